"""One-shot pruning of trained models, matrix by matrix and block by block."""

from ._bias import bias_correction as bias_correction
from ._contrast import contrast_mask as contrast_mask
from ._distill import cross_entropy as cross_entropy
from ._distill import distill as distill
from ._distill import distill_hidden as distill_hidden
from ._distill import distill_logits as distill_logits
from ._dsnot import dsnot as dsnot
from ._given import Refined as Refined
from ._icbs import Step as Step
from ._icbs import icbs as icbs
from ._icbs import icbs_step as icbs_step
from ._perp import LoRA as LoRA
from ._perp import perp_init as perp_init
from ._perp import perp_params as perp_params
from ._programs import Program as Program
from ._programs import anneal as anneal
from ._programs import icbs_program as icbs_program
from ._reconstruct import Fitted as Fitted
from ._reconstruct import reconstruct as reconstruct
from ._reconstruct import refit as refit
from ._self_data import SelfData as SelfData
from ._self_data import self_data as self_data
