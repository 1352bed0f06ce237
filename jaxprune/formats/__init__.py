"""Packed weights: what is kept, and where it stands."""

from ._bitmap import BitmapArray as BitmapArray
from ._block_sparse import BlockSparseArray as BlockSparseArray
from ._layout import Layout as Layout
from ._nm import NMArray as NMArray
from ._pack import pack as pack
from ._pack import unpack as unpack
from ._trees import pack_tree as pack_tree
from ._trees import unpack_tree as unpack_tree
from ._values import value_masks as value_masks
from ._values import values as values
from ._values import with_values as with_values
