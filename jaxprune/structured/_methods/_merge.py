"""UDFC: what a removed channel gave, by the channels that are like it, without data."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune._tree import PyTree
from jaxprune.structured._methods import _consumers
from jaxprune.structured._methods._biases import biases, replaced
from jaxprune.structured._methods._scores import by_path
from jaxprune.structured._plans._plan import Plan
from jaxprune.structured._reading._graph import INPUT, Graph, Group
from jaxprune.structured._reading._kinds import Kind
from jaxprune.structured._reading._kinds import wanted as wanted_kinds
from jaxprune.tracing import Site


def merge(
    graph: Graph,
    plan: Plan,
    params: PyTree,
    *,
    features: Mapping[str, Float[Array, "units features"]] | None = None,
    ridge: float = 1e-3,
    kinds: Kind | Sequence[Kind] = ("neuron", "channel"),
) -> PyTree:
    """Adds what reads removed channels to what reads the channels that are like them.

    A removed channel p is written as `Σ_j s_j` times the channels that are kept, by least
    squares on what makes them: `s = argmin ‖f_p - Σ_j s_j f_j‖² + ridge ‖s‖²`, with f the
    weights and the bias that make a channel. With W what reads them, `W_j += s_j W_p`. It
    is exact where a channel is another one times a positive number and the activation
    between them is a relu; or any combination, where there is no activation.

    Args:
      graph: of `trace`.
      plan: of this graph.
      params: of full size.
      features: by group, what makes each unit, such as `normalized_features` gives where
        there is a batch norm. By default the kernels that make it, and their biases.
      ridge: share of the mean of `‖f_j‖²`.
      kinds: of groups to merge. Units of others are dropped as they are.

    Returns:
      The parameters, of full size: for `plan.shrink`.

    Raises:
      ValueError: if a number is out of range, features do not fit, what reads a channel is
        quantized or goes through a mask, or channels are made or read in stacks, as in a
        scan, which this does not follow.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.array([[1.0, 2.0]]), "down": jnp.array([[1.0], [1.0]])}
      >>> graph = jp.structured.trace(fn, params, jnp.ones((3, 1)))
      >>> plan = jp.structured.planned(graph, {"down:0": [0]})
      >>> new = jp.structured.merge(graph, plan, params, ridge=0.0)
      >>> new["down"].tolist()  # relu(2 x) = 2 relu(x)
      [[3.0], [1.0]]

    References:
      Bai et al., "Unified Data-Free Compression: Pruning and Quantization without
      Fine-Tuning", arXiv 2308.07209: the abstract and a summary were read, the equations
      were not. Its second term, for what the activation does, and its quantization are
      left out.
    """
    if not (np.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge: got {ridge!r}; expected a number of 0 or more.")
    _consumers.check_alike(plan)
    wanted = wanted_kinds(kinds)
    leaves = by_path(graph, params, "params")
    added = biases(graph)
    sites = _consumers.trace_of(graph, params).sites
    new: dict[str, Array] = {}
    for name, choice in plan.groups.items():
        group = graph[name]
        if len(choice.kept) == group.size or group.kind not in wanted:
            continue
        made, read = _ends(group, sites)
        f = (features or {}).get(name)
        if f is None:
            f = _features(group, made, read, leaves, added)
        if np.ndim(f) != 2 or len(f) != group.size:
            raise ValueError(
                f"features: got the shape {np.shape(f)} for {name}; expected [units, "
                f"features] with {group.size} units."
            )
        shares = _shares(np.asarray(f, np.float64), choice.kept, ridge)
        for site, units in read:
            _consumers.check_fits(site, leaves[site.path])
            w = new[site.path] if site.path in new else leaves[site.path]
            new[site.path] = _merged(site, units, w, shares)
    return replaced(params, new)


def normalized_features(
    kernel: Float[Array, "*inputs units"],
    scale: Float[Array, " units"],
    bias: Float[Array, " units"],
    mean: Float[Array, " units"],
    var: Float[Array, " units"],
    *,
    epsilon: float = 1e-5,
) -> Float[Array, "units features"]:
    """What makes a channel behind a batch norm: `(γ W / σ, β - γ μ / σ)`, `σ² = var + ε`.

    Args:
      kernel: the channels last.
      scale: γ.
      bias: β.
      mean: μ, the running mean; less the bias of the kernel, if it has one.
      var: the running variance.
      epsilon: ε.

    Example:
      >>> ones = jnp.ones(2)
      >>> jp.structured.normalized_features(
      ...     jnp.array([[1.0, 2.0]]), ones, ones, 0 * ones, 4 * ones, epsilon=0.0
      ... ).tolist()
      [[0.5, 1.0], [1.0, 1.0]]
    """
    gain = scale / jnp.sqrt(var + epsilon)
    flat = jnp.reshape(kernel, (-1, kernel.shape[-1])) * gain
    return jnp.concatenate([flat, (bias - gain * mean)[None]]).T


def _ends(
    group: Group, sites: Sequence[Site]
) -> tuple[list[tuple[Site, np.ndarray]], list[tuple[Site, np.ndarray]]]:
    """Products that make the units, and products that read them, with the unit of each."""
    made, read = [], []
    for m in group.members:
        if m.path.startswith(INPUT):
            continue
        for site in (s for s in sites if s.path == m.path):
            inputs = _consumers.units_of_inputs(site, m.units, m.axis)
            if inputs is not None:
                _check_single(site, group)
                read.append((site, inputs[0, 0]))
            elif site.axes is not None and m.axis in site.axes[3]:
                _check_single(site, group)
                made.append((site, _consumers.units_of_outputs(site, m.units, m.axis)))
    return made, read


def _check_single(site: Site, group: Group) -> None:
    if site.matrix.stack != 1 or site.matrix.batch != 1:
        raise ValueError(
            f"plan: {group.name} is made or read by {site.path}, as matrices {site.matrix}; "
            "expected one matrix. Keep the group, leave its kind out of kinds=, or use "
            "structured.refit, which needs data."
        )


def _features(
    group: Group,
    made: Sequence[tuple[Site, np.ndarray]],
    read: Sequence[tuple[Site, np.ndarray]],
    leaves: dict[str, Array],
    added: dict[str, str],
) -> np.ndarray:
    """The columns of the kernels that make each unit, and their biases."""
    found = []
    for site, units in made:
        w = np.asarray(site.to_matrix(leaves[site.path])[0, 0], np.float64)  # [K, N]
        if site.path in added:
            bias = np.asarray(leaves[added[site.path]], np.float64).reshape(1, -1)
            w = np.concatenate([w, bias])
        found.append(np.stack([w[:, units == u].ravel() for u in range(group.size)]))
    known = {site.path for site, _ in (*made, *read)} | set(added.values())
    others = [m.path for m in group.members if m.path not in known]
    if others or not found:
        why = f"{others[0]} acts on" if others else "no product makes"
        raise ValueError(
            f"features: {why} the units of {group.name}, so that it is not known what makes "
            f"them. Pass features={{{group.name!r}: [units, features]}}; see "
            "structured.normalized_features for a batch norm."
        )
    return np.concatenate(found, axis=1)


def _shares(f: np.ndarray, kept: np.ndarray, ridge: float) -> np.ndarray:
    """`[units, units]`: row p says what each kept unit takes over of a removed one."""
    gone = np.setdiff1d(np.arange(len(f)), kept)
    own = f[kept]
    damped = own @ own.T
    if ridge:
        damped += ridge * np.mean(np.sum(own**2, 1)) * np.eye(len(kept))
        s = np.linalg.solve(damped, own @ f[gone].T).T
    else:
        s = np.linalg.lstsq(own.T, f[gone].T, rcond=None)[0].T
    found = np.zeros((len(f), len(f)))
    found[np.ix_(gone, kept)] = s
    return found


def _merged(site: Site, units: np.ndarray, leaf: Array, shares: np.ndarray) -> Array:
    """What reads the units, with what it read of removed ones moved to others."""
    size = len(shares)
    places = np.stack(
        [np.flatnonzero(units == u) for u in range(size)]
    )  # [units, each]
    w = np.array(site.to_matrix(leaf), np.float64)
    for column in places.T:  # such as one place of a window, or of a picture
        w[0, 0, column] += shares.T @ w[0, 0, column]
    return site.from_matrix(jnp.asarray(w, jnp.float32), leaf)
