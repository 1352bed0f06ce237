"""Physical removal of dead heads and neurons after NeuroPrune."""

import math
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

    Then a plan cuts them out of any function: with `graph` of
    `jaxprune.structured.trace`, the units to keep are those that
    `graph.as_groups(kinds=("head", "neuron")).alive(params)` finds.

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
    leaves, _, _ = _folded(params, found, roles, activation)
    return _tree.map_with_path(lambda path, _: leaves[path], params)


def neuroprune_shrink(
    params: PyTree,
    found: PyTree = None,
    *,
    roles: Roles,
    activation: Callable[[Array], Array] = jax.nn.gelu,
) -> tuple[PyTree, list[LayerSizes]]:
    """Removes dead heads and neurons, and keeps the function that the masked model has.

    What is dead says `neuroprune_fold`. In a stack of layers, and for grouped queries,
    sizes stay equal: the largest count that is needed anywhere, with dead heads or
    neurons as padding; each layer keeps its own. A layer may lose all of its heads. Where
    none of that is needed, a plan of `jaxprune.structured` does the same for any
    function, and gives the function too.

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
    leaves, layers, dead = _folded(params, found, roles, activation)
    sizes = []
    for layer, what in zip(layers, dead, strict=True):
        heads = kv_heads = neurons = (0, 0)
        if what.heads is not None:
            heads, kv_heads = _cut_heads(leaves, layer, roles, ~what.heads)
        if what.neurons is not None:
            neurons = _cut_mlp(leaves, layer, ~what.neurons)
        sizes.append(LayerSizes(layer.name, heads, kv_heads, neurons, what.notes))
    return _tree.map_with_path(lambda path, _: leaves[path], params), sizes


class _Dead(NamedTuple):
    """What of a layer, or of a stack of them, is dead.

    Attributes:
      heads: `[stack, kv heads, query heads of each]`.
      neurons: `[stack, neurons]`.
      notes: why something dead had to stay.
    """

    heads: np.ndarray | None
    neurons: np.ndarray | None
    notes: tuple[str, ...]


def _folded(params: PyTree, found: PyTree, roles: Roles, activation):
    """Leaves by path with constants folded and the dead set to 0, layers, what is dead."""
    if found is not None:
        params = masks.apply(params, found)
    leaves = _roles.leaves_by_path(params)
    kernels = [p for p, x in leaves.items() if getattr(x, "ndim", 0) >= 2]
    layers = _roles.layers(roles, kernels)
    dead = []
    for layer in layers:
        notes: list[str] = []
        heads = neurons = None
        if layer.qkv and layer.out:
            heads = _fold_heads(leaves, layer, roles, notes)
        if layer.mlp_in and layer.mlp_out:
            neurons = _fold_mlp(leaves, layer, activation, notes)
        dead.append(_Dead(heads, neurons, tuple(notes)))
    return leaves, layers, dead


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


def _fold_heads(
    leaves: dict[str, Any], layer, roles: Roles, notes: list[str]
) -> np.ndarray:
    """Sets dead heads to 0, their constant in the output bias; says which they are."""
    n, groups = roles.heads or 0, roles.groups
    heads = _read_heads(leaves, layer, roles)
    v, out = heads.qkv[2], heads.out
    silent = np.asarray(jnp.all(out == 0, axis=(2, 3)))  # [stack, heads]
    constant = np.asarray(jnp.all(v == 0, axis=(1, 3)))  # [stack, kv heads]
    constant = np.repeat(constant, n // groups, axis=1) & ~silent
    if constant.any() and np.asarray(heads.biases[2] != 0).any():
        if _bias(layer.out) not in leaves:
            notes.append("heads with constant output stay: W_O has no bias to hold it")
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
    return dead


def _cut_heads(leaves: dict[str, Any], layer, roles: Roles, alive: np.ndarray):
    """Removes the heads that are not alive, `[stack, kv heads, query heads of each]`."""
    stack, groups, each = alive.shape
    heads = _read_heads(leaves, layer, roles)
    groups_kept = _padded(np.any(alive, axis=-1))  # [stack, groups kept]
    chosen = np.take_along_axis(alive, groups_kept[..., None], axis=1)
    within = _padded(chosen.reshape(-1, each))
    within = within.reshape(*groups_kept.shape, within.shape[-1])
    heads_kept = groups_kept[..., None] * each + within  # [stack, groups, queries] kept
    heads_kept = heads_kept.reshape(stack, math.prod(within.shape[1:]))

    def take(x, index, axis):
        return jnp.stack([jnp.take(x[i], jnp.asarray(index[i], int), axis=axis)
                          for i in range(stack)])  # fmt: skip

    def cut(q, k, v):
        return take(q, heads_kept, 1), take(k, groups_kept, 1), take(v, groups_kept, 1)

    small = _Heads(cut(*heads.qkv), cut(*heads.biases), take(heads.out, heads_kept, 0))
    _write_heads(leaves, layer, roles, small)
    return (groups * each, heads_kept.shape[1]), (groups, groups_kept.shape[1])


def _fold_mlp(
    leaves: dict[str, Any], layer, activation, notes: list[str]
) -> np.ndarray:
    """Sets dead neurons to 0, their constant in the next bias; says which they are."""
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
    alive = jnp.asarray(~dead)
    for path, x in zip(layer.mlp_in, ins, strict=True):
        x = jnp.where(alive[:, None], x, 0)
        leaves[path] = x if stacked else x[0]
        if _bias(path) in leaves:
            bias = leaves[_bias(path)]
            leaves[_bias(path)] = jnp.where(alive.reshape(bias.shape), bias, 0)
    out = jnp.where(alive[..., None], out, 0)
    leaves[layer.mlp_out] = out if stacked else out[0]
    return dead


def _cut_mlp(leaves: dict[str, Any], layer, alive: np.ndarray) -> tuple[int, int]:
    """Removes the neurons that are not alive, `[stack, neurons]`."""
    kept = _padded(alive)
    ins, out, stacked = _mlp(leaves, layer)

    def take(x, axis):
        taken = [
            jnp.take(x[i], jnp.asarray(kept[i], int), axis=axis) for i in range(len(x))
        ]
        return jnp.stack(taken) if stacked else taken[0]

    for path, x in zip(layer.mlp_in, ins, strict=True):
        leaves[path] = take(x, 1)
        if _bias(path) in leaves:
            leaves[_bias(path)] = take(leaves[_bias(path)].reshape(len(x), -1), 0)
    leaves[layer.mlp_out] = take(out, 0)
    return alive.shape[1], kept.shape[1]


def _mlp(leaves: dict[str, Any], layer) -> tuple[list[Array], Array, bool]:
    """Kernels into and out of the hidden neurons, stacked, and whether they were."""
    ins, out = [leaves[p] for p in layer.mlp_in], leaves[layer.mlp_out]
    if out.ndim == 3:
        return ins, out, True
    return [x[None] for x in ins], out[None], False


def _add(leaves: dict[str, Any], path: str, moved: Array) -> None:
    bias = leaves[path]
    leaves[path] = (bias + moved.reshape(bias.shape)).astype(bias.dtype)


def _padded(alive: np.ndarray) -> np.ndarray:
    """Indices of what is alive in each row, filled up to one length with what is not."""
    order = np.argsort(~alive, axis=1, kind="stable")
    longest = int(alive.sum(1).max(initial=0))
    return np.sort(order[:, :longest], axis=1)


def _bias(path: str) -> str:
    return "/".join([*path.split("/")[:-1], "bias"])
