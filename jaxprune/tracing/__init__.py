"""Reading a function from its jaxpr: where a leaf is contracted, and running it anew.

`sites` reads and runs nothing. `replay` and `tap` run what was read: with packed leaves in
place of arrays, or with a look at values on the way. `blocks` runs it piece by piece.
"""

from ._blocks import Block as Block
from ._blocks import Blocks as Blocks
from ._blocks import Leaf as Leaf
from ._blocks import Slot as Slot
from ._blocks import block_of as block_of
from ._blocks import numbered as numbered
from ._blocks import reads as reads
from ._blocks import take as take
from ._blocks import value_of as value_of
from ._cut import BlockOf as BlockOf
from ._cut import blocks as blocks
from ._replay import Tap as Tap
from ._replay import View as View
from ._replay import replay as replay
from ._replay import tap as tap
from ._sites import Loop as Loop
from ._sites import Matrix as Matrix
from ._sites import Reading as Reading
from ._sites import Site as Site
from ._trace import Trace as Trace
from ._trace import of_jaxpr as of_jaxpr
from ._trace import sites as sites
from ._walk import Contraction as Contraction
