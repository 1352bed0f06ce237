"""Checkpoints of parameters, masks and optimizer state."""

from ._orbax import restore as restore
from ._orbax import save as save
