"""What kernels for Hopper GPUs ask about the device."""

from typing import Any

import jax


def processors() -> int:
    """Multiprocessors of the GPU, or of an H200 where there is none."""
    try:
        return jax.devices("cuda")[0].core_count
    except RuntimeError:
        return 132


def why_not(interpret: Any) -> str:
    """Why kernels do not run on the GPUs of this process, or nothing if they do."""
    try:
        found = [] if interpret else jax.devices("cuda")
    except RuntimeError:
        found = []  # as in an export for another machine, which is taken to be a Hopper
    others = [d.device_kind for d in found if not d.compute_capability.startswith("9.")]
    if others:
        return (
            f"{others[0]} is no GPU of the Hopper generation (compute capability 9), whose "
            "instructions they are multiplied with. Leave backend= out."
        )
    return ""
