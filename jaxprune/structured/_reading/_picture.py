"""A picture of coupled groups: where the units of each lie in the leaves."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxprune.structured._plans._plan import Plan
    from jaxprune.structured._reading._graph import Graph, Group

_WIDTH, _HEIGHT, _GAP = 120, 12, 12  # of the strip of an axis, in pixels
_WHOLE, _NOTHING = (0.87, 0.87, 0.87), (1.0, 1.0, 1.0)


def strips(
    graph: "Graph", paths: list[str], colours: dict[str, Any], plan: "Plan | None"
) -> np.ndarray:
    """An image with a row for each leaf, and in it a strip for each axis.

    Args:
      graph: the graph.
      paths: of the leaves.
      colours: of the groups, red, green and blue.
      plan: what is removed is white.

    Returns:
      float64 `[pixels, pixels, 3]`.
    """
    ranks = [len(graph.shapes[p]) for p in paths]
    step = _WIDTH + _GAP
    image = np.ones((len(paths) * (_HEIGHT + _GAP), max(ranks) * step, 3))
    for row, path in enumerate(paths):
        top = row * (_HEIGHT + _GAP) + _GAP // 2
        for axis in range(ranks[row]):
            strip = _strip(graph, path, axis, colours, plan)
            image[top : top + _HEIGHT, axis * step : axis * step + _WIDTH] = strip
    return image


def _strip(
    graph: "Graph", path: str, axis: int, colours: dict[str, Any], plan: "Plan | None"
) -> np.ndarray:
    """One axis: a layer for each group that lies in it, odd units a little lighter."""
    size = graph.shapes[path][axis]
    at = np.arange(_WIDTH) * size // _WIDTH  # [pixels], places of the axis
    layers = [
        np.where(
            (found := m.units[at])[:, None] < 0,
            _WHOLE,
            _lighter(np.asarray(colours[g.name]), 0.35 * (found % 2)),
        )
        for g in graph.groups
        for m in g.members
        if (m.path, m.axis) == (path, axis)
    ]
    layers = layers or [np.broadcast_to(_WHOLE, (_WIDTH, 3))]
    strip = np.stack([layers[i * len(layers) // _HEIGHT] for i in range(_HEIGHT)])
    kept = None if plan is None else plan.cuts.get(path, {}).get(axis)
    return (
        strip if kept is None else np.where(np.isin(at, kept)[:, None], strip, _NOTHING)
    )


def _lighter(colour: np.ndarray, share: np.ndarray) -> np.ndarray:
    return colour + (1 - colour) * share[:, None]


def draw(graph: "Graph", paths: list[str], plan: "Plan | None", ax: Any) -> Any:
    """See `Graph.plot`."""
    from matplotlib import patches, pyplot  # pyright: ignore[reportMissingImports]

    groups = [g for g in graph.groups if any(m.path in paths for m in g.members)]
    scale = pyplot.get_cmap("turbo", max(len(groups), 1))
    colours = {
        g.name: scale((i * 7 + 1) % len(groups))[:3] for i, g in enumerate(groups)
    }
    if ax is None:
        size = 11, 1 + 0.24 * max(len(paths), len(groups))
        ax = pyplot.figure(figsize=size, layout="constrained").add_subplot()
    image = strips(graph, paths, colours, plan)
    ax.imshow(image, interpolation="nearest", aspect="auto")
    rows = (np.arange(len(paths)) + 0.5) * (_HEIGHT + _GAP)
    ranks = np.arange(image.shape[1] // (_WIDTH + _GAP))
    ax.set_yticks(rows, [f"{p} {graph.shapes[p]}" for p in paths], fontsize="small")
    ax.set_xticks(ranks * (_WIDTH + _GAP) + _WIDTH / 2, [f"axis {i}" for i in ranks])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    handles = [
        patches.Patch(color=colours[g.name], label=_label(g, plan)) for g in groups
    ]
    handles.append(patches.Patch(color=_WHOLE, label="stays whole"))
    ax.legend(
        handles=handles, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1)
    )
    return ax


def _label(group: "Group", plan: "Plan | None") -> str:
    kept = "" if plan is None else f"{plan.groups[group.name].left} of "
    return f"{group.name} ({group.kind}, {kept}{group.size})"
