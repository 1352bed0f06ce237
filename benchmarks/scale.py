"""What pruning adds on a pod, read from programs that libtpu compiled for chips not there.

For Llama's shapes of 7B, 70B and 405B, on 8 to 512 chips: a training step (float32 weights,
adamw, layers in a scan and recomputed, one sequence of 2,048 tokens for each shard of the
batch) with the bare optimizer and with `jaxprune.masked`; the update alone, from gradients
that are there; and, for one layer, what `posttrain.prune` runs: a calibration step with
Gram matrices, and the solvers on the largest matrix.

Memory is what the compiler reserves on a chip. Collectives are those of the update alone,
where the bare optimizer has none: their bytes on a chip, each as often as it can run (a
search for a threshold ends after 33 passes at the latest, and mostly after 6).

    make build/libtpu
    python benchmarks/scale.py [--only 70B]

Lines are added to `results/scale.jsonl`; what is there is not compiled again. `--table`
prints the table.

Expected before measuring: an update step adds less than a tenth of a chip's weights, since
scores are computed anew in each pass and masks are packed, and some hundred kilobytes of
collectives at most, since only counts are added up between chips; nothing is gathered.
"""

import argparse
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
LIBTPU = HERE.parent / "build" / "libtpu" / "libtpu" / "libtpu.so"
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",  # libtpu does not know those of CPUs, and stops
    "TPU_LIBRARY_PATH": str(LIBTPU),
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax  # noqa: E402  (reads the environment)
import jax.numpy as jnp  # noqa: E402
import jsonl  # noqa: E402
import llama_shapes  # noqa: E402
import optax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import jaxprune as jp  # noqa: E402
from jaxprune import posttrain, tracing  # noqa: E402
from jaxprune.calibration import Inputs, _calibrate  # noqa: E402

RESULTS = HERE / "results" / "scale.jsonl"
LENGTH, MIB, PASSES = 2048, 2**20, 33


class Pod(NamedTuple):
    """Chips, and how a model lies on them.

    Attributes:
      topology: of libtpu.
      mesh: sizes of data, fsdp and tensor.
    """

    topology: str
    mesh: tuple[int, int, int]


PODS = {
    "7B": (Pod("v5e:2x4", (1, 8, 1)), Pod("v6e:4x4", (1, 8, 2))),
    "70B": (Pod("v5e:16x16", (1, 32, 8)), Pod("v5p:4x8x8", (2, 32, 4))),
    "405B": (Pod("v5p:4x8x8", (1, 32, 8)), Pod("v5p:8x8x8", (1, 64, 8))),
}

RAMP = {"begin": 100, "end": 900, "every": 20}
METHODS: dict[str, Callable[[], Any]] = {
    "fixed masks": lambda: jp.static(0.9),
    "GMP": lambda: jp.gmp(0.9, **RAMP),
    "GMP, global": lambda: jp.gmp(0.9, allocation="global", **RAMP),
    "GMP, 2:4": lambda: jp.gmp(
        0.5, structure=jp.NM(2, 4, axis=llama_shapes.CONTRACTED), **RAMP
    ),
    "SET": lambda: jp.set_(0.9, key=jax.random.key(0), **RAMP),
    "RigL": lambda: jp.rigl(0.9, key=jax.random.key(0), **RAMP),
    "GraNet": lambda: jp.granet(0.9, **RAMP),
}
# Everywhere; the others for one pod of the 70B only, since each takes a minute to compile.
USUAL = ("GMP", "RigL")


def placed(tree: Any, mesh: Any) -> Any:
    """Shapes that lie as their types say, on the chips."""

    def put(x):
        spec = P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(put, tree)


def shard_bytes(tree: Any) -> int:
    """On one chip."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def programs(config: Any, pod: Pod, names: tuple[str, ...]) -> Iterator[tuple]:
    """Names of what is compiled, and functions that do."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=pod.topology)
    mesh = llama_shapes.mesh(chips.devices, pod.mesh)
    params = llama_shapes.params(config, mesh)
    tokens = llama_shapes.tokens(mesh, LENGTH)

    for name in ("adamw", *names):
        inner = optax.adamw(1e-4)
        tx = inner if name == "adamw" else jp.masked(inner, METHODS[name]())

        def update(grads, state, params, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def step(params, state, tokens, update=update):
            def loss(params):
                return llama_shapes.loss(config, params, tokens)

            value, grads = jax.value_and_grad(loss)(params)
            return value, *update(grads, state, params)

        def compiled(f, *args, donated, tx=tx):
            with jax.set_mesh(mesh):
                state = placed(jax.eval_shape(tx.init, params), mesh)
                args = [state if x is None else x for x in args]
                return jax.jit(f, donate_argnums=donated).lower(*args)

        def run_update(update=update, compiled=compiled):
            return compiled(update, params, None, params, donated=(0, 1, 2))

        def run_step(step=step, compiled=compiled):
            return compiled(step, params, None, tokens, donated=(0, 1))

        weights = shard_bytes(params)
        yield f"{name}, update", weights, run_update
        yield f"{name}, step", weights, run_step

    yield from one_shot(config, pod, chips.devices)


def one_shot(config: Any, pod: Pod, devices: Any) -> Iterator[tuple]:
    """What runs for a layer of `posttrain.prune`, which works on automatic axes."""
    mesh = llama_shapes.mesh(devices, pod.mesh, AxisType.Auto)
    stacked = llama_shapes.params(config, mesh, jnp.bfloat16)["layers"]
    layer = {
        name: jax.ShapeDtypeStruct(
            x.shape[1:],
            x.dtype,
            sharding=NamedSharding(mesh, P(*x.sharding.spec[1:])),
        )
        for name, x in stacked.items()
    }
    rows = NamedSharding(mesh, P(llama_shapes.BATCH, None, None))
    shape = math.prod(pod.mesh[:2]), LENGTH, config.width
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)
    everywhere = NamedSharding(mesh, P())

    def calibration():
        with jax.set_mesh(mesh):
            closed = jax.make_jaxpr(llama_shapes.block)(layer, x)
            where = [name for name, leaf in layer.items() if leaf.ndim > 1]
            trace = tracing.of_jaxpr(closed, layer, where=where)
            step = _calibrate._Step(
                closed, trace, ("gram",), None, frozenset(), str, (layer, (x,))
            )
            stats = jax.tree.map(
                lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere),
                step.empty,
            )
            run = jax.jit(step._step, donate_argnums=0, out_shardings=everywhere)
            operands = [*jax.tree.leaves(layer), x]
            return run.lower(stats, closed.consts, operands, (x,))

    weights = shard_bytes(layer)
    yield "calibration step, Gram matrices", weights, calibration
    # As `prune` lays it: whole columns.
    places = NamedSharding(mesh, P(None, ("fsdp", "tensor")))
    shape, dtype = layer["down"].shape, layer["down"].dtype
    down = jax.ShapeDtypeStruct(shape, dtype, sharding=places)
    rows = shape[0]

    def whole(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=everywhere)

    inputs = Inputs(whole(), square=whole(rows), gram=whole(rows, rows))
    for name, solver in {
        "Wanda, `down`": posttrain.wanda(),
        "SparseGPT, `down`": posttrain.sparsegpt(),
    }.items():
        needed = Inputs(
            inputs.count, **{s: getattr(inputs, s) for s in solver.statistics}
        )

        def run(w, inputs, solver=solver):
            return solver.solve(w, inputs, 0.5, jp.Unstructured())

        def solve(run=run, needed=needed):
            with jax.set_mesh(mesh):
                return jax.jit(run).lower(down, needed)

        yield name, shard_bytes(down), solve


_OP = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip


_GATHERS = ("all-gather", "all-to-all", "collective-permute")


def collectives(text: str) -> dict[str, list[int]]:
    """Number in the program and bytes on a chip, at most, of each kind of collective.

    Of every branch, and as often as loops run: `PASSES` times where that is not known.
    What the compiler does piece by piece, beside other work, has one channel and is one.
    """
    bodies: dict[str, list[re.Match]] = {}
    entry = current = ""
    for line in text.splitlines():
        if line and not line.startswith(" ") and line.rstrip().endswith("{"):
            words = line.split()
            current = words[words[0] == "ENTRY"].lstrip("%")
            entry = current if words[0] == "ENTRY" else entry
            bodies[current] = []
        elif found := _OP.match(line):
            bodies[current].append(found)
    times: dict[str, int] = dict.fromkeys(bodies, 0)

    def visit(name: str, often: int) -> None:
        times[name] += often
        for found in bodies[name]:
            rest = found[4]
            once = re.findall(r"(?:calls|to_apply|true_computation|false_computation)"
                              r"=%?([\w.\-]+)", rest)  # fmt: skip
            for group in re.findall(r"branch_computations=\{([^}]*)\}", rest):
                once += [x.strip().lstrip("%") for x in group.split(",")]
            for child in once:
                visit(child, often)
            parts = dict(re.findall(r"(body|condition)=%?([\w.\-]+)", rest))
            if "body" in parts:
                visit(parts["body"], often * _rounds(bodies[parts["condition"]]))

    visit(entry, 1)
    each: dict[str, dict[str, int]] = {kind: {} for kind in _KINDS}
    for name, instructions in bodies.items():
        for found in instructions:
            kind = found[3].removesuffix("-start")
            if kind in each and times[name]:
                channel = re.search(r"channel_id=(\d+)", found[4])
                key = channel[1] if channel else f"{name} {found[1]}"
                moved = times[name] * _bytes(found[2])
                each[kind][key] = max(moved, each[kind].get(key, 0))
    return {kind: [len(n), sum(n.values())] for kind, n in each.items() if n}


def _rounds(condition: list[re.Match]) -> int:
    """How often a loop runs that counts to a constant; `PASSES` for a search."""
    text = "\n".join(found[0] for found in condition)
    limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", text)
    counts = len(limits) == 1 and re.search(r'op_name="[^"]*while/cond/lt"', text)
    return int(limits[0]) if counts else PASSES


def _bytes(shapes: str) -> int:
    total = 0
    for kind, dims in _SHAPE.findall(shapes):
        bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
        total += math.prod(int(n) for n in dims.split(",") if n) * bits // 8
    return total


def measure(
    weights: int, lower: Callable[[], Any], *, read: bool = True
) -> dict[str, Any]:
    """Compiles; the program is read for its collectives only if asked to."""
    start = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    memory = program.memory_analysis()
    moved: dict[str, list[int]] | None = {}
    if read:
        try:
            moved = collectives(program.as_text())
        except jax.errors.JaxRuntimeError:  # libtpu 0.0.52 cannot write down some
            moved = None
    return {
        "weights": weights,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "collectives": moved,
        "lower_s": round(traced - start, 1),
        "compile_s": round(done - traced, 1),
    }


def table(rows: list[dict]) -> str:
    """Markdown: what each method adds to the step of the bare optimizer."""
    by_name = {row["name"]: row for row in rows}
    lines = [
        "| model, chips | weights a chip, MiB | method | step: temporaries, MiB | added "
        "| of the weights | update alone: temporaries, of the weights | its collectives, KiB "
        "| of which gathers | compiled in, s |",
        "|---" * 10 + "|",
    ]
    for name, row in by_name.items():
        if not name.endswith(", update"):
            continue
        model, topology, method = name.removesuffix(", update").split(", ", 2)
        pod = f"{model}, {topology}"
        step, plain = (by_name.get(f"{pod}, {m}, step") for m in (method, "adamw"))
        share = row["temporaries"] / row["weights"]
        moved = sum(n for _, n in row["collectives"].values()) / 1024
        gathers = sum(row["collectives"].get(k, (0, 0))[0] for k in _GATHERS)
        cells = [pod, f"{row['weights'] / MIB:,.0f}", method]
        if step and plain:
            added = step["temporaries"] - plain["temporaries"]
            cells += [f"{step['temporaries'] / MIB:,.0f}", f"{added / MIB:+,.0f}",
                      f"{added / row['weights']:+.1%}"]  # fmt: skip
        else:
            cells += ["", "", ""]
        seconds = (step or row)["compile_s"]
        cells += [f"{share:.1%}", f"{moved:,.0f}", str(gathers), f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| model, chips | one layer of `posttrain.prune` | weights it reads, a chip, MiB "
        "| temporaries, MiB | collectives, MiB | compiled in, s |",
        "|---" * 6 + "|",
    ]
    for name, row in by_name.items():
        if name.endswith((", update", ", step")):
            continue
        model, topology, program = name.split(", ", 2)
        moved = "not written down by libtpu"
        if row["collectives"] is not None:
            moved = f"{sum(n for _, n in row['collectives'].values()) / MIB:,.0f}"
        lines.append(
            f"| {model}, {topology} | {program} | {row['weights'] / MIB:,.1f} "
            f"| {row['temporaries'] / MIB:,.0f} | {moved} | {row['compile_s']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compiles what is not in the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a part of the row's name")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table(jsonl.read(RESULTS)))
        return
    there = {row["name"] for row in jsonl.read(RESULTS)}
    for model, pods in PODS.items():
        for pod in pods:
            every = model == "70B" and pod == pods[0]
            names = tuple(METHODS) if every else USUAL
            for program, weights, lower in programs(
                llama_shapes.MODELS[model], pod, names
            ):
                name = f"{model}, {pod.topology}, {program}"
                if name in there or options.only not in name:
                    continue
                jsonl.add(
                    RESULTS,
                    {
                        "name": name,
                        **measure(weights, lower, read=not program.endswith(", step")),
                    },
                )


if __name__ == "__main__":
    main()
