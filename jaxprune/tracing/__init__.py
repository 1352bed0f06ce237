"""Reading a function from its jaxpr: where a leaf is contracted, and running it anew."""

from ._replay import View as View
from ._replay import replay as replay
