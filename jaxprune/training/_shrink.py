"""Physical removal of dead heads and neurons after NeuroPrune."""

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


class LayerSizes(NamedTuple):
    """What is left of one layer, or of one stack of layers.

    Attributes:
      layer: what the wildcards of the roles stood for.
      heads: query heads, before and after.
      kv_heads: key and value heads, before and after.
      neurons: hidden neurons of the MLP, before and after.
      notes: why something dead had to stay, if anything did.
    """

    layer: str
    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    neurons: tuple[int, int]
    notes: tuple[str, ...] = ()


def neuroprune_shrink(
    params: PyTree,
    found: PyTree = None,
    *,
    roles: Roles,
    activation: Callable[[Array], Array] = jax.nn.gelu,
) -> tuple[PyTree, list[LayerSizes]]:
    """Removes dead heads and neurons, and keeps the function that the masked model has.

    A head is dead if its rows of W_O are 0; or if its value columns are, when its output
    is the constant value bias, which goes through W_O into the output bias. A neuron is
    dead if its outgoing row is 0; or if its incoming column is, when it outputs
    `activation(bias)`, which goes into the next bias. Exact up to rounding, without
    dropout on attention weights.

    In a stack of layers, and for grouped queries, sizes stay equal: the largest count
    that is needed anywhere, with dead heads or neurons as padding. A gated MLP (several
    `mlp_in`) loses a neuron with a zero row out, or a zero column and bias in one of its
    inputs, provided that `activation(0)` is 0.

    This function runs on the host, on whole arrays.

    Args:
      params: parameters; biases are found beside the kernels, named `bias`.
      found: masks, applied first; `None` if `params` are sparse already.
      roles: which leaf plays which part.
      activation: between the MLP's matrices, elementwise.

    Returns:
      Parameters of the same structure, smaller, and the sizes of each layer, with which
      to build the smaller model.

    Raises:
      ValueError: if roles match nothing or the masks do not fit.

    Example:
      >>> params = {"up": {"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.array([0.0, 2.0])},
      ...           "down": {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}}
      >>> roles = jp.Roles(mlp_in="up/kernel", mlp_out="down/kernel")
      >>> small, sizes = jp.neuroprune_shrink(params, roles=roles, activation=jax.nn.relu)
      >>> sizes[0].neurons, small["down"]["bias"].tolist()
      ((2, 1), [2.0])
    """
    if found is not None:
        params = masks.apply(params, found)
    leaves = _roles.leaves_by_path(params)
    kernels = [p for p, x in leaves.items() if getattr(x, "ndim", 0) >= 2]
    sizes = []
    for layer in _roles.layers(roles, kernels):
        notes: list[str] = []
        heads = kv_heads = neurons = (0, 0)
        if layer.qkv and layer.out:
            heads, kv_heads = _shrink_heads(leaves, layer, roles, notes)
        if layer.mlp_in and layer.mlp_out:
            neurons = _shrink_mlp(leaves, layer, activation, notes)
        sizes.append(LayerSizes(layer.name, heads, kv_heads, neurons, tuple(notes)))
    paths, old, treedef = _tree.flatten(params)
    small = [
        x if _tree.is_hole(x) else leaves[p] for p, x in zip(paths, old, strict=True)
    ]
    return treedef.unflatten(small), sizes


def _shrink_heads(leaves: dict[str, Any], layer, roles: Roles, notes: list[str]):
    kernels = [leaves[p] for p in layer.qkv]
    explicit = _roles.has_head_axis(kernels[0], roles.heads or 0)
    n, groups = roles.heads or 0, roles.groups
    q, k, v = _roles.split_qkv(
        kernels, roles, explicit=explicit
    )  # [stack, d, heads, head_dim]
    out = _roles.split_out(leaves[layer.out], n, explicit=explicit)
    # A bias is a kernel of one input row; a missing one is a row of zeros.
    d_axis = -2 if not explicit else -3 if len(kernels) == 3 else -4
    rows = [
        jnp.expand_dims(leaves[_bias(p)], d_axis) if _bias(p) in leaves
        else jnp.zeros_like(jnp.take(x, jnp.array([0]), axis=d_axis))
        for p, x in zip(layer.qkv, kernels, strict=True)
    ]  # fmt: skip
    biases = _roles.split_qkv(rows, roles, explicit=explicit)
    stack = q.shape[0]
    silent = np.asarray(jnp.all(out == 0, axis=(2, 3)))  # [stack, heads]
    constant = np.asarray(jnp.all(v == 0, axis=(1, 3)))  # [stack, kv heads]
    constant = np.repeat(constant, n // groups, axis=1) & ~silent
    if constant.any() and np.asarray(biases[2] != 0).any():
        if _bias(layer.out) not in leaves:
            notes.append("heads with constant output stay: W_O has no bias to hold it")
            constant = np.zeros_like(constant)
        else:
            # [stack, heads, head_dim]
            value = jnp.repeat(biases[2][:, 0], n // groups, axis=1)
            moved = jnp.einsum("shd,shdn->sn", value * constant[..., None], out,
                               precision="highest")  # fmt: skip
            bias = leaves[_bias(layer.out)]
            leaves[_bias(layer.out)] = (bias + moved.reshape(bias.shape)).astype(
                bias.dtype
            )
    alive = (~silent & ~constant).reshape(stack, groups, n // groups)
    out = out * jnp.asarray(~constant, out.dtype)[..., None, None]
    groups_kept = _padded(np.asarray(alive.any(-1)))  # [stack, groups kept]
    chosen = np.take_along_axis(alive, groups_kept[..., None], axis=1)
    within = _padded(chosen.reshape(-1, n // groups))
    each = within.shape[-1]  # query heads kept in a group
    within = within.reshape(*groups_kept.shape, each)
    heads_kept = groups_kept[..., None] * (n // groups) + within
    heads_kept = heads_kept.reshape(stack, groups_kept.shape[1] * each)
    before = (n, groups)
    after = (heads_kept.shape[1], groups_kept.shape[1])

    def take(x, index, axis):
        return jnp.stack([jnp.take(x[i], jnp.asarray(index[i], int), axis=axis)
                          for i in range(stack)])  # fmt: skip

    kept = (heads_kept, groups_kept, groups_kept)
    q, k, v = (take(x, i, 1) for x, i in zip((q, k, v), kept, strict=True))
    joined = _roles.join_qkv((q, k, v), kernels, explicit=explicit)
    leaves.update(zip(layer.qkv, joined, strict=True))
    q, k, v = (take(x, i, 1) for x, i in zip(biases, kept, strict=True))
    joined = _roles.join_qkv((q, k, v), rows, explicit=explicit)
    for path, x in zip(layer.qkv, joined, strict=True):
        if _bias(path) in leaves:
            leaves[_bias(path)] = jnp.squeeze(x, d_axis)
    out = take(out, heads_kept, 0)  # [stack, heads kept, head_dim, d]
    leaves[layer.out] = _roles.join_out(out, leaves[layer.out], explicit=explicit)
    return (before[0], after[0]), (before[1], after[1])


def _shrink_mlp(leaves: dict[str, Any], layer, activation, notes: list[str]):
    ins = [leaves[p] for p in layer.mlp_in]
    out = leaves[layer.mlp_out]
    stacked = out.ndim == 3
    ins, out = ([x if stacked else x[None] for x in ins], out if stacked else out[None])
    n = out.shape[1]
    biases = [
        jnp.zeros((x.shape[0], n), x.dtype) if _bias(p) not in leaves
        else leaves[_bias(p)].reshape(x.shape[0], n)
        for p, x in zip(layer.mlp_in, ins, strict=True)
    ]  # fmt: skip
    dead = np.asarray(jnp.all(out == 0, axis=2))  # [stack, neurons]
    deaf = [np.asarray(jnp.all(x == 0, axis=1)) for x in ins]
    zero_at_zero = float(activation(jnp.zeros(()))) == 0
    if len(ins) == 1:
        constants = activation(biases[0]) * jnp.asarray(deaf[0] & ~dead, out.dtype)
        bias_path = _bias(layer.mlp_out)
        if bias_path in leaves:
            moved = jnp.einsum("sn,snd->sd", constants, out, precision="highest")
            bias = leaves[bias_path]
            leaves[bias_path] = (bias + moved.reshape(bias.shape)).astype(bias.dtype)
            dead = dead | deaf[0]
        else:
            nothing = np.asarray(constants == 0)
            if (deaf[0] & ~nothing).any():
                notes.append("neurons with constant output stay: no bias to hold it")
            dead = dead | (deaf[0] & nothing)
    else:
        for x, b in zip(deaf, biases, strict=True):
            silent = x & np.asarray(b == 0) & zero_at_zero
            if (x & ~silent & ~dead).any():
                notes.append(
                    "neurons with one zero input stay: it is not 0 behind its bias"
                )
            dead = dead | silent
    out = out * jnp.asarray(~dead, out.dtype)[..., None]  # padding must stay silent
    kept = _padded(~dead)

    def take(x, axis):
        taken = [
            jnp.take(x[i], jnp.asarray(kept[i], int), axis=axis) for i in range(len(x))
        ]
        return jnp.stack(taken) if stacked else taken[0]

    for path, x, b in zip(layer.mlp_in, ins, biases, strict=True):
        leaves[path] = take(x, 1)
        if _bias(path) in leaves:
            leaves[_bias(path)] = take(b, 0)
    leaves[layer.mlp_out] = take(out, 0)
    return n, kept.shape[1]


def _padded(alive: np.ndarray) -> np.ndarray:
    """Indices of what is alive in each row, filled up to one length with what is not."""
    order = np.argsort(~alive, axis=1, kind="stable")
    longest = int(alive.sum(1).max(initial=0))
    return np.sort(order[:, :longest], axis=1)


def _bias(path: str) -> str:
    return "/".join([*path.split("/")[:-1], "bias"])
