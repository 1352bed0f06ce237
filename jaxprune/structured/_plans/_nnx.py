"""A model of Flax NNX at the sizes of a plan, with the attributes that say them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.structured._plans import _module, _state
from jaxprune.structured._plans._module import Patch
from jaxprune.structured._plans._plan import Plan

if TYPE_CHECKING:
    from flax import nnx


def nnx_module(
    plan: Plan,
    model: "nnx.Module",
    *args: Any,
    call: Callable[..., Any] | None = None,
    tolerance: float = 1e-4,
) -> tuple["nnx.Module", Patch]:
    """A copy of an NNX model with the units that the plan keeps.

    Its variables are shrunk, and attributes that say sizes are set: features of linear
    layers, convolutions, tables and normalisations, groups of channels, heads. So it is
    the model as if it had been built at these sizes: its means and variances are those of
    the units that are kept, as in `plan.rewrite(fn, removed="absent")`. To this the copy is
    compared, on `args`.

    Args:
      plan: of a function of all variables of the model: `nnx.split(model)[1]`.
      model: at its full size; it is not changed.
      *args: an example of what it is called with.
      call: `call(model, *args)`, if it is not `model(*args)`: without dropout, for that
        draws other numbers at other sizes.
      tolerance: see `Plan.verify`.

    Returns:
      The copy, and what changed in its attributes.

    Raises:
      ValueError: if the plan is for another model, a variable is not in it, groups of
        channels are of different widths, or the copy does not give what the rewritten
        function gives; then there is no such module, and `plan.rewrite` is the way.

    Example:
      >>> from flax import nnx
      >>> model = nnx.Sequential(
      ...     nnx.Linear(4, 16, rngs=nnx.Rngs(0)), nnx.relu,
      ...     nnx.Linear(16, 3, rngs=nnx.Rngs(1)),
      ... )
      >>> graphdef, state = nnx.split(model)
      >>> x = jnp.ones((2, 4))
      >>> graph = jp.structured.trace(lambda s, x: nnx.merge(graphdef, s)(x), state, x)
      >>> plan = jp.structured.planned(graph, {"layers/0/kernel:1": range(6)})
      >>> small, patch = jp.structured.nnx_module(plan, model, x)
      >>> print(patch)
      layers/0: out_features 16 -> 6
      layers/2: in_features 16 -> 6
    """
    from flax import nnx

    run = call or (lambda model, *args: model(*args))
    graphdef, state = nnx.split(model)
    small = nnx.merge(graphdef, _shrunk(plan, state))
    changes = {}
    for path, module in nnx.iter_graph(small):
        if isinstance(module, nnx.Module):
            name = "/".join(map(str, path))
            if new := _module.changed(module, _attributes(plan, name, module)):
                changes[name] = new
                for attribute, (_, x) in new.items():
                    setattr(module, attribute, x)
    small_def, small_state = nnx.split(small)

    def whole(known: Mapping[str, Any], *args: Any) -> Any:
        return run(nnx.merge(graphdef, _filled(state, known)), *args)

    def cut(known: Mapping[str, Any], *args: Any) -> Any:
        return run(nnx.merge(small_def, _filled(small_state, known)), *args)

    leaves = _tree.flatten(small_state)
    known = {p: x for p, x in zip(*leaves[:2], strict=True) if p in plan.shapes}
    expected = plan.rewrite(whole, removed="absent")
    _module.check_equal(expected, cut, known, args, tolerance)
    return small, Patch(changes)


def _shrunk(plan: Plan, state: PyTree) -> PyTree:
    """The variables, shrunk; counts and keys of random numbers may be missing in the plan."""
    paths, leaves, _ = _tree.flatten(state)
    found = {p: x.shape for p, x in zip(paths, leaves, strict=True)}
    _state.check_shapes(found, plan.shapes, name="model", which="full")
    for path, x in zip(paths, leaves, strict=True):
        if path not in plan.shapes and x.ndim and _tree.is_float(x):
            raise ValueError(
                f"model: its variable {path} is not in the plan. Trace a function of all "
                "variables, lambda state, x: nnx.merge(graphdef, state)(x), with the "
                "graphdef and state of nnx.split(model)."
            )
    return _state.cut_tree(state, plan.cuts)


def _filled(state: PyTree, known: Mapping[str, Any]) -> PyTree:
    """The state with known leaves, by path."""
    paths, leaves, treedef = _tree.flatten(state)
    found = [known.get(p, x) for p, x in zip(paths, leaves, strict=True)]
    return treedef.unflatten(found)


def _attributes(plan: Plan, path: str, module: Any) -> dict[str, Any]:
    """Attributes that say sizes, as the shrunk variables have them.

    Axes are counted from the end, since layers may be stacked.
    """
    for kind, read in _readers():
        if isinstance(module, kind):
            return read(plan, path, module)
    return {}


def _linear(plan: Plan, path: str, module: Any) -> dict[str, Any]:
    into, out = module.kernel.shape[-2:]
    return {"in_features": into, "out_features": out}


def _lora(plan: Plan, path: str, module: Any) -> dict[str, Any]:
    return {
        "in_features": module.lora_a.shape[-2], "out_features": module.lora_b.shape[-1]
    }  # fmt: skip


def _linear_general(plan: Plan, path: str, module: Any) -> dict[str, Any]:
    n, m = len(module.in_features), len(module.out_features)
    shape = module.kernel.shape
    batch = shape[len(shape) - n - m - len(module.batch_axis) : len(shape) - n - m]
    found = dict(zip(module.batch_axis, batch, strict=True))
    return {
        "in_features": shape[len(shape) - n - m : len(shape) - m],
        "out_features": shape[len(shape) - m :],
        "batch_axis": type(module.batch_axis)(found),
    }


def _einsum(plan: Plan, path: str, module: Any) -> dict[str, Any]:
    found = {"kernel_shape": module.kernel.shape}
    return found | ({} if module.bias is None else {"bias_shape": module.bias.shape})


def _conv(plan: Plan, path: str, module: Any) -> dict[str, Any]:
    groups = module.feature_group_count
    groups = _module.groups_left(plan, f"{path}/kernel", -1, groups)
    shape = module.kernel.shape
    if module.mask is not None and module.mask.shape != shape:
        _module.refuse(f"{path} has a mask of its own, of the full shape")
    return {
        "in_features": shape[-2] * groups, "out_features": shape[-1],
        "kernel_shape": shape, "feature_group_count": groups,
    }  # fmt: skip


def _conv_transpose(plan: Plan, path: str, module: Any) -> dict[str, Any]:
    shape = module.kernel.shape
    out, into = shape[-2:] if module.transpose_kernel else shape[:-3:-1]
    return {"in_features": into, "out_features": out, "kernel_shape": shape}


def _embed(plan: Plan, path: str, module: Any) -> dict[str, Any]:
    rows, features = module.embedding.shape[-2:]
    return {"num_embeddings": rows, "features": features}


def _norm(plan: Plan, path: str, module: Any) -> dict[str, Any]:
    held = (getattr(module, name, None) for name in ("mean", "scale", "bias"))
    sizes = [x.shape[-1] for x in held if x is not None]
    return {"num_features": sizes[0]} if sizes else {}


def _group_norm(plan: Plan, path: str, module: Any) -> dict[str, Any]:
    for name in ("scale", "bias"):
        x = getattr(module, name)
        if x is not None:
            n = _module.groups_left(plan, f"{path}/{name}", -1, module.num_groups)
            return {"num_groups": n, "group_size": x.shape[-1] // n}
    return {}


def _attention(plan: Plan, path: str, module: Any) -> dict[str, Any]:
    into, heads, width = module.query.kernel.shape[-3:]
    return {
        "num_heads": heads, "num_kv_heads": module.key.kernel.shape[-2],
        "head_dim": width, "qkv_features": heads * width, "in_features": into,
        "in_kv_features": module.key.kernel.shape[-3],
        "out_features": module.out.kernel.shape[-1],
    }  # fmt: skip


def _cell(plan: Plan, path: str, module: Any) -> dict[str, Any]:
    into, own = ("ii", "hi") if hasattr(module, "hi") else ("dense_i", "dense_h")
    return {
        "in_features": getattr(module, into).kernel.shape[-2],
        "hidden_features": getattr(module, own).kernel.shape[-2],
    }


@functools.cache
def _readers() -> Sequence[tuple[Any, Callable[..., dict[str, Any]]]]:
    from flax import nnx

    return (
        (nnx.Linear, _linear), (nnx.LoRA, _lora), (nnx.LinearGeneral, _linear_general),
        (nnx.Einsum, _einsum), (nnx.Conv, _conv), (nnx.ConvTranspose, _conv_transpose),
        (nnx.Embed, _embed), (nnx.GroupNorm, _group_norm),
        ((nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.InstanceNorm), _norm),
        (nnx.MultiHeadAttention, _attention),
        ((nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell), _cell),
    )  # fmt: skip
