"""LoRAPrune: importance of weights from the gradients of low-rank adapters alone."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def lora_taylor(
    w: Float[Array, "*stack K N"],
    a: Float[Array, "*stack K r"],
    b: Float[Array, "*stack r N"],
    *,
    gradients: tuple[Float[Array, "*stack K r"], Float[Array, "*stack r N"]],
    scale: float = 1.0,
) -> Float[Array, "*stack K N"]:
    r"""`|ĝ (w + scale a b)|`, with the gradient of `w` guessed from those of `a` and `b`.

    `ĝ = a ∂b + ∂a b - ∂a ∂b` is what a step of gradient descent with rate 1 takes from
    the product `a b`. The frozen weights need no gradient. `jaxprune.structured.loraprune`
    sums the scores over coupled units, averages them over steps, and prunes by them while
    adapters are trained.

    Read for this: the authors' code (loraprune/utils.py).

    Args:
      w: frozen weights, inputs first.
      a: of the adapter `x a b`.
      b: of the adapter.
      gradients: of the loss by `a` and by `b`.
      scale: of the adapter, alpha over rank.

    Returns:
      Scores in at least float32. Higher is kept.

    Raises:
      ValueError: if shapes do not fit.

    Example:
      >>> w, a, b = jnp.array([[2.0]]), jnp.array([[1.0]]), jnp.array([[3.0]])
      >>> gradients = jnp.array([[0.5]]), jnp.array([[1.0]])
      >>> jp.scores.lora_taylor(w, a, b, gradients=gradients).tolist()
      [[10.0]]

    References:
      Zhang et al., LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient
      Fine-Tuning, arXiv 2305.18403; github.com/aim-uofa/LoRAPrune.
    """
    a_slope, b_slope = gradients
    shapes = [jnp.shape(x) for x in (w, a, b)]
    stack, (k, n), r = shapes[0][:-2], shapes[0][-2:], shapes[1][-1]
    if shapes[1:] != [(*stack, k, r), (*stack, r, n)]:
        raise ValueError(
            f"a, b: got the shapes {shapes[1]} and {shapes[2]} beside weights of "
            f"{shapes[0]}; expected [..., K, r] and [..., r, N]. Transpose adapters that "
            "are stored outputs first."
        )
    if [jnp.shape(a_slope), jnp.shape(b_slope)] != shapes[1:]:
        raise ValueError(
            f"gradients: got the shapes {jnp.shape(a_slope)} and {jnp.shape(b_slope)}; "
            f"expected those of a and b, {shapes[1]} and {shapes[2]}."
        )
    w, a, b, da, db = (
        x.astype(jnp.promote_types(x.dtype, jnp.float32))
        for x in map(jnp.asarray, (w, a, b, a_slope, b_slope))
    )
    slope = _product(a, db) + _product(da, b) - _product(da, db)
    return jnp.abs(slope * (w + scale * _product(a, b)))


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision="highest")
