"""One-shot pruning of trained models, matrix by matrix and block by block."""

from ._alps import alps as alps
from ._magnitude import magnitude as magnitude
from ._obs import obs as obs
from ._permutation import channel_permutation as channel_permutation
from ._refit import refit as refit
from ._ria import ria as ria
from ._solver import Group as Group
from ._solver import Solution as Solution
from ._solver import Solver as Solver
from ._solver import layer_error as layer_error
from ._sparsegpt import sparsegpt as sparsegpt
from ._wanda import wanda as wanda
