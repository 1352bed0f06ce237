"""Rows of an activation, as the matrix of a site meets them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxprune.calibration._inputs import Inputs
from jaxprune.calibration._moments import empty, moments
from jaxprune.tracing import Reading, Tap

T = TypeVar("T")
Merge = Callable[[Inputs, Inputs], Inputs]


def tap_of(
    reading: Reading,
    path: str,
    statistics: Sequence[str],
    weights: Array | None,
    sparse: bool,
    merge: Merge,
) -> Tap:
    """Reads the moments of an activation where a leaf meets it.

    Args:
      reading: the activation.
      path: of the leaf, for messages.
      statistics: which moments.
      weights: of tokens, or none.
      sparse: whether rows of zeros are no rows.
      merge: of moments.
    """
    lengths = [length for _, _, length in reading.indices]

    def read(eqn, operands, indices):
        def state(operands, indices, weights):
            found = _moments(eqn, operands, reading, path, statistics, weights, sparse)
            for index, length in reversed(list(zip(indices, lengths, strict=True))):
                found = at_index(found, index, length)
            return found

        return _anywhere(state, operands, indices, weights)

    batch, k = reading.shape
    return Tap(
        place=reading.place,
        read=read,
        merge=merge,
        zero=jax.eval_shape(lambda: empty((*lengths, batch), k, statistics)),
        loops=reading.loops,
        indices=tuple((place, operand) for place, operand, _ in reading.indices),
    )


def _anywhere(f, operands, indices, weights):
    """Calls `f` with arrays that XLA shards as it likes, also on an explicit mesh."""
    arrays = [operands, indices, weights]
    mesh = jax.sharding.get_abstract_mesh()
    for x in jax.tree.leaves(arrays):
        mesh = mesh if mesh.axis_names else jax.typeof(x).sharding.mesh
    explicit = [
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Explicit
    ]  # fmt: skip
    if not explicit:
        return f(*arrays)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(f, out_sharding=jax.P())(*arrays)


def at_index(found: T, index: Array, length: int) -> T:
    """Moments or counts in one place of a stack, zeros in the others."""
    here = jnp.clip(index, 0, length - 1)

    def put(x):
        zeros = jnp.zeros((length, *x.shape), x.dtype)
        return lax.dynamic_update_index_in_dim(zeros, x, here, 0)

    return jax.tree.map(put, found)


def _moments(
    eqn, operands, reading: Reading, path, statistics, weights, sparse
) -> Inputs:
    name = eqn.primitive.name
    if name == "conv_general_dilated":
        rows, free = _windows(operands[0], eqn, reading)
    elif name == "ragged_dot_general":
        return _ragged(eqn, operands, reading, path, statistics, weights, sparse)
    else:
        rows, free = _rows(operands[reading.operand], reading)
    spread = None if weights is None else weights_of_rows(weights, free, path)
    if sparse:
        filled = jnp.any(rows != 0, axis=2)
        spread = filled if spread is None else jnp.where(filled, spread, 0)
    return moments(rows, spread, statistics)


def _rows(x: Array, reading: Reading) -> tuple[Array, tuple[int, ...]]:
    """`[batch, rows, K]`, and the axes that the rows come from."""
    batch, k = reading.batch_axes, reading.k_axes
    for axis, window in zip((*batch, *k), reading.windows, strict=True):
        if window is not None:
            x = lax.slice_in_dim(x, window[0], sum(window), axis=axis)
    free = [a for a in range(x.ndim) if a not in (*batch, *k)]
    shape = tuple(x.shape[a] for a in free)
    x = x.transpose([*batch, *free, *k])
    count = math.prod(shape)
    b = math.prod(x.shape[: len(batch)])
    if reading.moved:
        x = x.reshape(b, count, *reading.k_sizes)
        moved = [2 + i for i in reading.moved]
        rest = [a for a in range(2, x.ndim) if a not in moved]
        x = x.transpose([0, *moved, 1, *rest])
    return x.reshape(reading.shape[0], count, reading.shape[1]), shape


def _windows(x: Array, eqn: Any, reading: Reading) -> tuple[Array, tuple[int, ...]]:
    """What the window of a convolution sees, for each place that it stands at."""
    params = eqn.params
    numbers = params["dimension_numbers"]
    weights = eqn.invars[1].aval
    patches = lax.conv_general_dilated_patches(
        x, [weights.shape[a] for a in numbers.rhs_spec[2:]], params["window_strides"],
        params["padding"], params["lhs_dilation"], params["rhs_dilation"],
        dimension_numbers=numbers, precision=lax.Precision.HIGHEST,
    )  # fmt: skip
    first, features, *space = numbers.out_spec
    patches = patches.transpose([first, *space, features])
    shape = patches.shape[:-1]
    groups, k = reading.shape
    rows = patches.reshape(math.prod(shape), groups, k)  # features: channels, window
    return rows.transpose(1, 0, 2), shape


def _ragged(
    eqn, operands, reading: Reading, path, statistics, weights, sparse
) -> Inputs:
    """Rows sorted by the matrix that each is multiplied with."""
    if weights is not None:
        raise ValueError(
            f"token_weights: the rows of {path} are sorted for a ragged product, so that "
            "it is not known which token each is. Leave the leaf out with where=, or "
            "calibrate without token_weights."
        )
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    x, sizes = operands[0], operands[2]
    (row_axis,) = numbers.lhs_ragged_dimensions
    free = [a for a in range(x.ndim) if a not in (row_axis, *reading.k_axes)]
    x = x.transpose([row_axis, *free, *reading.k_axes])
    x = x.reshape(x.shape[0], -1, reading.shape[1])  # [rows, others, K]
    ends = jnp.cumsum(sizes)
    at = jnp.arange(x.shape[0])[:, None]
    mine = (at < ends) & (at >= ends - sizes)  # [rows, groups]
    mine = jnp.repeat(mine, x.shape[1], axis=0).astype(jnp.float32).T
    x = x.reshape(-1, x.shape[2])
    if sparse:
        mine = mine * jnp.any(x != 0, axis=1)

    # One group after the other: all at once would take a copy of the rows for each.
    def one(weights):
        return moments(x[None], weights[None], statistics)

    return jax.tree.map(lambda a: a[:, 0], lax.map(one, mine))


def weights_of_rows(weights: Array, free: tuple[int, ...], path: str) -> Array:
    """Weights of tokens as weights of rows `[1, rows]`."""
    shape = weights.shape
    for given in (shape, (math.prod(shape),)):
        if free[: len(given)] == given:
            rest = math.prod(free[len(given) :])
            return jnp.repeat(weights.reshape(-1), rest)[None]
    raise ValueError(
        f"token_weights: they have the shape {shape}, and the rows that {path} is "
        f"multiplied with {free}; expected rows whose first axes are those of the weights. "
        "Leave the leaf out with where=, or give weights for the first of these axes only."
    )
