"""Checkpoints of parameters, masks, optimizer state and packed weights."""

from ._leaves import Leaf as Leaf
from ._leaves import leaves as leaves
from ._load_safetensors import load_safetensors as load_safetensors
from ._names import BERT as BERT
from ._names import LLAMA as LLAMA
from ._names import Rule as Rule
from ._names import from_huggingface as from_huggingface
from ._names import to_huggingface as to_huggingface
from ._restore import LeafRow as LeafRow
from ._restore import Metadata as Metadata
from ._restore import PerProcess as PerProcess
from ._restore import metadata as metadata
from ._restore import restore as restore
from ._save import save as save
from ._save import save_async as save_async
from ._save_safetensors import save_safetensors as save_safetensors
