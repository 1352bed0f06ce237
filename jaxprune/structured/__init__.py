"""Structured pruning of any function, really smaller.

`trace` reads off the jaxpr which axes lose their units together. Scores and a `plan` say
which units go. `Plan.shrink` cuts parameters and `Plan.rewrite` runs the user's own function
at the new sizes.
"""

from ._choose import Target as Target
from ._choose import plan as plan
from ._costs import Cost as Cost
from ._costs import Roofline as Roofline
from ._latency import measured as measured
from ._latency import predicted as predicted
from ._linen import linen_apply as linen_apply
from ._module import Patch as Patch
from ._nnx import nnx_module as nnx_module
from ._plan import Apart as Apart
from ._plan import Choice as Choice
from ._plan import Plan as Plan
from ._planned import planned as planned
from ._propagate import Rule as Rule
from ._scores import score_groups as score_groups
from ._trace import Graph as Graph
from ._trace import Group as Group
from ._trace import Member as Member
from ._trace import trace as trace
from ._verify import Verification as Verification
