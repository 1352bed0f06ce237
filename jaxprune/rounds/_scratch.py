"""Is it the weights or the architecture? Scratch-E and Scratch-B (arXiv 1810.05270)."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from jaxprune import _prune
from jaxprune import masks as mask_trees
from jaxprune._tree import PyTree
from jaxprune.rounds._loop import at_least


class Scratch(NamedTuple):
    """A network trained from scratch under masks.

    Attributes:
      params: trained, pruned weights at 0.
      steps: for how many steps.
    """

    params: PyTree
    steps: int


def scratch(
    train: Callable[[PyTree, PyTree, int], PyTree],
    params: PyTree,
    masks: PyTree,
    *,
    steps: int,
    budget: Literal["epochs", "flops"] = "epochs",
    flops: tuple[float, float] | None = None,
    cap: float | None = None,
) -> Scratch:
    """Trains the pruned architecture from new weights, to compare with fine-tuning.

    Scratch-E trains as long as the large network was trained; Scratch-B as much: for
    `steps * dense / sparse` steps, so that both spend the same FLOPs. The paper caps
    that at twice the steps in most of its ImageNet experiments, and nowhere else.

    Args:
      train: `train(params, masks, steps)` trains under masks for that many steps.
      params: freshly initialised; not the weights that the masks come from.
      masks: of the pruned network.
      steps: of the large network's training.
      budget: `"epochs"` for Scratch-E, `"flops"` for Scratch-B.
      flops: of one forward pass, dense and pruned; by default the numbers of maskable
        weights, which is their ratio where all matrices see as many inputs.
      cap: largest multiple of `steps`; `None` for none.

    Returns:
      Trained parameters and the number of steps.

    Raises:
      ValueError: if a value is out of range.

    Example:
      >>> def train(params, masks, steps):
      ...     return jp.masks.apply(params, masks)  # and train
      >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
      >>> _, masks = jp.prune(params, 0.5)
      >>> jp.rounds.scratch(train, params, masks, steps=100, budget="flops").steps
      200

    References:
      Liu et al., Rethinking the Value of Network Pruning, arXiv 1810.05270, section 3.
    """
    at_least("steps", steps, 1)
    if budget not in ("epochs", "flops"):
        raise ValueError(f"budget: got {budget!r}; expected 'epochs' or 'flops'.")
    _prune.require(
        "cap", cap, lambda x: x is None or x >= 1, "a multiple of at least 1, or None"
    )
    if budget == "flops":
        kept, total = mask_trees.count(masks)
        dense, sparse = (total, kept) if flops is None else flops
        if not 0 < sparse <= dense:
            raise ValueError(
                f"flops: got {dense} dense and {sparse} pruned; expected both above 0, and "
                "the pruned ones no more."
            )
        ratio = dense / sparse
        steps = math.floor(steps * (ratio if cap is None else min(ratio, cap)))
    return Scratch(train(mask_trees.apply(params, masks), masks, steps), steps)
