"""Fails where a public name stands on no API page, or has no docstring.

A name is public when it is re-exported with `x as x`, defined in a public module, or
listed in `__all__`. It is covered when an `auto...` directive in `docs/api/` names it,
or names the same object by another public path.
"""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys
import tomllib
import types
from collections.abc import Iterable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "api"

_DIRECTIVE = re.compile(r"^\s*\.\. (?:auto\w+|py:auto\w+):: +([\w.]+)", re.MULTILINE)


def documented_names(pages: Iterable[pathlib.Path]) -> dict[str, str]:
    """Gives each full name that a page documents, with the page."""
    return {
        name: page.name
        for page in pages
        for name in _DIRECTIVE.findall(page.read_text(encoding="utf-8"))
    }


def public_modules() -> list[str]:
    """Lists the installed packages and their modules, private ones left out."""
    # The list in pyproject.toml is read because `jaxprune.kernels` does not lie inside
    # the folder `jaxprune`, so that walking the package would miss it.
    with open(ROOT / "pyproject.toml", "rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]
    names = set(packages)
    for package in packages:
        path = importlib.import_module(package).__path__
        names |= {f"{package}.{info.name}" for info in pkgutil.iter_modules(path)}
    # The files of a kernel family are reached through `jaxprune.kernels` only.
    inner = re.compile(r"\._|^jaxprune\.kernels\.")
    return sorted(name for name in names if not inner.search(name))


def public_names(module: types.ModuleType) -> list[str]:
    """Lists the names, not the full names, that `module` offers."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    tree = ast.parse(inspect.getsource(module))
    return sorted(name for name in _offered(tree.body) if not name.startswith("_"))


def _offered(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        match node:
            case ast.Import() | ast.ImportFrom():
                yield from (a.asname for a in node.names if a.asname == a.name)
            case ast.FunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Assign():
                for target in node.targets:
                    yield from (
                        n.id for n in ast.walk(target) if isinstance(n, ast.Name)
                    )
            case ast.AnnAssign(target=ast.Name()):
                yield node.target.id
            case ast.If() | ast.Try():
                # `if TYPE_CHECKING:` holds the names that `__getattr__` loads late.
                yield from _offered([*node.body, *node.orelse])


def _lacks_docstring(value: object) -> bool:
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return False
    text = inspect.getdoc(value) or ""
    # NamedTuple and dataclass write a signature where no docstring was given.
    return not text or text.startswith(f"{value.__name__}(")


def problems(pages: Iterable[pathlib.Path] | None = None) -> list[str]:
    """Lists what is wrong, a line each; empty when every public name is covered.

    Args:
        pages: the API pages; by default every Markdown file in `docs/api/`.
    """
    if pages is None:
        pages = sorted(PAGES.glob("*.md"))
    documented = documented_names(pages)
    found, objects = [], []
    for name, page in documented.items():
        try:
            objects.append(pkgutil.resolve_name(name))
        except (AttributeError, ImportError):
            found.append(f"{name}: documented in {page}, but does not exist")
    for module_name in public_modules():
        module = importlib.import_module(module_name)
        if module_name not in documented:
            found.append(f"{module_name}: this module has no `automodule`")
        for name in public_names(module):
            value, full = getattr(module, name), f"{module_name}.{name}"
            if full not in documented and not any(value is other for other in objects):
                found.append(f"{full}: on no API page")
            if _lacks_docstring(value):
                found.append(f"{full}: no docstring")
    return found


if __name__ == "__main__":
    lines = problems()
    print("\n".join(lines) or "Every public name stands on an API page.")
    sys.exit(bool(lines))
