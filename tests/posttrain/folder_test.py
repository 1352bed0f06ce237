"""A run that was killed goes on where it was, and with nothing but its own arguments."""

import functools
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import posttrain

pytestmark = pytest.mark.usefixtures("quick_compilation")

TABLE = np.linspace(1, 2, 12, dtype=np.float32)


def model(params, x, *, act=jnp.tanh, scale=1.0, table=TABLE):
    def layer(x, w):
        return x + scale * act(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(layer, x * table, params["layers"])[0]


def arguments():
    random = np.random.default_rng(0)
    shapes = {"up": (3, 12, 24), "down": (3, 24, 12)}

    def normal(shape):
        return jnp.asarray(random.normal(size=shape) / 4, jnp.float32)

    layers = {name: normal(shape) for name, shape in shapes.items()}
    return {"layers": layers}, [normal((64, 12)) for _ in range(3)]


def run(directory=None, *, fn=model, batches=None, **options):
    params, given = arguments()
    options = {"sparsity": 0.5, **options}
    batches = given if batches is None else batches
    return posttrain.prune(fn, params, batches, directory=directory, **options)


def test_killed_and_resumed(tmp_path):
    whole = run()
    stopped = subprocess.run([sys.executable, __file__, str(tmp_path / "run")])
    assert stopped.returncode == -signal.SIGKILL
    there = {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()}
    assert "block_1" in there and "block_2" not in there
    seen = []
    resumed = run(tmp_path / "run", progress=lambda *block: seen.append(block))
    names = ["", *(f"layers/{i}" for i in range(3))]
    assert seen == [(name, i, 4) for i, name in enumerate(names)]
    jax.tree.map(np.testing.assert_array_equal, resumed[:2], whole[:2])
    drop = [[r._replace(seconds=0) for r in x[2].rows] for x in (resumed, whole)]
    np.testing.assert_equal(*drop)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    directory = tmp_path_factory.mktemp("begun")
    run(directory)
    return directory


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.25}, r"sparsity: .* was begun with '1/2'"),
        ({"where": "*/up"}, r"where: .* was begun with \('layers/0/down', "),
        ({"method": posttrain.magnitude()}, "method: .* was begun with"),
        ({"batches": arguments()[1][:2]}, "batches: .* was begun with other values"),
        ({"fn": functools.partial(model, act=jnp.sin)}, "fn: .* was begun with"),
        ({"fn": functools.partial(model, scale=0.5)}, "fn: .* was begun with"),
        ({"fn": functools.partial(model, table=TABLE + 1)}, "fn: .* was begun with"),
    ],
    ids=[
        "sparsity",
        "where",
        "method",
        "batches",
        "fn",
        "its literals",
        "its constants",
    ],
)
def test_other_arguments_are_refused(options, message, begun):
    with pytest.raises(ValueError, match=message):
        run(begun, **options)


def test_another_function_that_does_the_same_goes_on(begun):
    solve = posttrain.sparsegpt()
    seen = []

    def watched(*args):
        seen.append(args)
        return solve.solve(*args)

    again = run(
        begun, fn=lambda p, x: model(p, x), method=solve._replace(solve=watched)
    )
    assert not seen
    jax.tree.map(np.testing.assert_array_equal, again[:2], run()[:2])


class EachWith:
    """A structure by what it holds, which its name does not say."""

    def __init__(self, n):
        self.n = n

    def __call__(self, shapes, sparsities):
        return {path: jp.NM(self.n, 4) for path in shapes}


def test_what_the_structure_comes_to_is_what_counts(tmp_path):
    first = run(tmp_path, structure=EachWith(1))
    again = run(tmp_path, structure=jp.NM(1, 4), sparsity=None)
    jax.tree.map(np.testing.assert_array_equal, again[:2], first[:2])
    with pytest.raises(ValueError, match="structure: .* was begun with NM.*'n': 1"):
        run(tmp_path, structure=EachWith(2))
    whole = run()
    batches = arguments()[1]
    options = {"sparsity": 0.5, "directory": tmp_path / "donated", "donate": True}
    for _ in range(2):  # begun, and complete
        given = arguments()[0]
        found = posttrain.prune(model, given, batches, **options)
        jax.tree.map(np.testing.assert_array_equal, found[:2], whole[:2])
        assert all(x.is_deleted() for x in jax.tree.leaves(given))


def test_what_cannot_be_read_is_named(tmp_path):
    run(tmp_path)
    (tmp_path / "block_2.json").write_text("[[")
    with pytest.raises(
        ValueError, match="directory: .*block_2 is there, but cannot be"
    ):
        run(tmp_path)
    data = tmp_path / "block_1"
    for path in [p for p in data.rglob("*") if p.is_file()]:
        path.write_bytes(path.read_bytes()[:3])
    with pytest.raises(
        ValueError, match="directory: .*block_1 is there, but cannot be"
    ):
        run(tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="directory: .*settings.json cannot be read"):
        run(tmp_path)


def test_keys_in_batches(tmp_path):
    def fn(params, x, key):
        return model(params, x * jax.random.bernoulli(key, 0.9, x.shape))

    def go(seed, directory=None):
        args = [(x, jax.random.key(seed)) for x in arguments()[1]]
        return run(directory, fn=fn, batches=args, method=posttrain.wanda())[1]

    found = go(0, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, go(0, tmp_path))
    with pytest.raises(ValueError, match="batches: .* was begun with other values"):
        go(1, tmp_path)


def _be_killed(directory):
    """Prunes until block 2 is all written but for its name, and dies there."""
    jax.config.update("jax_disable_most_optimizations", True)

    def watch(event, args):
        if event == "os.rename" and os.path.basename(args[1]) == "block_2":
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    run(directory)


if __name__ == "__main__":
    _be_killed(sys.argv[1])
