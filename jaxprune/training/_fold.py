"""Dead heads and neurons after NeuroPrune: all their weights become 0."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune import _tree, masks
from jaxprune._tree import PyTree
from jaxprune.training import _roles
from jaxprune.training._roles import Roles


def neuroprune_fold(
    params: PyTree,
    found: PyTree = None,
    *,
    roles: Roles,
    activation: Callable[[Array], Array] = jax.nn.gelu,
) -> PyTree:
    """Sets all weights of dead heads and neurons to 0, and keeps the model's function.

    A head is dead if its rows of W_O are 0; or if its value columns are, when its output
    is the constant value bias, which goes through W_O into the output bias. A neuron is
    dead if its outgoing row is 0; or if its incoming column is, when it outputs
    `activation(bias)`, which goes into the next bias. Exact up to rounding, without
    dropout on attention weights. Keys and values that serve several queries are dead if
    all of these are. A gated MLP (several `mlp_in`) loses a neuron with a zero row out,
    or a zero column and bias in one of its inputs, provided that `activation(0)` is 0.

    A constant stays where it is if no bias is there to take it.

    Then a plan cuts them out of any function: `jaxprune.structured.without_zeros` of the
    `graph` that `jaxprune.structured.trace` gives.

    Args:
      params: parameters; biases are found beside the kernels, named `bias`.
      found: masks, applied first; `None` if `params` are sparse already.
      roles: which leaf plays which part.
      activation: between the MLP's matrices, elementwise.

    Returns:
      Parameters of the same structure and shapes.

    Raises:
      ValueError: if roles match nothing or the masks do not fit.

    Example:
      >>> params = {"up": {"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.array([0.0, 2.0])},
      ...           "down": {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}}
      >>> roles = jp.Roles(mlp_in="up/kernel", mlp_out="down/kernel")
      >>> folded = jp.neuroprune_fold(params, roles=roles, activation=jax.nn.relu)
      >>> folded["down"]["kernel"].tolist(), folded["down"]["bias"].tolist()
      ([[1.0], [0.0]], [2.0])
    """
    if found is not None:
        params = masks.apply(params, found)
    leaves = _roles.leaves_by_path(params)
    kernels = [p for p, x in leaves.items() if getattr(x, "ndim", 0) >= 2]
    for layer in _roles.layers(roles, kernels):
        if layer.qkv and layer.out:
            _fold_heads(leaves, layer, roles)
        if layer.mlp_in and layer.mlp_out:
            _fold_mlp(leaves, layer, activation)
    return _tree.map_with_path(lambda path, _: leaves[path], params)


class _Heads(NamedTuple):
    """Kernels and biases of the attention of a layer, by head.

    Attributes:
      qkv: `[stack, d, heads, head_dim]` each.
      biases: the same with one row in place of d.
      out: `[stack, heads, head_dim, d]`.
    """

    qkv: tuple[Array, Array, Array]
    biases: tuple[Array, Array, Array]
    out: Array


def _read_heads(leaves: dict[str, Any], layer, roles: Roles) -> _Heads:
    kernels, rows, explicit = _kernels_and_rows(leaves, layer, roles)
    return _Heads(
        _roles.split_qkv(kernels, roles, explicit=explicit),
        _roles.split_qkv(rows, roles, explicit=explicit),
        _roles.split_out(leaves[layer.out], roles.heads or 0, explicit=explicit),
    )


def _write_heads(leaves: dict[str, Any], layer, roles: Roles, heads: _Heads) -> None:
    kernels, rows, explicit = _kernels_and_rows(leaves, layer, roles)
    joined = _roles.join_qkv(heads.qkv, kernels, explicit=explicit)
    biases = _roles.join_qkv(heads.biases, rows, explicit=explicit)
    for path, kernel, row in zip(layer.qkv, joined, biases, strict=True):
        leaves[path] = kernel
        if _bias(path) in leaves:
            leaves[_bias(path)] = jnp.squeeze(row, _d_axis(kernels, explicit))
    leaves[layer.out] = _roles.join_out(heads.out, leaves[layer.out], explicit=explicit)


def _kernels_and_rows(leaves: dict[str, Any], layer, roles: Roles):
    """Kernels of Q, K and V, their biases as kernels of one row, and their layout.

    A missing bias is a row of zeros.
    """
    kernels = [leaves[p] for p in layer.qkv]
    explicit = _roles.has_head_axis(kernels[0], roles.heads or 0)
    axis = _d_axis(kernels, explicit)
    rows = [
        jnp.expand_dims(leaves[_bias(p)], axis) if _bias(p) in leaves
        else jnp.zeros_like(jnp.take(x, jnp.array([0]), axis=axis))
        for p, x in zip(layer.qkv, kernels, strict=True)
    ]  # fmt: skip
    return kernels, rows, explicit


def _d_axis(kernels: list[Any], explicit: bool) -> int:
    return -2 if not explicit else -3 if len(kernels) == 3 else -4


def _fold_heads(leaves: dict[str, Any], layer, roles: Roles) -> None:
    """Sets dead heads to 0, their constant in the output bias."""
    n, groups = roles.heads or 0, roles.groups
    heads = _read_heads(leaves, layer, roles)
    v, out = heads.qkv[2], heads.out
    silent = np.asarray(jnp.all(out == 0, axis=(2, 3)))  # [stack, heads]
    constant = np.asarray(jnp.all(v == 0, axis=(1, 3)))  # [stack, kv heads]
    constant = np.repeat(constant, n // groups, axis=1) & ~silent
    if constant.any() and np.asarray(heads.biases[2] != 0).any():
        if _bias(layer.out) not in leaves:
            constant = np.zeros_like(constant)
        else:
            # [stack, heads, head_dim]
            value = jnp.repeat(heads.biases[2][:, 0], n // groups, axis=1)
            moved = jnp.einsum("shd,shdn->sn", value * constant[..., None], out,
                               precision="highest")  # fmt: skip
            _add(leaves, _bias(layer.out), moved)
    dead = (silent | constant).reshape(len(silent), groups, n // groups)
    queries = ~(silent | constant)
    shared = ~np.all(dead, axis=-1)

    def zeroed(q, k, v):
        mine, theirs = (x[:, None, :, None] for x in (queries, shared))
        return jnp.where(mine, q, 0), jnp.where(theirs, k, 0), jnp.where(theirs, v, 0)

    out = jnp.where(queries[..., None, None], out, 0)
    _write_heads(
        leaves, layer, roles, _Heads(zeroed(*heads.qkv), zeroed(*heads.biases), out)
    )


def _fold_mlp(leaves: dict[str, Any], layer, activation) -> None:
    """Sets dead neurons to 0, their constant in the next bias."""
    ins, out, stacked = _mlp(leaves, layer)
    n = out.shape[1]
    biases = [
        jnp.zeros((len(x), n), x.dtype) if _bias(p) not in leaves
        else leaves[_bias(p)].reshape(len(x), n)
        for p, x in zip(layer.mlp_in, ins, strict=True)
    ]  # fmt: skip
    dead = np.asarray(jnp.all(out == 0, axis=2))  # [stack, neurons]
    deaf = [np.asarray(jnp.all(x == 0, axis=1)) for x in ins]
    zero_at_zero = float(activation(jnp.zeros(()))) == 0
    if len(ins) == 1:
        constants = activation(biases[0]) * jnp.asarray(deaf[0] & ~dead, out.dtype)
        if _bias(layer.mlp_out) in leaves:
            moved = jnp.einsum("sn,snd->sd", constants, out, precision="highest")
            _add(leaves, _bias(layer.mlp_out), moved)
            dead = dead | deaf[0]
        else:
            dead = dead | (deaf[0] & np.asarray(constants == 0))
    else:
        for x, b in zip(deaf, biases, strict=True):
            dead = dead | (x & np.asarray(b == 0) & zero_at_zero)
    alive = jnp.asarray(~dead)
    for path, x in zip(layer.mlp_in, ins, strict=True):
        x = jnp.where(alive[:, None], x, 0)
        leaves[path] = x if stacked else x[0]
        if _bias(path) in leaves:
            bias = leaves[_bias(path)]
            leaves[_bias(path)] = jnp.where(alive.reshape(bias.shape), bias, 0)
    out = jnp.where(alive[..., None], out, 0)
    leaves[layer.mlp_out] = out if stacked else out[0]


def _mlp(leaves: dict[str, Any], layer) -> tuple[list[Array], Array, bool]:
    """Kernels into and out of the hidden neurons, stacked, and whether they were."""
    ins, out = [leaves[p] for p in layer.mlp_in], leaves[layer.mlp_out]
    if out.ndim == 3:
        return ins, out, True
    return [x[None] for x in ins], out[None], False


def _add(leaves: dict[str, Any], path: str, moved: Array) -> None:
    bias = leaves[path]
    leaves[path] = (bias + moved.reshape(bias.shape)).astype(bias.dtype)


def _bias(path: str) -> str:
    return "/".join([*path.split("/")[:-1], "bias"])
