"""Calibration as a whole: batches, merging, memory, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import calibration, checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")
ALL = ("square", "mean", "variance", "gram")
KEY = jax.random.key(0)


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"]


PARAMS = {
    "up": jax.random.normal(KEY, (4, 6)),
    "down": jax.random.normal(KEY, (6, 3)),
    "bias": jnp.ones(3),
}
BATCHES = [
    3 + jax.random.normal(jax.random.key(i), (5 + i % 2, 4)) * (1 + i) for i in range(4)
]


def close(a, b, tol=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tol, atol=tol), a, b
    )


def by_hand(rows):
    rows = np.concatenate([np.asarray(r, np.float64) for r in rows])
    mean = rows.mean(0)
    return calibration.Inputs(
        np.array([[len(rows)]], np.float32),
        (rows**2).mean(0)[None, None],
        mean[None, None],
        ((rows - mean) ** 2).mean(0)[None, None],
        (rows.T @ rows / len(rows))[None, None],
    )


def test_all_batches_are_one_set_of_rows():
    stats = calibration.calibrate(model, PARAMS, BATCHES, statistics=ALL)
    (up,), (down,) = stats["up"], stats["down"]
    close(up.inputs, by_hand(BATCHES))
    close(down.inputs, by_hand([jnp.tanh(x @ PARAMS["up"]) for x in BATCHES]))
    assert stats.paths == ("up", "down")
    assert stats.untraced == {"bias": ("add with an activation",)}


def test_no_batches():
    with pytest.raises(
        ValueError, match="batches: there is none; expected an iterable"
    ):
        calibration.calibrate(model, PARAMS, iter(()))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30], ids=str)
def test_activations_that_are_not_finite(bad):
    batches = [BATCHES[0], BATCHES[2].at[1, 2].set(bad), BATCHES[0]]
    with pytest.raises(ValueError, match="in batch 2, what up.* multiplied with"):
        calibration.calibrate(model, PARAMS, batches)


def test_it_comes_back_from_a_checkpoint_and_goes_on(tmp_path):
    whole = calibration.calibrate(model, PARAMS, BATCHES, statistics=ALL)
    half = calibration.calibrate(model, PARAMS, BATCHES[:2], statistics=ALL)
    checkpoint.save(tmp_path / "stats", half)
    like = calibration.init(model, PARAMS, BATCHES[0], statistics=ALL)
    back = checkpoint.restore(tmp_path / "stats", like=like)
    found = calibration.calibrate(
        model, PARAMS, BATCHES[2:], statistics=ALL, initial=back
    )
    close(found, whole)
    close(half, back)  # what was gone on from is still there
