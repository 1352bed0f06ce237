"""What calls of all kernels have in common: checks of their operands, and where they run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

_PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}  # of a backend


def check_shape(x: Array, stack: tuple[int, ...], matrix: tuple[int, int]) -> None:
    """Refuses an x that does not fit to the matrices, or to the stack of them."""
    k, n = matrix
    if x.shape[-1:] != (k,) or x.shape[: len(stack)] != stack:
        raise ValueError(
            f"x: its shape is {x.shape}; expected {[*stack, '...', k]}, since packed holds "
            f"{f'a stack {list(stack)} of matrices' if stack else 'a matrix'} [{k}, {n}]. "
            "Move the axis that is contracted to the end."
        )


def check_backend(backend: str | None, reasons: dict[str, str], what: str) -> None:
    """Refuses a backend that there is not, or that has a reason not to take the matrix."""
    if backend is not None and backend not in reasons:
        names = ", ".join(map(repr, reasons))
        raise ValueError(f"backend: got {backend!r}; expected {names} or None.")
    if backend and reasons[backend]:
        raise ValueError(
            f"backend: {backend!r} does not take {what}: {reasons[backend]}"
        )


def check_bias(bias: Array | None, stack: tuple[int, ...], n: int) -> None:
    """Refuses a bias that is not of the shape of the columns."""
    if bias is not None and jnp.shape(bias) != (*stack, n):
        raise ValueError(
            f"bias: its shape is {jnp.shape(bias)}; expected {[*stack, n]}, a number for "
            "each column. Reshape it, or add it to the result."
        )


def finished(
    y: Any, bias: Array | None, activation: Callable | None, dtype
) -> Float[Array, "M N"]:
    """The activation of y and the bias, computed in float32."""
    y = y if bias is None else y + bias.astype(jnp.float32)
    y = y if activation is None else activation(y)
    return y.astype(dtype)


def ragged(
    x: Float[Array, "T K"],
    w: Float[Array, "experts K N"],
    group_sizes: Int[Array, " experts"],
    bias: Array | None,
    activation: Callable | None,
    *,
    precision: lax.PrecisionLike,
) -> Float[Array, "T N"]:
    """Products of rows that are sorted by the matrix they belong to; 0 after the last."""
    y = lax.ragged_dot(
        x, w.astype(x.dtype), group_sizes,
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(x)), side="right")
    if bias is not None:
        bias = bias.at[expert].get(mode="fill", fill_value=0)
    y = finished(y, bias, activation, x.dtype)
    return jnp.where((expert < len(w))[:, None], y, jnp.zeros_like(y))


def check_ragged(
    x: Array,
    group_sizes: Array,
    backend: str | None,
    stack: tuple[int, ...],
    matrix: tuple[int, int],
) -> None:
    """Refuses what is no ragged product."""
    if len(stack) != 1 or x.ndim != 2 or x.shape[1] != matrix[0]:
        raise ValueError(
            f"x: its shape is {x.shape}, and packed holds a stack {list(stack)} of matrices "
            f"{list(matrix)}; expected [rows, {matrix[0]}] and one axis of experts with "
            "group_sizes. Flatten the rows, sorted by expert."
        )
    if jnp.shape(group_sizes) != stack or not jnp.issubdtype(
        jnp.result_type(group_sizes), jnp.integer
    ):
        raise ValueError(
            f"group_sizes: it is {jax.typeof(group_sizes)}; expected integers of shape "
            f"{list(stack)}, the rows of each expert. Count them with jnp.bincount."
        )
    if backend not in (None, "xla"):
        raise ValueError(
            f"backend: got {backend!r} with group_sizes; expected 'xla' or None, since "
            "no kernel takes them. Leave backend= out."
        )


def over_stack(product: Callable, stack: tuple[int, ...]) -> Callable:
    """The product of each matrix of a stack."""
    for _ in stack:
        product = jax.vmap(product)
    return product


def on_mesh(product: Callable, x: Array, packed: Any, *others: Any) -> Array:
    """The product, where shardings are part of types: of the rows that a device has.

    Weights are whole on every device, except for axes of a stack, which x shares. In
    `jax.shard_map` all operands vary over the same axes afterwards, so that gradients of
    what did not are summed.
    """
    operands = x, packed, *others
    mesh = jax.typeof(x).sharding.mesh
    explicit = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Explicit
    }
    leaves = jax.tree.leaves(operands)
    if not explicit or all(_replicated(leaf) for leaf in leaves):
        return product(*varying(*operands))
    spec = _spec(x)
    for leaf in jax.tree.leaves((packed, *others)):
        pairs = zip(_spec(leaf), spec[:-1] + (None,) * leaf.ndim, strict=False)
        if any(names and names != wanted for names, wanted in pairs):
            raise ValueError(
                f"packed: an array of it is {jax.typeof(leaf)}, and x {jax.typeof(x)}, on a "
                "mesh with explicit axes; expected whole matrices, and axes of a stack as "
                "in x. Replicate packed with jax.reshard, or take the products of parts "
                "in jax.shard_map."
            )
    if spec[-1]:
        raise ValueError(
            f"x: it is {jax.typeof(x)}, sharded along the axis that is contracted; "
            "expected that axis whole, on a mesh with explicit axes. Use jax.reshard."
        )
    specs = jax.tree.map(lambda leaf: PartitionSpec(*_spec(leaf)), operands)

    def local(*operands):
        return product(*varying(*operands))

    return jax.shard_map(
        local, in_specs=specs, out_specs=PartitionSpec(*spec), axis_names=explicit
    )(*operands)


def _spec(x: Array) -> tuple:
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def _replicated(x: Array) -> bool:
    return not any(_spec(x))


def varying(*operands: Any) -> Any:
    """The operands, with the axes of a mesh that any of them varies over in `shard_map`."""

    def own(x):
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset().union(*map(own, jax.tree.leaves(operands)))

    def cast(x):
        missing = tuple(axes - own(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, operands)


def zeros(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """Zeros that vary over the same axes of a mesh as `like` does."""
    return varying(jnp.zeros(shape, dtype), like)[0]


def choose(
    backend: str | None, reasons: dict[str, str], by: dict[str, Callable], *operands
) -> Any:
    """Calls what `backend` names, or what suits the platform and has no reason against it."""
    if backend:
        return by[backend](*operands)
    branches = {_PLATFORMS[b]: by[b] for b in _PLATFORMS if not reasons.get(b, "-")}
    if not branches:
        return by["xla"](*operands)
    return lax.platform_dependent(*operands, **branches, default=by["xla"])


def no_gradient(x: Array) -> np.ndarray:
    """That of integers."""
    return np.zeros(x.shape, jax.dtypes.float0)
