"""Checkpoints: bytes on disk, and the time to save and to load, beside plain Orbax.

A tree of bf16 matrices of random normal numbers, 0.54 GB, saved densely and packed: 90 %
unstructured, 2:4, and blocks of 128 x 128 at 90 %. `ocp.save` and `ocp.load` of Orbax v1
with its own settings take the dense tree in the same round, and each figure is the median
over rounds of the ratio to theirs, so that a slow moment of the machine hits both. All
loads give arrays on the device, with a template. Files are in the memory of the system
when they are read, as after any save on a machine with enough of it.

    python benchmarks/checkpoint.py [--rounds 5] [--leaves 16] [--out /tmp]

Expected before measuring: bytes of 0.164 (a bit and a tenth of 16 bits for each weight),
0.547 (8.75 bits of 16) and 0.101 of the dense ones, and folders of that size, as values
are written as they are. Orbax compresses by default, which makes random bf16 a third
smaller and was seen to take several times as long as writing; so saving densely should
take 0.2 to 0.4 of its time and loading 0.5 to 1.0, checksums of files and arrays included
(they pass over memory twice), and packed trees less, by their bytes. Against Orbax without
compression, a dense tree should take 1.1 to 1.5 of the time, for the same checksums.
"""

import argparse
import pathlib
import shutil
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

import jaxprune as jp

SIDE = 4096
STRUCTURES = {
    "90 % unstructured": (0.9, jp.Unstructured()),
    "2:4": (0.5, jp.NM(2, 4)),
    "blocks, 90 %": (0.9, jp.Block(128, 128)),
}


def plain(compress: bool):
    """Save and load of Orbax itself."""

    def context():
        found = ocp.Context()
        found.array.saving.use_compression = compress
        return found

    def save(path, tree):
        with context():
            ocp.save(str(path), tree)

    def load(path, like):
        with context():
            return ocp.load(str(path), like)

    return save, load


def ours():
    return jp.checkpoint.save, lambda path, like: jp.checkpoint.restore(path, like=like)


def template(tree):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree
    )


def timed(f, *args):
    begin = time.perf_counter()
    out = jax.block_until_ready(f(*args))
    return time.perf_counter() - begin, out


def nbytes(folder: pathlib.Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--leaves", type=int, default=16)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    args = parser.parse_args()
    dense = {
        f"layers/{i}/kernel": jax.random.normal(
            jax.random.key(i), (SIDE, SIDE), jnp.bfloat16
        )
        for i in range(args.leaves)
    }
    trees = {"dense, plain Orbax": (plain(True), dense)}
    trees["dense, plain Orbax, uncompressed"] = plain(False), dense
    trees["dense"] = ours(), dense
    packing = {}
    for name, (sparsity, structure) in STRUCTURES.items():
        pruned, masks = jp.prune(dense, sparsity=sparsity, structure=structure)
        jp.formats.pack_tree(
            *(dict(list(t.items())[:1]) for t in (pruned, masks)),
            structure,
        )  # compiled
        seconds, packed = timed(jp.formats.pack_tree, pruned, masks, structure)
        packing[name] = seconds
        trees[name] = ours(), packed
        del pruned, masks
    size = sum(x.nbytes for x in dense.values())
    sizes, times = {}, {name: [] for name in trees}
    for i in range(-1, args.rounds):  # the first compiles
        for name, ((save, load), tree) in trees.items():
            folder = pathlib.Path(tempfile.mkdtemp(dir=args.out)) / "checkpoint"
            saving, _ = timed(save, folder, tree)
            loading, found = timed(load, folder, template(tree))
            sizes[name] = nbytes(folder)
            if i < 0:
                jax.tree.map(np.testing.assert_array_equal, found, tree)
            else:
                times[name].append((saving, loading))
            del found
            shutil.rmtree(folder.parent)
    print(f"{size / 1e9:.2f} GB of bf16, {args.rounds} rounds, jax {jax.__version__}, ")
    print(f"{jax.default_backend()}\n")
    print("| tree | bytes / dense bf16 | bytes / plain Orbax | save, s | load, s "
          "| save / plain Orbax | load / plain Orbax | packing, s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    first = "dense, plain Orbax"
    for name in trees:
        middle = [statistics.median(t[k] for t in times[name]) for k in (0, 1)]
        pairs = zip(times[name], times[first], strict=True)
        ratios = [[a[k] / b[k] for k in (0, 1)] for a, b in pairs]
        save, load = (statistics.median(r[k] for r in ratios) for k in (0, 1))
        spread = [
            (min(r[k] for r in ratios), max(r[k] for r in ratios)) for k in (0, 1)
        ]
        cells = [
            f"{sizes[name] / size:.4f}",
            f"{sizes[name] / sizes[first]:.4f}",
            *(f"{t:.2f}" for t in middle),
            *(
                f"{r:.2f} ({a:.2f} - {b:.2f})"
                for r, (a, b) in zip((save, load), spread, strict=True)
            ),
            f"{packing[name]:.1f}" if name in packing else "",
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
