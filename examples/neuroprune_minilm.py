"""Fine-tunes MiniLM-L6 dense and with NeuroPrune, then removes dead heads and neurons.

The published weights are trained on movie snippets, once with plain AdamW and once with
`jaxprune.masked(adamw, jaxprune.neuroprune(...))`. What is dead in the second model is
cut out, and a new process reloads what is left.

    python examples/neuroprune_minilm.py --data-dir .data --out build/demo

Kill it at any moment, with kill -9 too: the same command goes on from the last
checkpoint, to the same bits. Training that is complete is not repeated.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
from flax import nnx
from jaxtyping import Bool, Float
from minilm import data, model, picture, train

import jaxprune as jp

BUDGET = train.Budget()
# Sparse training likes a higher rate; benchmarks/neuroprune_minilm.py has tuned both.
SPARSE_BUDGET = dataclasses.replace(BUDGET, learning_rate=4e-4)
NEUROPRUNE = {
    "sparsity": 0.7,
    "begin": 20,
    "end": 130,  # the steps after it train the remaining weights under a fixed mask
    "every": 10,
    "head_every": 30,
    "theta_rel": 0.65,
}
TOLERANCE = 1e-4  # on the logits, between the masked and the shrunk model

console = rich.console.Console()


class Tested(NamedTuple):
    """A trained model and what it says about the test set."""

    model: model.MiniLM
    logits: Float[np.ndarray, "n c"]
    right: Bool[np.ndarray, "n"]

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=pathlib.Path, default=".data")
    parser.add_argument("--out", type=pathlib.Path, default="build/demo")
    parser.add_argument(
        "--verify", action="store_true", help="only reload the shrunk model and test it"
    )
    args = parser.parse_args()
    builder = data.prepare(args.data_dir)
    test = data.test_set(builder, length=BUDGET.length)
    if args.verify:
        verify(args.out, test)
        return

    cut = data.truncated(builder, length=BUDGET.length)
    console.print(
        f"{BUDGET.steps} steps of {BUDGET.batch} snippets, tested on "
        f"{len(test['label'])}; {cut:.0%} are cut to {BUDGET.length} tokens."
    )
    dense_params, _ = fit("dense", train.adamw(BUDGET), BUDGET, builder, args.out)
    neuroprune = jp.masked(
        train.adamw(SPARSE_BUDGET), jp.neuroprune(roles=model.ROLES, **NEUROPRUNE)
    )
    settings = (SPARSE_BUDGET, model.ROLES, NEUROPRUNE)
    params, opt_state = fit("NeuroPrune", neuroprune, settings, builder, args.out)

    static, _, frozen = model.split(model.pretrained(seed=BUDGET.seed))
    small = train.shrunk(static, params, frozen)
    config = model.sizes(small)
    small_static, _, _ = model.split(model.abstract(config))

    console.print("Testing the dense, the masked and the shrunk model ...")
    dense = evaluate(nnx.merge(static, dense_params, frozen), test)
    masked = evaluate(nnx.merge(static, params, frozen), test)
    shrunk = evaluate(nnx.merge(small_static, small, frozen), test)
    seconds = inference_seconds((dense.model, shrunk.model), test)
    image = args.out / "neuroprune.png"
    title = f"MiniLM-L6 pruned to {NEUROPRUNE['sparsity']:.0%} sparsity by NeuroPrune"
    picture.draw(dense.model, masked.model, config, image, title=title)
    folded = sum(int((~x).sum()) for x in opt_state.method.own.alive.values())

    console.print(table(dense, masked, shrunk, seconds))
    console.print(f"Accuracy, NeuroPrune - dense: {difference(masked, dense)} points.")
    dead = sum(model.Config().heads) - sum(config.heads)
    console.print(
        f"{dead} heads are gone: {folded} folded into a similar one, {dead - folded} "
        f"silenced by the sparsity."
    )
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    console.print(f"Inference time, dense / shrunk: {ratio:.2f}, a median of pairs.")
    console.print(f"Degrees and heads: {image}")

    error = float(np.abs(masked.logits - shrunk.logits).max())
    console.print(f"Masked and shrunk logits differ by at most {error:.1e}.")
    if not error <= TOLERANCE:
        sys.exit(f"Not the same function: {error:.1e} is above {TOLERANCE:.0e}.")

    save(args.out, shrunk, config)
    again = (sys.executable, __file__, "--verify")
    where = ("--data-dir", str(args.data_dir), "--out", str(args.out))
    sys.exit(subprocess.run([*again, *where]).returncode)


def fit(
    name: str, tx: optax.GradientTransformation, settings: Any, builder: Any,
    out: pathlib.Path,
) -> train.Trained:  # fmt: skip
    """Trains the published model, or goes on from what an earlier run left in `out`."""
    static, params, frozen = model.split(model.pretrained(seed=BUDGET.seed))
    stream = data.batches(
        builder, batch=BUDGET.batch, length=BUDGET.length, seed=BUDGET.seed
    )
    # Other settings get another folder: they must not go on from these checkpoints.
    number = zlib.crc32(repr(settings).encode())
    return train.fit(
        train.forward(static, frozen), params, tx, stream, budget=BUDGET,
        out=out / "checkpoints" / f"{name.lower()}-{number:08x}", title=f"{name:<10}",
    )  # fmt: skip


def evaluate(lm: model.MiniLM, test: train.Batch) -> Tested:
    static, params, frozen = model.split(lm)
    logits = train.predict(train.forward(static, frozen), params, test)
    return Tested(lm, logits, logits.argmax(-1) == test["label"])


def inference_seconds(
    models: tuple[model.MiniLM, ...], test: train.Batch, *, repeats: int = 20
) -> list[list[float]]:
    """Times of one batch, the models taking turns so that all see the same machine."""
    batch = {name: jnp.asarray(x[: BUDGET.batch]) for name, x in test.items()}
    runs = []
    for lm in models:
        static, params, frozen = model.split(lm)
        logits = train.forward(static, frozen)
        runs.append((jax.jit(logits).lower(params, batch).compile(), params))
    times = [[] for _ in runs]
    for repeat in range(-2, repeats):  # the first two fill the caches
        for (run, params), own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(params, batch).block_until_ready()
            if repeat >= 0:
                own.append(time.perf_counter() - start)
    return times


def table(
    dense: Tested, masked: Tested, shrunk: Tested, seconds: list[list[float]]
) -> rich.table.Table:
    """Before and after. Only the matrices of the encoder's layers count as weights."""
    tested = (dense, masked, shrunk)
    weights = [
        [x for x in jax.tree.leaves(nnx.state(t.model.layers)) if x.ndim == 2]
        for t in tested
    ]
    stored = [sum(x.size for x in kernels) for kernels in weights]
    kept = [sum(int((x != 0).sum()) for x in kernels) for kernels in weights]
    ms = [f"{1e3 * statistics.median(times):.1f}" for times in seconds]
    heads = [int(picture.alive_heads(t.model).sum()) for t in tested]
    widths = [[x.mlp.up.kernel.shape[1] for x in t.model.layers] for t in tested]
    neurons = [sum(widths[0]), sum(widths[2]), sum(widths[2])]

    rows = rich.table.Table()
    rows.add_column()
    for heading in ("dense", "NeuroPrune", "the same, shrunk"):
        rows.add_column(heading, justify="right")
    rows.add_row("accuracy, %", *(f"{percent(t.right)}" for t in tested))
    sparsity = (1 - n / m for n, m in zip(kept, stored, strict=True))
    rows.add_row("sparsity, %", *(f"{100 * s:.2f}" for s in sparsity))
    rows.add_row("heads alive", *(str(n) for n in heads))
    rows.add_row("MLP neurons alive", *(f"{n:,}" for n in neurons))
    rows.add_row("encoder weights stored", *(f"{n:,}" for n in stored))
    rows.add_row("encoder weights not zero", *(f"{n:,}" for n in kept))
    rows.add_row(f"ms for {BUDGET.batch} snippets", ms[0], "as dense", ms[1])
    return rows


def percent(right: Bool[np.ndarray, "n"]) -> str:
    """A mean with its standard error over the examples."""
    error = right.std(ddof=1) / math.sqrt(len(right))
    return f"{100 * right.mean():.2f} ± {100 * error:.2f}"


def difference(a: Tested, b: Tested) -> str:
    """The same for a difference: paired, since both saw the same examples."""
    gaps = a.right.astype(float) - b.right.astype(float)
    error = gaps.std(ddof=1) / math.sqrt(len(gaps))
    return f"{100 * gaps.mean():+.2f} ± {100 * error:.2f}"


def save(out: pathlib.Path, tested: Tested, config: model.Config) -> None:
    """Writes a model, its sizes and what it said about the test set."""
    tree = nnx.as_pure(nnx.state(tested.model))
    jp.checkpoint.save(out / "shrunk", tree, overwrite=True)
    said = {
        "heads": config.heads,
        "ff": config.ff,
        "accuracy": tested.accuracy,
        "checksum": checksum(tested),
    }
    (out / "shrunk.json").write_text(json.dumps(said, indent=2) + "\n")


def verify(out: pathlib.Path, test: train.Batch) -> None:
    """Reloads what `save` wrote, and leaves with an error if it says anything else."""
    said = json.loads((out / "shrunk.json").read_text())
    config = model.Config(heads=tuple(said["heads"]), ff=tuple(said["ff"]))
    lm = model.abstract(config)
    tree = jp.checkpoint.restore(out / "shrunk", like=nnx.as_pure(nnx.state(lm)))
    nnx.update(lm, tree)
    tested = evaluate(lm, test)
    now = (tested.accuracy, checksum(tested))
    before = (said["accuracy"], said["checksum"])
    if now != before:
        sys.exit(f"Reloaded, the model says {now}; it said {before}.")
    console.print(
        f"Reloaded in a new process: {100 * now[0]:.2f} %, checksum of the logits "
        f"{now[1]}. Both are the same."
    )


def checksum(tested: Tested) -> str:
    return f"{zlib.crc32(tested.logits.tobytes()):08x}"


if __name__ == "__main__":
    main()
