"""Structured pruning of any function, really smaller.

`trace` reads off the jaxpr which axes lose their units together. Scores and a `plan` say
which units go. `Plan.shrink` cuts parameters and `Plan.rewrite` runs the user's own function
at the new sizes.
"""

from ._add_biases import Biased as Biased
from ._add_biases import add_biases as add_biases
from ._aggregate import aggregate as aggregate
from ._amp import amp as amp
from ._biases import compensate as compensate
from ._by_block import adapt_ratios as adapt_ratios
from ._by_block import block_ranks as block_ranks
from ._by_block import block_ratios as block_ratios
from ._cfsp import relative_activation as relative_activation
from ._choose import Target as Target
from ._choose import plan as plan
from ._costs import Cost as Cost
from ._costs import Roofline as Roofline
from ._depth import redundant_blocks as redundant_blocks
from ._depth import remove_blocks as remove_blocks
from ._experts import nearest_task as nearest_task
from ._experts import premoe as premoe
from ._experts import reap as reap
from ._flap import flap as flap
from ._flap import fluctuation as fluctuation
from ._latency import measured as measured
from ._latency import predicted as predicted
from ._linen import linen_apply as linen_apply
from ._lora import lora_init as lora_init
from ._lora import lora_merge as lora_merge
from ._loraprune import LoRAPrune as LoRAPrune
from ._loraprune import LoRAPruneState as LoRAPruneState
from ._loraprune import loraprune as loraprune
from ._merge import merge as merge
from ._merge import normalized_features as normalized_features
from ._module import Patch as Patch
from ._nnx import nnx_module as nnx_module
from ._obs import obs_plan as obs_plan
from ._obs import obs_scores as obs_scores
from ._obs import refit as refit
from ._plan import Apart as Apart
from ._plan import Choice as Choice
from ._plan import Plan as Plan
from ._planned import planned as planned
from ._precrop import precrop as precrop
from ._propagate import Rule as Rule
from ._recalibrate import recalibrate as recalibrate
from ._s2ft import Slices as Slices
from ._s2ft import permuted as permuted
from ._s2ft import s2ft as s2ft
from ._scores import score_groups as score_groups
from ._search import Search as Search
from ._search import Supernet as Supernet
from ._search import divergence as divergence
from ._search import search as search
from ._search import supernet as supernet
from ._skips import SkipMatrices as SkipMatrices
from ._skips import add_skip_matrices as add_skip_matrices
from ._slicegpt import Sliced as Sliced
from ._slicegpt import fold_scales as fold_scales
from ._slicegpt import rotate as rotate
from ._slicegpt import slicegpt as slicegpt
from ._taylor import taylor as taylor
from ._trace import Graph as Graph
from ._trace import Group as Group
from ._trace import Member as Member
from ._trace import trace as trace
from ._untie import Untied as Untied
from ._untie import untie as untie
from ._verify import Verification as Verification
from ._without_zeros import without_zeros as without_zeros
