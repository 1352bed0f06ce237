"""Some of the damage of `benchmarks/safetensors_fuzz.py`, which does 10,000 files."""

import collections
import random
import sys
import tracemalloc
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import safetensors_fuzz as fuzz

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    cases = fuzz.cases(folder)
    tracemalloc.start()
    yield cases
    tracemalloc.stop()


def test_random_damage(cases, tmp_path):
    results = collections.Counter()
    for i in range(200):
        case = cases[i % len(cases)]
        outcome = fuzz.attempt(case, tmp_path / "damaged", random.Random(f"test {i}"))
        results[outcome.result] += 1
    assert results["error"] > 100 and results["sound"] > 3


@hypothesis.settings(max_examples=100)
@hypothesis.given(which=st.integers(0, 3), data=st.data())
def test_chosen_damage(cases, tmp_path_factory, which, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    fuzz.attempt(cases[which], folder, fuzz.Chosen(data))


def test_wrong_trees_are_found(cases, tmp_path, monkeypatch):
    """The test itself can fail: without checksums, a damaged weight comes through."""
    monkeypatch.setattr(fuzz.jp.checkpoint, "load_safetensors", lambda *_, **kw: {})
    with pytest.raises(fuzz.FuzzError, match="gave another tree"):
        for i in range(9):
            fuzz.attempt(cases[0], tmp_path / "damaged", random.Random(i))
