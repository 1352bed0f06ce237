"""Counts the VLIW bundles of a grid step of each TPU kernel, without a TPU.

`libtpu` compiles for every generation on any host, and writes down the instructions that
it came to: a bundle is issued in a cycle, so their number in the loop over the grid is the
time of a step, but for waits on memory.

    make build/libtpu
    python tests/kernels/tpu_bundles.py > tests/kernels/tpu_bundles.json
"""

import json
import os
import pathlib
import re
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBTPU = ROOT / "build" / "libtpu" / "libtpu" / "libtpu.so"
GENERATIONS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
# A line of the listing, "0x2a LB: > { ... }": each ">" is a loop it stands in.
_BUNDLE = re.compile(
    r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2}(?:,? ?[A-Z]{2})*)?\s*:\s*([> ]*)\{"
)


def prepare(dump: str) -> None:
    """Sets what libtpu reads from the environment, before JAX is imported."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # libtpu does not know those of CPUs, and stops
        "TPU_LIBRARY_PATH": str(LIBTPU),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final_bundles",
    }


def measure(dump: str) -> dict[str, dict[str, int]]:
    """Bundles by case and generation."""
    import jax
    import numpy as np
    import tpu_cases
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    found = {}
    for case in tpu_cases.cases():
        found[case.name] = {}
        for generation, topology in GENERATIONS.items():
            chips = topologies.get_topology_desc(platform="tpu", topology_name=topology)
            mesh = Mesh(np.array(chips.devices[:1]), ("x",))
            whole = NamedSharding(mesh, PartitionSpec())
            leaves, treedef = jax.tree.flatten(case.operands)
            leaves = [
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in leaves
            ]
            operands = treedef.unflatten(leaves)
            for file in pathlib.Path(dump).iterdir():
                file.unlink()
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                jax.jit(case.call, out_shardings=whole).lower(*operands).compile()
            found[case.name][generation] = _in_the_loop(dump, case.kernel)
    return found


def _in_the_loop(dump: str, kernel: str) -> int:
    listings = [
        file
        for file in pathlib.Path(dump).glob(f"*-{kernel}*final_bundles.txt")
        if "schedule-analysis" not in file.name
    ]
    if len(listings) != 1:
        raise RuntimeError(f"{kernel}: {len(listings)} listings in {dump}; expected 1.")
    matches = map(_BUNDLE.match, listings[0].read_text().splitlines())
    return sum(">" in m[1] for m in matches if m)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        found = measure(folder)
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
