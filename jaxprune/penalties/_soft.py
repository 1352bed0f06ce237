"""The soft threshold, the magnitude and the checks that the penalties share."""

import math
import numbers

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, ScalarLike


def soft_threshold(x: Float[Array, "..."], t: Float[Array, "..."]) -> Array:
    """Shrinks every entry towards zero by `t`, and to exactly zero if it is smaller.

    Where `t` is not above zero, `x` comes back bit for bit. NaN passes through.

    Args:
      x: values of any floating-point dtype; computed in at least float32.
      t: thresholds that broadcast against `x` without enlarging it.

    Returns:
      An array of the shape and dtype of `x`.

    Example:
      >>> soft_threshold(jnp.array([-3.0, 0.5, 2.0]), jnp.array(1.0))
      Array([-2.,  0.,  1.], dtype=float32)
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    values, t = x.astype(wide), t.astype(wide)
    # Compared, not clipped: `sign(x) * max(|x| - t, 0)` would leave -0.0 behind.
    shrunk = jnp.where(jnp.abs(values) <= t, 0, values - jnp.sign(values) * t)
    return jnp.where(t > 0, shrunk.astype(x.dtype), x)


def magnitude(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`|x|` in at least float32, with gradient 0 at 0, where `jnp.abs` has 1.

    A penalty that is not smooth at 0 would otherwise push zeros away from 0.

    Args:
      x: values of any floating-point dtype.

    Returns:
      An array of the shape of `x`.

    Example:
      >>> import jax
      >>> jax.grad(magnitude)(0.0 * jnp.ones(()))
      Array(0., dtype=float32)
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jnp.sign(lax.stop_gradient(x))


def check_matrix(name: str, x: Array) -> None:
    """Refuses what is not a floating-point matrix or a stack of them."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} has dtype {x.dtype}; a penalty needs floating-point weights. "
            f"Cast it, or leave this leaf out of the penalty."
        )
    if x.ndim < 2:
        raise ValueError(
            f"{name} has shape {x.shape}; wanted at least two axes, [..., fan_in, "
            f"units]. Leave biases and scales out, and reshape a flattened kernel."
        )


def check_strength(strength: ScalarLike) -> None:
    """Refuses a strength that is no scalar, or a Python number out of range.

    A strength that is an array is not read, since that would stop the device: there
    what is not above zero, NaN included, means no shrinking.
    """
    if jnp.ndim(strength) != 0:
        raise ValueError(
            f"strength has shape {jnp.shape(strength)}; wanted a scalar. For one "
            f"strength per matrix of a stack, use jax.vmap over both."
        )
    if isinstance(strength, numbers.Real) and not 0 <= float(strength) < math.inf:
        raise ValueError(
            f"strength is {strength}; wanted a finite number >= 0. Use 0 to switch "
            f"the penalty off."
        )
