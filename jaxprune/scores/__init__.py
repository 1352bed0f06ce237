"""How much a weight matters. Higher scores are kept."""

from ._data_free import magnitude as magnitude
from ._data_free import random as random
from ._data_free import saliency as saliency
