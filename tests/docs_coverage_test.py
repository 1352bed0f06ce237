"""Every public name stands on an API page, and the check would notice if not."""

import importlib.util
import pathlib

import pytest

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location(
        "check_coverage", DOCS / "check_coverage.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_documented(check):
    assert check.problems() == []


def test_name_on_no_page_is_found(check):
    assert "jaxprune.kernels: this module has no `automodule`" in check.problems([])
    assert any(line.endswith("on no API page") for line in check.problems([]))


def test_page_for_a_name_that_is_gone_is_found(check, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n.. autofunction:: jaxprune.no_such_name\n")
    assert (
        "jaxprune.no_such_name: documented in page.md, but does not exist"
        in check.problems([page])
    )


def test_public_names_are_reexports_and_definitions(check, tmp_path):
    source = """
import math
import json as _json
from typing import TYPE_CHECKING
from os.path import join as join, split as _split
from os.path import exists
if TYPE_CHECKING:
    from os.path import isdir as isdir
LIMIT: int = 3
left, _right = 1, 2
def f(): ...
class C: ...
def _hidden(): ...
"""
    path = tmp_path / "sample_module.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("sample_module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert check.public_names(module) == ["C", "LIMIT", "f", "isdir", "join", "left"]


def test_missing_docstring_is_found(check):
    def bare(): ...

    def told():
        """Tells."""

    assert check._lacks_docstring(bare)
    assert not check._lacks_docstring(told)
    assert not check._lacks_docstring(3)
