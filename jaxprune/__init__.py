"""Make neural networks in JAX smaller and faster: pruning as pure functions on pytrees."""

import importlib
import typing

from jaxprune import allocation as allocation
from jaxprune import analysis as analysis
from jaxprune import checkpoint as checkpoint
from jaxprune import formats as formats
from jaxprune import masks as masks
from jaxprune import penalties as penalties
from jaxprune import rounds as rounds
from jaxprune import schedules as schedules
from jaxprune import scores as scores
from jaxprune import structures as structures
from jaxprune import training as training

from ._prune import prune as prune
from ._prune import prune_in_rounds as prune_in_rounds
from .structures import NM as NM
from .structures import Block as Block
from .structures import Channel as Channel
from .structures import Groups as Groups
from .structures import Unstructured as Unstructured
from .training import Roles as Roles
from .training import acdc as acdc
from .training import chts as chts
from .training import dhspg as dhspg
from .training import get_info as get_info
from .training import get_masks as get_masks
from .training import gmp as gmp
from .training import granet as granet
from .training import hesso as hesso
from .training import hesso_cric as hesso_cric
from .training import iss_p as iss_p
from .training import mask_sparsity as mask_sparsity
from .training import masked as masked
from .training import mdgf as mdgf
from .training import neuroprune as neuroprune
from .training import neuroprune_fold as neuroprune_fold
from .training import pdp as pdp
from .training import rigl as rigl
from .training import sdgf as sdgf
from .training import set_ as set_
from .training import soft_top_k as soft_top_k
from .training import sora as sora
from .training import sparse_params as sparse_params
from .training import sr_ste as sr_ste
from .training import static as static
from .training import ste as ste
from .training import top_kast as top_kast

if typing.TYPE_CHECKING:
    from jaxprune import calibration as calibration
    from jaxprune import kernels as kernels
    from jaxprune import posttrain as posttrain
    from jaxprune import structured as structured
    from jaxprune import tracing as tracing

    from .acceleration import accelerate as accelerate
    from .acceleration import predict as predict
    from .calibration import calibrate as calibrate

# Pallas takes as long to import as all the rest: these come when they are asked for.
_LATER = {
    "accelerate": "acceleration",
    "calibrate": "calibration",
    "calibration": "calibration",
    "kernels": "kernels",
    "posttrain": "posttrain",
    "predict": "acceleration",
    "structured": "structured",
    "tracing": "tracing",
}


def __getattr__(name: str) -> typing.Any:
    if name not in _LATER:
        raise AttributeError(f"module 'jaxprune' has no attribute {name!r}")
    module = importlib.import_module(f"jaxprune.{_LATER[name]}")
    return module if name == _LATER[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
