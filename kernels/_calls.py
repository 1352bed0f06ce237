"""What calls of all kernels have in common: checks of their operands, and where they run."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
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
    if sharded(x) or sharded(w):
        raise ValueError(
            f"group_sizes: x is {jax.typeof(x)} and the matrices are {jax.typeof(w)}, on a "
            "mesh with explicit axes, where jax.lax.ragged_dot takes nothing that is "
            "sharded; expected both whole. Give x as [experts, rows, K] instead, or take "
            "the products of each device's experts in jax.shard_map."
        )
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


def multiply(
    product: Callable[[Array, Any], Array],
    x: Float[Array, "... K"],
    packed: Any,
    *,
    bias: Array | None = None,
    finish: Callable[[Array, Array | None], Array] = lambda y, bias: y,
) -> Float[Array, "... N"]:
    """The product of x and a packed leaf of any stack and parts, on any mesh.

    Args:
      product: of x `[M, K]` and a packed matrix, `[M, N]`.
      x: `[stack, ..., K]`.
      packed: `[stack, K, N]`.
      bias: `[stack, N]`.
      finish: gives the result from the sums `[M, N]` and the bias `[N]`.
    """
    stack = packed.shape[: len(packed.shape) - len(packed.layout.shape)]

    def local(x, packed, bias, reduce=None):
        size = x.shape[: len(stack)]
        rows = x.reshape(*size, -1, x.shape[-1])
        sums = functools.partial(_over_parts, product, reduce is not None)
        y = over_stack(sums, size)(rows, packed)
        y = reduce(y) if reduce else y
        y = over_stack(finish, size)(*varying(y, bias))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    ndim = len(stack) + (2 if packed.layout.parts else 0)
    return on_mesh(local, x, packed, bias, stack=len(stack), ndim=ndim)


def _over_parts(product: Callable, in_shards: bool, x: Array, packed: Any) -> Array:
    """The product with a matrix in parts: side by side along N, summed along K.

    In a shard the parts along K come one after another, which takes the memory of one.
    Elsewhere all come at once, so that XLA can leave each where it lies.
    """
    layout = packed.layout
    if layout.parts is None:
        return product(*varying(x, packed))
    k_parts, n_parts = packed.values.shape[:2]  # in a shard, those that it has
    packed = dataclasses.replace(packed, layout=layout.of_part)

    def across(x, packed):
        if n_parts == 1:
            return product(x, jax.tree.map(lambda a: a[0], packed))
        y = jax.vmap(product, (None, 0))(x, packed)  # [parts, M, cols]
        return jnp.moveaxis(y, 0, 1).reshape(x.shape[0], -1)

    x, packed = varying(x, packed)
    if k_parts == 1:
        return across(x, jax.tree.map(lambda a: a[0], packed))
    rows = jnp.moveaxis(x.reshape(x.shape[0], k_parts, -1), 1, 0)  # [parts, M, rows]
    if not in_shards:
        return jax.vmap(across)(rows, packed).sum(0)
    y = jax.eval_shape(across, rows[0], jax.tree.map(lambda a: a[0], packed))
    start = zeros(y.shape, y.dtype, x)
    return lax.scan(lambda y, part: (y + across(*part), None), start, (rows, packed))[0]


def on_mesh(
    product: Callable, x: Array, weights: Any, bias: Any, *, stack: int, ndim: int
) -> Array:
    """The product, where shardings are part of types: of what each device has.

    Rows of x stay where they are, and so do the columns of the weights, to become those
    of the result. Weights that are sharded along K stay too, if x can be sharded with
    them: the result is then summed over devices. Axes of the mesh that rows of x take up
    are not free for a matrix, so that one sharded over them is made whole first (as in
    fully sharded data parallelism).

    In `jax.shard_map` all operands vary over the same axes afterwards, so that gradients of
    what did not are summed.

    Args:
      product: `product(x, weights, bias, reduce)`, of shards; `reduce` adds up the sums over
        devices. Called without `reduce` where nothing is sharded.
      x: `[stack, ..., K]`.
      weights: arrays `[stack, K, N, ...]` of weights, or of parts along K and N.
      bias: `[stack, N]`, or `None`.
      stack: leading axes.
      ndim: axes of the weights that may be sharded; without those of K and N if there are
        no parts.

    Raises:
      ValueError: if shardings do not fit together.
    """
    leaves = jax.tree.leaves((x, weights, bias))
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in leaves]
    mesh = next((m for m in meshes if m.explicit_axes), None)
    if mesh is None or not any(sharded(leaf) for leaf in leaves):
        return product(x, weights, bias)
    specs = {_spec(leaf)[:ndim] for leaf in jax.tree.leaves(weights)}
    inner = [_spec(leaf)[ndim:] for leaf in jax.tree.leaves(weights)]
    if len(specs) > 1 or any(any(spec) for spec in inner):
        leaf = next(x for x in jax.tree.leaves(weights) if any(_spec(x)))
        raise ValueError(
            f"packed: an array of it is {jax.typeof(leaf)}, on a mesh with explicit axes; "
            "expected whole matrices, or parts of them as shards. Shard the weight, not "
            "the arrays: jaxprune.formats.pack then packs it in parts. Or replicate packed "
            "with jax.reshard."
        )
    rows, theirs = _spec(x), (*specs.pop(), None, None)
    leading = []
    for a, b in zip(rows[:stack], theirs[:stack], strict=True):
        if a and b and a != b:
            raise ValueError(
                f"x: it is {jax.typeof(x)}, and the stack of matrices is sharded as "
                f"{theirs[:stack]}; expected axes of a stack alike. Use jax.reshard."
            )
        leading.append(a or b)
    taken = {name for names in (*leading, *rows[stack:-1]) for name in _names(names)}
    k, n = theirs[stack : stack + 2]
    k = None if taken & {*_names(k)} else k
    if rows[-1] != k and shards(x, -1) > 1:
        raise ValueError(
            f"x: it is {jax.typeof(x)}, sharded along the axis that is contracted; "
            "expected that axis whole, on a mesh with explicit axes, or sharded as the "
            f"rows of the matrix are ({k}). Use jax.reshard."
        )
    n = None if (taken | {*_names(k)}) & {*_names(n)} else n
    ends = (k, n)[: max(0, ndim - stack)]
    specs = (
        PartitionSpec(*leading, *rows[stack:-1], k),
        PartitionSpec(*leading, *ends),
        PartitionSpec(*leading, n),
    )

    def put(x, spec):
        home = next((y.sharding.mesh for y in leaves if _is_there(y)), None)
        if home and not isinstance(x, core.Tracer):
            return jax.device_put(x, jax.sharding.NamedSharding(home, spec))
        return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, spec))

    operands = tuple(
        jax.tree.map(lambda leaf, spec=spec: put(leaf, spec), operand)
        for operand, spec in zip((x, weights, bias), specs, strict=True)
    )

    def reduce(y):
        names = tuple(
            a for a in _names(k) if a in jax.typeof(y).manual_axis_type.varying
        )
        return lax.psum(y, names) if names else y

    def local(x, weights, bias):
        return product(x, weights, bias, reduce)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec(*leading, *rows[stack:-1], n),
        axis_names=set(mesh.explicit_axes),
    )(*operands)


def _is_there(x: Array) -> bool:
    """Whether an array lies on the devices of an explicit mesh."""
    traced = isinstance(x, core.Tracer)
    return not traced and bool(jax.typeof(x).sharding.mesh.explicit_axes)


def placed_as(x: Array, like: Array) -> Array:
    """`x`, sharded as an array of as many axes is, where that is part of its type."""
    sharding = jax.typeof(like).sharding
    if not sharding.mesh.explicit_axes or _spec(x) == _spec(like):
        return x
    if isinstance(x, core.Tracer) or not _is_there(like):
        return jax.sharding.reshard(x, sharding)
    return jax.device_put(x, like.sharding)


def sharded(x: Array) -> bool:
    """Whether an array is, as far as its type says."""
    return any(_spec(x))


def shards(x: Array, axis: int) -> int:
    """How many an axis has, as far as the type says."""
    mesh = jax.typeof(x).sharding.mesh
    return math.prod(mesh.shape[name] for name in _names(_spec(x)[axis]))


def _names(names: Any) -> tuple:
    if names is None:
        return ()
    return names if isinstance(names, tuple) else (names,)


def _spec(x: Array) -> tuple:
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def varying(*operands: Any) -> Any:
    """The operands, with the axes of a mesh that any of them varies over in `shard_map`."""

    def own(x):
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset().union(*map(own, jax.tree.leaves(operands)))

    def cast(x):
        missing = tuple(axes - own(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, operands)


def struct(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """What a kernel gives that varies over the same axes of a mesh as `like` does."""
    kind = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def zeros(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """Zeros that vary over the same axes of a mesh as `like` does."""
    return varying(jnp.zeros(shape, dtype), like)[0]


def choose(
    backend: str | None, reasons: dict[str, str], by: dict[str, Callable], *operands
) -> Any:
    """Calls what `backend` names, or what suits the platform and has no reason against it.

    On axes of a mesh that XLA looks after this is `"xla"`: it does not know how to divide
    a kernel, and JAX refuses one there.
    """
    if backend:
        return by[backend](*operands)
    if on_auto_axes(*operands):
        return by["xla"](*operands)
    branches = {_PLATFORMS[b]: by[b] for b in _PLATFORMS if not reasons.get(b, "-")}
    if not branches:
        return by["xla"](*operands)

    def alike(branch):
        # A kernel of GPUs gives what is said to vary over no axes of a mesh.
        return lambda *operands: varying(branch(*operands), *operands)[0]

    branches = {name: alike(branch) for name, branch in branches.items()}
    return lax.platform_dependent(*operands, **branches, default=alike(by["xla"]))


def on_auto_axes(*operands: Any) -> bool:
    """Whether XLA divides the operation among devices, as far as that can be known."""
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(operands)]
    meshes.append(jax.sharding.get_abstract_mesh())
    return any(m.shape[name] > 1 for m in meshes for name in m.auto_axes)


def no_gradient(x: Array) -> np.ndarray:
    """That of integers."""
    return np.zeros(x.shape, jax.dtypes.float0)
