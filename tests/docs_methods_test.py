"""The page of methods against the code, and its numbers against the results."""

import functools
import importlib
import inspect
import json
import pathlib
import re
import statistics

import pytest

import jaxprune as jp

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text()
RUNS = ROOT / "benchmarks" / "results" / "sparse_training.jsonl"
CASE = {
    "model": "mlp",
    "sparsity": 0.9,
    "allocation": "erk",
    "structure": "unstructured",
}
ROWS = {
    (cells := [c.strip() for c in line.strip("|").split("|")])[0].strip("`"): cells
    for line in PAGE.splitlines()
    if line.startswith("| `")
}


def _resolve(name):
    module, attribute = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), attribute)


def _methods():
    """Everything public that is a method: factories, scores from a loss, rounds."""
    training = (
        f for f in vars(jp.training).values()
        if inspect.isfunction(f) and f.__annotations__.get("return") is jp.training.Method
    )  # fmt: skip
    rounds = (f for f in vars(jp.rounds).values() if inspect.isfunction(f))
    scores = (jp.scores.snip, jp.scores.grasp, jp.scores.synflow)
    others = (jp.training.bdwp_matmul, jp.allocation.water_filling)
    # A soup is a part of the method of soups.
    return {*training, *rounds, *scores, *others} - {jp.rounds.soup}


def test_every_method_has_a_row():
    assert {_resolve(name) for name in ROWS} == _methods()
    assert len(ROWS) == PAGE.count("\n| `")


@pytest.mark.parametrize("name", ROWS)
def test_papers_are_those_of_the_docstring(name):
    cited = re.findall(r"\d{4}\.\d{4,5}", ROWS[name][2])
    assert cited
    doc = inspect.getdoc(inspect.unwrap(_resolve(name)))
    assert all(number in doc for number in cited), name


def _in_text(before, after):
    """The methods that the page names between two phrases."""
    (text,) = re.findall(f"{before}(.*?){after}", " ".join(PAGE.split()))
    return set(re.findall(r"`(\w+)`", text))


def _with_default(argument, value):
    functions = [*_methods(), jp.prune_in_rounds]
    defaults = {f.__name__: inspect.signature(f).parameters for f in functions}
    return {
        name for name, known in defaults.items()
        if argument in known and known[argument].default == value
    }  # fmt: skip


def test_defaults_are_those_of_the_functions():
    assert _in_text("divided by ERK in", ", globally in") == _with_default(
        "allocation", "erk"
    )
    assert _in_text(", globally in", "and uniformly elsewhere") == _with_default(
        "allocation", "global"
    )
    assert _in_text("every 100 steps in", ", every 10 in") == _with_default(
        "every", 100
    )
    assert _in_text(", every 10 in", "and at each step elsewhere") == _with_default(
        "every", 10
    )


@pytest.mark.parametrize("name", [n for n in ROWS if "no N:M" in ROWS[n][1]])
def test_what_takes_no_nm_refuses_it(name):
    steps = {"end": 5, "harden": 5, "backward": 0.5}
    method = _resolve(name)
    known = inspect.signature(method).parameters
    chosen = {k: v for k, v in steps.items() if k in known}
    with pytest.raises(ValueError, match="structure: got NM"):
        method(0.5, structure=jp.NM(2, 4), **chosen)


@functools.cache
def _accuracies(name):
    rows = map(json.loads, RUNS.read_text().splitlines())
    return [
        100 * r["accuracy"] for r in rows
        if r["method"] == name and all(r[k] == v for k, v in CASE.items())
    ]  # fmt: skip


def _stated():
    found = [ROWS[name][-1] for name in ROWS if ROWS[name][-1] != "-"]
    (dense,) = re.findall(r"dense: \d+\.\d+ ± \d+\.\d+", PAGE)
    return [*found, dense]


@pytest.mark.parametrize("stated", _stated())
def test_numbers_are_those_of_the_results(stated):
    name = stated.split(":")[0]
    values = _accuracies(name)
    assert len(values) >= 3, name
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    assert stated == f"{name}: {mean:.2f} ± {spread:.2f}"
