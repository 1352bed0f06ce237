"""What refiners have in common: the checks of what they are given, and their result."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxprune.calibration import Inputs


class Refined(NamedTuple):
    """A refined mask, and what it was for.

    Attributes:
      mask: True = keep.
      error: of each output, in the measure of the method that made the mask.
      initial_error: the same of the mask given; never smaller in size.
    """

    mask: Bool[Array, "*stack K N"]
    error: Float[Array, "*stack N"]
    initial_error: Float[Array, "*stack N"]


def check(caller: str, mask: Any, **matrices: Any) -> None:
    """Raises unless the matrices `[*stack, K, N]` and the mask are of one shape."""
    shapes = {name: jnp.shape(x) for name, x in matrices.items()}
    first, shape = next(iter(shapes.items()))
    if len(shape) < 2:
        raise ValueError(
            f"{caller}: {first} has the shape {shape}; expected a matrix [K, N], inputs "
            "first, or a stack of them. Reshape what has more axes, such as a kernel of "
            "DenseGeneral."
        )
    for name, x in matrices.items():
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(
                f"{caller}: {name} holds {jnp.result_type(x)}; expected floating-point "
                "weights."
            )
    for name, other in {**shapes, "mask": jnp.shape(mask)}.items():
        if other != shape:
            raise ValueError(
                f"{caller}: {name} has the shape {other}, but {first} has {shape}; "
                "expected the same."
            )
    if jnp.result_type(mask) != jnp.bool_:
        raise TypeError(
            f"{caller}: mask holds {jnp.result_type(mask)}; expected booleans, True where "
            "a weight is kept. Compare it with 0 to make them."
        )


def statistic(caller: str, inputs: Inputs, name: str, w: Array) -> Array:
    """A statistic of the inputs of `w`, float32; raises if it is missing or misshapen."""
    if not isinstance(inputs, Inputs):
        raise TypeError(
            f"{caller}: inputs is of type {type(inputs).__name__}; expected "
            "jaxprune.calibration.Inputs, the statistics of what w is multiplied with."
        )
    x = getattr(inputs, name)
    if x is None:
        raise ValueError(
            f"{caller}: inputs.{name} is None, but is needed here. Calibrate with it, or "
            "compute it from the inputs."
        )
    *stack, k, _ = w.shape
    wanted = (*stack, k, k) if name == "gram" else (*stack, k)
    if jnp.shape(x) != wanted:
        raise ValueError(
            f"{caller}: inputs.{name} has the shape {jnp.shape(x)}; expected {wanted} for "
            f"weights of {tuple(w.shape)}, whose axis -2 is contracted."
        )
    return jnp.asarray(x, jnp.float32)


def wide(x: Array) -> Array:
    """In at least float32."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def dot(a: Array, b: Array) -> Array:
    """The product, as exact as the dtypes are."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def column_errors(gram: Array, change: Array) -> Float[Array, "N"]:
    """`cᵀ G c` of each column c."""
    return jnp.sum(change * dot(gram, change), axis=0)
