"""The quickstart of the README runs as it stands, and prints what it says."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_quickstart_runs(capsys):
    text = README.read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)
    shown = re.search(r"```text\n(.*?)```", text, re.S)
    assert code and shown
    exec(compile(code[1], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert shown[1] in printed
    accuracy = float(printed.rsplit(":", 1)[1])
    assert accuracy > 0.85
