"""The import directions between rooms, read from the source with `ast`."""

import ast
import pathlib
import tomllib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Room: the rooms it may import. A room is a file or folder directly inside `jaxprune/`,
# or the top-level `kernels/`; within itself it may import freely. A file without a row
# here fails: choose its place first. `__init__` is the front door and sees everything.
_FLOOR = {"_tree", "_axes", "_wide", "_bits", "_select"}
_BASE = _FLOOR | {"masks", "structures", "scores", "allocation", "schedules"}
_MEASURES = _BASE | {"penalties", "tracing", "calibration"}
ALLOWED: dict[str, set[str]] = {
    "_tree": set(),
    "_axes": set(),
    "_wide": set(),
    "_elementwise": set(),
    "_bits": set(),
    "_select": {"_tree", "_axes", "_wide", "_bits"},
    "_groups": {"_tree"},
    "_lora": set(),
    "masks": _FLOOR,
    "structures": _FLOOR | {"_groups", "masks"},
    "scores": _FLOOR | {"masks", "structures"},
    "allocation": _FLOOR | {"masks", "structures", "scores"},
    "schedules": _FLOOR | {"masks", "structures", "scores"},
    "penalties": {"_tree", "structures"},
    "_prune": _BASE | {"_elementwise"},
    "training": _BASE | {"_groups", "_prune", "penalties"},
    "tracing": {"_tree"},
    "calibration": {"_tree", "tracing"},
    "posttrain": _MEASURES | {"_lora", "checkpoint"},
    "structured": {
        "_tree",
        "_groups",
        "_lora",
        "masks",
        "tracing",
        "scores",
        "calibration",
    },
    "formats": {"_tree", "masks", "structures"},
    "kernels": {"formats", "masks", "structures"},
    "acceleration": {"_tree", "masks", "structures", "tracing", "formats", "kernels"},
    "checkpoint": {"_tree", "formats", "masks", "structures"},
    "analysis": _MEASURES | {"_prune"},
    "rounds": _BASE | {"_prune", "analysis", "checkpoint"},
    "_arguments": {"structures"},
    "__main__": {"cli"},
}
ALLOWED["cli"] = {*ALLOWED, "cli"} - {"__main__"}  # the front desk: everything


def _library_files() -> list[pathlib.Path]:
    return sorted([*ROOT.glob("jaxprune/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def _all_files() -> list[pathlib.Path]:
    folders = ("tests", "benchmarks", "examples", "docs")
    others = [file for name in folders for file in ROOT.glob(f"{name}/**/*.py")]
    return sorted([*_library_files(), *others])


def _ids(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _module(path: pathlib.Path) -> str:
    """Gives a library file the name that it is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("jaxprune", *parts)
    return ".".join(parts)


def _room(module: str) -> str:
    """The part after `jaxprune`; an empty string for the package itself."""
    return (module.split(".") + [""])[1]


def _imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Yields the line and full dotted name of everything that `source` imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                # `a.b.__init__` and `a.b.c` both count relative imports from `a.b`.
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _wrong_rooms(source: str, module: str) -> list[str]:
    """Lists the imports of `source` that its room may not make."""
    room = _room(module)
    if room == "__init__":
        return []
    if room not in ALLOWED:
        return [f"no room is called {room!r}; give it a row in ALLOWED"]
    found = []
    for line, name in _imports(source, module):
        if name.split(".")[0] != "jaxprune":
            continue
        target = _room(name)
        if target != room and target not in ALLOWED[room]:
            found.append(f"line {line}: {room!r} may not import {name!r}")
    return found


# The one name of `jax._src` that a test may import: it is public from JAX 0.11 on.
_PRIVATE = (
    "tests.kernels.conftest",
    "jax._src.pallas.mosaic_gpu.interpret.params.InterpretGPUParams",
)


def _banned(source: str, module: str) -> list[str]:
    """Lists uses of `jax._src` and of `kernels` by its bare name."""
    found = [
        f"line {line}: {name}"
        for line, name in _imports(source, module)
        if name.startswith("jax._src") or name.split(".")[0] == "kernels"
        if (module, name) != _PRIVATE
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "jax._src":
            found.append(f"line {node.lineno}: jax._src")
    return found


@pytest.mark.parametrize("path", _library_files(), ids=_ids)
def test_room_imports_only_the_rooms_above_it(path):
    assert _wrong_rooms(path.read_text(encoding="utf-8"), _module(path)) == []


@pytest.mark.parametrize("path", _all_files(), ids=_ids)
def test_no_private_jax_and_no_bare_kernels(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert _banned(path.read_text(encoding="utf-8"), module) == []


def test_every_package_is_installed():
    with open(ROOT / "pyproject.toml", "rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = [path for path in _library_files() if path.name == "__init__.py"]
    found = [_module(path).removesuffix(".__init__") for path in folders]
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import jaxprune.training", "jaxprune.masks"),
        ("from jaxprune import training", "jaxprune.scores._magnitude"),
        ("from jaxprune.training import _gmp", "jaxprune.penalties._norms"),
        ("from jaxprune.posttrain import x", "jaxprune.training._gmp"),
        ("from .. import training", "jaxprune.scores._magnitude"),
        ("from ..training import gmp", "jaxprune.scores.__init__"),
        ("def f():\n  from jaxprune import masks", "jaxprune._tree"),
        ("import jaxprune as jp", "jaxprune.masks"),
        ("from jaxprune import prune", "jaxprune.masks"),
        ("", "jaxprune.utilities"),
    ],
)
def test_wrong_room_is_found(source, module):
    assert _wrong_rooms(source, module)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from jaxprune import _tree", "jaxprune.masks"),
        ("from jaxprune.scores import _taylor", "jaxprune.scores._magnitude"),
        ("from . import _taylor", "jaxprune.scores._magnitude"),
        ("from jaxprune.training import gmp", "jaxprune.__init__"),
        ("import jax\nfrom optax import adam", "jaxprune._tree"),
    ],
)
def test_right_room_passes(source, module):
    assert _wrong_rooms(source, module) == []


@pytest.mark.parametrize(
    "source",
    [
        "import jax._src.core",
        "from jax import _src",
        "from jax._src import core",
        "import jax\njax._src.core",
        "import kernels",
        "from kernels.nm_matmul import api",
    ],
)
def test_banned_import_is_found(source):
    assert _banned(source, "tests.some_test")
    assert not _banned(
        "from jaxprune import kernels\nimport jax.numpy", "tests.some_test"
    )


_LAYERS = ("_reading", "_plans", "_methods")


@pytest.mark.parametrize("layer", _LAYERS)
def test_structured_reads_then_plans_then_prunes(layer):
    """No folder of `structured` imports one above it; the picture does, for types."""
    above = _LAYERS[_LAYERS.index(layer) + 1 :]
    files = sorted((ROOT / "jaxprune" / "structured" / layer).glob("*.py"))
    assert files
    for file in files:
        names = [name for _, name in _imports(file.read_text(), _module(file))]
        wrong = [n for n in names if any(f"structured.{x}" in n for x in above)]
        types = ["jaxprune.structured._plans._plan.Plan"]
        assert wrong == (types if file.name == "_picture.py" else []), file.name
