"""The example that switches methods: every method, every framework, exact counts."""

import inspect
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import switch_methods

pytestmark = pytest.mark.usefixtures("quick_compilation")


NAMES = list(switch_methods.METHODS)
FRAMEWORKS = list(switch_methods.FRAMEWORKS)
# Every method in one framework, one of each kind in all of them.
CASES = {(name, FRAMEWORKS[i % 3]) for i, name in enumerate(NAMES)}
CASES |= {(x, f) for x in ("gmp", "rigl", "pdp", "sr_ste 2:4") for f in FRAMEWORKS}
DENSITY = {"sr_ste 2:4": 0.5, "sdgf": 0.125}


@pytest.mark.parametrize(("name", "framework"), sorted(CASES))
def test_three_lines_are_enough(name, framework):
    random = np.random.default_rng(0)
    x, y = jnp.asarray(random.random((32, 64))), jnp.asarray(random.integers(0, 10, 32))
    train = switch_methods.FRAMEWORKS[framework]
    model, info = train(switch_methods.METHODS[name](), x, y, steps=260)
    assert model(x).shape == (32, 10)
    assert info["density"] == pytest.approx(DENSITY.get(name, 0.1), abs=1e-3)
    # All of the data is learnt by heart, through the sparse weights.
    assert (model(x).argmax(-1) == y).mean() > 0.9


def test_three_lines_know_of_jaxprune():
    """In each training loop three lines call the library, and they are marked."""
    for functions in ((switch_methods._train,), (switch_methods.train_nnx,)):
        lines = "".join(map(inspect.getsource, functions)).splitlines()
        body = [
            x for x in lines if re.search(r"\bjp\.(?!training\.Method|get_info)", x)
        ]
        assert [x.split("#")[-1].strip() for x in body] == ["1", "2", "3"]
