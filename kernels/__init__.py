"""Kernels, a folder a family."""

from .block_sparse_matmul.api import block_sparse_matmul as block_sparse_matmul
from .nm_matmul.api import nm_matmul as nm_matmul
