"""Tables of times: that they come out, and that both sides compute the same product."""

import importlib

import numpy as np
import pytest
from jaxprune.kernels import _bench

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("name", ["block_sparse", "nm", "bitmap", "masked"])
def test_both_sides_are_the_same_product(name):
    bench = importlib.import_module(f"jaxprune.kernels.{name}_matmul.bench")
    case = next(bench.cases((256,)))
    y, wanted = case.product(case.x, case.weights), case.dense(case.x, case.matrix)
    error = np.abs(np.asarray(y, np.float32) - np.asarray(wanted, np.float32))
    assert error.max() <= 1e-2 * np.abs(np.asarray(wanted, np.float32)).max()


def test_table(capsys):
    bench = importlib.import_module("jaxprune.kernels.masked_matmul.bench")
    case = next(bench.cases((8,)))
    _bench.table("masked_matmul", [case])
    head, _, names, _, row = capsys.readouterr().out.splitlines()
    assert head.startswith("masked_matmul on cpu") and names.count("|") == 5
    *_, ours, dense, ratio, _ = row.split("|")
    assert float(ours) >= 0 and float(dense) >= 0 and float(ratio) > 0
