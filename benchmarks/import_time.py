"""Measures what `import jaxprune` costs beside importing what it stands on.

Run `python benchmarks/import_time.py` in an environment where jaxprune is installed.
Each number is the median over fresh processes, taken in turns so that a busy machine
slows both alike; the start of the interpreter is not counted.
"""

import argparse
import platform
import statistics
import subprocess
import sys

STATEMENTS = ("import jax, flax, optax", "import jaxprune")


def seconds(statement: str) -> float:
    """Times one statement in a fresh process."""
    code = (
        "import time; start = time.perf_counter(); "
        f"{statement}; print(time.perf_counter() - start)"
    )
    # -P keeps the current folder off the path: the installed package is measured.
    command = [sys.executable, "-P", "-c", code]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    for statement in STATEMENTS:  # writes bytecode and fills the file cache
        seconds(statement)
    rounds = [[seconds(statement) for statement in STATEMENTS] for _ in range(repeats)]
    print(f"Python {platform.python_version()}, {platform.machine()}, n = {repeats}\n")
    print("| statement | median (s) | min (s) | max (s) |")
    print("|---|---|---|---|")
    columns = [list(column) for column in zip(*rounds, strict=True)]
    for statement, times in zip(STATEMENTS, columns, strict=True):
        middle = statistics.median(times)
        print(f"| `{statement}` | {middle:.3f} | {min(times):.3f} | {max(times):.3f} |")
    base, ours = (statistics.median(times) for times in columns)
    print(f"\nratio of medians: {ours / base:.3f}")


if __name__ == "__main__":
    main()
