"""The examples of the page on the command line run, and print what it says."""

import doctest
import pathlib
import re
import shlex

import jax.numpy as jnp
import pytest

import jaxprune as jp
from jaxprune import cli

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "command_line.md"
_LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|sh|text)\n(.*?)```", PAGE.read_text(), re.S)
    assert [kind for kind, _ in blocks] == ["python", *["sh", "text"] * 5]
    exec(blocks[0][1], {"jnp": jnp, "jp": jp})
    printed = ""
    for kind, text in blocks[1:]:
        if kind == "sh":
            program, *argv = shlex.split(text)
            assert program == "jaxprune" and cli.main(argv) == 0
            printed = capsys.readouterr().out
        else:
            assert doctest.OutputChecker().check_output(text, printed, _LOOSE), printed
