"""Sparse training: `masked` and one file a method."""

from ._gmp import gmp as gmp
from ._gmp import static as static
from ._masked import MaskedState as MaskedState
from ._masked import get_info as get_info
from ._masked import get_masks as get_masks
from ._masked import masked as masked
from ._masked import sparse_params as sparse_params
from ._method import Info as Info
from ._method import Method as Method
from ._method import MethodState as MethodState
from ._neuroprune import NeuroPruneState as NeuroPruneState
from ._neuroprune import neuroprune as neuroprune
from ._roles import Roles as Roles
from ._shrink import LayerSizes as LayerSizes
from ._shrink import neuroprune_shrink as neuroprune_shrink
