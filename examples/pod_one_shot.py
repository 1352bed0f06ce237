"""Prunes a model in one shot, on a mesh of any size, and saves it as small as it is then.

    python examples/pod_one_shot.py                   # this machine, its devices
    python examples/pod_one_shot.py --restore         # what was saved, on other devices
    python examples/pod_one_shot.py --pod             # the same on each host of a TPU pod

Model, mesh and data are those of `pod_pruning.py`, which also shows how to start several
processes. Block by block, 2:4 weights are found from the inputs of each product, on batches
of which every process makes its own rows. The checkpoint holds packed weights, in shards.
They are multiplied as they are: no dense weight is made to run what was restored.
"""

import pathlib

import jax
import optax
import pod_pruning as pod

import jaxprune as jp

METHODS = {"sparsegpt": jp.posttrain.sparsegpt(), "wanda": jp.posttrain.wanda()}


def pretrain(mesh: jax.sharding.Mesh, steps: int):
    """Stands for weights that are there: `jp.checkpoint.restore` reads them in shards."""
    params = jax.jit(pod.initialise)(jax.random.key(0))
    tx = optax.adamw(1e-2)
    step, state = pod.make_step(tx), jax.jit(tx.init)(params)
    for i in range(steps):
        params, state, _ = step(params, state, pod.batch(mesh, i))
    return params


def prune(mesh: jax.sharding.Mesh, params, method: str, batches: int):
    """2:4 weights, their masks, and the largest share of a weight that was held."""
    shares = []

    def progress(name: str, i: int, n: int) -> None:
        shares.append(pod.largest_share())
        pod.tell(f"block {i + 1} of {n}: {name}")

    calibration = [pod.batch(mesh, 1000 + i) for i in range(batches)]
    params, masks, report = jp.posttrain.prune(
        pod.model, params, calibration, method=METHODS[method],
        structure=pod.STRUCTURE, where=pod.WHERE, donate=True, progress=progress,
    )  # fmt: skip
    pod.tell(str(report))
    return params, masks, max(shares)


def restore(mesh: jax.sharding.Mesh, path: pathlib.Path):
    """Packed weights, onto this mesh; whichever mesh saved them, the parts are the same."""

    def saved(key):
        params = pod.initialise(key)
        return pod.packed(params, jp.masks.from_params(params, pod.WHERE))

    like = pod.placed(mesh, jax.eval_shape(saved, jax.random.key(0)))
    return jp.checkpoint.restore(path, like=like)


def main() -> None:
    parser = pod.arguments(__doc__)
    parser.add_argument("--method", choices=METHODS, default="sparsegpt")
    parser.add_argument("--batches", type=int, default=8, help="for calibration")
    args = parser.parse_args()
    mesh = pod.connect(args)
    path = pathlib.Path(args.folder).absolute() / "packed"
    share = 0.0
    with jax.set_mesh(mesh):
        if args.restore:
            small = restore(mesh, path)
            params = jp.formats.unpack_tree(small)  # to compare with
        else:
            params = pretrain(mesh, args.steps)
            tokens = pod.batch(mesh, 1_000_000)
            pod.tell(f"loss {jax.jit(pod.loss)(params, tokens):.4f} before")
            params, masks, share = prune(mesh, params, args.method, args.batches)
            small = pod.packed(params, masks)
            jp.checkpoint.save(path, small, overwrite=True)
            pod.tell(f"saved {path}")
        pod.compare(mesh, params, small)
    share = max(share, pod.largest_share())
    here = jax.process_index()
    print(f"process {here} holds {share:.3f} of a weight at most", flush=True)


if __name__ == "__main__":
    main()
