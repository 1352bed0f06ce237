"""A module of Flax linen that is applied to shrunk variables."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxprune._tree import PyTree
from jaxprune.structured._plans import _module
from jaxprune.structured._plans._module import Patch
from jaxprune.structured._plans._plan import Plan

if TYPE_CHECKING:
    from flax import linen as nn


def linen_apply(
    plan: Plan,
    module: "nn.Module",
    variables: PyTree,
    *args: Any,
    tolerance: float = 1e-4,
    **kwargs: Any,
) -> tuple[Callable[..., Any], Patch]:
    """`module.apply` for shrunk variables, of the sizes that the plan keeps.

    While it runs, each layer of linen gets the sizes of its variables: features, groups of
    channels, heads. The module itself does not change. It computes what the same module
    would if it had been written at these sizes: its means and variances are those of the
    units that are kept, as in `plan.rewrite(fn, removed="absent")`. To this the result is
    compared, on `args`.

    Args:
      plan: of `module.apply`.
      module: not bound.
      variables: of full size, all that were traced.
      *args: an example of what `module.apply` is called with, behind the variables.
      tolerance: see `Plan.verify`.
      **kwargs: of `module.apply`: without dropout, for that draws other numbers at other
        sizes.

    Returns:
      `apply(small_variables, *args, **kwargs)`, and what changes in the attributes of each
      layer, with which to write the smaller module.

    Raises:
      ValueError: if the plan is for another model, groups of channels are of different
        widths, or the result is not that of the rewritten function; then `plan.rewrite`
        is the way.

    Example:
      >>> import flax.linen as nn
      >>> module = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(3)])
      >>> x = jnp.ones((2, 4))
      >>> variables = module.init(jax.random.key(0), x)
      >>> graph = jp.structured.trace(module.apply, variables, x)
      >>> plan = jp.structured.planned(graph, {"layers_0/kernel:1": range(6)})
      >>> apply, patch = jp.structured.linen_apply(plan, module, variables, x)
      >>> apply(plan.shrink(variables), x).shape
      (2, 3)
      >>> print(patch)
      layers_0: features 16 -> 6
    """
    from flax import linen as nn

    changes: dict[str, dict[str, tuple[Any, Any]]] = {}

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        found = []
        for layer in _sized(context.module):
            if new := _module.changed(layer, _attributes(plan, layer)):
                found.append((layer, new))
                changes["/".join(layer.path)] = new
        try:
            _set(found, 1)
            return call(*args, **kwargs)
        finally:
            _set(found, 0)

    def apply(variables: PyTree, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(intercept):
            return module.apply(variables, *args, **kwargs)

    def full(variables: PyTree, *args: Any) -> Any:
        return module.apply(variables, *args, **kwargs)

    def small(variables: PyTree, *args: Any) -> Any:
        return apply(variables, *args, **kwargs)

    expected = plan.rewrite(full, removed="absent")
    _module.check_equal(expected, small, plan.shrink(variables), args, tolerance)
    return apply, Patch(dict(changes))


def _sized(layer: "nn.Module") -> list["nn.Module"]:
    """The layer; and the cell of an RNN, which makes its carry where nothing is seen."""
    from flax import linen as nn

    return [layer, layer.cell] if isinstance(layer, nn.RNN) else [layer]


def _set(
    found: Sequence[tuple["nn.Module", dict[str, tuple[Any, Any]]]], i: int
) -> None:
    """Sets attributes to the old or the new value."""
    for layer, values in found:
        for name, x in values.items():
            object.__setattr__(layer, name, x[i])  # modules of linen are frozen


def _attributes(plan: Plan, layer: "nn.Module") -> dict[str, Any]:
    """Attributes that say sizes, as the variables of the layer have them.

    Axes are counted from the end, since layers may be stacked.
    """
    from flax.core import meta

    if layer.scope is None:
        return {}
    for kind, read in _readers():
        if isinstance(layer, kind):
            params = layer.scope.variables().get("params", {})
            return read(plan, layer, meta.unbox(params)) if params else {}
    return {}


def _like(old: Any, shape: tuple[int, ...]) -> Any:
    """Several sizes, or the last one, as the attribute had it."""
    return shape[-1] if isinstance(old, int) else tuple(shape[-len(old) :])


def _dense(plan: Plan, layer: Any, params: Any) -> dict[str, Any]:
    return {"features": _like(layer.features, params["kernel"].shape)}


def _einsum(plan: Plan, layer: Any, params: Any) -> dict[str, Any]:
    return {"shape": _like(layer.shape, params["kernel"].shape)}


def _conv(plan: Plan, layer: Any, params: Any) -> dict[str, Any]:
    path, groups = "/".join((*layer.path, "kernel")), layer.feature_group_count
    return {
        "features": params["kernel"].shape[-1],
        "feature_group_count": _module.groups_left(plan, path, -1, groups),
    }


def _conv_transpose(plan: Plan, layer: Any, params: Any) -> dict[str, Any]:
    out = -2 if layer.transpose_kernel else -1
    return {"features": params["kernel"].shape[out]}


def _embed(plan: Plan, layer: Any, params: Any) -> dict[str, Any]:
    rows, features = params["embedding"].shape[-2:]
    return {"num_embeddings": rows, "features": features}


def _group_norm(plan: Plan, layer: Any, params: Any) -> dict[str, Any]:
    name = next(iter(params))
    path = "/".join((*layer.path, name))
    groups = layer.num_groups or plan.shapes[path][-1] // layer.group_size
    groups = _module.groups_left(plan, path, -1, groups)
    if layer.num_groups is None:
        return {"group_size": params[name].shape[-1] // groups}
    return {"num_groups": groups}


def _attention(plan: Plan, layer: Any, params: Any) -> dict[str, Any]:
    into, heads, width = params["query"]["kernel"].shape[-3:]
    found = {
        "qkv_features": heads * width,
        "out_features": params["out"]["kernel"].shape[-1],
    }
    # None is the width of the input.
    same = {
        n: None for n, x in found.items() if getattr(layer, n) is None and x == into
    }
    return {"num_heads": heads} | found | same


def _cell(plan: Plan, layer: Any, params: Any) -> dict[str, Any]:
    own = next(name for name in ("hi", "hn", "h") if name in params)
    return {"features": params[own]["kernel"].shape[-2]}


@functools.cache
def _readers() -> Sequence[tuple[Any, Callable[..., dict[str, Any]]]]:
    from flax import linen as nn

    return (
        ((nn.Dense, nn.DenseGeneral), _dense), (nn.Einsum, _einsum),
        ((nn.Conv, nn.ConvLocal), _conv), (nn.ConvTranspose, _conv_transpose),
        (nn.Embed, _embed), (nn.GroupNorm, _group_norm),
        (nn.MultiHeadDotProductAttention, _attention),
        ((nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.MGUCell, nn.SimpleCell), _cell),
    )  # fmt: skip
