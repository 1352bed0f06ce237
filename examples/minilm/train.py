"""A fine-tuning loop that, killed at any moment, goes on later to the same bits."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress
from flax import nnx
from jaxtyping import Array, Float

import jaxprune as jp
from minilm import model

_KEPT = 2  # checkpoints; the one before the last is there if the disk lost the last

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How long and how fast to train; the same for every model that is compared."""

    steps: int = 264  # one epoch
    batch: int = 32
    length: int = 32
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    seed: int = 0
    save_every: int = 66


class Trained(NamedTuple):
    params: nnx.State
    opt_state: optax.OptState


def adamw(budget: Budget) -> optax.GradientTransformation:
    """AdamW with a linear warm-up and a cosine decay to zero over the budget."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=budget.learning_rate,
        warmup_steps=max(1, round(budget.warmup * budget.steps)),
        decay_steps=budget.steps,
    )
    return optax.adamw(schedule, weight_decay=budget.weight_decay)


def forward(
    static: nnx.GraphDef, frozen: nnx.State
) -> Callable[[nnx.State, Batch], Float[Array, "b c"]]:
    """The model as a pure function of its trained params and a batch."""

    def logits(params, batch):
        return nnx.merge(static, params, frozen)(batch["ids"], batch["mask"])

    return logits


def shrunk(static: nnx.GraphDef, params: nnx.State, frozen: nnx.State) -> nnx.State:
    """The params without dead heads and neurons, of which each layer keeps one at least.

    Heads and neurons that put out a constant are folded into the next bias first.
    """
    params = jp.neuroprune_fold(params, roles=model.ROLES, activation=model.activation)
    batch = {"ids": jnp.zeros((2, 8), int), "mask": jnp.ones((2, 8), bool)}
    graph = jp.structured.trace(forward(static, frozen), params, batch)
    plan = jp.structured.without_zeros(graph, params, kinds=("head", "neuron"))
    return plan.shrink(params)


def cross_entropy(logits: Float[Array, "b c"], batch: Batch) -> Float[Array, ""]:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean()


def fit(
    logits: Callable[[nnx.State, Batch], Float[Array, "b c"]],
    params: nnx.State,
    tx: optax.GradientTransformation,
    stream: grain.DatasetIterator,
    *,
    budget: Budget,
    out: pathlib.Path,
    title: str,
) -> Trained:
    """Trains, from the last checkpoint under `out` if there is one.

    A checkpoint holds the params, the optimizer state (masks and the method's step
    count are part of it), the number of steps taken and the place in the stream. It
    appears under its name only when it is complete, so a run that is killed while
    saving goes back to the one before and repeats those steps bit for bit.

    Args:
        logits: A pure function of params and a batch.
        params: Where to start. The buffers are copied, not donated.
        tx: Any optax transformation, `jaxprune.masked` ones included.
        stream: Batches; its state is saved with the weights.
        budget: The number of steps and how often to save.
        out: The folder of the checkpoints, one folder a step.
        title: The text beside the progress bar.
    """

    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(
            lambda params: cross_entropy(logits(params, batch), batch)
        )(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    step = jax.jit(step, donate_argnums=(0, 1))
    # The step donates its arguments, and a state may start out sharing the weights.
    params, opt_state = jax.tree.map(jnp.copy, (params, tx.init(params)))
    done = 0
    if saved := _finished(out):
        tree = _tree(params, opt_state, 0, stream)
        tree = jp.checkpoint.restore(saved[-1], like=tree)
        params, opt_state, done = tree["params"], tree["opt_state"], int(tree["step"])
        stream.set_state(jax.tree.map(int, tree["stream"]))

    with _progress() as progress:
        bar = progress.add_task(title, total=budget.steps, completed=done, loss="")
        while done < budget.steps:
            params, opt_state, loss = step(params, opt_state, next(stream))
            done += 1
            progress.update(bar, advance=1, loss=f"loss {float(loss):.3f}")
            if done % budget.save_every == 0 or done == budget.steps:
                tree = _tree(params, opt_state, done, stream)
                jp.checkpoint.save(out / f"{done:08d}", tree)
                for old in _finished(out)[:-_KEPT]:
                    shutil.rmtree(old)
    return Trained(params, opt_state)


def predict(
    logits: Callable[[nnx.State, Batch], Float[Array, "b c"]],
    params: nnx.State,
    examples: Batch,
    *,
    batch: int = 128,
) -> Float[np.ndarray, "n c"]:
    """The logits of all examples, in their order."""
    count = len(examples["label"])
    logits = jax.jit(logits)
    rows = []
    for start in range(0, count, batch):
        # The last batch is filled up from the front: one shape, compiled once.
        take = np.arange(start, start + batch) % count
        part = jax.tree.map(lambda leaf, take=take: leaf[take], examples)
        rows.append(np.asarray(logits(params, part)))
    return np.concatenate(rows)[:count]


def accuracy(logits: Float[np.ndarray, "n c"], examples: Batch) -> float:
    return float((logits.argmax(-1) == examples["label"]).mean())


def _finished(out: pathlib.Path) -> list[pathlib.Path]:
    """The complete checkpoints, oldest first; a temporary name has more than digits."""
    return sorted(path for path in out.glob("*") if path.name.isdigit())


def _tree(params, opt_state, step: int, stream: grain.DatasetIterator) -> dict:
    return {
        "params": params,
        "opt_state": opt_state,
        "step": np.asarray(step),
        "stream": jax.tree.map(np.asarray, stream.get_state()),
    }


def _progress() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[loss]}"),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
