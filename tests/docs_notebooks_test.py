"""The notebooks that Colab opens are those that the docs are built from."""

import json
import pathlib
import tomllib

import jupytext
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "notebooks"
PAGES = sorted(FOLDER.glob("*.md"))


@pytest.fixture(scope="module")
def source():
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]["urls"]["Source"]


def _ids(path):
    return path.stem


def test_every_notebook_has_its_pair():
    assert len(PAGES) >= 3
    assert [x.stem for x in sorted(FOLDER.glob("*.ipynb"))] == [x.stem for x in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=_ids)
def test_pairs_agree(page):
    """Otherwise: jupytext --sync docs/notebooks/*.md"""
    written = json.loads(page.with_suffix(".ipynb").read_text())
    cells = [
        (cell["cell_type"], "".join(cell["source"]), cell["metadata"])
        for cell in written["cells"]
    ]
    assert cells == [
        (cell.cell_type, cell.source, cell.metadata)
        for cell in jupytext.read(page).cells
    ]


@pytest.mark.parametrize("page", PAGES, ids=_ids)
def test_outputs_are_not_kept(page):
    written = json.loads(page.with_suffix(".ipynb").read_text())
    code = [cell for cell in written["cells"] if cell["cell_type"] == "code"]
    assert code
    for cell in code:
        assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("page", PAGES, ids=_ids)
def test_badge_opens_this_notebook_and_its_first_cell_installs(page, source):
    user = source.removeprefix("https://github.com/")
    first, code = jupytext.read(page).cells[:2]
    title, _, badge = first.source.split("\n")[:3]
    assert title.startswith("# ")
    name = page.with_suffix(".ipynb").relative_to(ROOT).as_posix()
    assert badge == (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{user}/blob/main/{name})"
    )
    guard = 'if "google.colab" in sys.modules:'
    before, inside = code.source.split(f"{guard}\n")
    *_, install = inside.splitlines()
    assert "%" not in before
    assert install.startswith("    %pip install") and f"git+{source}" in install
