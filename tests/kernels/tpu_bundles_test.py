"""TPU kernels compile for every generation, and their steps stay as short as they are."""

import json
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import tpu_bundles  # noqa: E402

BUDGETS = json.loads((HERE / "tpu_bundles.json").read_text())
SLACK = 1.1

pytestmark = pytest.mark.skipif(
    not tpu_bundles.LIBTPU.exists(),
    reason="the compiler for TPU is not there: make build/libtpu",
)


@pytest.fixture(scope="module")
def measured():
    # A process of its own: libtpu reads its options when JAX is imported.
    command = [sys.executable, HERE / "tpu_bundles.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_case_has_a_budget(measured):
    assert list(measured) == list(BUDGETS)


@pytest.mark.parametrize("name", BUDGETS)
def test_bundles_of_a_step(measured, name):
    assert measured[name].keys() == tpu_bundles.GENERATIONS.keys()
    for generation, bundles in measured[name].items():
        budget = BUDGETS[name][generation]
        assert 0 < bundles <= SLACK * budget, (generation, bundles, budget)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("256 x 256, 2", {"v5e": 0.79, "v6e": 0.78}),
        ("128 x 128, 8", {"v5e": 0.89, "v6e": 0.54}),
        ("512 x 512, 1", {"v5e": 0.85, "v6e": 0.97}),
    ],
)
def test_share_of_the_matrix_unit(measured, name, least):
    """Multiplications a bundle, against what the matrix units of a core can do."""
    size, group = int(name.split()[0]), int(name[-1])
    work = 512 * size**2 * group
    peak = {"v5e": 4 * 128**2, "v6e": 2 * 256**2}
    for what in ("y", "dx", "dW"):
        row = measured[f"block_sparse_matmul {name} a step: {what}"]
        for generation, share in least.items():
            # dx and dW come within a tenth of y.
            wanted = share if what == "y" else 0.9 * share
            assert work / peak[generation] / row[generation] >= wanted, what
