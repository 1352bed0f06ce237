"""Structured pruning of any function, really smaller.

`trace` reads off the jaxpr which axes lose their units together. Scores and a `plan` say
which units go. `Plan.shrink` cuts parameters and `Plan.rewrite` runs the user's own function
at the new sizes.
"""

from ._methods._add_biases import Biased as Biased
from ._methods._add_biases import add_biases as add_biases
from ._methods._aggregate import aggregate as aggregate
from ._methods._amp import amp as amp
from ._methods._biases import compensate as compensate
from ._methods._by_block import adapt_ratios as adapt_ratios
from ._methods._by_block import block_ranks as block_ranks
from ._methods._by_block import block_ratios as block_ratios
from ._methods._cfsp import relative_activation as relative_activation
from ._methods._depth import redundant_blocks as redundant_blocks
from ._methods._depth import remove_blocks as remove_blocks
from ._methods._experts import nearest_task as nearest_task
from ._methods._experts import premoe as premoe
from ._methods._experts import reap as reap
from ._methods._flap import flap as flap
from ._methods._flap import fluctuation as fluctuation
from ._methods._lora import lora_init as lora_init
from ._methods._lora import lora_merge as lora_merge
from ._methods._loraprune import LoRAPrune as LoRAPrune
from ._methods._loraprune import LoRAPruneState as LoRAPruneState
from ._methods._loraprune import loraprune as loraprune
from ._methods._merge import merge as merge
from ._methods._merge import normalized_features as normalized_features
from ._methods._obs import obs_plan as obs_plan
from ._methods._obs import obs_scores as obs_scores
from ._methods._obs import refit as refit
from ._methods._precrop import precrop as precrop
from ._methods._recalibrate import recalibrate as recalibrate
from ._methods._s2ft import Slices as Slices
from ._methods._s2ft import permuted as permuted
from ._methods._s2ft import s2ft as s2ft
from ._methods._scores import score_groups as score_groups
from ._methods._search import Search as Search
from ._methods._search import Supernet as Supernet
from ._methods._search import divergence as divergence
from ._methods._search import search as search
from ._methods._search import supernet as supernet
from ._methods._skips import SkipMatrices as SkipMatrices
from ._methods._skips import add_skip_matrices as add_skip_matrices
from ._methods._slicegpt import Sliced as Sliced
from ._methods._slicegpt import fold_scales as fold_scales
from ._methods._slicegpt import rotate as rotate
from ._methods._slicegpt import slicegpt as slicegpt
from ._methods._taylor import taylor as taylor
from ._methods._untie import Untied as Untied
from ._methods._untie import untie as untie
from ._methods._without_zeros import without_zeros as without_zeros
from ._plans._choose import Target as Target
from ._plans._choose import plan as plan
from ._plans._costs import Cost as Cost
from ._plans._costs import Roofline as Roofline
from ._plans._latency import measured as measured
from ._plans._latency import predicted as predicted
from ._plans._linen import linen_apply as linen_apply
from ._plans._module import Patch as Patch
from ._plans._nnx import nnx_module as nnx_module
from ._plans._plan import Apart as Apart
from ._plans._plan import Choice as Choice
from ._plans._plan import Plan as Plan
from ._plans._planned import planned as planned
from ._plans._verify import Verification as Verification
from ._reading._graph import Graph as Graph
from ._reading._graph import Group as Group
from ._reading._graph import Member as Member
from ._reading._propagate import Rule as Rule
from ._reading._trace import trace as trace
