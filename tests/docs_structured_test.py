"""The examples of the page on structured pruning run, and print what it says."""

import pathlib
import re

import pytest

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "structured.md"

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_examples_run(capsys):
    blocks = re.findall(r"```(python|text)\n(.*?)```", PAGE.read_text(), re.S)
    names: dict = {}
    printed = ""
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, PAGE.name, "exec"), names)
            printed = capsys.readouterr().out or printed
        else:
            assert text in printed
    assert sum(kind == "text" for kind, _ in blocks) >= 2
