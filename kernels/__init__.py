"""Kernels, a folder a family."""

from jaxprune.kernels.bitmap_matmul.api import bitmap_matmul as bitmap_matmul
from jaxprune.kernels.block_sparse_matmul.api import (
    block_sparse_matmul as block_sparse_matmul,
)
from jaxprune.kernels.masked_matmul.api import masked_matmul as masked_matmul
from jaxprune.kernels.nm_matmul.api import nm_matmul as nm_matmul
