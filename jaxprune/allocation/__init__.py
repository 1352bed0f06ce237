"""How the sparsity of the whole is divided among the leaves."""

from ._allocate import Allocation as Allocation
from ._allocate import Shapes as Shapes
from ._allocate import Sparsities as Sparsities
from ._allocate import allocate as allocate
from ._allocate import er as er
from ._allocate import erk as erk
from ._allocate import exact as exact
from ._allocate import round_to_total as round_to_total
from ._allocate import uniform as uniform
from ._allocate import water_filling as water_filling
from ._block_error import by_block_error as by_block_error
from ._importance import by_similarity as by_similarity
from ._importance import outlier_ratio as outlier_ratio
from ._importance import owl as owl
from ._mixed_nm import mixed_nm as mixed_nm
