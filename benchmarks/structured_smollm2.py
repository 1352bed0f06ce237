"""SmolLM2-135M made smaller: parameters, operations, latency and perplexity, by method.

Neurons and groups of heads are removed, or whole layers, until the share of operations that
a row names remains, those of the unembedding counted: it is a fifth of all, and stays. So do
its columns, the width of the model. Scores are of 32 windows of 512 tokens of a novel (Pride
and Prejudice); perplexity is of 16 windows of another one by the same author (Emma) and of
the Brown corpus. Latency is that of a forward pass of one window of 512 tokens, against the
dense model in turns. The recovery afterwards is the same for all methods: all weights, adamw,
some passes over the calibration windows, in three orders. The weights are 4-bit numbers
(Q4_1), read as the float32 values that they stand for.

Every setting is a line of the results file, and one that is there is not run again: stop it
whenever you like.

    python benchmarks/structured_smollm2.py                    # runs what is missing
    python benchmarks/structured_smollm2.py --without-recovery # ... but not this
    python benchmarks/structured_smollm2.py --table            # prints the tables

Expected before measuring: Taylor and FLAP far ahead of magnitude, which is of no use on this
model even unstructured at 50 %; all far behind unstructured pruning at the same share of
weights; layers best in latency at equal perplexity at 20 %, where nothing but products
remains to be saved, and worse in perplexity at 50 %; a fall in latency of nine tenths of what
the operations say.
"""

import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jsonl
import numpy as np
import optax
import shrinking
import smollm2_perplexity as text

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

import prune_smollm2 as demo  # noqa: E402
from smollm2 import measure, weights  # noqa: E402

RESULTS = HERE / "results" / "structured_smollm2.jsonl"
SHARES = (0.8, 0.65, 0.5)  # of the operations that remain
SEEDS = (0, 1, 2)
STEPS, RATE = 64, 2e-5  # of the recovery, a window a step


def read(net: demo.Net, windows: np.ndarray) -> shrinking.Model:
    """What the methods look at."""

    def loss(params, ids):
        return measure.loss(net.logits(params, ids)[0], ids[0])

    each = [(ids[None],) for ids in windows]
    pairs = [(windows[i : i + 2],) for i in range(0, len(windows), 2)]
    return shrinking.Model(
        net.logits, net.params, each[0], pairs, loss, each,
        kinds=("neuron", "kv_group"),
        biased=("layers/*/out/kernel", "layers/*/down/kernel"),
        block_of=block_of, where="layers/*/kernel",
    )  # fmt: skip


def block_of(path: str) -> str | None:
    """The layer of a leaf."""
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] == "layers" else None


class Setting(NamedTuple):
    """A line of the results."""

    method: str
    share: float
    seed: int | None  # of the recovery; none before it


def settings(recovery: bool) -> Iterator[Setting]:
    """All settings, the most telling first."""
    yield Setting("dense", 1.0, None)
    for seed in (None, *SEEDS) if recovery else (None,):
        for share in SHARES:
            yield from (Setting(method, share, seed) for method in shrinking.METHODS)


def run(
    setting: Setting, model: shrinking.Model, windows: dict[str, np.ndarray]
) -> dict:
    """The numbers of one line of the results."""
    start = time.perf_counter()
    small = model.whole()
    if setting.method != "dense":
        small = shrinking.METHODS[setting.method](model, setting.share)
    found = {**setting._asdict(), "seconds": round(time.perf_counter() - start, 1)}
    params = small.params
    if setting.seed is None:
        found |= shrinking.costs(small, model)
    else:
        params = recovered(small, windows[demo.CALIBRATION.title], setting.seed)
    logits = jax.jit(small.fn)
    found["perplexity"] = {
        name: measure.perplexity(
            measure.losses(logits, params, windows[name], title=str(setting))
        )
        for name in (demo.HELD_OUT.title, text.BROWN.title)
    }
    return found


def recovered(small: shrinking.Small, windows: np.ndarray, seed: int) -> Any:
    """All weights, trained on the calibration windows in an order of its own."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, STEPS // 10, STEPS)
    tx = optax.adamw(schedule, weight_decay=0.0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, ids):
        def loss(params):
            return measure.loss(small.fn(params, ids[None])[0], ids)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jax.numpy.copy, small.params)
    state, random = tx.init(params), np.random.default_rng(seed)
    for _ in range(STEPS // len(windows)):
        for ids in random.permutation(windows):
            params, state = step(params, state, ids)
    return params


def table(rows: list[dict]) -> str:
    """A row for each method and share, before and after the recovery."""
    columns = (
        "wanted", "method", *shrinking.COSTS,
        "Emma", "Brown", "Emma, recovered", "Brown, recovered",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for share in (1.0, *SHARES):
        for method in ("dense", *shrinking.METHODS):
            own = [r for r in rows if (r["method"], r["share"]) == (method, share)]
            for r in (r for r in own if r["seed"] is None):
                after = [x["perplexity"] for x in own if x["seed"] is not None]
                cells = [
                    f"{100 * share:.0f} %", method, *shrinking.costs_of(r),
                    *(text.shown(x) for x in r["perplexity"].values()),
                    *(shrinking.spread([x[n] for x in after]) for n in r["perplexity"]),
                ]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=pathlib.Path, default=".data")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--without-recovery", action="store_true")
    args = parser.parse_args()
    if not args.table:
        lm, tokenizer = weights.pretrained()
        windows = text.load(args.data_dir, tokenizer)
        model = read(demo.in_nnx(lm), windows[demo.CALIBRATION.title])
        done = {(r["method"], r["share"], r["seed"]) for r in jsonl.read(RESULTS)}
        for setting in settings(not args.without_recovery):
            if setting not in done:
                jsonl.add(RESULTS, run(setting, model, windows))
    print(table(jsonl.read(RESULTS)))


if __name__ == "__main__":
    main()
