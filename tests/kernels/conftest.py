"""What tests of GPU kernels share."""

import sys

import pytest


@pytest.fixture
def gpu_interpreter(capsys):
    """Runs Mosaic GPU kernels where there is no GPU; a race in one fails the test."""
    try:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
    except ImportError:  # not public before JAX 0.11
        from jax._src.pallas.mosaic_gpu.interpret.params import (  # noqa: TID251
            InterpretGPUParams,
        )
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # its threads wait for one another all the time
    yield InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    sys.setswitchinterval(before)
    assert "RACE DETECTED" not in capsys.readouterr().out
