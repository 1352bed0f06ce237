"""LLM-Pruner's importance: the change of the loss by Taylor, of first and second order."""

from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.calibration import Gradients
from jaxprune.structured._methods._aggregate import (
    Reduction,
    by_member,
    check_reduction,
    reduced,
)
from jaxprune.structured._methods._scores import as_real, by_path
from jaxprune.structured._reading import _dims
from jaxprune.structured._reading._graph import Graph, Member

TaylorForm = Literal["vector", "first", "second", "mixed"]


def taylor(
    graph: Graph,
    params: PyTree,
    gradients: Gradients,
    *,
    form: TaylorForm = "mixed",
    reduction: Reduction = "sum",
) -> dict[str, np.ndarray]:
    """Scores of units by what the loss would do without them.

    With `g` the mean gradient and `F` the mean of squared gradients of examples, which
    stands for the diagonal of the Hessian: `"first"`, `Σ |g w|`; `"second"`, `Σ F w²`;
    `"mixed"`, `Σ |g w - F w²/2|`, weight by weight; `"vector"`, `|Σ g w|`, where the sum
    is over a row or column of one leaf, the slice that goes with one place along an axis.
    Each is found for every member of a group, and then reduced over these.

    Args:
      graph: of `trace`.
      params: the parameters that it was traced with.
      gradients: of `jaxprune.calibration.gradients`, with `per_example=True` for the second
        order. Leaves without a gradient count as 0.
      form: which. These are `vectorize`, `param_first`, `param_second` and `param_mix` in
        the authors' code, where a vector is of first order.
      reduction: over the members of a group. `"prod"` is 0 where one member is.

    Returns:
      Scores [units] by name of the group.

    Raises:
      ValueError: if an option is not known, or a tree does not fit.

    Example:
      >>> def loss(params, x):
      ...     return jnp.mean((x @ params["up"]) @ params["down"])
      >>> params = {"up": jnp.array([[1.0, 2.0]]), "down": jnp.array([[3.0], [1.0]])}
      >>> graph = jp.structured.trace(loss, params, jnp.ones((1, 1)))
      >>> grads = jp.calibration.gradients(loss, params, [jnp.ones((1, 1))])
      >>> jp.structured.taylor(graph, params, grads, form="first")["down:0"].tolist()
      [6.0, 4.0]

    References:
      Ma, Fang, Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models",
      arXiv 2305.11627, equations 3 to 5, and their code. The layers of a stack that a scan
      runs over are vectors of their own, and their scores are summed. Biases count as
      members too. Their "last" reduction, of the last layer of a group, is left out.
    """
    if form not in get_args(TaylorForm):
        raise ValueError(f"form: got {form!r}; expected one of {get_args(TaylorForm)}.")
    check_reduction(reduction)
    weights = by_path(graph, params, "params")
    mean, square = (_with_holes(graph, x, weights) for x in gradients[1:])
    traced = graph._traced
    dims = dict(zip(traced.paths, traced.dims, strict=True))

    def places(m: Member) -> np.ndarray:
        terms = _terms(weights[m.path], mean[m.path], square[m.path], form)
        stack = [i for i, d in enumerate(dims[m.path]) if _is_stack(d)]
        return _by_place(terms, m.axis, stack, form)

    return {g.name: reduced(by_member(g, places), reduction) for g in graph.groups}


def _terms(w: Array, g: Array, f: Array, form: str) -> Array:
    w = as_real(w)
    if form == "second":
        return f * w * w
    return g * w - (f * w * w / 2 if form == "mixed" else 0)


def _by_place(terms: Array, axis: int, stack: list[int], form: str) -> np.ndarray:
    rest = tuple(i for i in range(terms.ndim) if i != axis)
    if form == "vector":
        inside = tuple(i for i in rest if i not in stack)
        terms = jnp.sum(terms, axis=inside, keepdims=True)
    return np.asarray(jnp.sum(jnp.abs(terms), axis=rest), np.float64)


def _is_stack(d: _dims.Dim) -> bool:
    d = _dims.find(d)
    return d.form == "leaf" and "length of a scan" in d.roles


def _with_holes(
    graph: Graph, tree: PyTree, weights: dict[str, Array]
) -> dict[str, Array]:
    """Gradients by path, zeros where there are none."""
    paths, leaves, _ = _tree.flatten(tree)
    found = dict(zip(paths, leaves, strict=True))
    new = {}
    for path, shape in graph.shapes.items():
        x = found.get(path)
        if x is None or _tree.is_hole(x):
            x = jnp.zeros(shape, jnp.float32)
        if np.shape(x) != shape:
            raise ValueError(
                f"gradients: {path} has the shape {np.shape(x)}, and the weight has {shape}. "
                "Pass gradients of the parameters that were traced."
            )
        new[path] = x
    return new
