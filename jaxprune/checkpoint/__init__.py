"""Checkpoints of parameters, masks, optimizer state and packed weights."""

from ._restore import LeafRow as LeafRow
from ._restore import Metadata as Metadata
from ._restore import PerProcess as PerProcess
from ._restore import metadata as metadata
from ._restore import restore as restore
from ._save import save as save
from ._save import save_async as save_async
