"""After a shrink: training goes on, and a plan is applied in another process."""

import inspect
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = jax.random.normal(jax.random.key(0), (4, 5, 6))


def normed(x, scale):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale


def model(p, x):
    """Two blocks of a transformer, scanned."""

    def block(x, p):
        h = normed(x, p["norm"])
        q, k, v = jnp.moveaxis((h @ p["qkv"]).reshape(4, 5, 3, 2, 4), 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v).reshape(4, 5, 8)
        x = x + mixed @ p["o"]
        return x + jax.nn.gelu(normed(x, p["norm"]) @ p["up"]) @ p["down"], None

    x, _ = jax.lax.scan(block, x @ p["in"], p["blocks"])
    return normed(x, 1.0).mean(1) @ p["out"]


def init(width=12):
    shapes = {
        "in": (6, width), "out": (width, 3),
        "blocks": {"norm": (2, width), "qkv": (2, width, 24), "o": (2, 8, width),
                   "up": (2, width, 16), "down": (2, 16, width)},
    }  # fmt: skip
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    values = [0.4 * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
    return treedef.unflatten(values)


def planned(params):
    graph = structured.trace(model, params, X)
    assert {"embedding", "neuron", "head", "head_dim"} <= {g.kind for g in graph.groups}
    return structured.plan(graph, structured.score_groups(graph, params), ratio=0.5)


@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-6), (False, 1e-3)])
def test_a_hundred_steps_follow_those_of_the_masked_model(double, tolerance):
    plan, optimizer = planned(init()), optax.adamw(1e-3)
    with jax.enable_x64(double):
        p, x = jax.tree.map(lambda a: jnp.asarray(a, float), (init(), X))
        y = jnp.sin(x.mean(1) @ jnp.ones((6, 3)))

        def losses(fn, p, state, cut):
            @jax.jit
            def step(p, state):
                loss, grads = jax.value_and_grad(
                    lambda p: jnp.mean((fn(p, x) - y) ** 2)
                )(p)
                updates, state = optimizer.update(cut(grads), state, p)
                return loss, cut(optax.apply_updates(p, updates)), state

            found = []
            for _ in range(100):
                loss, p, state = step(p, state)
                found.append(float(loss))
            return np.array(found), p, state

        _, p, state = losses(model, p, optimizer.init(p), lambda t: t)
        small = plan.shrink(p), plan.shrink_state(state, p)
        masked, *_ = losses(model, plan.mask(p), state, plan.mask)
        shrunk, *_ = losses(plan.rewrite(model), *small, lambda t: t)
        assert masked[-1] < 0.9 * masked[0]
        np.testing.assert_allclose(shrunk, masked, rtol=tolerance)


_ELSEWHERE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import jaxprune as jp

folder, width = sys.argv[1], int(sys.argv[2])
plan = jp.structured.Plan.from_dict(json.load(open(folder + "/plan.json")))
like = jax.eval_shape(lambda: init(width))
params = jp.checkpoint.restore(folder + f"/of_{width}", like=like)
small = plan.shrink(params)
x = jnp.asarray(np.load(folder + "/x.npy"))
np.save(folder + "/y.npy", plan.rewrite(model)(small, x))
jp.checkpoint.save(folder + "/small", small)
"""


def _elsewhere(folder, width):
    functions = "\n".join(map(inspect.getsource, (normed, model, init)))
    return subprocess.run(
        [sys.executable, "-c", f"import jax, jax.numpy as jnp\n{functions}{_ELSEWHERE}",
         str(folder), str(width)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_plan_is_applied_in_another_process(tmp_path):
    params = init()
    plan = planned(params)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    np.save(tmp_path / "x.npy", X)
    jp.checkpoint.save(tmp_path / "of_12", params)
    jp.checkpoint.save(tmp_path / "of_14", init(14))

    done = _elsewhere(tmp_path, 12)
    assert not done.returncode, done.stderr
    small = plan.shrink(params)
    expected = model(plan.mask(params), X)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, atol=1e-5)
    there = jp.checkpoint.restore(tmp_path / "small", like=small)
    jax.tree.map(np.testing.assert_array_equal, there, small)

    refused = _elsewhere(tmp_path, 14)
    assert refused.returncode
    message = (
        "params: blocks/down has the shape (2, 16, 14), and the full shape in the plan"
    )
    assert message in refused.stderr
