r"""Prunes a model that no host could hold, on a mesh of any size, in any number of processes.

    python examples/pod_pruning.py                    # this machine, its devices
    python examples/pod_pruning.py --pod              # the same on each host of a TPU pod

Weights are made where they will lie, each shard by its own device; trained with 2:4 sparsity
that grows group by group; packed in shards; and saved in shards, with one-bit masks. With
`--restore` another run, on as many devices as there are then, reads them back. Every process
makes the rows of the batch that its own devices need, and none holds a whole weight.

Two processes on one machine, with two virtual devices each:

    export XLA_FLAGS=--xla_force_host_platform_device_count=2
    export JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
    for i in 0 1; do
        python examples/pod_pruning.py --coordinator localhost:1234 --processes 2 \
            --process $i &
    done; wait
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

VOCABULARY, WIDTH, HIDDEN, LAYERS = 128, 64, 192, 2
HEADS, KV_HEADS, HEAD = 6, 2, 16  # three query heads share a key and a value
ROWS, TOKENS = 16, 16
STRUCTURE = jp.NM(2, 4)
PARTS = {"fsdp": 4, "tensor": 2}  # what is packed fits meshes whose axes divide these

# Shape of each leaf, and the mesh axes that it is divided over. Layers of the stack are one
# leaf with a leading axis, which `lax.scan` runs over.
WEIGHTS = {
    "embedding": ((VOCABULARY, WIDTH), P(None, "fsdp")),
    "layers": {
        "norm_1": ((LAYERS, WIDTH), P()),
        "query": ((LAYERS, WIDTH, HEADS * HEAD), P(None, "fsdp", "tensor")),
        "key": ((LAYERS, WIDTH, KV_HEADS * HEAD), P(None, "fsdp", "tensor")),
        "value": ((LAYERS, WIDTH, KV_HEADS * HEAD), P(None, "fsdp", "tensor")),
        "out": ((LAYERS, HEADS * HEAD, WIDTH), P(None, "tensor", "fsdp")),
        "norm_2": ((LAYERS, WIDTH), P()),
        "gate": ((LAYERS, WIDTH, HIDDEN), P(None, "fsdp", "tensor")),
        "up": ((LAYERS, WIDTH, HIDDEN), P(None, "fsdp", "tensor")),
        "down": ((LAYERS, HIDDEN, WIDTH), P(None, "tensor", "fsdp")),
    },
    "head": ((WIDTH, VOCABULARY), P("fsdp", None)),
}
WHERE = "layers/*", "!*/norm_*"
BATCH = P(("data", "fsdp"))  # what a row needs of a weight is gathered


def make_mesh() -> jax.sharding.Mesh:
    """Weights over `fsdp` and `tensor`, which span hosts; copies of them over `data`."""
    number = jax.device_count()
    data = max(1, number // 8)
    tensor = 2 if number % (4 * data) == 0 else 1
    return jax.make_mesh(
        (data, number // (data * tensor), tensor), ("data", "fsdp", "tensor")
    )


def initialise(key: jax.Array):
    """All weights. Under `jit` each device makes its own shards, and nothing else."""
    specs, treedef = jax.tree.flatten(WEIGHTS, is_leaf=lambda x: isinstance(x, tuple))
    leaves = []
    for i, (shape, spec) in enumerate(specs):
        if len(shape) == 2 and shape[0] == LAYERS:  # a norm
            leaves.append(jnp.ones(shape, out_sharding=spec))
            continue
        own = jax.random.fold_in(key, i)
        w = jax.random.normal(own, shape, out_sharding=spec)
        leaves.append(w / shape[-2] ** 0.5)
    return treedef.unflatten(leaves)


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def project(x: jax.Array, w: jax.Array, *last: str | None) -> jax.Array:
    """A product with a weight that is gathered over `fsdp` for it, as FSDP does."""
    if isinstance(w, jp.formats.NMArray):
        return jp.kernels.nm_matmul(x, w)  # gathers it packed
    spec = jax.typeof(w).sharding.spec
    w = jax.reshard(w, P(*[None if axis == "fsdp" else axis for axis in spec]))
    return jnp.einsum("btd,de->bte", x, w, out_sharding=P(*BATCH, None, *last))


def attention(x: jax.Array, w) -> jax.Array:
    batch, tokens, _ = x.shape
    q = project(x, w["query"], "tensor").reshape(batch, tokens, KV_HEADS, -1, HEAD)
    k = project(x, w["key"], "tensor").reshape(batch, tokens, KV_HEADS, HEAD)
    v = project(x, w["value"], "tensor").reshape(batch, tokens, KV_HEADS, HEAD)
    seen = jnp.einsum("btgrk,bsgk->bgrts", q, k) / HEAD**0.5
    seen = jnp.where(jnp.tri(tokens, dtype=bool), seen, -1e9)
    mixed = jnp.einsum("bgrts,bsgk->btgrk", jax.nn.softmax(seen), v)
    return project(mixed.reshape(batch, tokens, HEADS * HEAD), w["out"])


def model(params, tokens: jax.Array) -> jax.Array:
    """Logits of a small Llama, without positions."""
    table = jax.reshard(params["embedding"], P())
    x = table.at[tokens].get(out_sharding=P(*BATCH, None, None))

    def layer(x, w):
        x = x + attention(norm(x, w["norm_1"]), w)
        h = norm(x, w["norm_2"])
        h = jax.nn.silu(project(h, w["gate"], "tensor")) * project(h, w["up"], "tensor")
        return x + project(h, w["down"]), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return project(x, params["head"])


def loss(params, tokens: jax.Array) -> jax.Array:
    logits = jax.nn.log_softmax(model(params, tokens[:, :-1]))
    wanted = jax.nn.one_hot(tokens[:, 1:], VOCABULARY)
    return -jnp.mean(jnp.sum(logits * wanted, -1))


def batch(mesh: jax.sharding.Mesh, step: int) -> jax.Array:
    """Rows of tokens. Each process is asked for those of its own devices only."""

    def rows(index):
        here = range(*index[0].indices(ROWS))
        return np.stack([make_row(step, row) for row in here])[:, index[1]]

    shape = (ROWS, TOKENS + 1)
    return jax.make_array_from_callback(shape, NamedSharding(mesh, BATCH), rows)


def make_row(step: int, row: int) -> np.ndarray:
    """Stands for a row of a data set: each token follows from the one before it."""
    random = np.random.default_rng((step, row))
    found = [random.integers(VOCABULARY)]
    for _ in range(TOKENS):
        found.append((3 * found[-1] + 7) % VOCABULARY)
    return np.asarray(found, np.int32)


def placed(mesh: jax.sharding.Mesh, shapes):
    """Shapes with the places that their types speak of: what `restore` must know."""

    def leaf(x):
        spec = P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(leaf, shapes)


def largest_share() -> float:
    """The largest part of a weight that lies in this process, of all arrays alive.

    A shard is an array too, and so is a Gram matrix; sizes are such that none of them has
    the shape of a weight, or of a layer of one.
    """
    leaves = jax.tree.leaves(WEIGHTS, is_leaf=lambda x: isinstance(x, tuple))
    whole = {shape[i:] for shape, spec in leaves if any(spec) for i in (0, -2)}
    found = []
    for x in jax.live_arrays():
        if tuple(n for n in x.shape if n > 1) in whole:
            own = {str(s.index): s.data.size for s in x.addressable_shards}
            found.append(sum(own.values()) / x.size)
    return max(found)


@jax.jit
def fingerprint(tree) -> jax.Array:
    """A sum over bits and places: the same number on every mesh, or not the same tree."""
    total = jnp.uint32(0)
    for x in jax.tree.leaves(tree):
        words = jax.lax.bitcast_convert_type(x, jnp.uint32)
        for axis in range(x.ndim):
            places = jax.lax.broadcasted_iota(
                jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding
            )
            words = (words ^ places) * jnp.uint32(2654435761)
        total = 31 * total + jnp.sum(words, dtype=jnp.uint32)
    return total


def make_step(tx: optax.GradientTransformation):
    """One step of training; also gives the loss in front of it."""

    @jax.jit
    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def train(mesh: jax.sharding.Mesh, steps: int):
    """From shapes to trained 2:4 weights, and their masks."""
    abstract = jax.eval_shape(initialise, jax.random.key(0))
    tell(f"{sum(x.size for x in jax.tree.leaves(abstract)):,} parameters")
    params = jax.jit(initialise)(jax.random.key(0))
    method = jp.gmp(begin=0, end=2 * steps // 3, every=3, structure=STRUCTURE)
    tx = jp.masked(optax.adamw(1e-2), method, where=WHERE)
    step, state = make_step(tx), jax.jit(tx.init)(params)
    for i in range(steps):
        params, state, value = step(params, state, batch(mesh, i))
        if i % 10 == 0 or i == steps - 1:
            density = jp.get_info(state)["density"]
            tell(f"step {i:3}: loss {value:.4f}, density {density:.3f}")
    return params, jp.get_masks(state)


def packed(params, masks):
    """What kernels read: each shard packs its own part of a weight, or several."""

    def leaf(w, mask):
        if mask is None:
            return w
        parts = tuple(PARTS[axis] for axis in jax.typeof(w).sharding.spec[-2:])
        return jp.formats.pack(w, mask, STRUCTURE, parts=parts)

    return jax.tree.map(leaf, params, masks)


def restore(mesh: jax.sharding.Mesh, path: pathlib.Path):
    """Onto this mesh, whichever mesh saved it."""

    def saved(key):
        params = initialise(key)
        masks = jp.masks.from_params(params, WHERE)
        return {"params": params, "masks": jp.masks.pack(masks)}

    like = placed(mesh, jax.eval_shape(saved, jax.random.key(0)))
    found = jp.checkpoint.restore(path, like=like)
    return found["params"], jp.masks.unpack(found["masks"])


def tell(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def arguments(text: str) -> argparse.ArgumentParser:
    """What every process is told."""
    parser = argparse.ArgumentParser(description=text.split("\n")[0])
    parser.add_argument("--folder", default="build/pod", help="one that all hosts see")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--restore", action="store_true", help="read what was saved")
    parser.add_argument("--pod", action="store_true", help="one of several hosts")
    parser.add_argument("--coordinator", help="host:port of process 0")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    return parser


def connect(args: argparse.Namespace) -> jax.sharding.Mesh:
    """Joins the other processes, before anything else of JAX."""
    if args.pod:  # on TPU pods, Slurm and Kubernetes it finds all by itself
        jax.distributed.initialize()
    elif args.processes > 1:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    mesh = make_mesh()
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    tell(f"{jax.process_count()} processes, {jax.device_count()} devices: {sizes}")
    return mesh


def compare(mesh: jax.sharding.Mesh, params, small) -> None:
    """Weights that are packed, and the same that are not."""
    tokens = batch(mesh, 1_000_000)
    dense, sparse = (jax.jit(loss)(x, tokens) for x in (params, small))
    same = int(fingerprint(jp.formats.unpack_tree(small))) == int(fingerprint(params))
    share = sum(x.nbytes for x in jax.tree.leaves(small))
    share /= sum(x.nbytes for x in jax.tree.leaves(params))
    tell(f"packed to {share:.2f} of the bytes, equal when unpacked: {same}")
    tell(f"loss {dense:.4f}, of packed weights {sparse:.4f}")
    tell(f"fingerprint {int(fingerprint(params)):08x}")


def main() -> None:
    args = arguments(__doc__).parse_args()
    mesh = connect(args)
    path = pathlib.Path(args.folder).absolute() / "sparse"
    with jax.set_mesh(mesh):
        if args.restore:
            params, masks = restore(mesh, path)
        else:
            params, masks = train(mesh, args.steps)
            tree = {"params": params, "masks": jp.masks.pack(masks)}
            jp.checkpoint.save(path, tree, overwrite=True)
            tell(f"saved {path}")
        compare(mesh, params, packed(params, masks))
    here = jax.process_index()
    print(f"process {here} holds {largest_share():.3f} of a weight at most", flush=True)


if __name__ == "__main__":
    main()
