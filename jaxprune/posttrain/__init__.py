"""One-shot pruning of trained models, matrix by matrix and block by block."""

from ._bias import bias_correction as bias_correction
from ._dsnot import Swapped as Swapped
from ._dsnot import dsnot as dsnot
from ._perp import LoRA as LoRA
from ._perp import perp_init as perp_init
from ._perp import perp_params as perp_params
from ._reconstruct import Fitted as Fitted
from ._reconstruct import reconstruct as reconstruct
from ._reconstruct import refit as refit
