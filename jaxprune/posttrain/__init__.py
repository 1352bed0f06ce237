"""One-shot pruning of trained models, matrix by matrix and block by block."""

from ._bias import bias_correction as bias_correction
from ._dsnot import Swapped as Swapped
from ._dsnot import dsnot as dsnot
