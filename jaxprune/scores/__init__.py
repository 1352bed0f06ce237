"""How much a weight matters. Higher scores are kept."""

from ._data_free import magnitude as magnitude
from ._data_free import random as random
from ._data_free import saliency as saliency
from ._from_inputs import contrast as contrast
from ._from_inputs import ria as ria
from ._from_inputs import wanda as wanda
from ._from_loss import grasp as grasp
from ._from_loss import snip as snip
from ._from_loss import synflow as synflow
from ._lora import lora_taylor as lora_taylor
