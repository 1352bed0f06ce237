"""Sparse training of a small language model on the Brown corpus.

A causal transformer (3 layers, width 96, 4 heads, 64 tokens of context, 2,048 BPE tokens)
trained for one pass over 90 % of the documents with adamw, a cosine learning rate and
batches of 32, and tested on the rest. Pruned are the matrices of attention and MLP.
Beside them stand static random masks and a dense model of the same FLOPs, made narrower.

The matrices learn at a share of the learning rate, and that share is tuned for each
method at each sparsity. It has to be: a step of Adam does not depend on the size of the
gradient, so that a sum over fewer weights moves less, and networks that are sparse from the
start want a share about as many times larger as they have fewer weights (SuPar, arXiv
2405.15743, derives that). It starts at 0.05 over the density at the start, and is doubled
or halved for as long as that helps; a trial is half a pass over nine tenths of the training
text, and is judged on its last tenth. The initial size was tuned in the same way, by hand,
for the dense model.
A run is a line of a results file, and a run that is there is not repeated.

    python benchmarks/sparse_lm.py --tune            # tunes what is not tuned yet
    python benchmarks/sparse_lm.py                   # runs what is missing
    python benchmarks/sparse_lm.py --only RigL GMP   # ... of some methods
    python benchmarks/sparse_lm.py --table           # prints the tables

Expected before measuring: at 70 % GMP and GraNet within a few percent of dense in
perplexity, SET and RigL behind them, static random last but ahead of the narrow dense
model; at 90 % the same order with larger gaps, and the narrow dense model near static
random. SR-STE behind GMP, since Adam undoes its decay. At 1:8 and 1:16 MdGf and SdGf ahead
of SR-STE, as their paper has it.
"""

import argparse
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import brown
import jax
import jax.numpy as jnp
import jsonl
import numpy as np
import optax
from jax import lax

import jaxprune as jp

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
RUNS = RESULTS / "sparse_lm.jsonl"
TUNING = RESULTS / "sparse_lm_tuning.jsonl"
SEEDS = (0, 1, 2)
BATCH, CONTEXT = 32, 64
WIDTH, HEADS, LAYERS = 96, 4, 3
PEAK = 1e-2  # learning rate of embeddings and norms
SHARE = 0.05  # of it for matrices, where tuning starts for a dense model
SIZE = 0.5  # initial size of a matrix, times 1 / sqrt(fan-in)
ENDS = 0.1  # times this where a branch ends
# Widths at which a dense model has the matrix FLOPs of the pruned one, but for rounding.
NARROW = {0.7: 52, 0.9: 32}
MATRICES = "layers/*/kernel"


class Case(NamedTuple):
    """How sparse, and in which pattern."""

    sparsity: float
    structure: str = "unstructured"


STRUCTURES = {
    "unstructured": jp.Unstructured(),
    "1:8": jp.NM(1, 8),
    "1:16": jp.NM(1, 16),
}


def common(case: Case) -> dict[str, Any]:
    return {
        "sparsity": case.sparsity,
        "structure": STRUCTURES[case.structure],
        "allocation": "uniform",
    }


def leak(steps: int) -> jp.schedules.Schedule:
    return jp.schedules.linear(0.0, 0, steps * 3 // 4, initial=1.0)


METHODS: dict[str, Callable[[Case, int, Any], Any]] = {
    "dense": lambda c, steps, key: jp.static(0.0),
    "narrow dense": lambda c, steps, key: jp.static(0.0),
    "static random": lambda c, steps, key: jp.static(key=key, **common(c)),
    "SET": lambda c, steps, key: jp.set_(key=key, end=steps * 3 // 4, **common(c)),
    "RigL": lambda c, steps, key: jp.rigl(key=key, end=steps * 3 // 4, **common(c)),
    "GraNet": lambda c, steps, key: jp.granet(
        end=steps // 2, until=steps * 3 // 4, every=50, **common(c)
    ),
    "GMP": lambda c, steps, key: jp.gmp(
        begin=steps // 4, end=steps * 3 // 4, every=20, **common(c)
    ),
    "CHTss": lambda c, steps, key: jp.chts(
        c.sparsity, key=key, end=steps * 3 // 4, settle=steps // 2, initial=0.5
    ),
    "soft top-k": lambda c, steps, key: jp.soft_top_k(
        end=steps // 5, harden=steps * 4 // 5, every=10, **common(c)
    ),
    "SR-STE": lambda c, steps, key: jp.sr_ste(every=10, **common(c)),
    "MdGf": lambda c, steps, key: jp.mdgf(leak=leak(steps), every=10, **common(c)),
    "SdGf": lambda c, steps, key: jp.sdgf(
        STRUCTURES[c.structure], end=steps // 2, every=10
    ),
}  # fmt: skip
RULES = ("GMP", "GraNet", "SET", "RigL", "CHTss", "soft top-k")


def plan() -> Iterator[tuple[str, Case, int]]:
    """All runs, the most telling first."""
    for seed in SEEDS:
        yield "dense", Case(0.0), seed
        for case in (Case(0.9), Case(0.7)):
            names = (*RULES, "static random", "narrow dense")
            yield from ((name, case, seed) for name in names)
    for seed, m in itertools.product(SEEDS, (8, 16)):
        case = Case(1 - 1 / m, f"1:{m}")
        yield from ((name, case, seed) for name in ("SR-STE", "MdGf", "SdGf"))


def init(key: jax.Array, width: int) -> dict:
    keys = iter(jax.random.split(key, 64))

    def matrix(a, b, scale=1.0):
        normal = jax.random.normal(next(keys), (a, b))
        return {"kernel": scale * SIZE * normal / a**0.5}

    def layer():
        return {
            "norm_1": {"scale": jnp.ones(width)},
            "query": matrix(width, width), "key": matrix(width, width),
            "value": matrix(width, width), "out": matrix(width, width, ENDS),
            "norm_2": {"scale": jnp.ones(width)},
            "up": matrix(width, 4 * width), "down": matrix(4 * width, width, ENDS),
        }  # fmt: skip

    return {
        "embedding": 0.02 * jax.random.normal(next(keys), (brown.VOCABULARY, width)),
        "positions": {
            "embedding": 0.02 * jax.random.normal(next(keys), (CONTEXT, width))
        },
        "layers": [layer() for _ in range(LAYERS)],
        "norm": {"scale": jnp.ones(width)},
    }


def logits(params: dict, tokens: jax.Array) -> jax.Array:
    """The next token's, `[batch, context, vocabulary]`; the embedding is tied."""
    x = params["embedding"][tokens] + params["positions"]["embedding"]
    for layer in params["layers"]:
        y = norm(layer["norm_1"], x)
        q, k, v = (
            (y @ layer[n]["kernel"]).reshape(*y.shape[:2], HEADS, -1)
            for n in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.reshape(x.shape) @ layer["out"]["kernel"]
        y = jax.nn.gelu(norm(layer["norm_2"], x) @ layer["up"]["kernel"])
        x = x + y @ layer["down"]["kernel"]
    return norm(params["norm"], x) @ params["embedding"].T


def norm(params: dict, x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * params["scale"]


def loss(params: dict, windows: jax.Array) -> jax.Array:
    found = logits(params, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(found, windows[:, 1:]).mean()


def windows(tokens: np.ndarray) -> np.ndarray:
    """Text in pieces of `CONTEXT` tokens and the one behind, `[pieces, CONTEXT + 1]`."""
    count = (len(tokens) - 1) // CONTEXT
    starts = np.arange(count)[:, None] * CONTEXT
    return tokens[starts + np.arange(CONTEXT + 1)]


def slower(share: float | jax.Array) -> optax.GradientTransformation:
    """Matrices move by a share of their updates."""
    return optax.stateless(
        lambda updates, params: (
            updates
            | {
                "layers": jax.tree.map(
                    lambda u: share * u if u.ndim == 2 else u, updates["layers"]
                )
            }
        )
    )


def run(
    name: str, case: Case, seed: int, train: np.ndarray, test: np.ndarray,
    steps: int, share: float,
) -> dict:  # fmt: skip
    width = NARROW[case.sparsity] if name == "narrow dense" else WIDTH
    params = init(jax.random.key(seed), width)
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK, steps // 20, steps)
    method = METHODS[name](case, steps, jax.random.key(100 + seed))

    def optimizer(share: float | jax.Array) -> optax.GradientTransformation:
        adamw = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(rate, b2=0.95, weight_decay=0.01),
            slower(share),
        )
        return jp.masked(adamw, method, where=MATRICES)

    state = jax.jit(optimizer(share).init)(params)

    @jax.jit
    def many(carry, batches, share):  # one program for all shares
        tx = optimizer(share)

        def step(carry, batch):
            params, state = carry
            grads = jax.grad(lambda p: loss(jp.sparse_params(p, state), batch))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, carry, batches)[0]

    random = np.random.default_rng(seed)
    start = time.perf_counter()
    order = random.permutation(len(train))[: steps * BATCH]
    for part in order.reshape(-1, 20, BATCH):
        params, state = many((params, state), train[part], share)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    seen = jp.sparse_params(params, state)
    measure = jax.jit(loss)
    pieces = test[: len(test) // BATCH * BATCH].reshape(-1, BATCH, CONTEXT + 1)
    held_out = float(np.mean([measure(seen, x) for x in pieces]))
    masks = jp.get_masks(state)
    return {
        "method": name, **case._asdict(), "share": share, "seed": seed, "loss": held_out,
        "perplexity": float(np.exp(held_out)),
        "achieved": jp.masks.sparsity(masks), "steps": steps, "seconds": seconds,
    }  # fmt: skip


def trial(name: str, case: Case, share: float, data: dict[str, np.ndarray]) -> dict:
    """A run of half the length, judged on text that the real runs train on."""
    pieces = windows(data["train"])
    cut = len(pieces) * 9 // 10
    steps = len(pieces) // BATCH // 40 * 20
    return run(name, case, 3, pieces[:cut], pieces[cut:], steps, share)


def first_share(name: str, case: Case) -> float:
    """A power of two times that of a dense model, near what the density calls for."""
    sparse_at_first = name in ("static random", "SET", "RigL")
    density = 1 - case.sparsity if sparse_at_first else 1.0
    return SHARE * 2 ** round(-math.log2(density))


def climb(loss: Callable[[float], float], start: float) -> float:
    """The share at which neither doubling nor halving it helps."""
    for factor in (2, 0.5):
        share = start
        while loss(share * factor) < loss(share):
            share *= factor
        if share != start:
            break
    return share


def tuned(
    name: str, case: Case, data: dict[str, np.ndarray], may_try: bool = False
) -> float:
    """The best share, from the trials in the file, and from new ones if need be."""
    known = {
        r["share"]: r["loss"]
        for r in jsonl.read(TUNING)
        if (r["method"], case_of(r)) == (name, case)
    }

    def loss_at(share):
        if share not in known:
            if not may_try:
                raise SystemExit(
                    f"{name} at {case}: not tuned with a share of {share}. Run "
                    "python benchmarks/sparse_lm.py --tune first."
                )
            row = trial(name, case, share, data)
            jsonl.add(TUNING, row)
            known[share] = row["loss"]
        return known[share]

    return climb(loss_at, first_share(name, case))


def table(rows: list[dict], case: Case) -> str:
    """Mean and standard deviation over seeds, the best first."""
    some = [r for r in rows if case_of(r) == case]
    lines = [
        "| method | seeds | perplexity | sparsity % | share of the rate |",
        "|---|---|---|---|---|",
    ]
    names = {r["method"] for r in some}
    means = {
        n: statistics.fmean(r["perplexity"] for r in some if r["method"] == n)
        for n in names
    }
    for name in sorted(names, key=means.__getitem__):
        mine = [r for r in some if r["method"] == name]
        values = [r["perplexity"] for r in mine]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        achieved = 100 * statistics.fmean(r["achieved"] for r in mine)
        lines.append(
            f"| {name} | {len(mine)} | {means[name]:.2f} ± {spread:.2f} | "
            f"{achieved:.2f} | {mine[0]['share']} |"
        )
    return "\n".join(lines)


def case_of(row: dict) -> Case:
    return Case(row["sparsity"], row["structure"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default=".data")
    parser.add_argument("--tune", action="store_true", help="find the learning rates")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument(
        "--only", nargs="+", default=list(METHODS), help="these methods"
    )
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", "build/compiled")
    wanted = [(n, case, seed) for n, case, seed in plan() if n in args.only]
    if args.tune:
        data = brown.load(args.data_dir)
        for name, case in dict.fromkeys((name, case) for name, case, _ in wanted):
            tuned(name, case, data, may_try=True)
    elif not args.table:
        data = brown.load(args.data_dir)
        train, test = (windows(data[split]) for split in ("train", "test"))
        steps = len(train) // BATCH // 20 * 20
        done = {(r["method"], case_of(r), r["seed"]) for r in jsonl.read(RUNS)}
        for name, case, seed in wanted:
            if (name, case, seed) not in done:
                share = tuned(name, case, data)
                jsonl.add(RUNS, run(name, case, seed, train, test, steps, share))
    rows = jsonl.read(RUNS)
    for case in dict.fromkeys(map(case_of, rows)):
        print(f"\n### {case.sparsity:.1%} {case.structure}\n\n{table(rows, case)}")


if __name__ == "__main__":
    main()
