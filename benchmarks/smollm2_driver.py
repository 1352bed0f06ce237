"""One-shot pruning of SmolLM2-135M: do forms and devices agree, and what does it hold.

Three tables. The model in NNX (30 layers written out) and in linen (30 layers scanned over)
and on eight virtual CPU devices are calibrated on the same tokens, and pruned: the largest
difference of a statistic, as a share of its largest value, and the share of weights whose
masks differ. Then what a calibration step costs beside a forward pass, by statistic. Last,
the most that the driver holds on the device, from the arrays alive in front of each block
and the temporary memory of its compiled programs, against the bound: the weights, the
statistics of one block, four copies of its largest Gram matrix, and two buffers for the
activations of all batches.

    python benchmarks/smollm2_driver.py --data-dir .data

Expected before measuring: statistics within 1e-4, masks within 0.1 % (Wanda, whose scores
are compared once) and a few times that for SparseGPT, which carries differences along;
a step with mean squares 1.05 times a forward pass, with Gram matrices 1.5 to 2 times, since
576 x 576 and 1536 x 1536 products are added to layers of about the same size.
"""

import argparse
import functools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np

import jaxprune as jp

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

import prune_smollm2 as demo  # noqa: E402
from smollm2 import text, weights  # noqa: E402

WINDOWS, LENGTH = 8, 256
METHODS = {"Wanda": jp.posttrain.wanda(), "SparseGPT": jp.posttrain.sparsegpt()}
Case = tuple[demo.Net, Any, np.ndarray]


def cases(lm: Any, ids: np.ndarray) -> dict[str, Case]:
    """The model in its forms, each with where its parameters and tokens lie."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    nnx, linen = demo.in_nnx(lm), demo.in_linen(lm)
    whole = jax.device_put(nnx.params, jax.NamedSharding(mesh, jax.P()))
    rows = jax.device_put(ids, jax.NamedSharding(mesh, jax.P("data")))
    return {
        "NNX": (nnx, nnx.params, ids),
        "linen, scanned": (linen, linen.params, ids),
        "NNX, 8 devices": (nnx, whole, rows),
    }


def squares(net: demo.Net, params: Any, ids: Any) -> dict[str, np.ndarray]:
    """Mean squares and diagonals and corners of Gram matrices, by leaf of the NNX model."""
    stats = jp.calibration.calibrate(
        net.logits, params, [ids], statistics=("square", "gram"), where="*/kernel"
    )
    found: dict[str, np.ndarray] = {}
    for path in stats:
        ((site, inputs),) = stats[path]
        for layer in range(site.matrix.stack):
            name = path.replace("layers/", f"layers/{layer}/", 1)
            name = name if site.matrix.stack > 1 else path
            found[f"{name} square"] = np.asarray(inputs.square[layer, 0])
            found[f"{name} gram"] = np.asarray(inputs.gram[layer, 0])
    return found


def agreement(found: dict[str, Case]) -> str:
    """How far each form is from the first."""
    lines = ["| form | mean squares | Gram matrices | masks of Wanda | of SparseGPT |",
             "|---" * 5 + "|"]  # fmt: skip
    first: Any = None
    for name, (net, params, ids) in found.items():
        stats = squares(net, params, ids)
        masks = {}
        for method, solver in METHODS.items():
            mask = jp.posttrain.prune(
                net.logits, params, [ids], method=solver, sparsity=0.5
            )[1]
            unstacked = net.as_nnx(mask)
            masks[method] = [np.asarray(m) for m in jax.tree.leaves(unstacked)]
            print(f"{name}: {method} done", file=sys.stderr, flush=True)
        if first is None:
            first = stats, masks
            continue
        gaps = {"square": 0.0, "gram": 0.0}
        for (key, x), (_, y) in zip(
            sorted(stats.items()), sorted(first[0].items()), strict=True
        ):
            gap = np.abs(x - y).max() / np.abs(y).max()
            kind = key.rpartition(" ")[2]
            gaps[kind] = max(gaps[kind], float(gap))
        cells = [f"{gap:.1e}" for gap in gaps.values()]
        for method, own in masks.items():
            other = first[1][method]
            flipped = sum(int(np.sum(a != b)) for a, b in zip(own, other, strict=True))
            cells.append(f"{flipped / sum(m.size for m in own):.4%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def median(f: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def costs(net: demo.Net, ids: np.ndarray, rounds: int) -> str:
    """Calibration on two batches less that on one, over a forward pass to the last layer.

    The forward pass that calibration needs ends in front of the unembedding, which is the
    output of the function nevertheless; so the ratio is to the function as it is.
    """
    forward = jax.jit(net.logits)
    jax.block_until_ready(forward(net.params, ids))
    plain = median(lambda: forward(net.params, ids), rounds)
    lines = ["| statistics | step over forward pass | cost, forward passes |",
             "|---" * 3 + "|"]  # fmt: skip
    for names in (("square",), ("square", "mean", "variance"), ("gram",)):
        steps: dict[Any, Any] = {}
        run = functools.partial(
            jp.calibration._calibrate.collect, net.logits, net.params,
            statistics=names, where="*/kernel", steps=steps,
        )  # fmt: skip
        run([ids])
        one = median(lambda run=run: run([ids]), rounds)
        many = median(lambda run=run: run([ids] * 3), rounds)
        ratio = (many - one) / 2 / plain
        lines.append(f"| {', '.join(names)} | {ratio:.2f} | {ratio - 1:.2f} |")
    return "\n".join(lines)


def held(net: demo.Net, ids: np.ndarray, *, offload: bool) -> str:
    """The most bytes of arrays that pruning holds in front of a block, and the bound."""
    known = {id(x) for x in jax.live_arrays()}
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        new = (x for x in jax.live_arrays() if id(x) not in known)
        most = max(most, sum(x.nbytes for x in new))

    params = jax.tree.map(np.asarray, net.params) if offload else net.params
    batches = [np.asarray(ids[i : i + 2]) for i in range(0, len(ids), 2)]
    _, masks, _ = jp.posttrain.prune(
        net.logits, params, batches, sparsity=0.5, offload=offload, progress=look
    )
    pruned = sum(4 * m.size for m in jax.tree.leaves(masks))
    masked = sum(m.size for m in jax.tree.leaves(masks))
    buffer = ids.size * 576 * 4
    grams = 4 * (3 * 576**2 + 1536**2)
    bound = 2 * buffer + grams + 4 * 4 * 1536**2
    mib = [x / 2**20 for x in (most, pruned, masked, bound)]
    name = "on the host" if offload else "on the device"
    return f"| {name} | {mib[0]:.0f} | {mib[1]:.0f} | {mib[2]:.0f} | {mib[3]:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=pathlib.Path, default=".data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("agreement", "costs", "held"))
    args = parser.parse_args()
    lm, tokenizer = weights.pretrained()
    ids = text.read(args.data_dir, tokenizer, demo.CALIBRATION)[:WINDOWS, :LENGTH]
    if args.only in (None, "agreement"):
        print(agreement(cases(lm, ids)), end="\n\n", flush=True)
    if args.only in (None, "costs"):
        print(costs(demo.in_linen(lm), ids, args.rounds), end="\n\n", flush=True)
    if args.only in (None, "held"):
        print("| rests | most held, MiB | new weights | masks | bound for the rest |")
        print("|---" * 5 + "|")
        for offload in (False, True):
            print(held(demo.in_nnx(lm), ids, offload=offload), flush=True)


if __name__ == "__main__":
    main()
