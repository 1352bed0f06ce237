"""Penalties that make weights sparse, and their proximal operators."""

from ._degree import Reading as Reading
from ._degree import degree_l1 as degree_l1
from ._degree import degree_weights as degree_weights
from ._degree import missing_links as missing_links
from ._degree import prox_degree_l1 as prox_degree_l1
from ._soft import soft_threshold as soft_threshold
from ._sqrt_l1 import prox_sqrt_l1 as prox_sqrt_l1
from ._sqrt_l1 import sqrt_l1 as sqrt_l1
from ._sqrt_l1 import sqrt_l1_slope as sqrt_l1_slope
