"""NeuroPrune against uniform l1, gradual magnitude pruning and dense, on MiniLM.

Every arm fine-tunes the same pretrained MiniLM-L6 for one epoch on the VADER movie
snippets, with the same optimizer, and is pruned to the same share of the encoder's
matrices. A run is a line of the results file, and a run that is there is not repeated:
stop it whenever you like.

    python benchmarks/neuroprune_minilm.py --tune       # the trials behind TUNED
    python benchmarks/neuroprune_minilm.py              # runs what is missing, prints the table
    python benchmarks/neuroprune_minilm.py --times      # training time against dense
    python benchmarks/neuroprune_minilm.py --table      # prints the tables

Learning rate and the last step of pruning are tuned for each arm, with as many trials for
each, at 70 % and seed 0: trained on four fifths of the training split, tested on the last
fifth. The test split plays no part in it.

Expected before measuring: at 50 % all arms near dense; magnitude ahead of both l1 arms at
90 %, because a soft threshold takes its toll of the weights that stay too, and a tenth of
an epoch cannot give it back; NeuroPrune about level with uniform l1 in accuracy, with a
much larger deviation of degree, and its inference hardly faster until whole neurons and
heads die, at 90 %. Training time 1.05 to 1.1 of dense.
"""

import argparse
import base64
import dataclasses
import fnmatch
import itertools
import pathlib
import statistics
import sys
import time
from typing import NamedTuple

import jax
import jsonl
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
TUNING = HERE / "results" / "neuroprune_minilm_tuning.jsonl"
TIMES = HERE / "results" / "neuroprune_minilm_times.jsonl"
BEGIN, EVERY = 20, 10
ENCODER = "layers/*/kernel"


def shuffled(kernel):
    """Eq. (1) with its weights dealt to other neurons: the control for topology."""
    weights = jp.penalties.degree_weights(kernel)
    key = jax.random.fold_in(jax.random.key(7), kernel.shape[0] * 31 + kernel.shape[1])
    return jax.random.permutation(key, weights, axis=-1, independent=False)


class Setting(NamedTuple):
    """What is tuned for each arm."""

    learning_rate: float
    end: int  # the step at which the final mask is drawn


GRID = tuple(Setting(rate, end) for end in (200, 130) for rate in (2e-4, 4e-4))
TRIALS = {"dense": (Setting(2e-4, 0), Setting(4e-4, 0))} | dict.fromkeys(
    ("uniform l1", "magnitude (GMP)", "NeuroPrune"), GRID
)


def neuroprune(sparsity, end, **options):
    options = {"head_every": None} | options
    return jp.neuroprune(
        sparsity, roles=model.ROLES, begin=BEGIN, end=end, every=EVERY, **options
    )


HEADS = {"head_every": 60, "theta": None, "theta_rel": 0.5}
ARMS = {
    "dense": lambda s, end: None,
    "uniform l1": lambda s, end: neuroprune(s, end, reading="uniform", attention="l1"),
    "magnitude (GMP)": lambda s, end: jp.gmp(
        s, begin=BEGIN, end=end, every=EVERY, allocation="global"
    ),
    "NeuroPrune": lambda s, end: neuroprune(s, end, **HEADS),
    "Eq. 1 alone, n/d": lambda s, end: neuroprune(s, end, attention="l1"),
    "Eq. 1 alone, d/(d-n)": lambda s, end: neuroprune(
        s, end, reading="inverse", attention="l1"
    ),
    "Eq. 1 shuffled": lambda s, end: neuroprune(
        s, end, reading=shuffled, attention="l1"
    ),
    "Eq. 1 + attention": lambda s, end: neuroprune(s, end),
}
# The best of the trials; the parts of NeuroPrune are trained as the whole.
TUNED = dict.fromkeys(ARMS, Setting(4e-4, 130)) | {
    "dense": Setting(2e-4, 0),
    "magnitude (GMP)": Setting(2e-4, 130),
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


class Trainer:
    """The model, the optimizer of one arm, and one compiled step of training."""

    def __init__(self, arm: str, sparsity: float, setting: Setting, seed: int):
        self.model = model.pretrained(seed=seed)
        static, self.params, frozen = model.split(self.model)
        self.logits = train.forward(static, frozen)
        budget = dataclasses.replace(BUDGET, learning_rate=setting.learning_rate)
        tx = train.adamw(budget)
        method = ARMS[arm](sparsity, setting.end)
        if method is not None:
            tx = jp.masked(tx, method, where=ENCODER)
        self.opt_state = tx.init(self.params)

        def step(params, opt_state, batch):
            loss, grads = jax.value_and_grad(
                lambda p: train.cross_entropy(self.logits(p, batch), batch)
            )(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        self._step = jax.jit(step)

    def step(self, batch) -> float:
        self.params, self.opt_state, loss = self._step(
            self.params, self.opt_state, batch
        )
        return float(loss)


def stream(builder, seed: int, split: str = "train"):
    sizes = {"batch": BUDGET.batch, "length": BUDGET.length}
    return iter(data.batches(builder, **sizes, seed=seed, split=split))


def run(arm: str, sparsity: float, seed: int, builder) -> dict:
    """Trains one arm; the numbers of one line of the results."""
    trainer = Trainer(arm, sparsity, TUNED[arm], seed)
    batches = stream(builder, seed)
    losses = [trainer.step(next(batches)) for _ in range(BUDGET.steps)]
    params = trainer.params
    test = data.test_set(builder, length=BUDGET.length)
    right = train.predict(trainer.logits, params, test).argmax(-1) == test["label"]
    kernels = encoder(params)
    weights = sum(x.size for x in kernels.values())
    zeros = sum(int((x == 0).sum()) for x in kernels.values())
    mlp = [x for p, x in kernels.items() if "/mlp/" in p]
    pure = [np.asarray(x) for x in kernels.values()]
    static, _, frozen = model.split(trainer.model)
    small = train.shrunk(static, params, frozen)
    config = model.sizes(small)
    out = {
        "arm": arm, "sparsity": sparsity, "seed": seed,
        "accuracy": float(right.mean()),
        "achieved": zeros / weights,
        "degree_deviation": float(np.mean([jp.analysis.degree_deviation(x) for x in mlp])),
        "four_group_share": float(np.mean([jp.analysis.four_group_share(x) for x in mlp])),
        "kept_mean": float(np.mean(np.concatenate([np.abs(x[x != 0]) for x in pure]))),
        "heads": sum(config.heads),
        "neurons": sum(config.ff),
        "final_loss": float(np.mean(losses[-20:])),
        "right": base64.b64encode(np.packbits(right)).decode(),
    }  # fmt: skip
    out["inference_ratio"] = inference_ratio(trainer.model, small, config, test)
    return out


def tune(arm: str, setting: Setting, builder) -> dict:
    """One trial, tested on training snippets that were held out."""
    trainer = Trainer(arm, 0.7, setting, seed=0)
    batches = stream(builder, 0, "train[:80%]")
    losses = [trainer.step(next(batches)) for _ in range(BUDGET.steps)]
    test = data.test_set(builder, length=BUDGET.length, split="train[80%:]")
    logits = train.predict(trainer.logits, trainer.params, test)
    return {
        "arm": arm,
        **setting._asdict(),
        "accuracy": train.accuracy(logits, test),
        "final_loss": float(np.mean(losses[-20:])),
    }


def times(arm: str, builder, cycles: int = 5) -> dict:
    """Time of a training step against dense, the two taking turns.

    The median over cycles of `EVERY` steps, which hold one update of the masks each.
    """
    batches = stream(builder, 0)
    pair = [Trainer(name, 0.7, TUNED[name], seed=0) for name in (arm, "dense")]
    for _ in range(BEGIN + 1):
        batch = next(batches)
        for trainer in pair:
            trainer.step(batch)
    seconds = np.zeros((cycles, EVERY, 2))
    for place in np.ndindex(cycles, EVERY):
        batch = next(batches)
        for i, trainer in enumerate(pair):
            start = time.perf_counter()
            trainer.step(batch)
            seconds[place][i] = time.perf_counter() - start
    ratios = seconds[..., 0].sum(1) / seconds[..., 1].sum(1)
    quiet = np.median(seconds[..., 0] / seconds[..., 1])
    return {"arm": arm, "ratio": float(np.median(ratios)), "no_update": float(quiet)}


def encoder(params) -> dict[str, jax.Array]:
    """The matrices that are pruned, by path."""
    flat = jax.tree_util.tree_leaves_with_path(nnx.as_pure(params))
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat}
    return {p: x for p, x in named.items() if fnmatch.fnmatchcase(p, ENCODER)}


def inference_ratio(lm, small, config, test, repeats: int = 9) -> float:
    """Time of the shrunk model over that of the dense one, median of paired runs."""
    static, params, frozen = model.split(lm)
    small_static, _, _ = model.split(model.abstract(config))
    batch = {k: v[:64] for k, v in test.items()}
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


def table(rows: list[dict], timed: list[dict]) -> str:
    """Mean and spread (standard deviation) over seeds, and paired differences."""
    columns = (
        "arm", "sparsity", "seeds", "accuracy %", "against l1", "against GMP",
        "achieved %", "degree dev. %", "kept weights, mean size", "heads", "neurons",
        "training step / dense", "inference / dense",
    )  # fmt: skip
    lines = [" | ".join(("", *columns, "")).strip(), "|---" * len(columns) + "|"]
    ratios = {r["arm"]: r["ratio"] for r in timed}
    cells = sorted({(r["sparsity"], list(ARMS).index(r["arm"])) for r in rows})
    for sparsity, index in cells:
        arm = list(ARMS)[index]
        some = [r for r in rows if (r["arm"], r["sparsity"]) == (arm, sparsity)]
        lines.append(
            f"| {arm} | {sparsity:.0%} | {len(some)} | {spread(some, 'accuracy', 100)} | "
            f"{paired(some, rows, 'uniform l1')} | "
            f"{paired(some, rows, 'magnitude (GMP)')} | {100 * mean(some, 'achieved'):.2f} | "
            f"{mean(some, 'degree_deviation'):.1f} | {mean(some, 'kept_mean'):.4f} | "
            f"{mean(some, 'heads'):.1f} | "
            f"{mean(some, 'neurons'):.0f} | "
            f"{f'{ratios[arm]:.2f}' if arm in ratios else '-'} | "
            f"{mean(some, 'inference_ratio'):.2f} |"
        )
    return "\n".join(lines)


def mean(rows, key) -> float:
    return statistics.fmean(r[key] for r in rows)


def spread(rows, key, scale) -> str:
    values = [scale * r[key] for r in rows]
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.2f} ± {deviation:.2f}"


def paired(some: list[dict], rows: list[dict], other: str) -> str:
    """Difference to another arm on the same seeds and examples, with its standard error."""
    key = (other, some[0]["sparsity"])
    others = {r["seed"]: r for r in rows if (r["arm"], r["sparsity"]) == key}
    pairs = [(bits(r), bits(others[r["seed"]])) for r in some if r["seed"] in others]
    if not pairs or some[0]["arm"] == other:
        return "-"
    # Averaged over seeds first: the examples are the sample.
    gap = np.mean([a.astype(float) - b.astype(float) for a, b in pairs], axis=0)
    return f"{100 * gap.mean():+.2f} ± {100 * gap.std(ddof=1) / len(gap) ** 0.5:.2f}"


def bits(row: dict) -> np.ndarray:
    raw = np.frombuffer(base64.b64decode(row["right"]), np.uint8)
    return np.unpackbits(raw)[: row.get("examples", 2107)]


def tuning_table(rows: list[dict]) -> str:
    lines = [
        "| arm | learning rate | end | accuracy % | loss |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        best = max(x["accuracy"] for x in rows if x["arm"] == r["arm"])
        mark = " (best)" if r["accuracy"] == best else ""
        lines.append(
            f"| {r['arm']} | {r['learning_rate']:g} | {r['end']} | "
            f"{100 * r['accuracy']:.2f}{mark} | {r['final_loss']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default=".data")
    parser.add_argument("--tune", action="store_true", help="run the trials")
    parser.add_argument("--times", action="store_true", help="time steps against dense")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument(
        "--only", nargs="+", default=list(ARMS), help="run only these arms"
    )
    args = parser.parse_args()
    builder = data.prepare(args.data_dir)
    wanted = [arm for arm in ARMS if arm in args.only]
    if args.tune:
        done = {(r["arm"], r["learning_rate"], r["end"]) for r in jsonl.read(TUNING)}
        for arm in (x for x in TRIALS if x in wanted):
            for setting in TRIALS[arm]:
                if (arm, *setting) not in done:
                    jsonl.add(TUNING, tune(arm, setting, builder), unsaid="right")
    elif args.times:
        done = {r["arm"] for r in jsonl.read(TIMES)}
        for arm in (x for x in wanted if x not in done):
            jsonl.add(TIMES, times(arm, builder), unsaid="right")
    elif not args.table:
        done = {(r["arm"], r["sparsity"], r["seed"]) for r in jsonl.read(RESULTS)}
        for arm, sparsity, seed in plan():
            if arm in wanted and (arm, sparsity, seed) not in done:
                jsonl.add(RESULTS, run(arm, sparsity, seed, builder), unsaid="right")
    print(tuning_table(jsonl.read(TUNING)), end="\n\n")
    print(table(jsonl.read(RESULTS), jsonl.read(TIMES)))


if __name__ == "__main__":
    main()
