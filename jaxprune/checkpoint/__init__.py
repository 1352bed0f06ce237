"""Checkpoints of parameters, masks and optimizer state."""

from ._load_safetensors import load_safetensors as load_safetensors
from ._names import BERT as BERT
from ._names import LLAMA as LLAMA
from ._names import Rule as Rule
from ._names import from_huggingface as from_huggingface
from ._names import to_huggingface as to_huggingface
from ._orbax import restore as restore
from ._orbax import save as save
from ._save_safetensors import save_safetensors as save_safetensors
