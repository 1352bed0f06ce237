"""Prunes SmolLM2-135M in one shot, without any training, and packs what is left.

For the dense model, and for each method at 50 % and 2:4: the perplexity on a novel that
calibration does not see, completions, and bytes. The packed models are saved, and a new
process reloads them. It takes minutes on two cores.

    python examples/prune_smollm2.py --data-dir .data --out build/demo-llm

With `--scanned` the same model runs in linen, its layers stacked and scanned over.

The weights come as 4-bit numbers, and are pruned as the float32 values that these stand
for.
"""

import argparse
import collections
import itertools
import json
import pathlib
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
import rich.table
from flax import nnx
from jaxtyping import Array, Float, Int
from smollm2 import measure, model, scanned, text, weights

import jaxprune as jp

LENGTH = 512  # tokens of a window
# How many windows of a novel, and the digest of their tokens.
CALIBRATION = text.Windows("Pride and Prejudice", 32, LENGTH, "3e7cf64a180bfee6")
HELD_OUT = text.Windows("Emma", 16, LENGTH, "c64c090193cea05b")
SPARSITY = 0.5
STRUCTURES = {"50 %": jp.Unstructured(), "2:4": jp.NM(2, 4)}
METHODS = {  # the model of the last one is saved
    "magnitude": jp.posttrain.magnitude(),
    "Wanda": jp.posttrain.wanda(),
    "SparseGPT": jp.posttrain.sparsegpt(),
}
BATCH = 4  # windows that calibration runs at once
PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "To make bread, you need",
)
COMPLETED = 32  # tokens, those of the prompt among them

console = rich.console.Console()


class Net(NamedTuple):
    """The model as a pure function, in NNX or in linen."""

    logits: Callable[[Any, Int[Array, "b s"]], Float[Array, "b s vocab"]]
    params: Any
    as_nnx: Callable[[Any], Any]  # from params or masks to those of the NNX model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=pathlib.Path, default=".data")
    parser.add_argument("--out", type=pathlib.Path, default="build/demo-llm")
    parser.add_argument("--scanned", action="store_true", help="the model in linen")
    parser.add_argument(
        "--verify", action="store_true", help="only reload the packed models"
    )
    args = parser.parse_args()
    lm, tokenizer = weights.pretrained()
    calibration, held_out = (
        text.read(args.data_dir, tokenizer, wanted)
        for wanted in (CALIBRATION, HELD_OUT)
    )
    net = in_linen(lm) if args.scanned else in_nnx(lm)
    if args.verify:
        verify(args.out, net, held_out)
        return

    for wanted, ids in ((CALIBRATION, calibration), (HELD_OUT, held_out)):
        console.print(f"{wanted.title}: {ids.size:,} tokens in {len(ids)} windows.")
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    complete = measure.completer(nnx.split(lm)[0], prompts, length=COMPLETED)
    logits = jax.jit(net.logits)
    table, said = headings(), {}
    losses = measure.losses(logits, net.params, held_out, title="dense")
    add(table, "dense", losses, 0.0, None, nbytes(net.params), net)
    said["dense"] = complete(net.as_nnx(net.params))
    rate = measure.tokens_per_second(complete, net.as_nnx(net.params))
    console.print(f"dense: {rate:.1f} tokens a second, {len(PROMPTS)} texts at a time.")
    for (name, structure), method in itertools.product(STRUCTURES.items(), METHODS):
        title = f"{method}, {name}"
        with console.status(f"Pruning: {title}"):
            start = time.perf_counter()
            params, masks = prune(net, calibration, method, structure)
            jax.block_until_ready(params)
            seconds = time.perf_counter() - start
        losses = measure.losses(logits, params, held_out, title=title)
        packed = pack(params, masks, structure)
        sparsity = jp.masks.sparsity(masks)
        add(table, title, losses, sparsity, seconds, nbytes(packed), net)
        said[title] = complete(net.as_nnx(params))
        if method == list(METHODS)[-1]:
            save(folder(args.out, name), logits, params, packed, held_out)
            cash_in(net, complete, params, masks, title)
    console.print(table)
    show(said, tokenizer)
    again = [sys.executable, __file__, "--verify", "--data-dir", str(args.data_dir)]
    again += ["--out", str(args.out)] + ["--scanned"] * args.scanned
    sys.exit(subprocess.run(again).returncode)


def prune(
    net: Net,
    windows: Int[np.ndarray, "n s"],
    method: str,
    structure: jp.structures.Structure,
) -> tuple[Any, Any]:
    """The pruned params and the masks; embeddings and norms stay dense."""
    params, masks, _ = jp.posttrain.prune(
        net.logits,
        net.params,
        [windows[i : i + BATCH] for i in range(0, len(windows), BATCH)],
        method=METHODS[method],
        sparsity=SPARSITY,
        structure=structure,
    )
    return params, masks


def in_nnx(lm: model.SmolLM) -> Net:
    static, params = nnx.split(lm)
    return Net(
        lambda params, ids: nnx.merge(static, params)(ids),
        nnx.as_pure(params),
        lambda params: params,
    )


def in_linen(lm: model.SmolLM) -> Net:
    module = scanned.SmolLM(lm.config)
    params = scanned.stack(nnx.state(lm))
    return Net(
        lambda params, ids: module.apply({"params": params}, ids),
        params,
        scanned.unstack,
    )


def pack(params: Any, masks: Any, structure: jp.structures.Structure) -> Any:
    """Packed matrices in the place of the masked ones."""

    def packed(w, mask):
        if mask is None:
            return w
        if isinstance(structure, jp.NM):
            return jp.formats.pack(w, mask, structure)
        rows, columns = w.shape[-2:]
        kept = rows * columns - int(SPARSITY * rows * columns)
        return jp.formats.pack(w, mask, structure, capacity=kept)

    return jax.tree.map(packed, params, masks)


def unpack(packed: Any) -> Any:
    """The dense arrays again, with their zeros."""
    return jax.tree.map(
        lambda x: x if isinstance(x, jax.Array) else jp.formats.unpack(x),
        packed,
        is_leaf=lambda x: isinstance(x, (jp.formats.NMArray, jp.formats.BitmapArray)),
    )


def nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def folder(out: pathlib.Path, name: str) -> pathlib.Path:
    return out / name.removesuffix(" %").replace(":", "_")


def save(out: pathlib.Path, logits, params: Any, packed: Any, windows) -> None:
    """Writes a packed model, and a checksum of its logits on the first window."""
    jp.checkpoint.save(out, packed, overwrite=True)
    crc = checksum(logits(params, windows[:1]))
    out.with_suffix(".json").write_text(json.dumps({"checksum": crc}) + "\n")


def verify(out: pathlib.Path, net: Net, windows: Int[np.ndarray, "n s"]) -> None:
    """Reloads what `save` wrote, and leaves with an error if it says anything else."""
    logits = jax.jit(net.logits)
    for name, structure in STRUCTURES.items():
        like = jax.eval_shape(
            lambda params, structure=structure: pack(
                params, jp.masks.from_params(params), structure
            ),
            net.params,
        )
        path = folder(out, name)
        params = unpack(jp.checkpoint.restore(path, like=like))
        before = json.loads(path.with_suffix(".json").read_text())["checksum"]
        now = checksum(logits(params, windows[:1]))
        if now != before:
            sys.exit(
                f"Reloaded from {path}, the logits have checksum {now}, not {before}."
            )
        console.print(
            f"{name}: reloaded in a new process from {path}; the logits have the same "
            f"checksum, {now}."
        )


def checksum(logits: Float[Array, "b s vocab"]) -> str:
    return f"{zlib.crc32(np.asarray(logits).tobytes()):08x}"


def cash_in(net: Net, complete, params: Any, masks: Any, title: str) -> None:
    """Says what `accelerate` packs, or why it does not, and how much faster it is."""
    params, masks = net.as_nnx(params), net.as_nnx(masks)
    fast, packed, report = jp.accelerate(complete, params, masks)
    packed_leaves = sum(choice.go for choice in report.choices)
    line = f"{title}: {packed_leaves} of {len(report.choices)} matrices run packed"
    reasons = collections.Counter(x.reason for x in report.choices if not x.go)
    if reasons:
        reason, count = reasons.most_common(1)[0]
        line += f"; {count} stay dense, for one: {reason}"
    console.print(f"{line}.")
    if packed_leaves:
        rates = [
            measure.tokens_per_second(f, p)
            for f, p in ((complete, params), (jax.jit(fast), packed))
        ]
        console.print(
            "Tokens a second, dense and packed: {:.1f}, {:.1f}.".format(*rates)
        )


def show(said: dict[str, Int[Array, "prompts length"]], tokenizer) -> None:
    """Prints the completions, prompt by prompt."""
    for i, prompt in enumerate(PROMPTS):
        console.print(f"[bold]{prompt} ...[/bold]")
        for title, rows in said.items():
            whole = tokenizer.decode(rows[i].tolist())
            rest = " ".join(whole.removeprefix(prompt).split())
            console.print(f"  {title}: {rest}", markup=False, highlight=False)


def headings() -> rich.table.Table:
    table = rich.table.Table("")
    for heading in ("perplexity", "sparsity, %", "seconds", "MB packed", "of dense, %"):
        table.add_column(heading, justify="right")
    return table


def add(
    table: rich.table.Table,
    title: str,
    losses: Float[np.ndarray, "windows"],
    sparsity: float,
    seconds: float | None,
    held: int,
    net: Net,
) -> None:
    """One more row; `held` are the bytes of the whole model, embedding and all."""
    table.add_row(
        title,
        f"{measure.perplexity(losses):.2f}",
        f"{100 * sparsity:.2f}",
        "" if seconds is None else f"{seconds:.1f}",
        f"{held / 1e6:.0f}",
        f"{100 * held / nbytes(net.params):.1f}",
    )


if __name__ == "__main__":
    main()
