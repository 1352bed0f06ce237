"""Inspect, prune and convert checkpoints on the command line, and ask what would pay."""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune import (
    _arguments,
    _prune,
    _tree,
    analysis,
    checkpoint,
    formats,
    masks,
    scores,
)
from jaxprune.checkpoint import _leaves
from jaxprune.structures import NM, Block, Channel, Structure, Unstructured

_PACKED = formats.BlockSparseArray | formats.NMArray | formats.BitmapArray
_WIDE = ("int64", "uint64", "float64", "complex128")
_SHARD = 5_000_000_000  # bytes of tensors in a file of a folder, as Hugging Face has it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: the arguments; by default those of the process.

    Returns:
      The exit code: 0, or 1 with the reason on stderr, or 130 after an interruption.

    Raises:
      SystemExit: with the code 2, if the arguments are no command.
    """
    if "JAX_PLATFORMS" not in os.environ:
        # Files are all that is worked on: another process may have the accelerator.
        jax.config.update("jax_platforms", "cpu")
    arguments = _arguments.parse(argv)
    try:
        _COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `jaxprune inspect PATH | head`
        sys.stdout = open(os.devnull, "w")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("jaxprune: interrupted\n")
        return 130
    except Exception as e:  # a reason, not a traceback
        kind = "" if isinstance(e, ValueError | OSError) else f"{type(e).__name__}: "
        sys.stderr.write(f"jaxprune: {kind}{e}\n")
        return 1
    return 0


def _inspect(arguments: argparse.Namespace) -> None:
    rows = []
    for row, read in _progress(arguments.path):
        found: dict[str, Any] = {**row._asdict(), "shape": list(row.shape)}
        if row.kind != "value":
            found["dense_nbytes"] = _dense_nbytes(row)
        if row.kind not in ("value", "key"):
            seen = analysis.patterns(_on_host(read()))
            found["sparsity"] = seen.sparsity
            found["nm"] = [{"n": x.n, "m": x.m, "axis": x.axis} for x in seen.groups]
            found["empty_blocks"] = seen.empty_blocks
        rows.append(found)
    total = {
        "disk_nbytes": _on_disk(arguments.path),
        "nbytes": sum(x["nbytes"] for x in rows),
        "dense_nbytes": sum(x.get("dense_nbytes", 0) for x in rows),
    }
    if arguments.json:
        _say(
            json.dumps({"path": str(arguments.path), "leaves": rows, **total}, indent=1)
        )
        return
    head = ("leaf", "kind", "shape", "type", "bytes", "zeros", "N:M", "empty blocks")
    _say(_table([head, *map(_line, rows)]))
    _say(
        f"{len(rows)} leaves; {total['disk_nbytes']:,} bytes on disk, {total['nbytes']:,} "
        f"of arrays, {total['dense_nbytes']:,} if all of them were dense"
    )


def _line(x: Mapping[str, Any]) -> tuple[str, ...]:
    groups = ", ".join(
        f"{g['n']}:{g['m']} axis {g['axis']}"
        for g in x.get("nm", ())
        if 2 * g["n"] <= g["m"]  # others are chance
    )
    empty = x.get("empty_blocks", {}).items()
    blocks = ", ".join(f"{size}: {share:.1%}" for size, share in empty if share)
    return (
        x["path"], x["kind"], "x".join(map(str, x["shape"])), x["dtype"],
        f"{x['nbytes']:,}", f"{x['sparsity']:.2%}" if "sparsity" in x else "-",
        groups if x.get("sparsity") != 1 else "all", blocks,
    )  # fmt: skip


def _prune_command(arguments: argparse.Namespace) -> None:
    _check_out(arguments)
    if arguments.sparsity is None and not isinstance(arguments.structure, NM):
        raise ValueError("--sparsity is missing; only N:M goes without.")
    with _all_bits(arguments.source):
        tree = formats.unpack_tree(_load(arguments.source))
        chosen = _tree.paths(_tree.select(tree, arguments.where))
        structure = _placed(arguments.structure, arguments.axis, chosen)
        score: Any = scores.magnitude
        if arguments.score == "random":
            score = scores.random(tree, key=jax.random.key(arguments.seed))
        with _working("pruning"):
            pruned, kept = _prune.prune(
                tree, arguments.sparsity, score=score, structure=structure,
                allocation=arguments.allocation, where=arguments.where,
            )  # fmt: skip
        summary = masks.summary(tree, kept)
        if arguments.pack:
            pruned = _pack(pruned, kept, structure, arguments.sparsity)
        _save(arguments, pruned)
    _say(summary)
    _say(f"wrote {arguments.out}, {_on_disk(arguments.out):,} bytes")


def _convert(arguments: argparse.Namespace) -> None:
    _check_out(arguments)
    if not arguments.pack and (
        arguments.structure or arguments.where or arguments.axis
    ):
        raise ValueError("--structure, --axis and --where go with --pack only.")
    with _all_bits(arguments.source):
        tree = _load(arguments.source)
        if arguments.unpack:
            tree = formats.unpack_tree(tree)
        if arguments.pack:
            dense = jax.tree.map(
                lambda x: None if _is_packed(x) else x, tree, is_leaf=_is_packed
            )
            kept = masks.from_params(dense, arguments.where)
            structure = arguments.structure or Unstructured()
            structure = _placed(structure, arguments.axis, _tree.paths(kept))
            tree = _pack(tree, kept, structure, None)
        _save(arguments, tree)
    _say(f"wrote {arguments.out}, {_on_disk(arguments.out):,} bytes")


def _predict(arguments: argparse.Namespace) -> None:
    from jaxprune.acceleration import predict  # Pallas takes long to import

    structure, sparsity = arguments.structure, arguments.sparsity
    if sparsity is None:
        if not isinstance(structure, NM):
            raise ValueError("--sparsity is missing; only N:M goes without.")
        sparsity = 1 - structure.n / structure.m
    if arguments.shape:
        named = {"x".join(map(str, shape)): (shape, 1) for shape in arguments.shape}
    else:
        named = _matrices(arguments.path, arguments.where, arguments.axis)
    found = []
    for device in arguments.device:
        for m in arguments.rows:
            shapes = {name: (m, k, n) for name, ((k, n), _) in named.items()}
            report = predict(
                shapes, structure, sparsity, device, dtype=np.dtype(arguments.dtype)
            )
            found += [(device, choice) for choice in report.choices]
    if arguments.json:
        rows = [
            {
                "device": device,
                "count": named[c.path][1],
                **c._asdict(),
                "candidates": None,
            }
            for device, c in found
        ]
        _say(json.dumps(rows, indent=1))
        return
    lines = [
        ("device", "rows", "leaf", "shape", "format", "dense/fast", "bytes", "why not")
    ]
    for device, c in found:
        count = named[c.path][1]
        speedup = f"{c.speedup:.2f} {c.basis}" if c.speedup else "-"
        lines.append(
            (
                device, str(c.rows), c.path + f" and {count - 1} more" * (count > 1),
                "x".join(map(str, c.shape)), c.format, speedup,
                f"{c.nbytes / max(c.dense_nbytes, 1):.0%}", c.reason,
            )
        )  # fmt: skip
    _say(_table(lines))


def _matrices(
    path: pathlib.Path, where: Sequence[str] | None, axis: int | None
) -> dict[str, tuple[tuple[int, int], int]]:
    """The matrices of a checkpoint, `[K, N]`, those of one shape by the first of them."""
    tree = {
        row.path.replace(".", "/"): jax.ShapeDtypeStruct(row.shape, row.dtype)
        for row, _ in _rows(path)
        if row.kind not in ("value", "key", "packed mask")
    }
    chosen = _tree.select(tree, where)
    contracted = _axis_of(axis, _tree.paths(chosen))
    found: dict[tuple[int, int], list[str]] = {}
    for name, x in sorted(chosen.items()):
        if x is not None and len(x.shape) > 1:
            k, n = x.shape[-2:] if contracted == -2 else x.shape[:-3:-1]
            found.setdefault((k, n), []).append(name)
    return {names[0]: (shape, len(names)) for shape, names in found.items()}


def _placed(structure: Structure, axis: int | None, paths: Sequence[str]) -> Structure:
    """The structure with its axes, which must be known where they matter."""
    if isinstance(structure, Unstructured):
        return structure
    if isinstance(structure, Block) and structure.rows == structure.cols:
        return structure
    axis = _axis_of(axis, paths)
    other = -3 - axis  # of the last two
    match structure:
        case NM(n, m):
            return NM(n, m, axis=axis)
        case Block(rows, cols):
            return Block(rows, cols, axis=axis, out_axis=other)
    return Channel(axis=other)


def _axis_of(axis: int | None, paths: Sequence[str]) -> int:
    names = [x.removesuffix("/value").split("/")[-1] for x in paths]
    others = [x for x, name in zip(paths, names, strict=True) if name != "kernel"]
    if axis is None and others:
        raise ValueError(
            f"--axis is missing: how {_tree.listing(others, 3)} lie cannot be told from "
            "their names. Pass --axis -1 for weights of PyTorch, [out, in], or --axis -2 "
            "for kernels of Flax, [in, out]."
        )
    return -2 if axis is None else axis


def _pack(tree: Any, kept: Any, structure: Structure, sparsity: float | None) -> Any:
    """In the format of the structure, if every leaf has it; or in what is smallest."""
    whole = isinstance(structure, Block) or (
        isinstance(structure, NM) and sparsity in (None, 1 - structure.n / structure.m)
    )
    with _working("packing"):
        return formats.pack_tree(tree, kept, structure if whole else None)


def _is_packed(x: Any) -> bool:
    return isinstance(x, _PACKED | masks.PackedMask)


def _rows(path: pathlib.Path) -> Iterator[checkpoint.Leaf]:
    return checkpoint.leaves(_existing(path))


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there.")
    return path


def _load(path: pathlib.Path) -> Any:
    """The whole tree; names of other libraries are cut at their dots."""
    with _working("reading"):
        if _is_folder(path):
            return checkpoint.restore(path)
        return checkpoint.load_safetensors(path, separator=".")


def _is_foreign(path: pathlib.Path) -> bool:
    """Whether another library wrote it."""
    return not _is_folder(path) and not _leaves.is_ours(path)


def _is_folder(path: pathlib.Path) -> bool:
    """Whether it is one of `jaxprune.checkpoint.save`."""
    return (path / "manifest.json").is_file()


def _check_out(arguments: argparse.Namespace) -> None:
    out = arguments.out
    if out.exists() and not arguments.overwrite:
        raise FileExistsError(
            f"{out} exists already. Choose another name, or pass --overwrite."
        )
    if out.exists() and out.resolve() == _existing(arguments.source).resolve():
        raise ValueError(f"IN and OUT are both {out}; expected two names.")


def _save(arguments: argparse.Namespace, tree: Any) -> None:
    out, overwrite = arguments.out, arguments.overwrite
    to = arguments.to or ("safetensors" if out.suffix == ".safetensors" else "orbax")
    with _working("writing"):
        if to == "orbax":
            _save_folder(out, tree, overwrite)
            return
        if _is_foreign(arguments.source):
            tree = _dotted(tree)
        shard = None if out.suffix == ".safetensors" else _SHARD
        checkpoint.save_safetensors(out, tree, overwrite=overwrite, shard_bytes=shard)


def _save_folder(out: pathlib.Path, tree: Any, overwrite: bool) -> None:
    if out.exists() and not _is_folder(out):
        raise ValueError(
            f"{out} is no folder of jaxprune.checkpoint, which would replace it. Choose "
            "another name."
        )
    try:
        checkpoint.save(out, tree, overwrite=overwrite)
    except BaseException:
        shutil.rmtree(out.with_name(out.name + ".part"), ignore_errors=True)
        raise


def _dotted(tree: Any) -> dict[str, Any]:
    """The names that another library gave its tensors."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_packed)
    return {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in found}


@contextlib.contextmanager
def _all_bits(path: pathlib.Path) -> Iterator[None]:
    """JAX would cut 64 bits to 32."""
    wide = any(row.dtype in _WIDE for row, _ in _rows(path))
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        yield


def _on_host(x: Any) -> np.ndarray:
    if isinstance(x, masks.PackedMask):
        x = masks.as_bool(x)
    return np.asarray(formats.unpack(x) if isinstance(x, _PACKED) else x)


def _dense_nbytes(row: checkpoint.LeafRow) -> int:
    if row.kind in ("array", "key", "packed mask"):
        return row.nbytes
    return int(np.prod(row.shape, dtype=object)) * np.dtype(row.dtype).itemsize


def _on_disk(path: pathlib.Path) -> int:
    if path.name.endswith(".index.json"):
        path = path.parent
    if path.is_file():
        return path.stat().st_size
    return sum(x.stat().st_size for x in path.rglob("*") if x.is_file())


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _bar(**options: Any) -> Any:
    """A bar on stderr, which is hidden unless someone looks at it."""
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    return rich.progress.Progress(
        transient=True, console=console, disable=not console.is_terminal, **options
    )


def _progress(path: pathlib.Path) -> Iterator[checkpoint.Leaf]:
    total = sum(1 for _ in _rows(path))
    with _bar() as bar:
        yield from bar.track(_rows(path), total, description="reading")


@contextlib.contextmanager
def _working(text: str) -> Iterator[None]:
    with _bar() as bar:
        bar.add_task(text, total=None)
        yield


_COMMANDS = {
    "inspect": _inspect,
    "prune": _prune_command,
    "convert": _convert,
    "predict": _predict,
}
