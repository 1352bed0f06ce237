"""One-shot pruning of trained models, matrix by matrix and block by block."""

from ._bias import bias_correction as bias_correction
from ._contrast import contrast_mask as contrast_mask
from ._distill import SelfData as SelfData
from ._distill import cross_entropy as cross_entropy
from ._distill import distill as distill
from ._distill import distill_hidden as distill_hidden
from ._distill import distill_logits as distill_logits
from ._distill import self_data as self_data
from ._dsnot import Swapped as Swapped
from ._dsnot import dsnot as dsnot
from ._perp import LoRA as LoRA
from ._perp import perp_init as perp_init
from ._perp import perp_params as perp_params
from ._reconstruct import Fitted as Fitted
from ._reconstruct import reconstruct as reconstruct
from ._reconstruct import refit as refit
