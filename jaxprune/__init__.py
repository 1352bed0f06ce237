"""Make neural networks in JAX smaller and faster: pruning as pure functions on pytrees."""

from jaxprune import allocation as allocation
from jaxprune import analysis as analysis
from jaxprune import checkpoint as checkpoint
from jaxprune import masks as masks
from jaxprune import penalties as penalties
from jaxprune import schedules as schedules
from jaxprune import scores as scores
from jaxprune import structures as structures
from jaxprune import training as training

from ._prune import prune as prune
from .structures import NM as NM
from .structures import Block as Block
from .structures import Channel as Channel
from .structures import Unstructured as Unstructured
from .training import Roles as Roles
from .training import get_info as get_info
from .training import get_masks as get_masks
from .training import gmp as gmp
from .training import masked as masked
from .training import neuroprune as neuroprune
from .training import neuroprune_shrink as neuroprune_shrink
from .training import sparse_params as sparse_params
from .training import static as static
