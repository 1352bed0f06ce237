"""The models of the tests of structured pruning: what is found, and whether it is exact.

`python benchmarks/structured_models.py` writes `benchmarks/results/structured_models.md`.
"""

import collections
import functools
import pathlib
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprune import structured

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "structured_models.md"
HEAD = """# Structured pruning: models

Written by `python benchmarks/structured_models.py`. Toy sizes, random weights, on a CPU.
*Prunable* is the share of parameters that is gone where each group, of all kinds, keeps one
unit (or the least it may). *Difference* is the largest of the outputs of the shrunk function
from those of the masked one, relative to the largest output, where a random half of each
group is kept, layers of a scan and rows of tables too; where it is not rounding, the notes
of the groups say why. *Frozen* are axes, or parts of axes, that stay, by reason.

| model | groups | prunable | difference | frozen |
|---|---|---|---|---|
"""


def main() -> None:
    """Writes the table."""
    rows = []
    for name, fn, params, args in models():
        rows.append(row(name, fn, params, args))
        print(rows[-1], flush=True)
    OUT.write_text(HEAD + "\n".join(rows) + f"\n\n{len(rows)} models.\n")


def models() -> Any:
    """Yields name, function, parameters and other arguments."""
    random = load("conftest")["_random"]
    for name, (build, _) in load("functions_test")["MODELS"].items():
        fn, params, *args = build()
        yield name, fn, params, args
    others = load("rewrite_test")
    x = jax.random.normal(jax.random.key(0), (5, 6))
    for name in ("moe_one_hot", "moe_gathered"):
        yield name, others[name], others["MOE"], (x,)
    params = {"a": x.T, "b": x}
    yield "weight_norm", weight_norm, params, (x,)
    flax = load("modules_test")
    linen = {name: (m, (x,)) for name, (m, x, _) in flax["LINEN"].items()}
    linen |= {name: (m, x) for name, (m, x, _) in load("zoo_test")["MODELS"].items()}
    for name, (module, args) in linen.items():
        params = random(module.init(flax["KEY"], *args))
        yield f"{name} (linen)", functools.partial(apply, module), params, args
    for name, (module, x, _) in flax["NNX"].items():
        graphdef, state = nnx.split(module(nnx.Rngs(0)))
        fn = functools.partial(merged, graphdef)
        yield f"{name} (NNX)", fn, random(state), (x,)


def weight_norm(p: Any, x: Any) -> Any:
    """The kernel of a unit divided by its norm: 0 / 0 without weights."""
    return x @ (p["a"] / jnp.linalg.norm(p["a"], axis=0)) @ p["b"]


def apply(module: Any, variables: Any, *args: Any) -> Any:
    """A linen module as a function."""
    return module.apply(variables, *args)


def merged(graphdef: Any, state: Any, *args: Any) -> Any:
    """An NNX module as a function."""
    return nnx.merge(graphdef, state)(*args)


def load(name: str) -> dict[str, Any]:
    """What a module of the tests defines."""
    return runpy.run_path(str(ROOT / "tests" / "structured" / f"{name}.py"))


def row(name: str, fn: Any, params: Any, args: Any) -> str:
    """A line of the table."""
    graph = structured.trace(fn, params, *args)
    random = np.random.default_rng(0)
    least = {g.name: np.arange(g.minimum) for g in graph.groups}
    half = {
        g.name: random.choice(g.size, max(g.minimum, g.size // 2), replace=False)
        for g in graph.groups
    }
    smallest = structured.planned(graph, least)
    share = 1 - smallest.after.parameters / smallest.before.parameters
    report = structured.planned(graph, half).verify(fn, params, *args)
    notes = dict.fromkeys(note for g in graph.groups for note in g.notes)
    why = "" if report.equal else f": {', '.join(notes)}"
    kinds = collections.Counter(g.kind for g in graph.groups)
    reasons = collections.Counter(x[0] for x in graph.frozen.values())
    cells = [
        name.replace("_", " "),
        ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
        f"{share:.0%}",
        f"{max(report.errors.values()):.0e}{why}",
        ", ".join(f"{n} {why}" for why, n in reasons.items()),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    main()
