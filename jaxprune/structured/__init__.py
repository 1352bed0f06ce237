"""Structured pruning of any function, really smaller.

`trace` reads off the jaxpr which axes lose their units together. Scores and a `plan` say
which units go. `Plan.shrink` cuts parameters and `Plan.rewrite` runs the user's own function
at the new sizes.
"""

from ._choose import Target as Target
from ._choose import plan as plan
from ._choose import planned as planned
from ._costs import Cost as Cost
from ._plan import Choice as Choice
from ._plan import Plan as Plan
from ._precrop import precrop as precrop
from ._propagate import Rule as Rule
from ._s2ft import Slices as Slices
from ._s2ft import permuted as permuted
from ._s2ft import s2ft as s2ft
from ._scores import score_groups as score_groups
from ._trace import Graph as Graph
from ._trace import Group as Group
from ._trace import Member as Member
from ._trace import trace as trace
from ._verify import Verification as Verification
