"""NeuroPrune against uniform l1, gradual magnitude pruning and dense, on MiniLM.

Every arm fine-tunes the same pretrained MiniLM-L6 for one epoch on the VADER movie
snippets, with the same optimizer, and is pruned to the same share of the encoder's
matrices. A run is a line of the results file, and a run that is there is not repeated:
stop it whenever you like.

    python benchmarks/neuroprune_minilm.py --data-dir .data     # runs what is missing
    python benchmarks/neuroprune_minilm.py --table              # prints the table
"""

import argparse
import base64
import fnmatch
import itertools
import json
import pathlib
import statistics
import sys
import time

import jax
import numpy as np
import optax
from flax import nnx

import jaxprune as jp

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from minilm import data, model, train  # noqa: E402

RESULTS = HERE / "results" / "neuroprune_minilm.jsonl"
SEEDS = (0, 1, 2)
BUDGET = train.Budget()
BEGIN, END, EVERY = 20, 180, 10
ENCODER = "layers/*/kernel"
ROLES = jp.Roles(
    mlp_in="layers/*/mlp/up/kernel",
    mlp_out="layers/*/mlp/down/kernel",
    query="layers/*/attn/query/kernel",
    key="layers/*/attn/key/kernel",
    value="layers/*/attn/value/kernel",
    out="layers/*/attn/out/kernel",
    degree="layers/*/attn/out/kernel",
    heads=12,
)


def shuffled(kernel):
    """Eq. (1) with its weights dealt to other neurons: the control for topology."""
    weights = jp.penalties.degree_weights(kernel)
    key = jax.random.fold_in(jax.random.key(7), kernel.shape[0] * 31 + kernel.shape[1])
    return jax.random.permutation(key, weights, axis=-1, independent=False)


def neuroprune(sparsity, **options):
    options = {"head_every": None} | options
    return jp.neuroprune(
        sparsity, roles=ROLES, begin=BEGIN, end=END, every=EVERY, **options
    )


HEADS = {"head_every": 60, "theta": None, "theta_rel": 0.5}
ARMS = {
    "dense": lambda s: None,
    "uniform l1": lambda s: neuroprune(s, reading="uniform", attention="l1"),
    "magnitude (GMP)": lambda s: jp.gmp(
        s, begin=BEGIN, end=END, every=EVERY, allocation="global"
    ),
    "NeuroPrune": lambda s: neuroprune(s, **HEADS),
    "Eq. 1 alone, n/d": lambda s: neuroprune(s, attention="l1"),
    "Eq. 1 alone, d/(d-n)": lambda s: neuroprune(s, reading="inverse", attention="l1"),
    "Eq. 1 shuffled": lambda s: neuroprune(s, reading=shuffled, attention="l1"),
    "Eq. 1 + attention": lambda s: neuroprune(s),
}
MAIN = ("uniform l1", "magnitude (GMP)", "NeuroPrune")
ABLATIONS = tuple(a for a in ARMS if a not in MAIN and a != "dense")


def plan():
    """All runs, the most telling first."""
    for seed in SEEDS:
        yield "dense", 0.0, seed
        for sparsity in (0.7, 0.9, 0.5):
            yield from ((arm, sparsity, seed) for arm in MAIN)
    for seed in SEEDS:
        yield from ((arm, 0.7, seed) for arm in ABLATIONS)
    for sparsity, seed in itertools.product((0.8, 0.95), SEEDS):
        yield from ((arm, sparsity, seed) for arm in MAIN)


def run(arm: str, sparsity: float, seed: int, builder) -> dict:
    """Trains one arm; the numbers of one line of the results."""
    lm = model.pretrained(seed=seed)
    static, params, frozen = model.split(lm)
    logits = train.forward(static, frozen)
    tx = train.adamw(BUDGET)
    method = ARMS[arm](sparsity)
    if method is not None:
        tx = jp.masked(tx, method, where=ENCODER)
    opt_state = tx.init(params)
    stream = iter(
        data.batches(builder, batch=BUDGET.batch, length=BUDGET.length, seed=seed)
    )

    @jax.jit
    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(
            lambda p: train.cross_entropy(logits(p, batch), batch)
        )(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses, times = [], []
    for _ in range(BUDGET.steps):
        batch = next(stream)
        start = time.perf_counter()
        params, opt_state, loss = step(params, opt_state, batch)
        losses.append(float(loss))
        times.append(time.perf_counter() - start)
    test = data.test_set(builder, length=BUDGET.length)
    right = train.predict(logits, params, test).argmax(-1) == test["label"]
    kernels = encoder(params)
    weights = sum(x.size for x in kernels.values())
    zeros = sum(int((x == 0).sum()) for x in kernels.values())
    mlp = [x for p, x in kernels.items() if "/mlp/" in p]
    small, sizes = jp.neuroprune_shrink(
        params, roles=ROLES, activation=model.activation
    )
    out = {
        "arm": arm, "sparsity": sparsity, "seed": seed,
        "accuracy": float(right.mean()),
        "achieved": zeros / weights,
        "degree_deviation": float(np.mean([jp.analysis.degree_deviation(x) for x in mlp])),
        "four_group_share": float(np.mean([jp.analysis.four_group_share(x) for x in mlp])),
        "heads": sum(s.heads[1] for s in sizes),
        "neurons": sum(s.neurons[1] for s in sizes),
        "step_seconds": statistics.median(times[5:]),
        "final_loss": float(np.mean(losses[-20:])),
        "right": base64.b64encode(np.packbits(right)).decode(),
    }  # fmt: skip
    out["inference_ratio"] = inference_ratio(lm, small, sizes, test)
    return out


def encoder(params) -> dict[str, jax.Array]:
    """The matrices that are pruned, by path."""
    flat = jax.tree_util.tree_leaves_with_path(nnx.as_pure(params))
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat}
    return {p: x for p, x in named.items() if fnmatch.fnmatchcase(p, ENCODER)}


def inference_ratio(lm, small, sizes, test, repeats: int = 15) -> float:
    """Time of the shrunk model over that of the dense one, median of paired runs."""
    static, params, frozen = model.split(lm)
    config = model.Config(
        heads=tuple(s.heads[1] for s in sizes), ff=tuple(s.neurons[1] for s in sizes)
    )
    small_static, _, _ = model.split(model.abstract(config))
    batch = {k: v[:128] for k, v in test.items()}
    fast, slow = (
        jax.jit(train.forward(s, frozen)).lower(p, batch).compile()
        for s, p in ((small_static, small), (static, params))
    )

    def seconds(f, params):
        start = time.perf_counter()
        jax.block_until_ready(f(params, batch))
        return time.perf_counter() - start

    seconds(fast, small), seconds(slow, params)
    return statistics.median(
        seconds(fast, small) / seconds(slow, params) for _ in range(repeats)
    )


def table(rows: list[dict]) -> str:
    """Mean and spread (standard deviation) over seeds, and paired differences."""
    lines = [
        "| arm | sparsity | seeds | accuracy % | vs GMP | achieved % | degree dev. % | heads "
        "| neurons | step vs dense | inference vs dense |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    dense = {r["seed"]: r["step_seconds"] for r in rows if r["arm"] == "dense"}
    cells = sorted({(r["sparsity"], list(ARMS).index(r["arm"])) for r in rows})
    for sparsity, index in cells:
        arm = list(ARMS)[index]
        some = [r for r in rows if (r["arm"], r["sparsity"]) == (arm, sparsity)]
        steps = [
            r["step_seconds"] / dense[r["seed"]] for r in some if r["seed"] in dense
        ]
        lines.append(
            f"| {arm} | {sparsity:.0%} | {len(some)} | {spread(some, 'accuracy', 100)} | "
            f"{paired(some, rows)} | {100 * mean(some, 'achieved'):.2f} | "
            f"{mean(some, 'degree_deviation'):.1f} | {mean(some, 'heads'):.1f} | "
            f"{mean(some, 'neurons'):.0f} | "
            f"{statistics.median(steps) if steps else float('nan'):.2f} | "
            f"{mean(some, 'inference_ratio'):.2f} |"
        )
    return "\n".join(lines)


def mean(rows, key) -> float:
    return statistics.fmean(r[key] for r in rows)


def spread(rows, key, scale) -> str:
    values = [scale * r[key] for r in rows]
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.2f} ± {deviation:.2f}"


def paired(some: list[dict], rows: list[dict]) -> str:
    """Difference to GMP on the same seeds and examples, with its standard error."""
    gmp = {
        r["seed"]: r for r in rows
        if (r["arm"], r["sparsity"]) == ("magnitude (GMP)", some[0]["sparsity"])
    }  # fmt: skip
    pairs = [(bits(r), bits(gmp[r["seed"]])) for r in some if r["seed"] in gmp]
    if not pairs or some[0]["arm"] == "magnitude (GMP)":
        return "-"
    # Averaged over seeds first: the examples are the sample.
    gap = np.mean([a.astype(float) - b.astype(float) for a, b in pairs], axis=0)
    return f"{100 * gap.mean():+.2f} ± {100 * gap.std(ddof=1) / len(gap) ** 0.5:.2f}"


def bits(row: dict) -> np.ndarray:
    raw = np.frombuffer(base64.b64decode(row["right"]), np.uint8)
    return np.unpackbits(raw)[: row.get("examples", 2107)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default=".data")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--only", help="run only this arm")
    parser.add_argument("--sparsity", type=float, help="run only this sparsity")
    parser.add_argument("--seed", type=int, help="run only this seed")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        [json.loads(line) for line in args.results.read_text().splitlines()]
        if args.results.exists() else []
    )  # fmt: skip
    if not args.table:
        done = {(r["arm"], r["sparsity"], r["seed"]) for r in rows}
        builder = data.prepare(args.data_dir)
        for arm, sparsity, seed in plan():
            wanted = (
                args.only in (None, arm)
                and args.sparsity in (None, sparsity)
                and args.seed in (None, seed)
            )
            if not wanted or (arm, sparsity, seed) in done:
                continue
            start = time.time()
            row = run(arm, sparsity, seed, builder)
            rows.append(row)
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            shown = {k: v for k, v in row.items() if k != "right"}
            print(f"{time.time() - start:.0f} s  {shown}", file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
