"""Methods that train or score in rounds: host loops around functions under `jit`."""

from ._imp import imp as imp
from ._loop import Rounds as Rounds
from ._loop import Train as Train
from ._random_search import Found as Found
from ._random_search import random_search as random_search
from ._sap import sap as sap
from ._scratch import Scratch as Scratch
from ._scratch import scratch as scratch
from ._soups import TrainReplica as TrainReplica
from ._soups import soup as soup
from ._soups import sparse_model_soups as sparse_model_soups
