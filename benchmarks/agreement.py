r"""Whether devices and processes change what comes out, for each family of methods.

    python benchmarks/agreement.py [--only rigl wanda] [--steps 200] [--ulps 1]

A small residual network is trained with each method on one device, and on meshes of 2 to 8
virtual devices in 1, 2 and 4 processes (`jax.distributed`, with gloo between them). Weights
are divided over the axes `fsdp` and `tensor`, and rows of the batch over `data` and `fsdp`;
each process makes its own rows. Three things are compared with the one device:

*equal masks*: after three updates of the method with given weights and gradients; for masks
of one shot, by the magnitudes of given weights. They must be the same bit for bit, and so
must be weights *packed* with them: each shard packs its own part, and one device packs the
whole in as many parts.

*loss*: the largest relative difference over a training run, or of the pruned model. Sums
over devices are made in another order, so that losses agree to rounding, and so do the
scores that come out of them.

*masks*: the share of weights on which the final masks agree.

One column is one device again, with half of the weights, drawn at random, larger by an
ulp: what rounding alone does to a method. Of several draws (`--ulps`) it has the worst.
"""

import argparse
import collections
import contextlib
import functools
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

D, F, LAYERS, OUTPUTS = 64, 128, 2, 32
ROWS, BATCHES = 64, 8
WEIGHTS = {
    "up": ((LAYERS, D, F), (None, "fsdp", "tensor")),
    "down": ((LAYERS, F, D), (None, "tensor", "fsdp")),
    "readout": ((D, OUTPUTS), ("fsdp", "tensor")),
}
ROW_AXES = ("data", "fsdp")
MESHES = {1: (1, 1, 1), 2: (1, 2, 1), 4: (1, 2, 2), 8: (2, 2, 2)}
# processes, devices in all, kind of mesh
LAYOUTS = [
    (1, 2, "explicit"),
    (1, 4, "auto"),
    (1, 8, "explicit"),
    (2, 8, "auto"),
    (4, 8, "explicit"),
]


def methods(steps):
    """A function of the parameters for each; the keys of random methods are made here."""
    key, end, every = jax.random.key(0), 3 * steps // 4, steps // 10
    roles = jp.Roles(mlp_in="up/kernel", mlp_out="down/kernel")
    ramp = {"begin": 0, "end": end, "every": every}
    nm = jp.NM(2, 4)

    def hidden(params):
        return jp.Groups.along({"hidden": {"up/kernel": 2, "down/kernel": 1}}, params)

    def some(params):
        return jp.prune(params, 0.5, score=functools.partial(jp.scores.random, key=key))

    found = {
        "static": lambda _: jp.static(0.8, key=key, allocation="erk"),
        "set": lambda _: jp.set_(0.8, key=key, **ramp),
        "rigl": lambda _: jp.rigl(0.8, key=key, **ramp),
        "granet": lambda _: jp.granet(0.8, **ramp),
        "chts": lambda _: jp.chts(0.8, key=key, **ramp),
        "gmp": lambda _: jp.gmp(0.8, **ramp),
        "gmp, global": lambda _: jp.gmp(0.8, allocation="global", **ramp),
        "gmp, 2:4": lambda _: jp.gmp(0.5, structure=nm, **ramp),
        "gmp, blocks": lambda _: jp.gmp(0.75, structure=jp.Block(8, 8), **ramp),
        "gmp, channels": lambda _: jp.gmp(0.5, structure=jp.Channel(), **ramp),
        "acdc": lambda _: jp.acdc(0.8, **ramp),
        "iss_p": lambda _: jp.iss_p(0.8, end=end, every=every),
        "mask_sparsity": lambda _: jp.mask_sparsity(0.8, begin=0, end=end),
        "neuroprune": lambda _: jp.neuroprune(
            0.5, roles=roles, end=end, every=every),
        "hesso": lambda p: jp.hesso(hidden(p), 0.5, begin=0, end=end),
        "hesso_cric": lambda p: jp.hesso_cric(
            hidden(p), 0.5, begin=0, end=end, samples=every, cycles=2),
        "dhspg": lambda p: jp.dhspg(hidden(p), 0.5, begin=0, end=end),
        "ste": lambda _: jp.ste(0.8, every=every),
        "sr_ste, 2:4": lambda _: jp.sr_ste(structure=nm, every=every),
        "mdgf": lambda _: jp.mdgf(
            0.8, leak=jp.schedules.linear(0.0, 0, end, initial=1.0), every=every),
        "sdgf": lambda _: jp.sdgf(jp.NM(1, 4), end=end, every=every),
        "top_kast": lambda _: jp.top_kast(0.8, backward=0.5, every=every),
        "pdp": lambda _: jp.pdp(0.8, begin=0, end=end // 2, harden=end, every=every),
        "soft_top_k": lambda _: jp.soft_top_k(0.8, end=end // 2, harden=end, every=every),
        "task": lambda p: jp.training.task(some(p)[1]),
    }  # fmt: skip
    return found


def one_shot():
    """`(params, loss, model, batches) -> params, masks`, by name."""

    def by(score):
        def pruned(params, loss, model, batches):
            scores = score(loss, params, *batches)
            return jp.prune(params, 0.8, score=scores, allocation="global")

        return pruned

    def driver(method, **options):
        def pruned(params, loss, model, batches):
            inputs = [x for x, _ in batches]
            return jp.posttrain.prune(model, params, inputs, method=method, **options)[
                :2
            ]

        return pruned

    post = jp.posttrain
    return {
        "snip": by(jp.scores.snip),
        "grasp": by(jp.scores.grasp),
        "posttrain magnitude": driver(post.magnitude(), sparsity=0.6),
        "wanda, 2:4": driver(post.wanda(), structure=jp.NM(2, 4)),
        "ria": driver(post.ria(), sparsity=0.6),
        "sparsegpt": driver(post.sparsegpt(), sparsity=0.6),
        "sparsegpt, 2:4": driver(post.sparsegpt(), structure=jp.NM(2, 4)),
        "alps": driver(post.alps(), sparsity=0.6),
    }


def equal_scores():
    """Structures for masks of given scores, whose weights are packed too."""
    return {
        "bitmap": (jp.Unstructured(), 0.8, "uniform"),
        "bitmap, global": (jp.Unstructured(), 0.8, "global"),
        "2:4": (jp.NM(2, 4), 0.5, "uniform"),
        "blocks": (jp.Block(8, 8), 0.75, "uniform"),
    }


class Place:
    """Where arrays lie: on a mesh of either kind, or on the one device."""

    def __init__(self, devices: int, kind: str):
        self.mesh = None
        self.explicit = kind == "explicit"
        self.draw = int(kind.partition("-")[2]) if "perturbed" in kind else None
        if devices > 1:
            axis = AxisType.Explicit if self.explicit else AxisType.Auto
            self.mesh = jax.make_mesh(
                MESHES[devices], ("data", "fsdp", "tensor"), (axis,) * 3
            )

    def make(self, x: np.ndarray, *spec) -> jax.Array:
        """An array of which each process makes what its devices hold."""
        if self.mesh is None:
            return jnp.asarray(x)
        sharding = NamedSharding(self.mesh, P(*spec))
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    def like(self, x: jax.Array, *spec) -> jax.Array:
        """Moved so, inside of a function."""
        if self.mesh is None:
            return x
        sharding = NamedSharding(self.mesh, P(*spec))
        if self.explicit:
            return jax.reshard(x, sharding)
        return jax.lax.with_sharding_constraint(x, sharding)

    def product(self, spelled: str, x: jax.Array, w: jax.Array, *spec) -> jax.Array:
        """A product whose contracted axis may lie on several devices."""
        if self.mesh is None or not self.explicit:
            return self.like(jnp.einsum(spelled, x, w), *spec)
        return jnp.einsum(
            spelled, x, w, out_sharding=NamedSharding(self.mesh, P(*spec))
        )

    def whole(self, tree):
        """On this host, as NumPy arrays."""
        if self.mesh is None:
            return jax.tree.map(np.asarray, tree)
        everywhere = NamedSharding(self.mesh, P())
        move = jax.jit(lambda x: x, out_shardings=everywhere)
        return jax.tree.map(lambda x: np.asarray(move(x)), tree)


def forward(place, params, x):
    """Residual layers by `lax.scan`; weights are gathered over `fsdp`."""
    w = {name: leaf["kernel"] for name, leaf in params.items()}

    def product(name, x, w, *last):
        spec = (None if axis == "fsdp" else axis for axis in WEIGHTS[name][1][-2:])
        return place.product("rd,de->re", x, place.like(w, *spec), ROW_AXES, *last)

    def layer(x, weights):
        up, down = weights
        return x + product("down", jnp.tanh(product("up", x, up, "tensor")), down), None

    x, _ = jax.lax.scan(layer, x, (w["up"], w["down"]))
    return product("readout", x, w["readout"], "tensor")


def weights(place, seed):
    random = np.random.default_rng(seed)
    found = {}
    for name, (shape, spec) in WEIGHTS.items():
        w = random.normal(size=shape).astype("f4") / np.float32(shape[-2] ** 0.5)
        w = w.astype(jax.dtypes.canonicalize_dtype("f8"))
        if place.draw is not None:
            more = np.random.default_rng((place.draw, seed)).random(shape) < 0.5
            w = np.where(more, np.nextafter(w, 2 * w), w)
        found[name] = {"kernel": place.make(w, *spec)}
    return found


def numbers(seed):
    random = np.random.default_rng(seed)
    dtype = jax.dtypes.canonicalize_dtype("f8")
    return (
        random.normal(size=(ROWS, D)).astype(dtype),
        random.normal(size=(ROWS, OUTPUTS)).astype(dtype),
    )


def problem(place):
    """A loss, its batches, and the model alone."""
    model = functools.partial(forward, place)
    teacher = jax.jit(model)

    def loss(params, batch):
        x, y = batch
        return jnp.mean((model(params, x) - y) ** 2)

    batches = []
    truth = weights(place, 1)
    for i in range(BATCHES):
        x, noise = (place.make(a, ROW_AXES) for a in numbers(10 + i))
        batches.append((x, teacher(truth, x) + 0.1 * noise))
    return loss, batches, model


def train(place, method, steps):
    """Masks of equal scores; then losses of each step, and the masks at the end."""
    loss, batches, _ = problem(place)
    params = weights(place, 0)
    tx = jp.masked(optax.adamw(3e-3), method(params))

    @jax.jit
    def gradients(params, state, batch):
        return jax.value_and_grad(lambda p: loss(jp.sparse_params(p, state), batch))(
            params
        )

    @jax.jit
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    given = jax.tree.map(lambda w: w * w - 0.5 * w, params)
    for _ in range(3):
        _, state = update(given, state, params)
    same = jp.get_masks(state)

    state = tx.init(params)
    losses = []
    for i in range(steps):
        value, grads = gradients(params, state, batches[i % BATCHES])
        params, state = update(grads, state, params)
        losses.append(float(value))
    return same, losses, jp.get_masks(state)


def packs_alike(place, params, masks, structure=None) -> bool:
    """Whether packing in shards gives the bits of packing the whole in the same parts.

    In the format of the structure; as a bitmap with room for all where there is none, so
    that one program does for all methods.
    """
    found = []
    for name, leaf in params.items():
        w, mask = leaf["kernel"], masks[name]["kernel"]
        if mask is None or place.mesh is None:
            continue
        options = {} if structure else {"capacity": w.shape[-2] * w.shape[-1]}
        pack = functools.partial(jp.formats.pack, **options)
        here = pack(w, mask, structure or jp.Unstructured())
        w, mask = map(jnp.asarray, place.whole((w, mask)))
        parts = here.layout.parts
        there = pack(w, mask, structure or jp.Unstructured(), parts=parts)
        found += jax.tree.map(
            equal_bits, *map(jax.tree.leaves, (place.whole(here), there))
        )
        found.append(
            equal_bits(place.whole(jp.formats.unpack(here)), jnp.where(mask, w, 0))
        )
    return all(found)


def equal_bits(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def work(args, place):
    """What one process does; process 0 writes what came out."""
    out: dict[str, np.ndarray] = {}

    def keep(name, what, tree):
        for i, x in enumerate(jax.tree.leaves(place.whole(tree))):
            out[f"{name}|{what}|{i:03}"] = np.packbits(x) if x.dtype == bool else x

    def wanted(name):
        return not args.only or name in args.only

    for name, method in methods(args.steps).items():
        if not wanted(name):
            continue
        start = time.perf_counter()
        same, losses, masks = train(place, method, args.steps)
        keep(name, "same", same)
        out[f"{name}|packed|"] = packs_alike(place, weights(place, 0), same)
        out[f"{name}|losses|"] = np.asarray(losses)
        keep(name, "masks", masks)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    for name, (structure, sparsity, allocation) in equal_scores().items():
        if not wanted(name):
            continue
        start = time.perf_counter()
        params, masks = jp.prune(
            weights(place, 0), sparsity, structure=structure, allocation=allocation
        )
        keep(name, "same", masks)
        out[f"{name}|packed|"] = packs_alike(place, params, masks, structure)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    chosen = {name: f for name, f in one_shot().items() if wanted(name)}
    if chosen:
        loss, batches, model = problem(place)
    for name, prune in chosen.items():
        start = time.perf_counter()
        params, masks = prune(weights(place, 0), loss, model, batches[:4])
        out[f"{name}|losses|"] = np.asarray([float(jax.jit(loss)(params, batches[-1]))])
        keep(name, "masks", masks)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    if args.process == 0:
        np.savez(f"{args.out}.part.npz", **out)
        os.replace(f"{args.out}.part.npz", args.out)


def results(path):
    """By name and kind, arrays in order."""
    found = collections.defaultdict(list)
    with np.load(path) as file:
        for key in sorted(file.files):
            name, what, _ = key.split("|")
            found[name, what].append(file[key])
    return found


def compare(one, many):
    """For each name what is equal, and how far apart losses are."""
    rows = {}
    for name in dict.fromkeys(name for name, _ in one):
        row = dict.fromkeys(("same", "packed", "loss", "masks"))
        if (name, "same") in one:
            row["same"] = all(map(equal_bits, one[name, "same"], many[name, "same"]))
            row["packed"] = bool(many[name, "packed"][0])
        if (name, "losses") in one:
            a, b = one[name, "losses"][0], many[name, "losses"][0]
            row["loss"] = float(np.max(np.abs(a - b) / np.abs(a)))
            a, b = (np.concatenate(x[name, "masks"]) for x in (one, many))
            flips = int(np.bitwise_count(a ^ b).sum())
            row["masks"] = 1 - flips / (8 * a.size)
        rows[name] = row
    return rows


def worst(tables):
    """Of several, what is furthest off."""
    found = {name: dict(row) for name, row in tables[0].items()}
    for name, row in found.items():
        if row["loss"] is not None:
            row["loss"] = max(table[name]["loss"] for table in tables)
            row["masks"] = min(table[name]["masks"] for table in tables)
    return found


def spawn(folder, layout, args):
    """What one layout gives; what is there already is not made again."""
    number, devices, kind = layout
    out = pathlib.Path(folder, f"{number}-{devices}-{kind}.npz")
    if not out.exists():
        command = [
            __file__,
            "--devices",
            str(devices),
            "--kind",
            kind,
            "--out",
            str(out),
        ]
        command += ["--steps", str(args.steps)]
        command += ["--only", *args.only] if args.only else []
        start = time.perf_counter()
        processes.run(
            command, processes=number, devices=devices // number, timeout=args.timeout
        )
        print(layout, f"{time.perf_counter() - start:.0f} s", flush=True)
    return results(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ulps", type=int, default=1, help="draws for one device")
    parser.add_argument("--timeout", type=float, default=3600)
    parser.add_argument("--folder", default="build/agreement", help="of the results")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    processes.arguments(parser)
    args = parser.parse_args()
    if args.out:
        processes.connect(args)
        jax.config.update("jax_disable_most_optimizations", True)  # compiles sooner
        place = Place(args.devices, args.kind)
        with jax.set_mesh(place.mesh) if place.mesh else contextlib.nullcontext():
            work(args, place)
        return
    folder = pathlib.Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    one = spawn(folder, (1, 1, "auto"), args)
    # One device too, and each weight an ulp or none larger: what rounding does.
    drawn = [(1, 1, f"perturbed-{i}") for i in range(args.ulps)]
    alone = worst([compare(one, spawn(folder, layout, args)) for layout in drawn])
    meshes = {x: compare(one, spawn(folder, x, args)) for x in LAYOUTS}
    head = "1 × 1, weights off by an ulp"
    report(head if args.ulps == 1 else f"{head}, worst of {args.ulps}", alone, meshes)


def report(head, alone, meshes):
    """A row a method; the first column is what one device makes of rounding."""
    heads = [head, *(f"{x[0]} × {x[1] // x[0]}, {x[2]}" for x in meshes)]
    print("| method | equal masks | packed | " + " | ".join(heads) + " |")
    print("|---|---|---|" + "---|" * len(heads))
    words = {None: "-", True: "yes", False: "**no**"}
    for name in alone:
        rows = [table[name] for table in meshes.values()]
        said = []
        for what in ("same", "packed"):
            found = [r[what] for r in rows]
            said.append(words[None if None in found else all(found)])
        cells = [
            "-" if r["loss"] is None else f"{r['loss']:.0e}, {100 * r['masks']:.3f} %"
            for r in (alone[name], *rows)
        ]
        print(f"| {name} | " + " | ".join([*said, *cells]) + " |")


if __name__ == "__main__":
    main()
