"""Units pruned while training, against training, pruning and fine-tuning.

The small CNN of `sparse_training.py` (16, 32 and 64 channels, no biases) on Fashion-MNIST,
from scratch: adamw, batches of 128, 1,400 steps in all whatever the method. Half or three
quarters of the 112 channels go. What is measured is the network that is left, cut out by a
plan and run by itself: its accuracy on the test set, its parameters and FLOPs. Beside the
methods stand the full network, and narrow ones with every layer as much narrower, trained
from scratch for as long.

Each method has six settings to choose from, at three quarters: a trial is 700 steps on
50,000 images, judged on the other 10,000 of the training set. The learning rate is that of
four (1e-3, 3e-3, 1e-2, 3e-2) which is best for the full network, judged in the same way,
for all. A run is a line of a results file, and a run that is there is not repeated.

    python benchmarks/structured_training.py --tune     # tunes what is not tuned yet
    python benchmarks/structured_training.py            # runs what is missing
    python benchmarks/structured_training.py --table    # prints the table

Expected before measuring: at a half all are within a point of the full network, HESSO and
pruning with fine-tuning level; at three quarters pruning with fine-tuning a point behind
HESSO, since 112 channels trained for a part of the steps only. DHSPG between them, or
behind if its penalty does not reach zero in time. CRIC no better than HESSO, as it loses
its cycles' steps. The narrow networks at a half level with all, at three quarters one or two
points behind. A choice over all layers leaves the cheap first layer wide, so that FLOPs
fall more than the count of channels says.
"""

import argparse
import functools
import itertools
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import fashion_mnist
import jax
import jax.numpy as jnp
import jsonl
import numpy as np
import optax
import sparse_training as base
from jax import lax

import jaxprune as jp

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
RUNS = RESULTS / "structured_training.jsonl"
TUNING = RESULTS / "structured_training_tuning.jsonl"
SEEDS = (0, 1, 2)
SPARSITIES = (0.5, 0.75)
STEPS, TRIAL, HELD_OUT = 1400, 700, 10_000
TUNED_AT, TUNING_SEED = 0.75, 10
CNN = base.Case("cnn")

# What each method chooses from.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "full": [{"learning_rate": r} for r in (1e-3, 3e-3, 1e-2, 3e-2)],
    "train, prune, fine-tune": [
        {"pruned_at": at, "scope": scope}
        for at, scope in itertools.product((0.25, 0.5, 0.75), ("local", "global"))
    ],
    "HESSO": [
        {"end": end, "periods": n}
        for end, n in itertools.product((0.3, 0.5, 0.75), (1, 10))
    ],
    "HESSO-CRIC": [
        {"end": end, "samples": n}
        for end, n in itertools.product((0.3, 0.5, 0.75), (0.01, 0.03))
    ],
    "DHSPG": [
        {"end": end, "penalty": p}
        for end, p in itertools.product((0.3, 0.5, 0.75), (1e-3, 1e-2))
    ],
    "narrow": [{}],
}
BEGIN = 0.1  # share of the steps before units are chosen


class Data(NamedTuple):
    """Images and labels to learn from, and those to test on."""

    learnt: tuple[jax.Array, jax.Array]
    tested: tuple[np.ndarray, np.ndarray]


class Outcome(NamedTuple):
    """A network that is left; `base.cnn` takes weights of any width.

    Attributes:
      params: its weights.
      plan: which units are kept.
      gap: largest difference of its logits from those of the network it was cut from.
    """

    params: Any
    plan: jp.structured.Plan
    gap: float = 0.0


def convolutional(params: dict, images: jax.Array) -> jax.Array:
    """`base.cnn`, in whose patches channels cannot be told apart, with convolutions."""
    x = images[..., None]
    for i, stride in enumerate((2, 2, 1)):
        x = lax.conv_general_dilated(
            x, params[f"conv_{i}"]["kernel"], (stride, stride), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ params["dense"]["kernel"]


@functools.cache
def traced() -> tuple[jp.structured.Graph, jp.Groups]:
    """The groups of channels; the same for all seeds."""
    images = jax.ShapeDtypeStruct((1, 28, 28), jnp.float32)
    graph = jp.structured.trace(convolutional, base.init(CNN, 0), images)
    return graph, graph.as_groups(readers=False)


def fit(params, tx, state, order: np.ndarray, data):
    """Trains on the batches of `order`, `[steps, batch]`."""

    @jax.jit
    def run(params, state, order, data):
        loss = base.loss_of(base.cnn)

        def step(carry, places):
            params, state = carry
            grads = jax.grad(loss)(params, tuple(x[places] for x in data))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, (params, state), order)[0]

    return run(params, state, jnp.asarray(order), data)


def batches(seed: int, images: int, steps: int) -> np.ndarray:
    stream = base.orders(seed, images)
    parts = []
    while sum(map(len, parts)) < steps:
        parts.append(next(stream))
    return np.concatenate(parts)[:steps]


def method_of(name: str, sparsity: float, steps: int, setting: dict):
    """The method that prunes while training."""
    _, groups = traced()
    begin, end = round(BEGIN * steps), round(setting["end"] * steps)
    if name == "HESSO":
        return jp.hesso(
            groups, sparsity, begin=begin, end=end, periods=setting["periods"]
        )
    if name == "HESSO-CRIC":
        samples = round(setting["samples"] * steps)
        return jp.hesso_cric(
            groups, sparsity, begin=begin, end=end, samples=samples, cycles=5
        )
    return jp.dhspg(groups, sparsity, begin=begin, end=end, penalty=setting["penalty"])


def cut(params, kept: dict[str, np.ndarray], some: jax.Array) -> Outcome:
    """What is left of a trained network, run by the plan's own function."""
    graph, _ = traced()
    plan = jp.structured.planned(graph, kept)
    small = plan.shrink(params)
    found = plan.rewrite(convolutional)(small, some)
    return Outcome(small, plan, float(jnp.abs(found - base.cnn(params, some)).max()))


def train(name: str, sparsity: float, seed: int, steps: int, setting: dict,
          learning_rate: float, data: Data) -> Outcome:  # fmt: skip
    """One run of a method, and what is left."""
    graph, groups = traced()
    optimizer = optax.adamw(learning_rate, weight_decay=1e-4)
    params = base.init(CNN, seed)
    order = batches(seed, len(data.learnt[0]), steps)
    everything = {n: np.arange(size) for n, size in groups.sizes.items()}
    if name == "full":
        params, _ = fit(params, optimizer, optimizer.init(params), order, data.learnt)
        return cut(params, everything, jnp.asarray(data.tested[0][:100]))
    if name == "narrow":
        kept = {n: x[: round(len(x) * (1 - sparsity))] for n, x in everything.items()}
        plan = jp.structured.planned(graph, kept)
        params = narrow(plan.small_shapes, seed)
        state = optimizer.init(params)
        return Outcome(fit(params, optimizer, state, order, data.learnt)[0], plan)
    if name == "train, prune, fine-tune":
        first, rest = np.split(order, [round(setting["pruned_at"] * steps)])
        state = optimizer.init(params)
        params, state = fit(params, optimizer, state, first, data.learnt)
        scores = jp.structured.score_groups(graph, params, "l2")
        plan = jp.structured.plan(graph, scores, ratio=sparsity, scope=setting["scope"])
        small, state = plan.shrink(params), plan.shrink_state(state, params)
        return Outcome(fit(small, optimizer, state, rest, data.learnt)[0], plan)
    tx = jp.masked(optimizer, method_of(name, sparsity, steps, setting))
    params, _ = fit(params, tx, tx.init(params), order, data.learnt)
    alive = {n: np.flatnonzero(x) for n, x in groups.alive(params).items()}
    return cut(params, alive, jnp.asarray(data.tested[0][:100]))


def narrow(shapes: dict[str, tuple[int, ...]], seed: int) -> dict:
    """Weights of a network of these widths, drawn as those of the full one."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    he = jax.nn.initializers.he_normal()
    return {
        path.split("/")[0]: {"kernel": he(next(keys), shape)}
        for path, shape in shapes.items()
    }


def accuracy(found: Outcome, tested) -> float:
    images, labels = tested
    logits = jax.jit(base.cnn)
    right = [
        np.asarray(logits(found.params, x)).argmax(-1) == y
        for x, y in zip(
            np.split(images, 10), np.split(np.asarray(labels), 10), strict=True
        )
    ]
    return float(np.concatenate(right).mean())


def tune(data) -> None:
    """The trials that are missing."""
    images, labels = data["train"]
    split = Data(
        (jnp.asarray(images[:-HELD_OUT]), jnp.asarray(labels[:-HELD_OUT])),
        (images[-HELD_OUT:], labels[-HELD_OUT:]),
    )
    for name, settings in SETTINGS.items():
        if len(settings) == 1:
            continue
        done = [(r["method"], r["setting"]) for r in jsonl.read(TUNING)]
        for setting in settings:
            if (name, setting) in done:
                continue
            rate = setting["learning_rate"] if name == "full" else best_rate()
            found = train(
                name, TUNED_AT, TUNING_SEED, TRIAL,
                {} if name == "full" else setting, rate, split,
            )  # fmt: skip
            row = {
                "method": name,
                "setting": setting,
                "accuracy": accuracy(found, split.tested),
            }
            jsonl.add(TUNING, row)


def chosen(name: str) -> dict:
    """The setting of the best trial."""
    rows = [r for r in jsonl.read(TUNING) if r["method"] == name]
    if len(SETTINGS[name]) == 1:
        return SETTINGS[name][0]
    if len(rows) < len(SETTINGS[name]):
        raise SystemExit(f"{name} is not tuned yet: run with --tune first.")
    return max(rows, key=lambda r: r["accuracy"])["setting"]


def best_rate() -> float:
    return chosen("full")["learning_rate"]


def plan_of_runs() -> Iterator[tuple[str, float, int]]:
    """All runs, the most telling first."""
    first = [n for n in SETTINGS if n not in ("full", "HESSO-CRIC")]
    for names in (first, ["HESSO-CRIC"]):
        for seed in SEEDS:
            if names is first:
                yield "full", 0.0, seed
            yield from ((n, s, seed) for s in SPARSITIES for n in names)


def run(name: str, sparsity: float, seed: int, data: Data) -> dict:
    start = time.perf_counter()
    setting = chosen(name)
    found = train(
        name,
        sparsity,
        seed,
        STEPS,
        {} if name == "full" else setting,
        best_rate(),
        data,
    )
    plan = found.plan
    return {
        "method": name,
        "sparsity": sparsity,
        "seed": seed,
        "setting": setting,
        "accuracy": accuracy(found, data.tested),
        "widths": [len(c.kept) for c in plan.groups.values()],
        "parameters": plan.after.parameters / plan.before.parameters,
        "flops": plan.after.flops / plan.before.flops,
        "gap": found.gap,
        "seconds": time.perf_counter() - start,
    }


def table(rows: list[dict], sparsity: float) -> str:
    """Mean and standard deviation over seeds."""
    lines = [
        "| method | seeds | accuracy % | channels, seed 0 | parameters % | FLOPs % |",
        "|---|---|---|---|---|---|",
    ]
    some = [r for r in rows if r["sparsity"] in (0.0, sparsity)]
    names = dict.fromkeys(r["method"] for r in some)
    means = {
        n: statistics.fmean(r["accuracy"] for r in some if r["method"] == n)
        for n in names
    }
    for name in sorted(names, key=lambda n: -means[n]):
        mine = [r for r in some if r["method"] == name]
        values = [100 * r["accuracy"] for r in mine]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        parameters, flops = (
            100 * statistics.fmean(r[k] for r in mine) for k in ("parameters", "flops")
        )
        widths = " + ".join(map(str, mine[0]["widths"]))
        lines.append(
            f"| {name} | {len(mine)} | {statistics.fmean(values):.2f} ± {spread:.2f} | "
            f"{widths} | {parameters:.1f} | {flops:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Units pruned while training.")
    parser.add_argument("--data-dir", default=".data")
    parser.add_argument("--tune", action="store_true", help="tunes what is not tuned")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args = parser.parse_args()
    # Seeds share programs, which take longer to compile than to run.
    jax.config.update("jax_compilation_cache_dir", "build/compiled")
    if args.tune:
        tune(fashion_mnist.load(args.data_dir))
    elif not args.table:
        loaded = fashion_mnist.load(args.data_dir)
        images, labels = loaded["train"]
        data = Data((jnp.asarray(images), jnp.asarray(labels)), loaded["test"])
        done = {(r["method"], r["sparsity"], r["seed"]) for r in jsonl.read(RUNS)}
        for name, sparsity, seed in plan_of_runs():
            if (name, sparsity, seed) not in done:
                jsonl.add(RUNS, run(name, sparsity, seed, data))
    rows = jsonl.read(RUNS)
    for sparsity in SPARSITIES:
        print(f"\n### {sparsity:.0%} of the channels\n\n{table(rows, sparsity)}")


if __name__ == "__main__":
    main()
