"""One-shot pruning of SmolLM2-135M: do forms and devices agree, and what does it hold.

Three tables. The model in NNX (30 layers written out) and in linen (30 layers scanned over)
and on eight virtual CPU devices are calibrated on the same tokens, and pruned: the largest
difference of a statistic, as a share of its largest value, and the share of weights whose
masks differ. Then what a calibration step costs beside a forward pass, by statistic. Last,
by how much the memory of the process rises while it prunes, against the bound: the pruned
weights and masks, the statistics of one block, four copies of its largest Gram matrix, and
two buffers for the activations of all batches. With `donate=True` weights and masks are not
in the bound. What a forward pass holds inside a block is not either, and grows with the
batch; so the batch is varied.

    python benchmarks/smollm2_driver.py --data-dir .data

Expected before measuring: statistics within 1e-4, masks within 0.1 % (Wanda, whose scores
are compared once) and a few times that for SparseGPT, which carries differences along;
a step with mean squares 1.05 times a forward pass, with Gram matrices 1.5 to 2 times, since
576 x 576 and 1536 x 1536 products are added to layers of about the same size.
"""

import argparse
import ctypes
import functools
import gc
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import threading
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

WINDOWS, LENGTH, BATCH = 32, 512, 8
FEW = 2  # layers that eight devices run
LEAVES = 7  # matrices of a layer
LIBC, M_MMAP_THRESHOLD = ctypes.CDLL("libc.so.6"), -3  # glibc


class Allocated(ctypes.Structure):
    """What glibc's `mallinfo2` gives."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks",
                     "fsmblks", "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


LIBC.mallinfo2.restype = Allocated
METHODS = {"Wanda": jp.posttrain.wanda(), "SparseGPT": jp.posttrain.sparsegpt()}
Case = tuple[demo.Net, Any, list[Any]]  # parameters, and batches


def squares(case: Case, where: str) -> dict[str, np.ndarray]:
    """Mean squares and Gram matrices, by leaf of the NNX model."""
    net, params, batches = case
    stats = jp.calibration.calibrate(
        net.logits, params, batches, statistics=("square", "gram"), where=where
    )
    found: dict[str, np.ndarray] = {}
    for path in stats:
        ((site, inputs),) = stats[path]
        for layer in range(site.matrix.stack):
            name = path
            if site.matrix.stack > 1:
                name = path.replace("layers/", f"layers/{layer}/", 1)
            found[f"{name} square"] = np.asarray(inputs.square[layer, 0])
            found[f"{name} gram"] = np.asarray(inputs.gram[layer, 0])
    return found


def masks(case: Case, method: str, where: str) -> list[np.ndarray]:
    """Masks at 50 %, in the order of the NNX model: those of the first layer lead."""
    net, params, batches = case
    found = jp.posttrain.prune(
        net.logits, params, batches, method=METHODS[method], sparsity=0.5, where=where
    )[1]
    return [np.asarray(m) for m in jax.tree.leaves(net.as_nnx(found))]


def compare(name: str, one: Case, other: Case, where: str = "*/kernel") -> str:
    """How far one form is from another."""
    a, b = squares(one, where), squares(other, where)
    gaps = {"square": 0.0, "gram": 0.0}
    for (key, x), (_, y) in zip(sorted(a.items()), sorted(b.items()), strict=True):
        kind = key.rpartition(" ")[2]
        gap = float(np.abs(x - y).max() / np.abs(x).max())
        gaps[kind] = gap if not gap <= gaps[kind] else gaps[kind]
    del a, b
    cells = [f"{gap:.1e}" for gap in gaps.values()]
    for method in METHODS:
        a, b = masks(one, method, where), masks(other, method, where)
        for count in (LEAVES, len(a)):
            pairs = zip(a[:count], b[:count], strict=True)
            flipped = sum(int(np.sum(x != y)) for x, y in pairs)
            cells.append(f"{flipped / sum(x.size for x in a[:count]):.4%}")
    return f"| {name} | {' | '.join(cells)} |"


def agreement(lm: Any, ids: np.ndarray) -> None:
    """NNX and linen, all layers; one device and eight, the first `FEW` layers."""
    print(
        "| | mean squares | Gram matrices | masks of Wanda, first layer | all "
        "| of SparseGPT, first layer | all |"
    )
    print("|---" * 7 + "|")
    nnx, linen = demo.in_nnx(lm), demo.in_linen(lm)
    batches = [ids[i : i + BATCH] for i in range(0, len(ids), BATCH)]
    first = nnx, nnx.params, batches
    few = f"layers/[0-{FEW - 1}]/*/kernel"
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.device_put(nnx.params, jax.NamedSharding(mesh, jax.P()))
    spread = jax.NamedSharding(mesh, jax.P("data"))
    rows = [jax.device_put(x, spread) for x in batches]
    print(compare(f"1 device, 8 ({FEW} layers)", first, (nnx, whole, rows), few))
    turned = nnx, nnx.params, batches[::-1]
    print(compare(f"batches in another order ({FEW} layers)", first, turned, few))
    short = [ids[:8, :256]]
    one, other = (nnx, nnx.params, short), (linen, linen.params, short)
    print(compare("NNX, linen", one, other), flush=True)


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
        run([ids])  # compiles
        one = median(lambda run=run: run([ids]), rounds)
        many = median(lambda run=run: run([ids] * 3), rounds)
        ratio = (many - one) / 2 / plain
        lines.append(f"| {', '.join(names)} | {ratio:.2f} | {ratio - 1:.2f} |")
    return "\n".join(lines)


def held(net: demo.Net, ids: np.ndarray, size: int, donate: bool) -> str:
    """By how much the memory of this process rises while it prunes, and the bound."""
    batches = [np.asarray(ids[i : i + size]) for i in range(0, len(ids), size)]
    jax.config.update("jax_compilation_cache_dir", "build/compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    def run(where: str, donate: bool = False) -> Any:
        return jp.posttrain.prune(
            net.logits, net.params, batches, sparsity=0.5, where=where, donate=donate
        )

    run(f"layers/[0-{FEW - 1}]/*/kernel")  # so that all programs are in the cache
    gc.collect()
    LIBC.malloc_trim(0)  # what the first run left goes back
    with Peak() as peak:
        masks = run("*/kernel", donate)[1]
        weights = sum(m.size for m in jax.tree.leaves(masks))
    grams = 4 * (3 * 576**2 + 1536**2)
    bound = grams + 4 * 4 * 1536**2 + 2 * ids.size * 576 * 4
    if not donate:
        bound += 4 * weights + weights
    cells = *(peak.most[x] - peak.before[x] for x in peak.most), bound
    row = " | ".join(f"{x / 2**20:.0f}" for x in cells)
    return f"| {size} | {'yes' if donate else 'no'} | {row} |"


class Peak:
    """The most memory that is held meanwhile."""

    def __enter__(self) -> "Peak":
        self.before = self.most = self.held()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            now = self.held()
            self.most = {x: max(now[x], self.most[x]) for x in now}

    @staticmethod
    def held() -> dict[str, int]:
        """Bytes: of arrays and what XLA works in, and of the whole process.

        Allocations from 128 KiB on are mapped, and glibc counts them. Files that the process
        maps are left out.
        """
        text = pathlib.Path("/proc/self/status").read_text()
        (line,) = (x for x in text.splitlines() if x.startswith("RssAnon"))
        return {
            "arrays": LIBC.mallinfo2().hblkhd,
            "process": int(line.split()[1]) * 1024,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=pathlib.Path, default=".data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("agreement", "costs", "held"))
    parser.add_argument("--held", type=int, help="only a row of that table")
    parser.add_argument("--donate", action="store_true", help="in that row")
    args = parser.parse_args()
    # From here on large arrays are mapped, and leave the process when they are freed.
    LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 17)
    lm, tokenizer = weights.pretrained()
    ids = text.read(args.data_dir, tokenizer, demo.CALIBRATION)[:WINDOWS, :LENGTH]
    if args.held is not None:
        print(held(demo.in_nnx(lm), ids, args.held, args.donate), flush=True)
        return
    if args.only in (None, "agreement"):
        agreement(lm, ids)
        print()
    if args.only in (None, "costs"):
        print(costs(demo.in_linen(lm), ids[:4], args.rounds), end="\n\n", flush=True)
    if args.only in (None, "held"):
        print(
            "| windows a batch | parameters given up | arrays, MiB | process, MiB "
            "| bound, MiB |"
        )
        print("|---" * 5 + "|")
        for size, donate in itertools.product((BATCH, 2, 1), (False, True)):
            # Each in a process of its own, with nothing left from another.
            options = ["--data-dir", str(args.data_dir), "--held", str(size)]
            options += ["--donate"] * donate
            subprocess.run([sys.executable, __file__, *options], check=True)


if __name__ == "__main__":
    main()
