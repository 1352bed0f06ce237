"""Kept weights fitted to the dense layer's outputs, from the Gram of its inputs alone."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from jaxprune.calibration import Inputs
from jaxprune.posttrain import _given, _solver
from jaxprune.posttrain._given import column_errors, dot
from jaxprune.posttrain._perp import lora_init


class Fitted(NamedTuple):
    """Weights behind a mask, and how far their outputs are from the dense ones.

    Attributes:
      w: 0 where pruned, in the dtype of the weights given.
      error: `E[(x w_dense - x w)²]` of each output, float32 `[*stack, N]`.
      initial_error: the same of the weights given, 0 where pruned.
    """

    w: Float[Array, "*stack K N"]
    error: Float[Array, "*stack N"]
    initial_error: Float[Array, "*stack N"]


def pcg(
    w_dense: Float[Array, "*stack K N"],
    w: Float[Array, "*stack K N"],
    mask: Bool[Array, "*stack K N"],
    inputs: Inputs,
    *,
    steps: int = 100,
) -> Fitted:
    """The least-squares fit of the kept weights, by conjugate gradients.

    Minimises `(w_dense - w)ᵀ E[x xᵀ] (w_dense - w)` of each column over its kept weights,
    all columns at once, scaled by the diagonal. With as many steps as kept weights this is
    the optimum, in exact arithmetic; some tens come near. No column gets worse. `refit`
    solves the same exactly, at a cost of `K³` for each column.

    Args:
      w_dense: weights before pruning.
      w: weights to start from, of any solver.
      mask: True = keep.
      inputs: `gram`.
      steps: of conjugate gradients.

    Raises:
      ValueError: if shapes do not fit, `inputs.gram` is missing, or `steps` is below 1.

    Example:
      >>> w = jnp.array([[1.0], [1.0]])
      >>> mask = jnp.array([[True], [False]])
      >>> gram = jnp.array([[1.0, 0.5], [0.5, 1.0]])
      >>> inputs = jp.calibration.Inputs(1.0, gram=gram)
      >>> found = jp.posttrain.pcg(w, jnp.where(mask, w, 0), mask, inputs)
      >>> found.w.ravel().tolist(), found.initial_error.item(), found.error.item()
      ([1.5, 0.0], 1.0, 0.75)
    """
    gram = _check("pcg", w_dense, w, mask, inputs, steps)
    one = functools.partial(_conjugate_gradients, steps=steps)
    return _solver.over_stack(one, w.ndim - 2)(w_dense, w, mask, gram)


def reconstruct(
    w_dense: Float[Array, "*stack K N"],
    w: Float[Array, "*stack K N"],
    mask: Bool[Array, "*stack K N"],
    inputs: Inputs,
    *,
    kind: Literal["mask_lora", "scale_lora"] = "mask_lora",
    rank: int = 16,
    steps: int = 200,
    optimizer: optax.GradientTransformation | None = None,
    key: Key[Array, ""],
) -> Fitted:
    """PERP's layer-wise reconstruction: MaskLoRA or ScaleLoRA on one layer's error.

    The loss is the mean squared error of the outputs, which `gram` gives without the
    inputs; relative to the dense outputs, and the weights to their size, so that the
    optimizer need not know them. The authors instead run the inputs of a whole block
    through it, in batches. `pcg` finds what no rank limits; this keeps nearer to the
    weights, which matters where there are few calibration rows.

    Args:
      w_dense: weights before pruning.
      w: weights to start from, of any solver.
      mask: True = keep.
      inputs: `gram`.
      kind: what is trained; see `perp_init`.
      rank: of the factors.
      steps: of the optimizer, all on the whole data.
      optimizer: by default `optax.adam`, from 0.01 linearly down to 0.
      key: for the factors of MaskLoRA.

    Returns:
      The merged weights. A column that would be worse than before stays as it was.

    Raises:
      ValueError: if shapes do not fit, `inputs.gram` is missing, or a number is below 1.

    Example:
      >>> w = jnp.array([[1.0], [1.0]])
      >>> mask = jnp.array([[True], [False]])
      >>> gram = jnp.array([[1.0, 0.5], [0.5, 1.0]])
      >>> found = jp.posttrain.reconstruct(
      ...     w, jnp.where(mask, w, 0), mask, jp.calibration.Inputs(1.0, gram=gram),
      ...     key=jax.random.key(0),
      ... )
      >>> jnp.round(found.w, 2).ravel().tolist()
      [1.5, 0.0]

    References:
      Zimmer et al., arXiv 2312.15230 (layer-wise reconstruction).
    """
    gram = _check("reconstruct", w_dense, w, mask, inputs, steps)
    if kind not in ("mask_lora", "scale_lora"):
        raise ValueError(
            f"reconstruct: got kind={kind!r}; expected 'mask_lora' or 'scale_lora'. With "
            "biases, use bias_correction."
        )
    if rank < 1:
        raise ValueError(f"reconstruct: got rank={rank}; expected at least 1.")
    schedule = optax.linear_schedule(0.01, 0.0, steps)
    tx = optax.adam(schedule) if optimizer is None else optimizer
    few = lora_init(kind, "w", w, rank, 2.0 * rank, key)
    one = functools.partial(_train, steps=steps, tx=tx)
    return _solver.over_stack(one, w.ndim - 2)(w_dense, w, mask, gram, few)


def _check(caller, w_dense, w, mask, inputs, steps) -> Array:
    _given.check(caller, mask, w=w, w_dense=w_dense)
    if steps < 1:
        raise ValueError(f"{caller}: got steps={steps}; expected at least 1.")
    return _given.statistic(caller, inputs, "gram", w)


def _finish(w_dense, w, new, mask, gram) -> Fitted:
    """Takes the new columns that are better once they are in the dtype of `w`."""
    w, new = (jnp.where(mask, x, 0).astype(w.dtype) for x in (w, new))
    dense = _given.wide(w_dense)
    before, after = (column_errors(gram, dense - _given.wide(x)) for x in (w, new))
    better = after < before
    return Fitted(jnp.where(better, new, w), jnp.where(better, after, before), before)


def _conjugate_gradients(w_dense, w, mask, gram, *, steps) -> Fitted:
    diagonal = jnp.diagonal(gram)
    inverse = 1 / jnp.where(diagonal > 0, diagonal, 1)[:, None]  # [K, 1]
    dense = _given.wide(w_dense)
    start = jnp.where(mask, _given.wide(w), 0)
    residual = jnp.where(mask, dot(gram, dense - start), 0)
    # Below this a column is solved to the precision there is.
    least = 1e-14 * column_errors(gram, dense)

    def step(_, state):
        x, residual, along, size = state
        turned = jnp.where(mask, dot(gram, along), 0)
        curvature = jnp.sum(along * turned, axis=0)  # [N]
        move = (size > least) & (curvature > 0)
        length = jnp.where(move, size / jnp.where(move, curvature, 1), 0)
        x, residual = x + length * along, residual - length * turned
        scaled = inverse * residual
        new = jnp.sum(residual * scaled, axis=0)
        along = scaled + jnp.where(move, new / jnp.where(move, size, 1), 0) * along
        return x, residual, along, jnp.where(move, new, 0)

    along = inverse * residual
    state = start, residual, along, jnp.sum(residual * along, axis=0)
    new = lax.fori_loop(0, steps, step, state)[0]
    return _finish(w_dense, w, new, mask, gram)


def _train(w_dense, w, mask, gram, few, *, steps, tx) -> Fitted:
    dense, start = _given.wide(w_dense), jnp.where(mask, _given.wide(w), 0)
    unit = jnp.sqrt(jnp.sum(dense**2) / dense.shape[1])  # a weight is 1 / √K of it
    unit = jnp.where(unit > 0, unit, 1)
    dense, start = dense / unit, start / unit
    total = jnp.sum(column_errors(gram, dense))
    scaled = gram / jnp.where(total > 0, total, 1)

    def loss(few):
        return jnp.sum(column_errors(scaled, dense - few.merge(start, mask)))

    def step(state, _):
        few, opt_state = state
        updates, opt_state = tx.update(jax.grad(loss)(few), opt_state, few)
        return (optax.apply_updates(few, updates), opt_state), None

    (few, _), _ = lax.scan(step, (few, tx.init(few)), length=steps)
    return _finish(w_dense, w, few.merge(start, mask) * unit, mask, gram)
