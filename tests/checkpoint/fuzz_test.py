"""Damaged checkpoints, some of the 10,000 of `benchmarks/checkpoint_fuzz.py`."""

import json
import pathlib
import shutil
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.checkpoint import _manifest

FUZZER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks/checkpoint_fuzz.py"


def test_an_error_or_an_equal_tree():
    done = subprocess.run(
        [sys.executable, FUZZER, "--files", "200"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 damaged checkpoints" in done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("saved") / "a"
    jp.checkpoint.save(path, {"w": jnp.arange(6.0).reshape(2, 3), "n": [1, "x", None]})
    return path


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)  # fmt: skip


@hypothesis.given(
    where=st.sampled_from(["manifest.json", "process_0.json"]),
    way=st.lists(st.integers(0, 9), max_size=8),
    new=_JSON,
)
def test_forged_json(saved, where, way, new):
    """The description says something else, and its checksums fit."""
    names = ("manifest.json", "process_0.json")
    whole = {n: (saved / n).read_text() for n in names}
    parts = {n: _manifest.read(saved / n) for n in names}
    x, last = parts, where
    for i in way:
        inside = x[last]
        if not isinstance(inside, dict | list) or not inside:
            break
        keys = sorted(inside) if isinstance(inside, dict) else range(len(inside))
        x, last = inside, keys[i % len(inside)]
    x[last] = new
    try:
        if isinstance(parts[names[1]], dict):
            parts[names[1]]["manifest"] = _manifest.crc(parts[names[0]])
        for name, part in parts.items():
            sealed = isinstance(part, dict)
            text = _manifest.sealed(part) if sealed else json.dumps(part)
            (saved / name).write_text(text)
        found = jp.checkpoint.restore(saved)
    except (ValueError, FileNotFoundError):
        return
    finally:
        for name, text in whole.items():
            (saved / name).write_text(text)
    # Another tree, perhaps, but with the same weights.
    arrays = [x for x in _flat(found) if hasattr(x, "shape")]
    assert len(arrays) == 1
    np.testing.assert_array_equal(arrays[0], jnp.arange(6.0).reshape(2, 3))


def _flat(x):
    if isinstance(x, dict | list | tuple):
        values = x.values() if isinstance(x, dict) else x
        return [y for value in values for y in _flat(value)]
    return [x]


def test_another_file_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "a")
    (data,) = (tmp_path / "a/arrays/state/ocdbt.process_0/d").iterdir()
    whole = data.read_bytes()
    for damaged, message in (
        (whole[:-1], f"{data.name} has {len(whole) - 1} bytes, not {len(whole)}"),
        (bytes([whole[0] ^ 1]) + whole[1:], f"{data.name} has other contents"),
    ):
        data.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"path: .*not as it was saved.*{message}"):
            jp.checkpoint.restore(tmp_path / "a")
    data.unlink()
    with pytest.raises(ValueError, match=f"{data.name} is missing"):
        jp.checkpoint.restore(tmp_path / "a")
