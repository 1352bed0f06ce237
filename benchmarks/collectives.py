"""What moves between devices, read off the programs that XLA compiled.

Every function runs on eight virtual CPU devices with a weight of 256 x 512 float32 that is
sharded in several ways, and once on one device. XLA writes down each program that it
compiles for it, also those of single operations; the table counts their collectives. A
collective in a loop is counted once.

    python benchmarks/collectives.py > benchmarks/results/collectives.md

Columns: the number of collectives of each kind; the bytes of the largest result of one, as
a share of the bytes that a device has of the weight; whether masks and weights lie as the
weight does; and whether they, and all else that comes back, have the same bits as on one
device, or agree to rounding (1e-4 of the largest number).

Expected before measuring: nothing but counts for masks and packing along whole groups and
blocks; the weight along K, once, where groups or blocks straddle devices; sums of results
for kernels with K sharded, and the weight itself, once, where rows of x take up its axes of
the mesh.
"""

import argparse
import collections
import functools
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile
import traceback

DUMP = tempfile.mkdtemp()
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "PJRT_NPROC": "32",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
    f"--xla_dump_to={DUMP} --xla_dump_hlo_as_text "
    "--xla_dump_hlo_module_re=.* --xla_cpu_use_fusion_emitters=false",
}

import jax  # noqa: E402  (reads the environment)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import jaxprune as jp  # noqa: E402

K, N, M, EXPERTS = 256, 512, 64, 4
KEY = jax.random.key(0)
_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-gather|all-reduce|all-to-all|collective-permute"
    r"|reduce-scatter|collective-broadcast)(?:-start)?\("
)
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5}

# How the weight lies, and how x does where there is one.
SHARDINGS = {
    "K": (P("model", None), P("data", None)),
    "N": (P(None, "model"), P("data", None)),
    "both": (P("data", "model"), P(None, None)),
    "FSDP": (P("data", "model"), P("data", None)),
    "experts": (P("model", None, "data"), P("model", None, None)),
}
STRUCTURES = {
    "unstructured": jp.Unstructured(),
    "2:4": jp.NM(2, 4),
    "blocks": jp.Block(16, 16),
    "channels": jp.Channel(),
}


def shape_of(sharding):
    return (EXPERTS, K, N) if sharding == "experts" else (K, N)


def weights(sharding):
    return jax.random.normal(KEY, shape_of(sharding))


def inputs(sharding):
    shape = (EXPERTS, M, K) if sharding == "experts" else (M, K)
    return jax.random.normal(jax.random.key(1), shape)


class Case:
    """A function of the weight and what else it gets, in a sharding.

    Attributes:
      prepare: arrays, from the name of the sharding: the weight first.
      specs: of these arrays, from the specs of weight and x.
      run: what is counted.
      shardings: in which it runs.
    """

    def __init__(self, prepare, specs, run, shardings=tuple(SHARDINGS)):
        self.prepare, self.specs, self.run = prepare, specs, run
        self.shardings = shardings


@functools.cache
def masked_weights(structure, sharding):
    w = weights(sharding)
    _, masks = jp.prune({"w": w}, 0.5, structure=STRUCTURES[structure])
    return w, masks["w"]


def pruning(structure, allocation="uniform"):
    def run(w):
        return jp.prune({"w": w}, 0.5, structure=structure, allocation=allocation)

    return Case(lambda s: (weights(s),), lambda w, x: (w,), run)


def with_mask(structure, run, shardings=tuple(SHARDINGS)):
    return Case(
        lambda s: masked_weights(structure, s), lambda w, x: (w, w), run, shardings
    )


def packing(structure):
    def run(w, mask):
        return jp.formats.unpack(jp.formats.pack(w, mask, STRUCTURES[structure]))

    return with_mask(structure, run)


def product(name, structure, gradient):
    kernel = getattr(jp.kernels, name)

    def loss(x, *packed):
        return jnp.sum(jnp.sin(kernel(x, *packed)))

    def packed(w, mask, x):
        if name == "masked_matmul":
            return x, w, mask
        return x, jp.formats.pack(w, mask, STRUCTURES[structure])

    def run(*operands):
        if not gradient:
            return jax.jit(kernel)(*operands)
        found = jax.grad(loss, (0, 1), allow_int=True)
        dx, dw = jax.jit(found)(*operands)
        return dx, dw if name == "masked_matmul" else dw.values

    case = Case(
        lambda s: (*masked_weights(structure, s), inputs(s)),
        lambda w, x: (w, w, x),
        run,
    )
    case.ready = packed
    return case


def accelerated():
    def ready(w, mask, x):
        fn = lambda p, x: x @ p["w"]  # noqa: E731
        fast, packed, _ = jp.accelerate(
            fn, {"w": w}, {"w": mask}, x, prefer="memory", slowdown=1e9
        )
        return fast, packed, x

    case = Case(
        lambda s: (*masked_weights("2:4", s), inputs(s)),
        lambda w, x: (w, w, x),
        lambda fast, packed, x: jax.jit(fast)(packed, x),
        ("N", "FSDP"),
    )
    case.ready = ready
    return case


def mlp(params, x):
    h = jax.nn.relu(jnp.einsum("mk,kn->mn", x, params["up"]))
    rows = jax.typeof(h).sharding
    mesh = rows.mesh
    out = {"out_sharding": P(rows.spec[0])} if mesh.explicit_axes else {}
    return jnp.einsum("mn,nk->mk", h, params["down"], **out)


def two_layers(s):
    w = weights(s)
    return w, 0.1 * jax.random.normal(jax.random.key(2), (N, K)), inputs(s)


def two_specs(w, x):
    return w, P(*reversed(w)), x


DENSE = ("K", "N", "FSDP")


def one_shot(method, structure):
    def run(up, down, x):
        params = {"up": up, "down": down}
        return jp.posttrain.prune(
            mlp, params, [x], method=method(), sparsity=0.5, structure=structure
        )[:2]

    return Case(two_layers, two_specs, run, ("N", "FSDP"))


def calibration(statistic):
    def run(up, down, x):
        params = {"up": up, "down": down}
        return jp.calibrate(mlp, params, [x], statistics=(statistic,))

    return Case(two_layers, two_specs, run, ("N", "FSDP"))


def structured(what):
    def run(up, down, x):
        params = {"up": up, "down": down}
        graph = jp.structured.trace(mlp, params, x)
        scores = jp.structured.score_groups(graph, params, "l2")
        if what == "score_groups":
            return scores
        plan = jp.structured.plan(graph, scores, ratio=0.5)
        if what == "shrink_state":
            state = optax.adam(1e-3).init(params)
            return plan.shrink_state(state, params)
        return getattr(plan, what)(params)

    return Case(two_layers, two_specs, run, ("N", "FSDP"))


def training(method):
    def run(w):
        params = {"w": w}
        tx = jp.masked(optax.sgd(0.1), method)
        state = tx.init(params)
        step = jax.jit(lambda p, s: tx.update(jax.tree.map(jnp.cos, p), s, p))
        _, state = step(params, state)
        return step(params, state)[0], jp.get_masks(state)

    return Case(lambda s: (weights(s),), lambda w, x: (w,), run, ("N", "both"))


RAMP = {"begin": 0, "end": 2}
CASES = {
    **{
        f"`prune`, {name}": pruning(structure) for name, structure in STRUCTURES.items()
    },
    # Under K a device has 64 rows, of which these make half a group or block.
    "`prune`, 2:4 of stride 32": pruning(jp.NM(2, 4, stride=32)),
    "`prune`, blocks of 128 rows": pruning(jp.Block(128, 16)),
    "`prune`, global": pruning(jp.Unstructured(), "global"),
    "`masks.pack`, `unpack`": with_mask(
        "unstructured", lambda w, m: jp.masks.unpack(jp.masks.pack({"w": m}))
    ),
    "`masks.apply`, packed": with_mask(
        "unstructured", lambda w, m: jp.masks.apply({"w": w}, jp.masks.pack({"w": m}))
    ),
    "`masks.count`, `flipped`": with_mask(
        "unstructured", lambda w, m: (jp.masks.count(m), jp.masks.flipped(m, w > 0))
    ),
    **{
        f"`formats.pack`, `unpack`, {name}": packing(name)
        for name in ("unstructured", "2:4", "blocks")
    },
    **{
        f"`{name}`{', gradient' if gradient else ''}": product(
            name, structure, gradient
        )
        for name, structure in (
            ("nm_matmul", "2:4"),
            ("block_sparse_matmul", "blocks"),
            ("bitmap_matmul", "unstructured"),
            ("masked_matmul", "unstructured"),
        )
        for gradient in (False, True)
    },
    "`accelerate`d function": accelerated(),
    "`calibrate`, square": calibration("square"),
    "`calibrate`, gram": calibration("gram"),
    "`posttrain.prune`, magnitude": one_shot(jp.posttrain.magnitude, jp.Unstructured()),
    "`posttrain.prune`, Wanda": one_shot(jp.posttrain.wanda, jp.Unstructured()),
    "`posttrain.prune`, Wanda 2:4": one_shot(jp.posttrain.wanda, jp.NM(2, 4)),
    "`posttrain.prune`, SparseGPT": one_shot(jp.posttrain.sparsegpt, jp.Unstructured()),
    **{
        f"`structured`, {what}": structured(what)
        for what in ("score_groups", "mask", "shrink", "shrink_state")
    },
    "`analysis.pq_index`": Case(
        lambda s: (weights(s),), lambda w, x: (w,), lambda w: jp.analysis.pq_index(w)
    ),
    "`analysis.degrees`": with_mask(
        "unstructured", lambda w, m: jp.analysis.degrees(m), DENSE
    ),
    **{
        f"step of `{name}` with an update": training(method)
        for name, method in {
            "gmp": jp.gmp(0.5, **RAMP),
            "gmp, 2:4": jp.gmp(0.5, structure=jp.NM(2, 4), **RAMP),
            "rigl": jp.rigl(0.5, key=KEY, every=1, **RAMP),
            "set_": jp.set_(0.5, key=KEY, every=1, **RAMP),
            "granet": jp.granet(0.5, every=1, **RAMP),
            "top_kast": jp.top_kast(0.5, backward=0.25, every=1),
            "pdp": jp.pdp(0.5, harden=3, **RAMP),
            "ste": jp.ste(0.5),
            "chts": jp.chts(0.5, key=KEY, end=9, every=1),
        }.items()
    },
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--only", default="", help="functions whose name has this in it"
    )
    parser.add_argument("--kind", nargs="*", default=["explicit", "auto"])
    parser.add_argument("--errors", action="store_true", help="print tracebacks")
    options = parser.parse_args()
    print(f"`{' '.join(['python', 'benchmarks/collectives.py', *sys.argv[1:]])}`\n")
    print(f"JAX {jax.__version__}, 8 virtual CPU devices, mesh 2 (data) x 4 (model).\n")
    print("| function | mesh | sharding | collectives | largest | lies | bits |")
    print("| -------- | ---- | -------- | ----------- | ------- | ---- | ---- |")
    for name, case in CASES.items():
        if options.only not in name:
            continue
        for kind in options.kind:
            for sharding in case.shardings:
                try:
                    row = measure(case, sharding, kind)
                except Exception as e:
                    if options.errors:
                        traceback.print_exc()
                    reason = f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"
                    row = [reason.replace("|", "/"), "", "", ""]
                print(
                    f"| {name} | {kind} | {sharding} | {' | '.join(row)} |", flush=True
                )


def measure(case, sharding, kind):
    plain = case.prepare(sharding)
    wanted = None
    ready = getattr(case, "ready", lambda *xs: xs)
    if not hasattr(case, "ready"):
        wanted = case.run(*plain)
    w_spec, x_spec = SHARDINGS[sharding]
    kinds = (getattr(AxisType, kind.title()),) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(plain, case.specs(w_spec, x_spec), strict=True)
        ]
        operands = ready(*placed)
        if wanted is None:
            # The same numbers, packed in the same parts, on one device.
            whole = jax.tree.map(_on_one_device, operands)
    if wanted is None:
        wanted = case.run(*whole)
    jax.clear_caches()
    shutil.rmtree(DUMP)
    pathlib.Path(DUMP).mkdir()
    with jax.set_mesh(mesh):
        found = jax.block_until_ready(case.run(*operands))
    counts, largest = _collectives()
    shard = placed[0].addressable_shards[0].data.nbytes
    told = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "none"
    share = f"{largest / shard:.2f}" if counts else ""
    return [told, share, _lies(found, placed), _bits(found, wanted)]


def _on_one_device(x):
    return jnp.asarray(np.asarray(x)) if isinstance(x, jax.Array) else x


def _collectives():
    counts, largest = collections.Counter(), 0
    for file in pathlib.Path(DUMP).glob("*after_optimizations.txt"):
        for shape, kind in _COLLECTIVE.findall(file.read_text()):
            counts[kind] += 1
            largest = max(largest, sum(map(_size, re.findall(r"\w+\[[\d,]*\]", shape))))
    return counts, largest


def _size(shape):
    dtype, extents = re.fullmatch(r"(\w+)\[([\d,]*)\]", shape).groups()
    each = _BYTES.get(dtype) or int(re.search(r"\d+", dtype)[0]) / 8
    return each * math.prod(int(n) for n in extents.split(",") if n)


def _lies(found, placed):
    """Whether arrays of the shape of an operand lie as that does."""
    like = {x.shape: x.sharding for x in reversed(placed)}
    seen = [
        x.sharding.is_equivalent_to(like[x.shape], x.ndim)
        for x in jax.tree.leaves(found)
        if isinstance(x, jax.Array) and x.shape in like
    ]
    return "" if not seen else "as it did" if all(seen) else "**elsewhere**"


def _bits(found, wanted):
    pairs = list(zip(*map(jax.tree.leaves, (found, wanted)), strict=True))
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in pairs if _is_number(a)]
    if all(np.array_equal(a, b) for a, b in pairs):
        return "same"
    off = total = 0
    for a, b in pairs:
        close = 1e-4 * (np.abs(b.astype(np.float64)).max(initial=0) or 1)
        off += np.sum(np.abs(a.astype(np.float64) - b) > close)
        total += a.size
    return f"{off / total:.1e} differ" if off else "to rounding"


def _is_number(x):
    return getattr(x, "dtype", np.dtype(type(x))) != jax.dtypes.float0


if __name__ == "__main__":
    main()
