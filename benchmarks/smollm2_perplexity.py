"""One-shot pruning of SmolLM2-135M: perplexity by method, sparsity and pattern.

Calibrated on 32 windows of 512 tokens of a novel (Pride and Prejudice), and tested on 16
windows of another one by the same author (Emma) and of the Brown corpus, which is another
sort of text altogether. The windows are spread over the whole of each text, and their
digests stand below: other tokens are refused. All matrices of attention and MLP are pruned;
embeddings and norms are not. The weights are 4-bit numbers (Q4_1), read as the float32
values that they stand for: no number here is one of the model as it was published.

Every setting is a line of the results file, and one that is there is not run again: stop it
whenever you like.

    python benchmarks/smollm2_perplexity.py                          # runs what is missing
    python benchmarks/smollm2_perplexity.py --only dense magnitude   # ... of some methods
    python benchmarks/smollm2_perplexity.py --table                  # prints the tables

Expected before measuring: 50 % ahead of 4:8, and that ahead of 2:4, for each method;
SparseGPT ahead of Wanda at 70 % and 2:4; magnitude far behind all others; PERP recovers
most at 2:4.
"""

import argparse
import functools
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import brown
import jax
import jax.numpy as jnp
import jsonl
import numpy as np
import optax

import jaxprune as jp

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

import prune_smollm2 as demo  # noqa: E402
from smollm2 import measure, text, weights  # noqa: E402

RESULTS = HERE / "results" / "smollm2_perplexity.jsonl"
BROWN = text.Windows("Brown", 16, demo.LENGTH, "08ffe78e3762d70d")
PATTERNS = {
    "50 %": (0.5, jp.Unstructured()),
    "60 %": (0.6, jp.Unstructured()),
    "70 %": (0.7, jp.Unstructured()),
    "4:8": (0.5, jp.NM(4, 8)),
    "2:4": (0.5, jp.NM(2, 4)),
}
SOLVERS = {
    "magnitude": jp.posttrain.magnitude(),
    "Wanda": jp.posttrain.wanda(),
    "RIA": jp.posttrain.ria(),
    "SparseGPT": jp.posttrain.sparsegpt(),
    "ALPS": jp.posttrain.alps(),
}
EXTRAS = ("DSnoT", "OWL", "PERP")
COMBINED = ("Wanda + DSnoT", "Wanda + OWL", "Wanda + PERP", "SparseGPT + OWL",
            "SparseGPT + PERP")  # fmt: skip
METHODS = ("dense", *SOLVERS, *COMBINED)
RETRAINED = 4  # passes of PERP over the calibration windows, one window a step


class Setting(NamedTuple):
    """A line of the results."""

    method: str
    pattern: str


def plan() -> Iterator[Setting]:
    """All settings, the most telling first."""
    yield Setting("dense", "")
    for method in ("magnitude", "Wanda", "SparseGPT", "RIA"):
        yield from (Setting(method, pattern) for pattern in PATTERNS)
    yield from (Setting("ALPS", pattern) for pattern in ("70 %", "2:4"))
    for method in COMBINED:
        yield from (Setting(method, pattern) for pattern in ("60 %", "2:4"))
    # OWL gives each layer an N of its own, of which there are few with groups of four.
    yield from (Setting(f"{method} + OWL", "4:8") for method in ("Wanda", "SparseGPT"))


def prune(net: demo.Net, windows: np.ndarray, setting: Setting) -> tuple[Any, Any]:
    """Params and masks."""
    sparsity, structure = PATTERNS[setting.pattern]
    method, _, extra = setting.method.partition(" + ")
    steps = range(0, len(windows), demo.BATCH)
    batches = [windows[i : i + demo.BATCH] for i in steps]
    options = {}
    if extra == "OWL":
        outliers = jp.posttrain.outlier_ratios(net.logits, net.params, batches)
        owl = functools.partial(jp.allocation.owl, outliers=outliers)
        options["allocation"] = owl
        if isinstance(structure, jp.NM):  # the authors' range: one N up, and one down
            options["allocation"] = functools.partial(owl, limit=1 / structure.m)
            structure = functools.partial(jp.allocation.mixed_nm, m=structure.m)
    if extra == "DSnoT":
        options["refine"] = functools.partial(swap, structure)
        options["statistics"] = ("square", "mean", "variance")
    params, masks, _ = jp.posttrain.prune(
        net.logits, net.params, batches,
        method=SOLVERS[method], sparsity=sparsity, structure=structure, **options,
    )  # fmt: skip
    if extra == "PERP":
        params = retrain(net.logits, params, masks, windows)
    return params, masks


def swap(structure, w, found, inputs):
    """DSnoT behind a solver that leaves weights as they are."""
    mask = jp.posttrain.dsnot(w, found.mask, inputs, structure=structure).mask
    return found._replace(w=jnp.where(mask, w, 0), mask=mask)


def retrain(logits: measure.Logits, params: Any, masks: Any, windows: np.ndarray):
    """PERP on the calibration windows: norms and MaskLoRA, merged in the end."""
    few = jp.posttrain.perp_init(
        params, masks, kind=("norm", "mask_lora"), key=jax.random.key(0)
    )
    steps = RETRAINED * len(windows)
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 2e-4, steps // 10, steps))

    @jax.jit
    def step(few, state, ids):
        def loss(few):
            new = jp.posttrain.perp_params(few, params, masks)
            return measure.loss(logits(new, ids[None])[0], ids)

        updates, state = tx.update(jax.grad(loss)(few), state, few)
        return optax.apply_updates(few, updates), state

    state, random = tx.init(few), np.random.default_rng(0)
    for _ in range(RETRAINED):
        for ids in random.permutation(windows):
            few, state = step(few, state, ids)
    return jp.posttrain.perp_params(few, params, masks)


def run(
    setting: Setting, net: demo.Net, logits, windows: dict[str, np.ndarray]
) -> dict:
    """Prunes and tests; the numbers of one line of the results."""
    title = " ".join(setting)
    start = time.perf_counter()
    params, sparsity = net.params, 0.0
    if setting.method != "dense":
        params, masks = prune(net, windows[demo.CALIBRATION.title], setting)
        sparsity = jp.masks.sparsity(masks)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    losses = {
        name: measure.losses(logits, params, windows[name], title=f"{title}, {name}")
        for name in (demo.HELD_OUT.title, BROWN.title)
    }
    return {
        **setting._asdict(),
        "sparsity": sparsity,
        "seconds": round(seconds, 1),
        "perplexity": {name: measure.perplexity(x) for name, x in losses.items()},
        "losses": {name: x.round(5).tolist() for name, x in losses.items()},
    }


def table(rows: list[dict], name: str) -> str:
    """Perplexity on one text, a row for each method and a column for each pattern."""
    found = {Setting(r["method"], r["pattern"]): r["perplexity"][name] for r in rows}
    lines = ["| method | " + " | ".join(PATTERNS) + " |", "|---" * 6 + "|"]
    for method in METHODS:
        own = {p: x for (m, p), x in found.items() if m == method}
        if own:
            cells = [shown(own.get(p, own.get(""))) for p in PATTERNS]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(perplexity: float | None) -> str:
    if perplexity is None:
        return "-"
    return f"{perplexity:,.0f}" if perplexity >= 1000 else f"{perplexity:.2f}"


def comparisons(rows: list[dict]) -> str:
    """How much larger the loss of one method is, paired by window, with its error."""
    found = {(r["method"], r["pattern"]): r["losses"] for r in rows}
    lines = ["| pattern | loss of | less that of | Emma | Brown |", "|---" * 5 + "|"]
    for pattern in PATTERNS:
        for a, b in (("Wanda", "SparseGPT"), ("RIA", "Wanda"), ("SparseGPT", "ALPS")):
            if (a, pattern) in found and (b, pattern) in found:
                gaps = [
                    np.subtract(found[a, pattern][name], found[b, pattern][name])
                    for name in (demo.HELD_OUT.title, BROWN.title)
                ]
                cells = [
                    f"{x.mean():+.3f} ± {statistics.stdev(x) / len(x) ** 0.5:.3f}"
                    for x in gaps
                ]
                lines.append(f"| {pattern} | {a} | {b} | {' | '.join(cells)} |")
    return "\n".join(lines)


def load(data_dir: pathlib.Path, tokenizer) -> dict[str, np.ndarray]:
    """The windows of all texts, checked, and said."""
    novels = (demo.CALIBRATION, demo.HELD_OUT)
    windows = {x.title: text.read(data_dir, tokenizer, x) for x in novels}
    corpus = "\n\n".join(document for _, document in brown.documents(data_dir))
    corpus = re.sub(r"([;?!])\1", r"\1", corpus)  # which the corpus writes twice
    windows[BROWN.title] = text.encode(
        tokenizer, corpus, count=BROWN.pieces, length=BROWN.length
    )
    text.check(windows[BROWN.title], BROWN)
    for name, ids in windows.items():
        print(f"{name}: {len(ids)} x {ids.shape[1]} tokens, digest {text.digest(ids)}")
    return windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=pathlib.Path, default=".data")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args()
    if not args.table:
        lm, tokenizer = weights.pretrained()
        windows, net = load(args.data_dir, tokenizer), demo.in_nnx(lm)
        one = functools.partial(
            run, net=net, logits=jax.jit(net.logits), windows=windows
        )
        done = {(r["method"], r["pattern"]) for r in jsonl.read(RESULTS)}
        for setting in plan():
            if setting not in done and setting.method in args.only:
                jsonl.add(RESULTS, one(setting), unsaid="losses")
    rows = jsonl.read(RESULTS)
    for name in (demo.HELD_OUT.title, BROWN.title):
        print(f"\n{name}:\n\n{table(rows, name)}")
    print(f"\n{comparisons(rows)}")


if __name__ == "__main__":
    main()
