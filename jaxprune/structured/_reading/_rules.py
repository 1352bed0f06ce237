"""What each primitive makes of the dimensions of its operands."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxprune.structured._reading import _dims, _indexing
from jaxprune.structured._reading._dims import Dim, MisalignedError, freeze, mark, unify
from jaxprune.structured._reading._indexing import CHOICES
from jaxprune.structured._reading._values import (
    Moved,
    Operand,
    frozen,
    frozen_dim,
    same,
    unknown,
)
from jaxprune.tracing._layout import aligned
from jaxprune.tracing._moves import AS_THEY_ARE, ELEMENTWISE

_AS_IT_WAS = AS_THEY_ARE - {"optimization_barrier"} | {
    "stop_gradient", "real", "imag", "conj", "layout_constraint",
}  # fmt: skip
_POINTWISE = ELEMENTWISE | frozenset(
    "asin acos atan atan2 asinh acosh atanh sin cos tan sinh cosh erf_inv erfc lgamma "
    "digamma complex population_count clz igamma igammac polygamma bessel_i0e "
    "bessel_i1e eq_to lt_to le_to random_gamma_grad".split()
)
_LINEAR = frozenset("add sub neg add_any select_n".split()) | _AS_IT_WAS
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor".split()
)
_CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())
_WINDOWS = frozenset(
    "reduce_window reduce_window_sum reduce_window_max reduce_window_min".split()
)
_SCATTERS = frozenset(
    "scatter scatter-add scatter_add scatter-mul scatter_mul scatter_min scatter_max "
    "scatter-min scatter-max".split()
)


def is_pointwise(eqn: Any) -> bool:
    """Whether each element of the output depends on those at its own place alone."""
    return eqn.primitive.name in _POINTWISE or eqn.primitive.name in _AS_IT_WAS


def keeps_axes(eqn: Any) -> bool:
    """Whether axes of the output are axes of the operands, whatever their sizes."""
    names = {"dot_general", "transpose", "broadcast_in_dim", "squeeze", "expand_dims"}
    name = eqn.primitive.name
    return is_pointwise(eqn) or name in _REDUCTIONS or name in names


def apply(eqn: Any, operands: Sequence[Operand]) -> Moved | None:
    """Dimensions of the outputs; `None` for a primitive that is not known here."""
    name = eqn.primitive.name
    if name == "optimization_barrier":
        return Moved([x.dims for x in operands])
    if name in _POINTWISE or name in _AS_IT_WAS:
        return _pointwise(eqn, operands)
    if name in _REDUCTIONS or name in CHOICES:
        return _reduce(eqn, operands)
    if name in _CUMULATIVE:
        freeze(operands[0].dims[eqn.params["axis"]], name)
        return Moved([operands[0].dims])
    if name in _WINDOWS:
        return _reduce_window(eqn, operands)
    if name in _SCATTERS:
        return _indexing.scatter(eqn, operands)
    if name in _RULES:
        return _RULES[name](eqn, operands)
    return None


def _pointwise(eqn: Any, operands: Sequence[Operand]) -> Moved:
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    met = [x for x in operands if len(x.dims) == len(shape)]
    dims = same([x.dims for x in met]) if met else _dims.fresh(shape)
    whole = [x for x in met if x.data and [d.size for d in x.dims] == list(shape)]
    if name not in _LINEAR and any(x.data for x in operands):
        gates = name not in ("mul", "div") or len(whole) > 1
        for d in dims if gates else ():
            mark(d, "nonlinear")
    if name in ("add", "sub") and len(whole) > 1:
        for d in dims:
            mark(d, "residual")
    return Moved([dims] * len(eqn.outvars))


def _reduce(eqn: Any, operands: Sequence[Operand]) -> Moved:
    axes = set(eqn.params["axes"])
    for a in axes:
        chosen = eqn.primitive.name in CHOICES
        role = (
            "chosen"
            if chosen
            else "reduced"
            if len(axes) == 1
            else "reduced with others"
        )
        mark(operands[0].dims[a], role)
    dims = tuple(d for i, d in enumerate(operands[0].dims) if i not in axes)
    return Moved([dims] * len(eqn.outvars))


def _dot(eqn: Any, operands: Sequence[Operand]) -> Moved:
    (l_axes, r_axes), (l_batch, r_batch) = eqn.params["dimension_numbers"]
    left, right = operands
    pairs = [(left.dims[i], right.dims[j]) for i, j in zip(l_axes, r_axes, strict=True)]
    batch = [
        (left.dims[i], right.dims[j]) for i, j in zip(l_batch, r_batch, strict=True)
    ]
    for a, b in (*pairs, *batch):
        unify(a, b)
    free = [
        [d for i, d in enumerate(x.dims) if i not in (*axes, *b)]
        for x, axes, b in ((left, l_axes, l_batch), (right, r_axes, r_batch))
    ]
    if left.data and right.data and not pairs:  # one scales the other
        for d in (a for a, _ in batch) if any(free) else ():
            mark(d, "scaled")
        return Moved([(*(a for a, _ in batch), *free[0], *free[1])])
    kind = {2: "activations", 1: "weights", 0: "between weights"}[
        left.data + right.data
    ]
    for role, found in (
        ("contracted by ", [a for a, _ in pairs]),
        ("batch of ", [a for a, _ in batch]),
        ("free in ", [*free[0], *free[1]]),
    ):
        for d in found:
            if role == "free in " and f"free in {kind}" in _dims.find(d).roles:
                mark(d, f"free again in {kind}")
            mark(d, role + kind)
    if left.data and right.data:
        for leaf in (x for dims in free for d in dims for x in _dims.leaves(d)):
            leaf.beside += [a for a, _ in batch]
            leaf.over += [a for a, _ in pairs]
    return Moved([(*(a for a, _ in batch), *free[0], *free[1])])


def _conv(eqn: Any, operands: Sequence[Operand]) -> Moved | None:
    params = eqn.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return None
    left, right = (x.dims for x in operands)
    l_spec, r_spec, o_spec = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    shape, group = eqn.outvars[0].aval.shape, Dim(groups)
    features, into = right[r_spec[0]], right[r_spec[1]]
    if groups == 1:
        unify(left[l_spec[1]], into)
    else:
        unify(left[l_spec[1]], _dims.product([group, into]))
        each = Dim(features.size // groups)
        unify(features, _dims.product([group, each]))
    out: list[Dim] = [group] * len(shape)
    out[o_spec[0]], out[o_spec[1]] = left[l_spec[0]], features
    for i in o_spec[2:]:
        out[i] = frozen_dim(shape[i], "a window of a convolution")
    for dims, spec in ((left, l_spec), (right, r_spec)):
        freeze([dims[i] for i in spec[2:]], "a window of a convolution")
    for d in (left[l_spec[1]], features, into):
        mark(d, "convolved")
    return Moved([tuple(out)], group)


def _ragged(eqn: Any, operands: Sequence[Operand]) -> Moved | None:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (l_axes, r_axes), (l_batch, _) = numbers.dot_dimension_numbers
    ragged, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if l_batch or len(groups) != 1 or len(ragged) != 1 or ragged[0] in l_axes:
        return None
    left, right, *sizes = (x.dims for x in operands)
    for i, j in zip(l_axes, r_axes, strict=True):
        unify(left[i], right[j])
        mark(left[i], "contracted by weights")
    for x in sizes:
        freeze(x, "sizes of ragged groups")
    freeze(right[groups[0]], "ragged groups")
    rest = [d for i, d in enumerate(right) if i not in (*r_axes, groups[0])]
    return Moved([(*(d for i, d in enumerate(left) if i not in l_axes), *rest)])


def _reshape(eqn: Any, operands: Sequence[Operand]) -> Moved:
    dims, shape = operands[0].dims, eqn.outvars[0].aval.shape
    order = eqn.params.get("dimensions")
    dims = dims if order is None else tuple(dims[i] for i in order)
    out = list(_dims.fresh(shape))
    for old, new in aligned([d.size for d in dims], shape):
        before = [d for d in (dims[i] for i in old) if d.size != 1]
        after = [i for i in new if shape[i] != 1]
        if len(before) == len(after) == 1:
            out[after[0]] = before[0]
        elif before:
            joined = _dims.product([out[i] for i in after])
            unify(_dims.product(before), joined)
    return Moved([tuple(out)])


def _transpose(eqn: Any, operands: Sequence[Operand]) -> Moved:
    return Moved([tuple(operands[0].dims[i] for i in eqn.params["permutation"])])


def _squeeze(eqn: Any, operands: Sequence[Operand]) -> Moved:
    gone = {a % len(operands[0].dims) for a in eqn.params["dimensions"]}
    return Moved([tuple(d for i, d in enumerate(operands[0].dims) if i not in gone)])


def _expand_dims(eqn: Any, operands: Sequence[Operand]) -> Moved:
    rank = len(eqn.outvars[0].aval.shape)
    new = {a % rank for a in eqn.params["dimensions"]}
    rest = iter(operands[0].dims)
    return Moved([tuple(Dim(1) if i in new else next(rest) for i in range(rank))])


def _broadcast(eqn: Any, operands: Sequence[Operand]) -> Moved:
    out = list(_dims.fresh(eqn.outvars[0].aval.shape))
    for d, i in zip(operands[0].dims, eqn.params["broadcast_dimensions"], strict=True):
        if d.size == out[i].size:
            out[i] = d
    return Moved([tuple(out)])


def _reduce_window(eqn: Any, operands: Sequence[Operand]) -> Moved | None:
    params, shape = eqn.params, eqn.outvars[0].aval.shape
    dilations = [params.get(n) for n in ("base_dilation", "window_dilation")]
    if len(operands) > 2 or len(eqn.outvars) > 1:
        return None
    out = []
    for i, d in enumerate(operands[0].dims):
        whole = params["window_dimensions"][i] == params["window_strides"][i] == 1
        plain = tuple(params["padding"][i]) == (0, 0)
        if whole and plain and all(x is None or x[i] == 1 for x in dilations):
            out.append(d)
        else:
            freeze(d, "a window")
            out.append(frozen_dim(shape[i], "a window"))
    return Moved([tuple(out)])


def _sort(eqn: Any, operands: Sequence[Operand]) -> Moved:
    dims = same([x.dims for x in operands])
    freeze(dims[eqn.params["dimension"]], "sort")
    return Moved([dims] * len(eqn.outvars))


def _reverse(eqn: Any, operands: Sequence[Operand]) -> Moved:
    freeze([operands[0].dims[i] for i in eqn.params["dimensions"]], "rev")
    return Moved([operands[0].dims])


def _tile(eqn: Any, operands: Sequence[Operand]) -> Moved:
    out = []
    for d, times in zip(operands[0].dims, eqn.params["reps"], strict=True):
        copies = frozen_dim(times, "copies")
        out.append(d if times == 1 else _dims.product([copies, d]))
    return Moved([tuple(out)])


def _stack(eqn: Any, operands: Sequence[Operand]) -> Moved:
    dims = list(same([x.dims for x in operands]))
    dims.insert(eqn.params["axis"], frozen_dim(len(operands), "stacked values"))
    return Moved([tuple(dims)])


def _unstack(eqn: Any, operands: Sequence[Operand]) -> Moved:
    dims, axis = list(operands[0].dims), eqn.params["axis"]
    freeze(dims.pop(axis), "taken apart")
    return Moved([tuple(dims)] * len(eqn.outvars))


def _concatenate(eqn: Any, operands: Sequence[Operand]) -> Moved:
    axis = eqn.params["dimension"]
    others = [x.dims[:axis] + x.dims[axis + 1 :] for x in operands]
    dims = list(same(others))
    dims.insert(axis, _dims.total([x.dims[axis] for x in operands]))
    return Moved([tuple(dims)])


def _split(eqn: Any, operands: Sequence[Operand]) -> Moved:
    axis, dims = eqn.params["axis"], operands[0].dims
    rest, outs = dims[axis], []
    for n in eqn.params["sizes"]:
        size = _dims.find(rest).size
        try:
            part, rest = _dims.split(rest, n) if 0 < n < size else (rest, rest)
            if n == 0:
                part = Dim(0)
        except MisalignedError as error:
            freeze(rest, f"misaligned: {error}")
            part, rest = frozen((n, size - n), "split")
        outs.append((*dims[:axis], part, *dims[axis + 1 :]))
    return Moved(outs)


def _slice(eqn: Any, operands: Sequence[Operand]) -> Moved:
    params, shape, out = eqn.params, eqn.outvars[0].aval.shape, []
    steps = params["strides"] or (1,) * len(shape)
    starts, limits = params["start_indices"], params["limit_indices"]
    cuts = zip(operands[0].dims, starts, limits, steps, shape, strict=True)
    for d, start, limit, step, size in cuts:
        try:
            out.append(_window(d, start, limit, step, size))
        except MisalignedError as error:
            freeze(d, f"misaligned: {error}")
            out.append(frozen_dim(size, "slice"))
    return Moved([tuple(out)])


def _window(d: Dim, start: int, limit: int, step: int, size: int) -> Dim:
    if step == 1:
        return _dims.window(d, start, limit)
    if d.size != size * step or start >= step:
        raise MisalignedError(f"a slice of {_dims.describe(d)} with step {step}")
    outer = Dim(size)
    unify(d, _dims.product([outer, frozen_dim(step, "a stride")]))
    return outer


def _pad(eqn: Any, operands: Sequence[Operand]) -> Moved:
    out, edges = [], []
    for d, (low, high, inner) in zip(
        operands[0].dims, eqn.params["padding_config"], strict=True
    ):
        if inner or low < 0 or high < 0:
            freeze(d, "pad")
            size = eqn.outvars[0].aval.shape[len(out)]
            out.append(frozen_dim(size, "pad"))
            edges.append(None)
        else:
            edge = Dim(low), Dim(high)
            out.append(_dims.total([edge[0], d, edge[1]]) if low or high else d)
            edges.append(edge)
    return Moved([tuple(out)], tuple(edges))


def _free(eqn: Any, operands: Sequence[Operand]) -> Moved:
    return Moved([_dims.fresh(v.aval.shape) for v in eqn.outvars])


def _random(eqn: Any, operands: Sequence[Operand]) -> Moved:
    if any(x.dims for x in operands[1:]) or len(operands[0].dims):
        return unknown(eqn, operands, eqn.primitive.name)
    return _free(eqn, operands)


def _keys(eqn: Any, operands: Sequence[Operand]) -> Moved:
    return unknown(eqn, operands, "random keys")


def _bitcast(eqn: Any, operands: Sequence[Operand]) -> Moved | None:
    if eqn.invars[0].aval.shape != eqn.outvars[0].aval.shape:
        return None
    return Moved([operands[0].dims])


_RULES: dict[str, Callable[[Any, Sequence[Operand]], Moved | None]] = {
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "dynamic_slice": _indexing.dynamic_slice,
    "dynamic_update_slice": _indexing.dynamic_update,
    "expand_dims": _expand_dims,
    "gather": _indexing.gather,
    "debug_callback": _free,
    "debug_print": _free,
    "iota": _free,
    "pad": _pad,
    "platform_index": _free,
    "ragged_dot_general": _ragged,
    "random_bits": _random,
    **dict.fromkeys(
        "random_wrap random_unwrap random_seed random_fold_in random_split "
        "random_clone".split(),
        _keys,
    ),
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _indexing.top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}
