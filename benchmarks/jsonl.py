"""Results as a file of lines of JSON, to which each run adds one."""

import json
import pathlib
import sys


def read(path: pathlib.Path) -> list[dict]:
    """All lines; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def add(path: pathlib.Path, row: dict, *, unsaid: str = "") -> None:
    """Adds a line, and prints it but for the field `unsaid`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print({k: v for k, v in row.items() if k != unsaid}, file=sys.stderr, flush=True)
