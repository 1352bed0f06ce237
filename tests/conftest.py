"""Eight virtual CPU devices for every test; read by JAX when it first runs something.

Most of the time of the tests goes into compiling programs that run for a moment. So XLA's
older, quicker emitters compile them, each process keeps what it compiled in `build/tests`,
for the tests that follow and for the next run, and files that ask for `quick_compilation`
do with fewer optimizations.
"""

import collections
import gc
import os
import pathlib

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()
# Virtual devices wait for one another in threads of one pool, as large as the number of
# cores or devices unless told otherwise. It must not run out, or a collective hangs.
os.environ.setdefault("PJRT_NPROC", "32")

# Workers do not share a folder: JAX does not write its entries atomically.
_CACHE = pathlib.Path(__file__).resolve().parents[1] / "build" / "tests"
_CACHE /= os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402  (reads the environment)

# Tracing makes so many objects that looking for garbage among them would take a quarter of
# its time.
gc.set_threshold(100_000, 20, 20)

# Files of few tests that take long.
_LONG = (
    "tpu_bundles_test.py",
    "minilm_resume_test.py",
    "nm_matmul_gpu_test.py",
    "block_sparse_matmul_gpu_test.py",
)


def pytest_collection_modifyitems(items):
    """Longest files first, so that no worker is left alone with one at the end."""
    tests = collections.Counter(item.path for item in items)
    items.sort(key=lambda x: (x.path.name not in _LONG, -tests[x.path], x.path))


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles with few optimizations, for tests that run small programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs do not pile up: a run would take many gigabytes, and slow down."""
    yield
    jax.clear_caches()
