#!/bin/sh
# Checks the GPU kernels against their references and times them, within 8 minutes:
#
#     benchmarks/gpu.sh [--out build/gpu] [--dry-run]
#
# Tables go to the screen and to the folder; a failed check gives an exit status of 1. What
# is installed is used; what is missing is installed (PYTHON says which interpreter to use).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

case " $* " in
*" --dry-run "*)
    JAX_PLATFORMS=cpu
    export JAX_PLATFORMS
    ;;
*)
    if ! "$python" -c 'import jax; jax.devices("cuda")' 2>/dev/null; then
        version=13
        nvidia-smi | grep -q 'CUDA Version: 12' && version=12
        "$python" -m venv build/gpu-venv
        python=build/gpu-venv/bin/python
        "$python" -m pip install --quiet "jax[cuda$version]"
    fi
    ;;
esac
needed='import flax, jaxtyping, optax, orbax.checkpoint'
"$python" -c "$needed" 2>/dev/null ||
    "$python" -m pip install --quiet flax jaxtyping optax orbax-checkpoint

# The package as it would be installed, with kernels/ as one of its own.
site=build/gpu-site
rm -rf "$site"
mkdir -p "$site"
cp -R jaxprune "$site/jaxprune"
rm -rf "$site/jaxprune/kernels"
cp -R kernels "$site/jaxprune/kernels"
PYTHONPATH=$site exec "$python" benchmarks/gpu_kernels.py "$@"
