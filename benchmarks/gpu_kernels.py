"""Kernels on a GPU: checked against their references, then timed against dense products.

    benchmarks/gpu.sh [--out build/gpu] [--dry-run]

Each job runs in a process of its own and has its share of eight minutes, so that a kernel
that fails or hangs leaves the tables of the others. A job first checks and then times.
Times are of whole calls, with what is read off the pattern in every one of them. Calls of
both sides take turns; each stands 4 or 16 times in one program, with weights and inputs of
its own, so that they come from memory as in a model, and nothing is copied to the host.
The ratio is the median over rounds.

The limit is the larger of kept multiplications at 989 TFLOP/s and bytes, each read or
written once, at 4.8 TB/s: the figures of an H200 for bfloat16.

Expected before measuring, on an H200, for M >= 2048: with blocks of 128 at least 6 times
as fast as dense at 90 % and 3.5 times at 80 %, forward; with blocks of 64, where a piece of
x serves half as many products, about two thirds of that. At M <= 64 launches decide, and
2 times is much. The loop that XLA makes of it is slower than the dense product.
N:M weights, for M <= 64: 2:4 at least 1.6 times as fast as dense and 1:4 at least 2.8 times,
of 1.83 and 3.56 that the bytes allow, for K = N = 8192; less for 4096, where the launches
that bring x into order and add up parts of the sums count.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import math
import pathlib
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxprune.kernels.block_sparse_matmul import reference, shapes
from jaxprune.kernels.nm_matmul import reference as nm_reference
from jaxprune.kernels.nm_matmul import shapes as nm_shapes

import jaxprune as jp
from jaxprune.formats import BlockSparseArray

FLOPS = 989e12
BYTES = 4.8e12
ROUNDS = 7
SPARSITIES = (0.9, 0.8, 0.95, 0.5)
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}


class Settings(NamedTuple):
    """What a dry run on a CPU does less of.

    Attributes:
      backend: of the kernels that are checked.
      sizes: of K and N.
      rows: M.
      blocks: extents of blocks.
      until: when a job has to come to its end, in seconds since the epoch.
    """

    backend: str
    sizes: tuple[int, ...]
    rows: tuple[int, ...]
    blocks: tuple[int, ...]
    until: float


class Row(NamedTuple):
    """One product that was timed: sizes, seconds of a call, of its limit, of dense."""

    size: int
    block: int
    sparsity: float
    m: int
    seconds: float
    limit: float
    ratio: float


# --- checks ---------------------------------------------------------------------------


def random_packed(key, k, n, block, density, spare=0, dtype=jnp.bfloat16, empty=False):
    """A packed matrix of this many blocks by chance, and the blocks that are kept."""
    random = np.random.default_rng(key)
    grid = (-(-k // block[0]), -(-n // block[1]))
    kept = random.random(grid) < density
    if empty:
        kept[1:2], kept[:, 1:2] = False, False
    mask = np.kron(kept, np.ones(block, bool))[:k, :n]
    w = jnp.asarray(random.standard_normal((k, n)), dtype)
    capacity = max(1, int(kept.sum())) + spare
    return jp.formats.pack(w, jnp.asarray(mask), jp.Block(*block), capacity=capacity)


def with_gradients(f):
    """The product, and its gradients for x and the values."""

    def g(x, packed, dy):
        def product(x, values):
            return f(x, dataclasses.replace(packed, values=values))

        y, back = jax.vjp(product, x, packed.values)
        return y, *back(dy)

    return g


def check_block_sparse(settings: Settings, backend: str, backward: bool) -> list[str]:
    """What is wrong."""
    cases = [(s, "bfloat16") for s in (*shapes.HALF, *shapes.WIDE)]
    cases += [(shapes.HALF[0], "float16")]
    if backend == "xla":
        cases += [(s, "float32") for s in shapes.SMALL]
    if settings.backend == "gpu" and backend == "gpu":
        cases += [
            (shapes.Shape(m, 4096, 4096, (b, b), 0.1, spare=7), "bfloat16")
            for b in settings.blocks
            for m in (16, 2048)
        ]

    def product(x, packed):
        # The default of float32 is tf32, and dense products of bfloat16 have no other.
        precision = "highest" if x.dtype == jnp.float32 else None
        return jp.kernels.block_sparse_matmul(
            x, packed, backend=backend, precision=precision
        )

    def exact(x, packed):
        return reference.block_sparse_matmul(x, packed, precision="highest")

    def run(f, *arguments):
        if not backward:
            return (f(*arguments[:2]),)
        return with_gradients(f)(*arguments)

    wrong = []
    for number, (shape, dtype) in enumerate(cases):
        m, k, n, block, density, spare = shape
        packed = random_packed(
            number, k, n, block, density, spare, dtype, empty=density < 1
        )
        random = np.random.default_rng(number + 1000)
        x, dy = (jnp.asarray(random.standard_normal((m, a)), dtype) for a in (k, n))
        found = jax.jit(run, static_argnums=0)(product, x, packed, dy)
        wide = jax.tree.map(
            lambda a: (
                a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.inexact) else a
            ),
            (x, packed, dy),
        )
        wanted = jax.jit(run, static_argnums=0)(exact, *wide)
        for name, a, b in zip(("y", "dx", "dvalues"), found, wanted, strict=False):
            size = max(1.0, float(jnp.abs(b).max()))
            error = float(jnp.abs(a.astype(jnp.float32) - b).max()) / size
            if not error <= TOLERANCE[dtype]:  # NaN fails
                wrong.append(f"{backend} {name} {dtype} {shape}: error {error:.1e}")
    print(f"{len(cases)} cases, {len(wrong)} wrong results", flush=True)
    return wrong


# --- times ----------------------------------------------------------------------------


def time_calls(programs: dict[str, tuple], count: int) -> dict[str, list[float]]:
    """Seconds of a call, in rounds in which programs take turns; each holds `count`."""
    repeats = {}
    for name, (program, arguments) in programs.items():
        jax.block_until_ready(program(*arguments))
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        took = time.perf_counter() - start
        repeats[name] = max(1, min(50, math.ceil(3e-3 / took)))
    found = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, (program, arguments) in programs.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                out = program(*arguments)
            jax.block_until_ready(out)
            took = time.perf_counter() - start
            found[name].append(took / repeats[name] / count)
    return found


def repeated(f: Callable) -> Callable:
    """Calls `f` with each set of arguments; nothing is shared between calls."""

    def g(sets):
        return [f(*jax.lax.optimization_barrier(arguments)) for arguments in sets]

    return jax.jit(g)


class Case(NamedTuple):
    """A product to be timed."""

    size: int
    block: int
    sparsity: float
    m: int
    dtype: str = "bfloat16"

    @property
    def count(self) -> int:
        """Calls in one program."""
        return 16 if self.m <= 256 and self.size > 256 else 4

    @property
    def blocks(self) -> int:
        """That are kept."""
        return max(1, round((1 - self.sparsity) * (self.size // self.block) ** 2))

    def limit(self, backward: bool) -> float:
        """Seconds that the GPU cannot do without."""
        kept = self.blocks * self.block**2
        operations = 2 * self.m * kept * (3 if backward else 1)
        activations = self.m * self.size * (4 if backward else 2)
        numbers = activations + kept * (3 if backward else 1)
        return max(operations / FLOPS, numbers * jnp.dtype(self.dtype).itemsize / BYTES)


def pattern(case: Case) -> BlockSparseArray:
    """Exactly as many blocks as the sparsity says, at random; the values are missing."""
    random = np.random.default_rng(0)
    side = case.size // case.block
    taken = np.zeros(side * side, bool)
    taken[random.choice(taken.size, case.blocks, replace=False)] = True
    small = taken.reshape(side, side)
    packed = jp.formats.pack(jnp.ones((side, side)), jnp.asarray(small), jp.Block(1, 1))
    layout = dataclasses.replace(packed.layout, shape=(case.size, case.size))
    return dataclasses.replace(packed, layout=layout)


def compiled(case: Case, product: Callable, backward: bool) -> dict[str, tuple]:
    """The sparse and the dense program, and the shapes of the arguments of a call."""

    def gradients(f, x, w, dy):
        if not backward:
            return f(x, w)
        y, back = jax.vjp(f, x, w)
        return y, *back(dy)

    place = pattern(case)

    # The places are arguments like the values: of constants XLA would know the sums.
    def sparse(x, values, dy, rows, columns, by_row):
        fields = dataclasses.replace(place, rows=rows, columns=columns, by_row=by_row)

        def f(x, values):
            return product(x, dataclasses.replace(fields, values=values))

        return gradients(f, x, values, dy)

    b, size = case.block, case.size
    x = jax.ShapeDtypeStruct((case.m, size), case.dtype)
    values = jax.ShapeDtypeStruct((case.blocks, b, b), case.dtype)
    w = jax.ShapeDtypeStruct((size, size), case.dtype)
    of_sparse = (x, values, x, place.rows, place.columns, place.by_row)
    of_dense = (x, w, x)

    def compile_(f, arguments):
        return repeated(f).lower(abstract([arguments] * case.count)).compile()

    key = size, case.m, case.dtype, backward
    if key not in _DENSE:
        _DENSE[key] = compile_(functools.partial(gradients, jnp.dot), of_dense)
    return {
        "sparse": (compile_(sparse, of_sparse), of_sparse),
        "dense": (_DENSE[key], of_dense),
    }


_DENSE = {}


def random_arrays(arguments, count):
    """`count` sets of arrays of these shapes; arrays stay as they are."""
    key = jax.random.key(0)

    def make(a):
        if not isinstance(a, jax.ShapeDtypeStruct):
            return [jnp.array(a) for _ in range(count)]
        nonlocal key
        key, part = jax.random.split(key)
        one = jax.random.normal(part, a.shape, a.dtype)
        return [one, *(one + jnp.zeros_like(one) for _ in range(count - 1))]

    return list(zip(*(make(a) for a in arguments), strict=True))


def abstract(sets):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), sets)


def time_cases(
    cases: list[Case], product: Callable, backward: bool, until: float
) -> list[Row]:
    """Times each of them until time is up; compiles a number of them side by side."""

    def prepared(case):
        return compiled(case, product, backward) if time.time() < until else None

    rows, together = [], 16
    for first in range(0, len(cases), together):
        some = cases[first : first + together]
        # Nothing is compiled while another is timed: XLA tries out dense products.
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            ready = list(pool.map(prepared, some))
        for number, (case, found) in enumerate(zip(some, ready, strict=True)):
            if found is None or time.time() > until:
                left = len(cases) - first - number
                print(f"no time for {left} of {len(cases)} cases", flush=True)
                return rows
            sets = {n: random_arrays(a, case.count) for n, (_, a) in found.items()}
            took = time_calls({n: (found[n][0], (sets[n],)) for n in found}, case.count)
            ratios = [d / s for d, s in zip(took["dense"], took["sparse"], strict=True)]
            rows.append(
                Row(
                    case.size, case.block, case.sparsity, case.m,
                    statistics.median(took["sparse"]), case.limit(backward),
                    statistics.median(ratios),
                )
            )  # fmt: skip
    return rows


def table(title: str, rows: list[Row]) -> str:
    """A row a pattern and a column a number of rows of x."""
    parts = [f"## {title}", ""]
    parts.append(
        "Microseconds, share of the limit, and how many times as fast as dense."
    )
    for size in sorted({row.size for row in rows}):
        of_size = [row for row in rows if row.size == size]
        counts = sorted({row.m for row in of_size})
        head = " | ".join(f"M = {m}" for m in counts)
        parts += ["", f"K = N = {size}", "", f"| block | sparsity | {head} |"]
        parts += ["|---|---|" + "---|" * len(counts)]
        for block, sparsity in sorted({(row.block, row.sparsity) for row in of_size}):
            cells = []
            for m in counts:
                here = [r for r in of_size if r[1:4] == (block, sparsity, m)]
                cells += [
                    f"{r.seconds * 1e6:.1f}, {r.limit / r.seconds:.0%}, **{r.ratio:.2f}×**"
                    for r in here
                ] or [""]
            parts.append(f"| {block} | {sparsity:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(parts) + "\n"


def cases_of(settings: Settings, blocks, sparsities=SPARSITIES) -> list[Case]:
    """Large ones first, in case that time runs out."""
    return [
        Case(size, block, sparsity, m)
        for block in blocks
        for size in settings.sizes
        for m in sorted(settings.rows, reverse=True)
        for sparsity in sparsities
        if size >= 2 * block
    ]


# --- jobs: each gives what is wrong, and its tables -------------------------------------


def block_sparse(settings: Settings, backward: bool) -> tuple[list[str], str]:
    """The kernel that is chosen by default."""
    wrong = check_block_sparse(settings, settings.backend, backward)
    if wrong:
        return wrong, ""

    def product(x, packed):
        return jp.kernels.block_sparse_matmul(x, packed, backend=settings.backend)

    cases = cases_of(settings, settings.blocks)
    rows = time_cases(cases, product, backward, settings.until)
    what = "forward and backward" if backward else "forward"
    return [], table(f"Block-sparse product, bfloat16, {what}", rows)


def forward(settings: Settings) -> tuple[list[str], str]:
    """`x @ W`."""
    return block_sparse(settings, backward=False)


def backward(settings: Settings) -> tuple[list[str], str]:
    """With both gradients."""
    return block_sparse(settings, backward=True)


def plain(settings: Settings) -> tuple[list[str], str]:
    """What XLA makes of the same product."""
    wrong = check_block_sparse(settings, "xla", backward=True)

    def product(x, packed):
        return jp.kernels.block_sparse_matmul(x, packed, backend="xla")

    tables = []
    for dtype in ("bfloat16", "float32"):
        cases = [
            Case(settings.sizes[0], block, 0.9, m, dtype)
            for block in settings.blocks[:2]
            for m in settings.rows
            if settings.sizes[0] >= 2 * block
        ]
        half = (settings.until - time.time()) / (2 if dtype == "bfloat16" else 1)
        rows = time_cases(cases, product, False, time.time() + half)
        tables.append(table(f"Block-sparse product by XLA, {dtype}, forward", rows))
    return wrong, "\n".join(tables)


def tiles(settings: Settings) -> tuple[list[str], str]:
    """The same product with other tiles than are chosen."""
    from jaxprune.kernels.block_sparse_matmul import gpu

    parts = ["## Tiles of the forward product, blocks of 128, 90 %", ""]
    parts += [
        "Rows, columns and stages: microseconds. The first is what is chosen.",
        "",
    ]
    for size in settings.sizes:
        for m in (8192, 2048, 16):
            case = Case(size, 128, 0.9, m)
            chosen = gpu.choose_tile(m, size // 128, 128)
            others = [(256, 128, 4), (256, 128, 3), (256, 64, 4)]
            others += [(128, 128, 6), (128, 128, 5), (128, 128, 4), (128, 64, 8)]
            others += [(128, 64, 6), (64, 128, 6), (64, 64, 8), (64, 64, 4)]
            cells = []
            for tile in dict.fromkeys([chosen, *(gpu.Tile(*t) for t in others)]):
                if time.time() > settings.until:
                    break
                if tile.rows > max(64, 2 * m):
                    continue

                def product(x, packed, tile=tile):
                    order = jnp.arange(packed.capacity, dtype=jnp.int32)
                    missing = -x.shape[0] % tile.rows
                    return gpu.matmul(
                        jnp.pad(x, ((0, missing), (0, 0))), packed.values, order,
                        packed.rows, packed.columns, packed.grid[1], tile=tile,
                    )  # fmt: skip

                try:
                    rows = time_cases([case], product, False, settings.until)
                except Exception as problem:
                    cells.append(f"{tuple(tile)}: {str(problem).splitlines()[0][:60]}")
                else:
                    cells += [f"{tuple(tile)}: {r.seconds * 1e6:.1f}" for r in rows]
            parts.append(f"- K = N = {size}, M = {m}: " + "; ".join(cells))
    return [], "\n".join(parts) + "\n"


def nm(settings: Settings) -> tuple[list[str], str]:
    """Products of few rows with N:M weights, which are decoded on the way."""
    kinds = ((2, 4), (1, 4))
    wrong = []
    cases = [(nm_shapes.WIDE[0], "float16"), (nm_shapes.WIDE[3], "bfloat16")]
    if settings.backend == "gpu":
        cases += [(shape, "bfloat16") for shape in nm_shapes.WIDE]
    for number, (shape, dtype) in enumerate(cases):
        rows, k, cols, n, m, stride = shape
        structure = jp.NM(n, m, stride=stride)
        random = np.random.default_rng(number)
        x, w = (
            jnp.asarray(random.standard_normal(s), dtype)
            for s in ((rows, k), (k, cols))
        )
        mask = structure.best("w", jnp.abs(w).astype(jnp.float32))
        packed = jp.formats.pack(w, mask, structure)
        product = functools.partial(jp.kernels.nm_matmul, backend=settings.backend)
        found = jax.jit(product)(x, packed).astype(jnp.float32)
        dense = nm_reference.dense(packed).astype(jnp.float32)
        wanted = jnp.matmul(x.astype(jnp.float32), dense, precision="highest")
        error = float(jnp.abs(found - wanted).max() / jnp.abs(wanted).max())
        if not error <= TOLERANCE[dtype]:  # NaN fails
            wrong.append(f"nm_matmul {dtype} {shape}: error {error:.1e}")
    print(f"{len(cases)} cases, {len(wrong)} wrong results", flush=True)
    if wrong:
        return wrong, ""
    rows = [1, 4, 16, 64] if settings.backend == "gpu" else [1, 64]
    parts = ["## N:M product, bfloat16", ""]
    parts += [
        "Microseconds, share of the limit, and how many times as fast as dense.",
        "",
    ]
    parts += ["| K = N | kept | " + " | ".join(f"M = {m}" for m in rows) + " |"]
    parts += ["|---|---|" + "---|" * len(rows)]
    for size in settings.sizes:
        for n, m in kinds:
            cells = []
            for count in rows:
                if time.time() > settings.until:
                    print(f"no time for {size}, {n}:{m}, M = {count}", flush=True)
                    continue
                cells.append(time_nm(settings, size, n, m, count))
            parts.append(f"| {size} | {n}:{m} | " + " | ".join(cells) + " |")
    return [], "\n".join(parts) + "\n"


def time_nm(settings: Settings, size: int, n: int, m: int, rows: int) -> str:
    """A cell of the table."""
    count = 16 if size > 256 else 4
    structure = jp.NM(n, m)
    w = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    mask = structure.best("w", jnp.abs(w).astype(jnp.float32))
    packed = jp.formats.pack(w, mask, structure)
    x = jax.ShapeDtypeStruct((rows, size), jnp.bfloat16)

    def sparse(x, values, codes):
        again = dataclasses.replace(packed, values=values, codes=codes)
        return jp.kernels.nm_matmul(x, again, backend=settings.backend)

    operands = {
        "sparse": (sparse, (x, packed.values, packed.codes)),
        "dense": (jnp.dot, (x, w)),
    }
    programs = {}
    for name, (f, arguments) in operands.items():
        programs[name] = (repeated(f), (random_arrays(arguments, count),))
    took = time_calls(programs, count)
    ratio = statistics.median(
        d / s for d, s in zip(took["dense"], took["sparse"], strict=True)
    )
    seconds = statistics.median(took["sparse"])
    limit = max((packed.nbytes + 4 * rows * size) / BYTES, 2 * rows * size**2 / FLOPS)
    return f"{seconds * 1e6:.1f}, {limit / seconds:.0%}, **{ratio:.2f}×**"


# Name: the job, and its share of the time in seconds. Another kernel is another line.
JOBS = {
    "nm": (nm, 60),
    "block_sparse_forward": (forward, 150),
    "block_sparse_backward": (backward, 150),
    "block_sparse_xla": (plain, 50),
    "block_sparse_tiles": (tiles, 50),
}


def run_job(name: str, arguments) -> int:
    """Here, in this process."""
    job, seconds = JOBS[name]
    until = time.time() + seconds * 0.85
    rows = 16, 64, 256, 2048, 8192
    settings = Settings("gpu", (4096, 8192), rows, (128, 64, 256), until)
    if arguments.dry_run:
        settings = Settings("xla", (256,), (16, 64), (64,), math.inf)
    device = jax.devices("cpu" if arguments.dry_run else "cuda")[0]
    head = f"{device.device_kind}, JAX {jax.__version__}\n\n"
    print(head, flush=True)
    try:
        wrong, text = job(settings)
    except Exception:
        wrong, text = [traceback.format_exc()], ""
    if text:
        (arguments.out / f"{name}.md").write_text(head + text)
        print(text)
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


def main() -> int:
    """One process a job, so that what goes wrong in one stays there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/gpu"))
    parser.add_argument("--dry-run", action="store_true", help="small sizes, on a CPU")
    parser.add_argument("--only", choices=JOBS, help="one job, in this process")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only:
        return run_job(arguments.only, arguments)
    failed = []
    for name, (_, seconds) in JOBS.items():
        if arguments.dry_run and name == "block_sparse_tiles":
            continue
        print(f"\n# {name}", flush=True)
        command = [
            sys.executable,
            __file__,
            "--only",
            name,
            "--out",
            str(arguments.out),
        ]
        command += ["--dry-run"] * arguments.dry_run
        try:
            limit = None if arguments.dry_run else seconds + 10
            status = subprocess.run(command, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            status = "no answer in time"
        if status:
            failed.append(f"{name} ({status})")
    print("\nAll checks passed." if not failed else f"\nFAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
