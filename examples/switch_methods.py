"""One training loop for every method, with NNX, linen and a plain function.

    python examples/switch_methods.py

Three lines of training know of jaxprune, marked below; to switch methods, change `method`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jaxprune as jp

STEPS = 300
KEY = jax.random.key(0)

METHODS: dict[str, Callable[[], jp.training.Method]] = {
    "static random": lambda: jp.static(0.9, key=KEY, allocation="erk"),
    "set": lambda: jp.set_(0.9, key=KEY, end=200, every=20),
    "rigl": lambda: jp.rigl(0.9, key=KEY, end=200, every=20),
    "granet": lambda: jp.granet(0.9, end=150, until=200, every=20),
    "chts": lambda: jp.chts(0.9, key=KEY, end=200, every=20),
    "gmp": lambda: jp.gmp(0.9, begin=50, end=200, every=10),
    "acdc": lambda: jp.acdc(0.9, begin=30, end=240, every=30),
    "iss_p": lambda: jp.iss_p(0.9, end=200, every=10),
    "mask_sparsity": lambda: jp.mask_sparsity(0.9, begin=50, end=200),
    "top_kast": lambda: jp.top_kast(0.9, backward=0.8, every=20),
    "ste": lambda: jp.ste(0.9, every=10),
    "sr_ste": lambda: jp.sr_ste(0.9, every=10),
    "sr_ste 2:4": lambda: jp.sr_ste(structure=jp.NM(2, 4)),
    "mdgf": lambda: jp.mdgf(0.9, leak=jp.schedules.linear(0.0, 0, 200, initial=1.0)),
    "sdgf": lambda: jp.sdgf(jp.NM(1, 8), end=200),
    "pdp": lambda: jp.pdp(0.9, begin=50, end=150, harden=200),
    "soft_top_k": lambda: jp.soft_top_k(0.9, end=100, harden=240),
}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_plain(method: jp.training.Method, x, y, steps: int = STEPS):
    """Parameters in a dictionary and a function of them."""
    up, down = jax.random.split(KEY)
    params = {
        "hidden": 0.1 * jax.random.normal(up, (64, 256)),
        "out": 0.1 * jax.random.normal(down, (256, 10)),
    }

    def model(params, x):
        return jax.nn.relu(x @ params["hidden"]) @ params["out"]

    return _train(model, params, method, x, y, steps)


def train_linen(method: jp.training.Method, x, y, steps: int = STEPS):
    """A linen module."""
    module = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(10)])
    params = module.init(KEY, x[:1])
    return _train(module.apply, params, method, x, y, steps)


def _train(model, params: Any, method: jp.training.Method, x, y, steps: int):
    tx = jp.masked(optax.adamw(3e-3), method)  # 1
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        def loss(params):
            seen = jp.sparse_params(params, state)  # 2
            return cross_entropy(model(seen, x), y)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    seen = jp.sparse_params(params, state)  # 3
    return lambda x: model(seen, x), jp.get_info(state)


class Mlp(nnx.Module):
    """The same network in NNX."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 256, rngs=rngs)
        self.out = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(jax.nn.relu(self.hidden(x)))


def train_nnx(method: jp.training.Method, x, y, steps: int = STEPS):
    """An NNX module and its optimizer."""
    model = Mlp(rngs=nnx.Rngs(0))
    tx = jp.masked(optax.adamw(3e-3), method)  # 1
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        graph, params = nnx.split(model, nnx.Param)

        def loss(params):
            seen = jp.sparse_params(params, optimizer)  # 2
            return cross_entropy(nnx.merge(graph, seen)(x), y)

        optimizer.update(model, jax.grad(loss)(params))

    for _ in range(steps):
        step(model, optimizer)
    nnx.update(model, jp.sparse_params(nnx.state(model, nnx.Param), optimizer))  # 3
    return model, jp.get_info(optimizer)


FRAMEWORKS = {"plain": train_plain, "linen": train_linen, "nnx": train_nnx}


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images) / 16, jnp.asarray(labels)
    print(f"{'method':<14} " + " ".join(f"{name:>8}" for name in FRAMEWORKS))
    for name, method in METHODS.items():
        cells = []
        for train in FRAMEWORKS.values():
            model, _ = train(method(), x[:1500], y[:1500])
            right = model(x[1500:]).argmax(-1) == y[1500:]
            cells.append(f"{100 * float(right.mean()):>7.1f}%")
        print(f"{name:<14} " + " ".join(cells))


if __name__ == "__main__":
    main()
