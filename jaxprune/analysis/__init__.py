"""Measures and diagnostics of models, masks and sparse layers; they return numbers."""

from ._patterns import Patterns as Patterns
from ._patterns import patterns as patterns
from ._pq_index import pq_index as pq_index
from ._sensitivity import Knee as Knee
from ._sensitivity import Sensitivity as Sensitivity
from ._sensitivity import essential_sparsity as essential_sparsity
from ._sensitivity import sensitivity as sensitivity
from ._topology import Vanished as Vanished
from ._topology import degree_deviation as degree_deviation
from ._topology import degrees as degrees
from ._topology import four_group_share as four_group_share
from ._topology import vanished as vanished
