"""How much each block loses: from how much it changes what goes through it."""

import glob
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxprune import _tree, tracing
from jaxprune._tree import PyTree
from jaxprune.calibration import Similarity
from jaxprune.structured._methods import _consumers
from jaxprune.structured._methods._flap import UNITS
from jaxprune.structured._reading._graph import INPUT, Graph, Group
from jaxprune.structured._reading._kinds import Kind

_MOST = 0.99
_ROOM = 1.05


def block_ratios(
    graph: Graph,
    similarity: Similarity,
    *,
    ratio: float,
    sharpness: float = 26.0,
    kinds: Sequence[Kind] = ("neuron",),
) -> dict[str, float]:
    """CFSP's coarse step: what each group loses, by the angle that its block turns by.

    The importance of a block is `arccos(cos) / π`; with σ the logistic function of
    `sharpness` times its distance from the mean, a block keeps `(1 - ratio) σ / mean(σ)`.
    Where that would pass 1, all distances of σ from their mean are made smaller alike. The
    mean of what is kept is `1 - ratio`: the budget, where blocks are of one size.

    Args:
      graph: of `trace`.
      similarity: of `jaxprune.calibration.similarity`, of the same parameters.
      ratio: mean share of the units to remove.
      sharpness: 0 makes all blocks equal. The authors sum importance over tokens and
        divide by 10,000, which for their 128 × 2048 tokens is a factor of 26.
      kinds: of groups to prune.

    Returns:
      Ratios by name of the group, for `plan(..., ratio=0.0, overrides=...)`.

    Raises:
      ValueError: if a number is out of range, or no group lies in one of the blocks.

    References:
      Wang et al., "CFSP", arXiv 2409.13199, and their code, which averages the angle; this
      is the angle of the mean cosine.
    """
    _check_ratio(ratio)
    level = _levels(similarity, sharpness)
    mean, most = level.mean(), level.max()
    if most / mean * (1 - ratio) >= 1 and most > mean:
        scale = mean * (1 / (1 - ratio) - 1) / (most - mean) / _ROOM
        level = mean + (level - mean) * scale
    kept = level / level.mean() * (1 - ratio)
    return _by_group(graph, similarity.names, 1 - kept, kinds)


def block_ranks(
    params: PyTree,
    similarity: Similarity,
    *,
    rank: int = 8,
    sharpness: float = 26.0,
) -> dict[str, int]:
    """CFSP's recovery: blocks that matter more get adapters of larger ranks.

    A block gets `rank σ / mean(σ)`, with σ as in `block_ratios`: ranks are shared out as
    what is kept of blocks is. They are rounded so that their mean is `rank`, and each is 1
    or more.

    Read for this: of the paper only the abstract, which lets the effort of the recovery
    follow the coarse importance, and pages that say that ranks of LoRA do (IG-LoRA). The
    equation was not found, and the authors' code has no recovery; that ranks are in
    proportion to σ, rather than to the angle, and how they are rounded, are ours.

    Args:
      params: parameters, full or shrunk, or shapes of them: their paths are read.
      similarity: of `jaxprune.calibration.similarity`, of the parameters before pruning.
      rank: mean over the blocks.
      sharpness: as in `block_ratios`; 0 makes all blocks equal.

    Returns:
      Ranks by path of each leaf of a block, for `lora_init(..., rank=...)`, as patterns
      that match this path alone. Leaves outside the blocks have none.

    Raises:
      ValueError: if a number is out of range, or a block has no leaf of its own.

    Example:
      >>> similarity = jp.calibration.Similarity(
      ...     ("layers/0", "layers/1"), jnp.array([0.8, 0.9]), jnp.float32(1)
      ... )
      >>> params = {"layers": [{"w": jnp.ones((4, 4))}] * 2, "head": jnp.ones((4, 2))}
      >>> jp.structured.block_ranks(params, similarity, rank=8)
      {'layers/0/w': 11, 'layers/1/w': 5}

    References:
      Wang et al., "CFSP: An Efficient Structured Pruning Framework for LLMs with
      Coarse-to-Fine Activation Information", arXiv 2409.13199.
    """
    if not hasattr(rank, "__index__") or rank < 1:
        raise ValueError(f"rank: got {rank!r}; expected a whole number of 1 or more.")
    level = _levels(similarity, sharpness)
    wanted = rank * level / level.mean()
    ranks = np.ones(len(level), int)
    for _ in range((rank - 1) * len(level)):
        ranks[np.argmax(wanted - ranks)] += 1
    known = dict(zip(similarity.names, ranks.tolist(), strict=True))
    paths = _tree.paths(params)
    if lacking := sorted(set(known) - {tracing.numbered(p) for p in paths}):
        raise ValueError(
            f"similarity: no leaf of its own has {_tree.listing(lacking)}. Layers of one "
            "scan lie in the same leaves, so that they cannot have ranks of their own: "
            "give lora_init one rank. The leaves are: " + _tree.listing(paths) + "."
        )
    blocks = {p: tracing.numbered(p) for p in paths}
    return {glob.escape(p): known[b] for p, b in blocks.items() if b in known}


def adapt_ratios(
    graph: Graph,
    similarity: Similarity,
    *,
    step: float,
    amplitude: float = 0.03,
    previous: Mapping[str, float] | None = None,
    kinds: Sequence[Kind] = UNITS,
) -> dict[str, float]:
    """Adapt-Pruner's step: each block loses a little more, the less it does.

    With `I = -cos` of what goes into a block and what comes out, moved to a mean of 0 and
    scaled so that its largest size is 1, a block's ratio s becomes
    `min(max(s + step - amplitude I, 0), 0.99)`. The mean rises by `step` where nothing is
    clipped. Adapt-Pruner does this many times, on the model as it is by then, with Taylor
    scores and training in between; ratios are shares of the units that there were at first.

    Args:
      graph: of the full model.
      similarity: of `jaxprune.calibration.similarity`, of the model as it is.
      step: how much the mean rises.
      amplitude: how far blocks come apart; 0.03 is the authors' default.
      previous: what this function gave before; nothing is removed without it.
      kinds: of groups to prune.

    Returns:
      Ratios by name of the group, for `plan(..., ratio=0.0, overrides=...)`.

    Raises:
      ValueError: if a number is out of range, or no group lies in one of the blocks.

    References:
      Wang et al., "Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language
      Model Training", arXiv 2502.03460, and their code.
    """
    _check_ratio(step, "step")
    if not math.isfinite(amplitude) or amplitude < 0:
        raise ValueError(
            f"amplitude: got {amplitude!r}; expected a number of 0 or more."
        )
    cosine = np.asarray(similarity.cosine, np.float64)
    importance = np.mean(cosine) - cosine
    largest = np.abs(importance).max()
    if largest > 0:
        importance = importance / largest
    change = _by_group(graph, similarity.names, step - amplitude * importance, kinds)
    before = previous or {}
    return {
        name: float(np.clip(before.get(name, 0.0) + x, 0.0, _MOST))
        for name, x in change.items()
    }


def _levels(similarity: Similarity, sharpness: float) -> np.ndarray:
    """The logistic function of how far the importance of each block is from the mean."""
    if not math.isfinite(sharpness) or sharpness < 0:
        raise ValueError(
            f"sharpness: got {sharpness!r}; expected a number of 0 or more."
        )
    importance = np.arccos(np.clip(np.asarray(similarity.cosine, np.float64), -1, 1))
    apart = importance / np.pi - np.mean(importance / np.pi)
    return 1 / (1 + np.exp(-sharpness * apart))


def _by_group(
    graph: Graph, names: Sequence[str], values: np.ndarray, kinds: Sequence[Kind]
) -> dict[str, float]:
    """The value of its block for each group that lies in one."""
    known = dict(zip(names, map(float, values), strict=True))
    found = {}
    for group in _consumers.groups_of(graph, kinds):
        block = _block(group)
        if block in known:
            found[group.name] = known[block]
    if not found:
        groups = [f"{g.name} ({g.kind})" for g in graph.groups]
        raise ValueError(
            f"similarity: its blocks are {_tree.listing(list(names))}, and no group of the "
            f"kinds {tuple(kinds)} lies in one of them. The groups are: "
            f"{_tree.listing(groups)}. Layers of one scan keep the same units, so that they "
            "cannot have ratios of their own."
        )
    return found


def _block(group: Group) -> str | None:
    """The block that all members of a group lie in."""
    paths = [m.path for m in group.members if not m.path.startswith(INPUT)]
    blocks = {tracing.numbered(p) for p in paths}
    return blocks.pop() if len(blocks) == 1 else None


def _check_ratio(ratio: float, name: str = "ratio") -> None:
    if not 0 <= ratio < 1:
        raise ValueError(
            f"{name}: got {ratio!r}; expected a share in [0, 1), such as 0.2."
        )
