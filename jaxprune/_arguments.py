"""What the command line takes, with its manual."""

import argparse
import pathlib
import re
from collections.abc import Sequence

from jaxprune.structures import NM, Block, Channel, Structure, Unstructured

_DEVICES = ("cpu", "v4", "v5e", "v5p", "v6e", "tpu7x", "h100", "h200")
_EPILOG = """
PATH is a folder that jaxprune.checkpoint.save wrote, a *.safetensors file of any library,
or a folder of these; which one, is seen from what lies there. Names and shapes are not
guessed at: a checkpoint of another kind, or one that is damaged, is refused.

exit codes: 0 if all went well; 1 if something is wrong with the files or what is asked of
them, with the reason on stderr; 2 if the command is; 130 if it was interrupted.
"""
_WHERE = """which leaves: a glob pattern on the path, or several, of which the last that
matches decides; a leading ! excludes. By default all floating-point leaves of two or more
axes that are no bias, scale, norm statistic or embedding table"""
_AXIS = """the axis of a leaf that is contracted in its product: -2 for kernels of Flax,
[..., in, out]; -1 for weights of PyTorch, [out, in]. Where it matters it must be given,
unless all leaves in question are called kernel"""
_STRUCTURE = """what is kept or pruned together: unstructured, N:M (such as 2:4, 2 kept of
every 4), blocks (such as 128x128) or channel, whole outputs"""


_INSPECT = """Shows what a checkpoint holds: for each leaf its kind, shape, type, bytes and
share of zeros; the N:M that every group along an axis keeps to; and the share of square
blocks of 16 to 256 that are empty. Leaves are read one by one, and checked against the
checksums of the checkpoint, if it has any."""
_PRUNE = """Prunes a checkpoint once, without data, to exact counts. IN is one of parameters:
name them with --where if there is more in it. Leaves that are packed are unpacked first.
Files of other libraries keep the names of their tensors."""
_CONVERT = """Rewrites a checkpoint: as a folder of jaxprune.checkpoint or as safetensors,
packed or not. Values are kept bit for bit; zeros in packed leaves are +0. Names of tensors
from other libraries are kept in safetensors, and cut at their dots to dicts within dicts
in a folder."""
_PREDICT = """Says for each matrix, number of rows and device which format would be chosen,
and how many times as fast as dense it is predicted to be, with what the prediction rests
on. Nothing is read of a checkpoint but its shapes; nothing is run."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command, and its name as `command`.

    Raises:
      SystemExit: with the code 2, if they are no command.
    """
    parser = argparse.ArgumentParser(
        "jaxprune",
        description="Inspect, prune and convert checkpoints; ask what would pay.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        short = text.split(". ")[0].rstrip(".")
        found = commands.add_parser(
            name, help=short, description=text, epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        found.set_defaults(command=name)
        return found

    inspect = command("inspect", _INSPECT)
    inspect.add_argument("path", metavar="PATH", type=pathlib.Path)
    inspect.add_argument("--json", action="store_true", help="for programs")

    prune = command("prune", _PRUNE)
    _add_in_and_out(prune)
    prune.add_argument(
        "--sparsity", type=float, metavar="S",
        help="share of the weights to prune, in [0, 1); may be left out with N:M",
    )  # fmt: skip
    prune.add_argument(
        "--score", choices=("magnitude", "random"), default="magnitude",
        help="what decides: absolute values, or chance (default: magnitude)",
    )  # fmt: skip
    prune.add_argument("--seed", type=int, default=0, help="for --score random")
    prune.add_argument(
        "--structure", type=_structure, default=Unstructured(), help=_STRUCTURE
    )
    prune.add_argument("--axis", type=int, choices=(-2, -1), help=_AXIS)
    prune.add_argument(
        "--allocation", choices=("uniform", "global", "erk"), default="uniform",
        help="how sparsity is divided: alike in all leaves, by one threshold for all, or "
        "less in small leaves (default: uniform)",
    )  # fmt: skip
    prune.add_argument(
        "--where", nargs="+", action="extend", metavar="PATTERN", help=_WHERE
    )
    prune.add_argument(
        "--pack", action="store_true", help="write packed weights, not zeros"
    )

    convert = command("convert", _CONVERT)
    _add_in_and_out(convert)
    packing = convert.add_mutually_exclusive_group()
    packing.add_argument(
        "--pack", action="store_true",
        help="pack each leaf that has zeros: in the format of --structure, or in the "
        "smallest, among which N:M is looked for along the axis -2 only",
    )  # fmt: skip
    packing.add_argument(
        "--unpack", action="store_true", help="write packed weights as zeros"
    )
    convert.add_argument(
        "--where", nargs="+", action="extend", metavar="PATTERN", help=_WHERE
    )
    convert.add_argument("--structure", type=_structure, help=_STRUCTURE)
    convert.add_argument("--axis", type=int, choices=(-2, -1), help=_AXIS)

    predict = command("predict", _PREDICT)
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("path", metavar="PATH", type=pathlib.Path, nargs="?")
    source.add_argument(
        "--shape", type=_shape, nargs="+", metavar="KxN",
        help="of matrices, in and out, such as 4096x11008",
    )  # fmt: skip
    predict.add_argument("--structure", type=_structure, required=True, help=_STRUCTURE)
    predict.add_argument(
        "--sparsity", type=float, metavar="S",
        help="share of the blocks or weights; may be left out with N:M",
    )  # fmt: skip
    predict.add_argument(
        "--device", nargs="+", choices=_DEVICES, default=list(_DEVICES),
        help="by default all of them",
    )  # fmt: skip
    predict.add_argument(
        "--rows", type=int, nargs="+", default=[16, 2048], metavar="M",
        help="rows of x at a time: tokens of a batch that is decoded, or of prompts and "
        "training (default: 16 2048)",
    )  # fmt: skip
    predict.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32", "int8"), default="bfloat16",
        help="of the weights and products (default: bfloat16)",
    )  # fmt: skip
    predict.add_argument("--axis", type=int, choices=(-2, -1), help=_AXIS)
    predict.add_argument(
        "--where", nargs="+", action="extend", metavar="PATTERN", help=_WHERE
    )
    predict.add_argument("--json", action="store_true", help="for programs")
    return parser.parse_args(argv)


def _add_in_and_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", type=pathlib.Path)
    parser.add_argument("out", metavar="OUT", type=pathlib.Path)
    parser.add_argument(
        "--to", choices=("orbax", "safetensors"),
        help="what to write: a folder of jaxprune.checkpoint, or safetensors, in files of "
        "5 GB if OUT does not end in .safetensors (default: by the name of OUT, and a folder "
        "of jaxprune.checkpoint unless it ends in .safetensors)",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it is there"
    )


def _structure(text: str) -> Structure:
    """A structure as it is written on the command line; without axes."""
    if text in ("unstructured", "channel"):
        return Unstructured() if text == "unstructured" else Channel()
    try:
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            return NM(int(found[1]), int(found[2]))
        if found := re.fullmatch(r"(?:block[ :]?)?(\d+)x(\d+)", text):
            return Block(int(found[1]), int(found[2]))
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e
    raise argparse.ArgumentTypeError(
        f"got {text!r}; expected unstructured, N:M such as 2:4, blocks such as 128x128, or "
        "channel"
    )


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected KxN, such as 4096x11008"
        )
    return int(found[1]), int(found[2])
