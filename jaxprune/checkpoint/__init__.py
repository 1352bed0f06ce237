"""Checkpoints of parameters, masks and optimizer state."""

from ._load_safetensors import load_safetensors as load_safetensors
from ._orbax import restore as restore
from ._orbax import save as save
from ._save_safetensors import save_safetensors as save_safetensors
