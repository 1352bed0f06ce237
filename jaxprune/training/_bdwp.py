"""BDWP: N:M weights in the forward and the backward product (arXiv 2309.13015)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.structures import NM


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def bdwp_matmul(
    x: Float[Array, "*batch inputs"],
    w: Float[Array, "inputs outputs"],
    structure: NM = NM(2, 8),
) -> Float[Array, "*batch outputs"]:
    """`x @ NM(w)`, whose backward pass multiplies by N:M weights as well.

    Both products see N:M weights along the axis that they contract, made from the same
    dense `w`:

        y  = x @ P_in(w)        groups along the inputs
        dx = dy @ P_out(w).T    groups along the outputs, another mask
        dw = x.T @ dy           dense: straight through both masks

    So `dx` is not the gradient of `y`. It is a matrix product and no view of weights; put
    it in the model in place of `x @ w`, and train with any optimizer. Both `inputs` and
    `outputs` must be multiples of `m`; layers where they are not stay dense in practice.

    No code of the authors is public; whether a decay of pruned weights is added to `dw`
    could not be confirmed, and none is.

    Args:
      x: inputs.
      w: dense weights.
      structure: the N:M of both; its `axis` is not read. 2:8 in the paper.

    Returns:
      Outputs, in the dtype of the product.

    Raises:
      ValueError: if an axis is no multiple of `m * stride`.

    Example:
      >>> w = jnp.array([[1.0, 4.0], [3.0, 2.0]])
      >>> x = jnp.ones((1, 2))
      >>> jp.training.bdwp_matmul(x, w, jp.NM(1, 2)).tolist()
      [[3.0, 4.0]]
      >>> jax.grad(lambda x: jp.training.bdwp_matmul(x, w, jp.NM(1, 2)).sum())(x).tolist()
      [[4.0, 3.0]]

    References:
      Fang et al., Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and
      Dataflow Co-Design, arXiv 2309.13015, section on bidirectional weight pruning.
    """
    return x @ _best(w, structure, -2)


def _forward(x, w, structure):
    return x @ _best(w, structure, -2), (x, w)


def _backward(structure, kept, dy):
    x, w = kept
    dx = dy @ _best(w, structure, -1).T
    rows = dy.reshape(-1, dy.shape[-1])
    dw = x.reshape(-1, x.shape[-1]).T @ rows
    return dx.astype(x.dtype), dw.astype(w.dtype)


bdwp_matmul.defvjp(_forward, _backward)


def _best(w: Array, structure: NM, axis: int) -> Array:
    if not isinstance(structure, NM):
        raise TypeError(f"structure: got {structure!r}; expected NM, such as NM(2, 8).")
    if w.ndim != 2:
        raise ValueError(
            f"w: got shape {w.shape}; expected [inputs, outputs]. Map over stacked layers "
            "with jax.vmap."
        )
    along = dataclasses.replace(structure, axis=axis)
    along.units("w", w)  # refuses sizes that do not fit
    return jnp.where(along.best("w", jnp.abs(w)), w, 0)
