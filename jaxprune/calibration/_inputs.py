"""What calibration knows of the activations that a matrix is contracted with."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Inputs(NamedTuple):
    """Moments of the rows x that a matrix `[K, N]` is multiplied with.

    All are means over rows, so that their size does not depend on how many there were;
    `None` where a statistic was not asked for.

    Attributes:
      count: rows seen, float32; with weights, the sum of these.
      square: mean of x², float32 `[*stack, K]`.
      mean: mean of x, float32 `[*stack, K]`.
      variance: mean of (x - mean)², float32 `[*stack, K]`.
      gram: mean of x xᵀ, float32 `[*stack, K, K]`.
    """

    count: Float[Array, "*stack"]  # pyright: ignore[reportIncompatibleMethodOverride]
    square: Float[Array, "*stack K"] | None = None
    mean: Float[Array, "*stack K"] | None = None
    variance: Float[Array, "*stack K"] | None = None
    gram: Float[Array, "*stack K K"] | None = None
