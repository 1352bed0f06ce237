"""SmolLM2-135M made smaller: parameters, operations, latency and perplexity, by method.

Neurons and groups of heads are removed, or whole layers, until the share of operations that
a row names remains, those of the unembedding counted: it is a fifth of all, and stays. So do
its columns, the width of the model. Scores are of 32 windows of 512 tokens of a novel (Pride
and Prejudice); perplexity is of 16 windows of another one by the same author (Emma) and of
the Brown corpus. Latency is that of a forward pass of one window of 512 tokens, against the
dense model in turns. The recovery afterwards is the same for the methods that have one, and
for the dense model: all weights, adamw, a pass over the calibration windows, in three orders.
The weights are 4-bit numbers (Q4_1), read as the float32 values that they stand for.

Every setting is a line of the results file, and one that is there is not run again: stop it
whenever you like.

    python benchmarks/structured_smollm2.py                     # runs what is missing
    python benchmarks/structured_smollm2.py --without-recovery  # ... but not this
    python benchmarks/structured_smollm2.py --times             # latency
    python benchmarks/structured_smollm2.py --operations        # what takes the time
    python benchmarks/structured_smollm2.py --table             # prints the table

Expected before measuring: Taylor and FLAP far ahead of magnitude, which is of no use on this
model even unstructured at 50 %; all far behind unstructured pruning at the same share of
weights; layers best in latency at equal perplexity at 20 %, where nothing but products
remains to be saved, and worse in perplexity at 50 %; a fall in latency of nine tenths of what
the operations say. Of the recovery: all gain, magnitude and removed layers most, as they are
furthest from where they could be; at 80 % Taylor, FLAP and layers end within a third of each
other; dense gains little on Emma and loses on Brown.
"""

import argparse
import collections
import itertools
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
TIMES = HERE / "results" / "structured_smollm2_times.jsonl"
SHARES = (0.8, 0.65, 0.5)  # of the operations that remain
SEEDS = (0, 1, 2)
RECOVERED = ("Taylor", "FLAP", "ShortGPT")
METHODS = (*RECOVERED, "magnitude", "OBSPA", "AMP", "CFSP")
STEPS, RATE = 32, 2e-5  # of the recovery, a window a step


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
    """All settings; those of one small model after each other."""
    models = [("dense", 1.0), *itertools.product(RECOVERED, SHARES)]
    others = [m for m in METHODS if m not in RECOVERED]
    for method, share in [*models, *itertools.product(others, SHARES)]:
        yield Setting(method, share, None)
        if recovery and (method, share) in models:
            yield from (Setting(method, share, seed) for seed in SEEDS)


class Bench:
    """A small model, and what its lines have in common."""

    def __init__(self, method: str, share: float, model: shrinking.Model):
        start = time.perf_counter()
        self.small = shrinking.made(method, model, share)
        self.seconds = round(time.perf_counter() - start, 1)
        self.model, self.logits = model, jax.jit(self.small.fn)
        schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, STEPS // 10, STEPS)
        self.tx = optax.adamw(schedule, weight_decay=0.0)
        self.step = jax.jit(self._step, donate_argnums=(0, 1))

    def _step(self, params: Any, state: Any, ids: Any) -> tuple[Any, Any]:
        def loss(params):
            return measure.loss(self.small.fn(params, ids[None])[0], ids)

        updates, state = self.tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def recovered(self, windows: np.ndarray, seed: int) -> Any:
        """All weights, trained on the windows in an order of its own."""
        params = jax.tree.map(jnp.copy, self.small.params)
        state, random = self.tx.init(params), np.random.default_rng(seed)
        for ids in random.permutation(windows)[:STEPS]:
            params, state = self.step(params, state, ids)
        return params

    def run(self, setting: Setting, windows: dict[str, np.ndarray]) -> dict:
        """The numbers of one line of the results."""
        found = {**setting._asdict(), "seconds": self.seconds}
        params = self.small.params
        if setting.seed is None:
            found |= shrinking.costs(self.small, self.model)
        else:
            params = self.recovered(windows[demo.CALIBRATION.title], setting.seed)
        found["perplexity"] = {
            name: measure.perplexity(
                measure.losses(self.logits, params, windows[name], title=str(setting))
            )
            for name in (demo.HELD_OUT.title, text.BROWN.title)
        }
        return found


def show_operations(model: shrinking.Model) -> None:
    """Where the time goes, by shape and primitive, all layers together."""
    for method, share in (("dense", 1.0), *(("magnitude", s) for s in SHARES)):
        small = shrinking.made(method, model, share)
        spent = collections.Counter()
        for name, each in shrinking.operations(
            small.fn, small.params, model.args
        ).items():
            spent[name.split(" ", 1)[1]] += each
        print(f"{small.flops:,} operations, {sum(spent.values()):.0f} ms")
        for name, total in spent.most_common(9):
            print(f"    {total:.1f} ms {name}")


def table(rows: list[dict], times: list[dict]) -> str:
    """A row for each method and share, before and after the recovery."""
    columns = (
        "wanted", "method", *shrinking.COSTS,
        "Emma", "Brown", "Emma, recovered", "Brown, recovered",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for share in (1.0, *SHARES):
        for method in ("dense", *METHODS):
            own = [r for r in rows if (r["method"], r["share"]) == (method, share)]
            for r in (r for r in own if r["seed"] is None):
                after = [x["perplexity"] for x in own if x["seed"] is not None]
                cells = [
                    f"{100 * share:.0f} %", method, *shrinking.costs_of(r, times),
                    *(text.shown(x) for x in r["perplexity"].values()),
                    *(shrinking.spread([x[n] for x in after]) for n in r["perplexity"]),
                ]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=pathlib.Path, default=".data")
    parser.add_argument("--times", action="store_true", help="only latency")
    parser.add_argument("--operations", action="store_true", help="what takes the time")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--without-recovery", action="store_true")
    args = parser.parse_args()
    if not args.table:
        lm, tokenizer = weights.pretrained()
        windows = text.load(args.data_dir, tokenizer)
        model = read(demo.in_nnx(lm), windows[demo.CALIBRATION.title])
        if args.operations:
            show_operations(model)
            return
        done = {(r["method"], r["share"], r["seed"]) for r in jsonl.read(RESULTS)}
        wanted = () if args.times else settings(not args.without_recovery)
        missing = [x for x in wanted if x not in done]
        for (method, share), lines in itertools.groupby(missing, lambda x: x[:2]):
            bench = Bench(method, share, model)
            for setting in lines:
                jsonl.add(RESULTS, bench.run(setting, windows))
        shrinking.time_all(TIMES, lambda: model, METHODS, SHARES)
    print(table(jsonl.read(RESULTS), jsonl.read(TIMES)))


if __name__ == "__main__":
    main()
