"""One picture of what pruning left: the links of each neuron, heads and neurons."""

import pathlib
from fractions import Fraction

import matplotlib.figure
import matplotlib.patches
import numpy as np
from jaxtyping import Array, Bool, Int

import jaxprune as jp
from minilm import model

_BLUE, _ORANGE = "#20639b", "#e07b39"
_PALE, _DIM, _INK = "#e4e7eb", "#6b7280", "#22262b"
_BINS = 48


def draw(
    dense: model.MiniLM,
    pruned: model.MiniLM,
    config: model.Config,
    path: pathlib.Path,
    *,
    title: str,
) -> None:
    """Writes a PNG.

    Args:
        dense: The dense model.
        pruned: The masked model, not yet shrunk.
        config: The sizes that the shrunk model has.
        path: The file to write.
        title: The line above everything.
    """
    figure = matplotlib.figure.Figure(figsize=(11, 7.8), layout="constrained")
    figure.suptitle(title, x=0.015, ha="left", fontsize=14, color=_INK)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, hspace=0.06, wspace=0.05)
    (up, down), (heads, neurons) = figure.subplots(2, 2)
    _degrees(up, dense, pruned, "up", "Links into an MLP neuron")
    _degrees(down, dense, pruned, "down", "Links from the MLP into an output")
    _heads(heads, alive_heads(pruned))
    _neurons(neurons, config.ff, dense)
    figure.savefig(path, dpi=150)


def alive_heads(lm: model.MiniLM) -> Bool[np.ndarray, "layers heads"]:
    """The heads whose output depends on the input and is used."""
    rows = []
    for layer in lm.layers:
        shape = (-1, layer.attn.head_dim)
        value = np.any(layer.attn.value.kernel[...] != 0, axis=0).reshape(shape)
        out = np.any(layer.attn.out.kernel[...] != 0, axis=1).reshape(shape)
        rows.append(value.any(1) & out.any(1))
    size = max(len(row) for row in rows)
    return np.array([np.pad(row, (0, size - len(row))) for row in rows])


def _degrees(axes, dense: model.MiniLM, pruned: model.MiniLM, name: str, title: str):
    """Histograms of NeuroPrune, and of magnitude with as many links in each matrix."""
    before, after = (
        {str(i): getattr(x.mlp, name).kernel[...] for i, x in enumerate(lm.layers)}
        for lm in (dense, pruned)
    )
    zeros = {i: Fraction(int((x == 0).sum()), x.size) for i, x in after.items()}
    control, _ = jp.prune(before, allocation=zeros)
    inputs = before["0"].shape[0]
    bins = np.linspace(0, inputs, _BINS + 1)
    shown = (
        ("NeuroPrune", after, {"color": _ORANGE}),
        ("dense, pruned by magnitude", control, {"color": _BLUE, "histtype": "step"}),
    )
    highest = 0
    for label, kernels, style in shown:
        label = f"{label}: {_deviation(kernels)}"
        counts, *_ = axes.hist(_links(kernels), bins, label=label, lw=1.6, **style)
        highest = max(highest, counts.max())
    links = _links(before)
    label = f"dense: {_deviation(before)}, all {len(links):,} have {links.mean():,.0f}"
    axes.axvline(inputs, color=_DIM, lw=2.5, clip_on=False, label=label)
    axes.set(xlim=(0, inputs), ylim=(0, 1.5 * highest))  # room for the legend
    axes.set_xlabel(f"links kept, of {inputs:,}")
    axes.set_ylabel("neurons" if name == "up" else "outputs")
    axes.legend(
        loc="upper left", frameon=False, labelcolor=_INK, title="degree deviation",
        alignment="left",
    )  # fmt: skip
    _finish(axes, title)


def _links(kernels: dict[str, Array]) -> Int[np.ndarray, "units"]:
    return np.concatenate([jp.analysis.degrees(x) for x in kernels.values()])


def _deviation(kernels: dict[str, Array]) -> str:
    each = [jp.analysis.degree_deviation(x) for x in kernels.values()]
    return f"{np.mean(each):.1f} %"


def _heads(axes, alive: Bool[np.ndarray, "layers heads"]):
    layers, heads = alive.shape
    for i, j in np.ndindex(layers, heads):
        colour = _ORANGE if alive[i, j] else _PALE
        axes.add_patch(
            matplotlib.patches.Rectangle((j + 0.54, i + 0.54), 0.92, 0.92, color=colour)
        )
        if not alive[i, j]:
            axes.text(j + 1, i + 1, "×", ha="center", va="center", color=_DIM)
    axes.set(xlim=(0.4, heads + 0.6), ylim=(layers + 0.6, 0.4), aspect="equal")
    axes.set_xticks(range(1, heads + 1))
    axes.set_yticks(range(1, layers + 1))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    title = f"Attention heads: {alive.sum()} of {alive.size} kept, × removed"
    _finish(axes, title)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _neurons(axes, kept: tuple[int, ...], dense: model.MiniLM):
    full = [layer.mlp.up.kernel.shape[1] for layer in dense.layers]
    places = np.arange(1, len(kept) + 1)
    axes.barh(places, full, color=_PALE)
    axes.barh(places, kept, color=_ORANGE)
    for place, n in zip(places, kept, strict=True):
        axes.text(
            0.02 * max(full), place, f"{n:,}", va="center",
            color="white" if n > 0.12 * max(full) else _INK,
        )  # fmt: skip
    axes.set_xlim(0, max(full))
    axes.set_ylim(len(kept) + 0.6, 0.4)
    axes.set_yticks(places)
    axes.set_ylabel("layer")
    axes.set_xlabel(f"MLP neurons, of {max(full):,} a layer")
    _finish(axes, f"MLP neurons: {sum(kept):,} of {sum(full):,} kept")
    axes.tick_params(axis="y", length=0)


def _finish(axes, title: str):
    axes.set_title(title, loc="left", fontsize=11.5, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_DIM)
    axes.tick_params(colors=_DIM)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
