"""Settings of long work: the same in every process, others where they differ."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.checkpoint import _folder


def ones():
    """One of each kind; called in two processes."""
    return [
        0.5,
        jp.NM(2, 4),
        {"*": 0.5},
        json.dumps,
        functools.partial(sorted, reverse=True),
        lambda x: x + 1,
        lambda x: x + 2,
        _held(3),
        _held(4),
        jax.jit(_held(3)),
        jp.posttrain.wanda(),
        jp.posttrain.wanda(group="layer"),
        functools.partial(_held(3), 5),
        functools.partial(_held(3), 6),
        _default(1),
        _default(2),
        _default(np.arange(3000)),
        _default(np.arange(3000) + (np.arange(3000) == 1500)),
        _default(jax.numpy.arange(3000)),
        _default({"ab", "cd", "ef", "gh"}),
        lambda x: x in {"ab", "cd", "ef", "gh"},
        lambda x: (y + 1 for y in x),
        lambda x: (y + 2 for y in x),
        object(),
    ]


def _held(n):
    return lambda x: x + n


def _default(n):
    def fn(x, n=n):
        return x + n

    return fn


def test_spelled_alike_in_another_process_and_unlike_for_others():
    mine = [_folder.spelled(x) for x in ones()]
    assert len(set(mine)) == len(mine)
    assert mine == [_folder.spelled(x) for x in ones()]
    code = (
        "import json; from jaxprune.checkpoint import _folder; import folder_test as t;"
        "print(json.dumps([_folder.spelled(x) for x in t.ones()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=__file__.rpartition("/")[0],
    )  # fmt: skip
    assert json.loads(done.stdout) == mine


def test_a_function_that_calls_itself():
    def make(n):
        def fn(x):
            return fn(x - n) if x > 0 else x

        return fn

    assert _folder.spelled(make(1)) == _folder.spelled(make(1))
    assert _folder.spelled(make(1)) != _folder.spelled(make(2))


def test_what_differs_is_named(tmp_path):
    begin = functools.partial(_folder.open_folder, tmp_path / "run")
    arrays = {"params": {"w": jax.numpy.ones(3)}}
    for _ in range(2):
        assert begin({"rate": 0.5}, arrays) == tmp_path / "run"
    with pytest.raises(
        ValueError, match=r"rate: .*run was begun with 0.5\. Go on with"
    ):
        begin({"rate": 0.25}, arrays)
    with pytest.raises(ValueError, match="params: .* was begun with other values"):
        begin({"rate": 0.5}, {"params": {"w": jax.numpy.zeros(3)}})
    with pytest.raises(ValueError, match="params: .* was begun with other values"):
        begin({"rate": 0.5}, {"params": {"v": jax.numpy.ones(3)}})
    with pytest.raises(ValueError, match="more: .* was begun with None"):
        begin({"rate": 0.5, "more": 1}, arrays)
