"""The command line: what it writes and says, and its exit codes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxprune as jp
from jaxprune import cli

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a checkpoint of ours, and a file as PyTorch has it."""
    monkeypatch.chdir(tmp_path)
    jp.checkpoint.save("model", _params())
    rng = np.random.default_rng(0)
    weights = {
        "model.embed_tokens.weight": rng.normal(size=(32, 16)).astype(np.float32),
        "model.layers.0.mlp.weight": rng.normal(size=(32, 64)).astype(np.float16),
        "model.layers.0.norm.weight": np.ones(16, np.float32),
        "model.layers.0.wide.weight": rng.normal(size=(32, 64)),
    }
    save_file(weights, "torch.safetensors")
    return tmp_path


def _params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "layers": [
            {
                "kernel": jax.random.normal(k, (64, 64), jnp.bfloat16),
                "bias": jnp.ones(64),
            }
            for k in keys
        ],
        "step": 7,
    }


def _run(capsys, *argv, code=0):
    found = cli.main([str(x) for x in argv])
    out, err = capsys.readouterr()
    assert found == code, err
    assert "Traceback" not in err
    return out if code == 0 else err


def _leaves(out):
    return {x["path"]: x for x in json.loads(out)["leaves"]}


def _equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
@pytest.mark.parametrize("pack", [[], ["--pack"]], ids=["zeros", "packed"])
def test_prune_is_prune(here, capsys, out, pack):
    said = _run(capsys, "prune", "model", out, "--sparsity", 0.75, *pack)
    assert "75.00 %" in said and f"wrote {out}" in said
    back = (
        jp.checkpoint.restore(out)
        if out == "out"
        else jp.checkpoint.load_safetensors(out)
    )
    kinds = {type(x["kernel"]).__name__ for x in back["layers"]}
    assert kinds == {"BitmapArray" if pack else "ArrayImpl"}
    wanted, _ = jp.prune(_params(), 0.75)
    _equal(jp.formats.unpack_tree(back), wanted)


def test_structures_and_leaves_are_chosen(here, capsys):
    _run(
        capsys,
        "prune",
        "model",
        "a",
        "--structure",
        "1:4",
        "--where",
        "layers/0/kernel",
    )
    wanted, _ = jp.prune(_params(), structure=jp.NM(1, 4), where="layers/0/kernel")
    _equal(jp.checkpoint.restore("a"), wanted)
    argv = ["--structure", "block 32x16", "--sparsity", 0.5, "--pack"]
    _run(capsys, "prune", "model", "b", *argv)
    back = jp.checkpoint.restore("b")
    assert back["layers"][0]["kernel"].block == (32, 16)
    _run(capsys, "prune", "model", "c", "--structure", "channel", "--sparsity", 0.5)
    wanted, _ = jp.prune(_params(), 0.5, structure=jp.Channel())
    _equal(jp.checkpoint.restore("c"), wanted)


def test_random_scores_depend_on_the_seed(here, capsys):
    argv = ["--sparsity", 0.5, "--score", "random", "--seed"]
    kept = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        _run(capsys, "prune", "model", out, *argv, seed)
        kept.append(np.asarray(jp.checkpoint.restore(out)["layers"][0]["kernel"]) != 0)
    assert (kept[0] == kept[1]).all() and (kept[0] != kept[2]).any()
    assert kept[0].sum() == 64 * 32


def test_files_of_other_libraries_keep_names_and_types(here, capsys):
    before = load_file("torch.safetensors")
    _run(
        capsys, "prune", "torch.safetensors", "out.safetensors",
        "--structure", "2:4", "--axis", -1,
    )  # fmt: skip
    after = load_file("out.safetensors")
    assert {k: (x.dtype, x.shape) for k, x in after.items()} == {
        k: (x.dtype, x.shape) for k, x in before.items()
    }
    for name, w in before.items():
        if name.split(".")[-2] in ("mlp", "wide"):
            groups = after[name].reshape(32, 16, 4)
            assert ((groups != 0).sum(-1) == 2).all()
            kept = after[name] != 0
            np.testing.assert_array_equal(after[name][kept], w[kept])
        else:
            np.testing.assert_array_equal(after[name], w)


def test_an_axis_is_not_guessed(here, capsys):
    argv = ["prune", "torch.safetensors", "out.safetensors", "--structure", "2:4"]
    said = _run(capsys, *argv, code=1)
    assert "--axis is missing" in said and "model/layers/0/mlp/weight" in said
    assert not pathlib.Path("out.safetensors").exists()


def test_inspect_finds_the_patterns(here, capsys):
    _run(capsys, "prune", "model", "a", "--structure", "2:4", "--pack")
    found = _leaves(_run(capsys, "inspect", "a", "--json"))
    row = found["layers/0/kernel"]
    assert row["kind"] == "NMArray" and row["sparsity"] == 0.5
    assert {"n": 2, "m": 4, "axis": -2} in row["nm"]
    assert row["nbytes"] < row["dense_nbytes"] == 64 * 64 * 2
    assert found["step"] == {
        "path": "step", "kind": "value", "shape": [], "dtype": "int", "nbytes": 0,
    }  # fmt: skip
    table = _run(capsys, "inspect", "a")
    assert "2:4 axis -2" in table and "bytes on disk" in table


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "several"])
def test_inspect_reads_files_of_other_libraries(here, capsys, shards):
    path = "torch.safetensors"
    if shards:
        path = "folder"
        tree = load_file("torch.safetensors")
        jp.checkpoint.save_safetensors(path, tree, shard_bytes=5000)
        assert len(list(pathlib.Path(path).glob("*.safetensors"))) > 1
    found = json.loads(_run(capsys, "inspect", path, "--json"))
    shapes = {x["path"]: tuple(x["shape"]) for x in found["leaves"]}
    assert shapes == {k: x.shape for k, x in load_file("torch.safetensors").items()}
    files = pathlib.Path(path).rglob("*") if shards else [pathlib.Path(path)]
    assert found["disk_nbytes"] == sum(x.stat().st_size for x in files)


def test_convert_goes_round(here, capsys):
    _run(capsys, "prune", "model", "a", "--sparsity", 0.9)
    _run(capsys, "convert", "a", "b.safetensors", "--pack")
    _run(capsys, "convert", "b.safetensors", "c", "--to", "safetensors")
    _run(capsys, "convert", "c", "d", "--unpack")
    _equal(jp.checkpoint.restore("d"), jp.checkpoint.restore("a"))
    sizes = [os.path.getsize("b.safetensors"), 2 * 64 * 64 * 2]
    assert sizes[0] < sizes[1] / 2


def test_convert_cuts_names_at_their_dots(here, capsys):
    _run(capsys, "convert", "torch.safetensors", "a")
    found = _leaves(_run(capsys, "inspect", "a", "--json"))
    assert found["model/layers/0/wide/weight"]["dtype"] == "float64"
    _run(capsys, "convert", "a", "b.safetensors")
    assert {k: x.dtype for k, x in load_file("b.safetensors").items()} == {
        k.replace(".", "/"): x.dtype for k, x in load_file("torch.safetensors").items()
    }


def test_predict(here, capsys):
    argv = ["--structure", "2:4", "--device", "v5e", "cpu", "--rows", 16, "--json"]
    found = json.loads(_run(capsys, "predict", "--shape", "4096x4096", *argv))
    assert [(x["device"], x["rows"]) for x in found] == [("v5e", 16), ("cpu", 16)]
    wanted = jp.predict((16, 4096, 4096), jp.NM(2, 4), 0.5, "v5e").choices[0]
    assert found[0]["speedup"] == wanted.speedup > 1
    assert found[0]["basis"] == "predicted, not timed"
    found = json.loads(_run(capsys, "predict", "model", *argv))
    assert [(x["path"], x["count"], x["shape"]) for x in found] == [
        ("layers/0/kernel", 2, [64, 64])
    ] * 2
    _run(capsys, "prune", "model", "small", "--structure", "2:4", "--pack")
    of_packed = json.loads(_run(capsys, "predict", "small", *argv))
    assert of_packed == found


def test_variables_that_came_back_as_dicts(here, capsys):
    class Net(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(16, 8, rngs=nnx.Rngs(0))
            self.up = nnx.Linear(8, 16, rngs=nnx.Rngs(0))

    jp.checkpoint.save("net", nnx.state(Net()))
    _run(capsys, "prune", "net", "out", "--structure", "2:4")
    back = jp.checkpoint.restore("out", like=nnx.state(Net()))
    wanted, _ = jp.prune(nnx.state(Net()), structure=jp.NM(2, 4))
    _equal(back, wanted)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["prune", "model", "out", "--sparsity", "1.5"], "in [0, 1)"),
        (["prune", "model", "out"], "--sparsity is missing"),
        (["prune", "model", "torch.safetensors", "--sparsity", "0.5"], "--overwrite"),
        (["prune", "model", "model", "--sparsity", "0.5", "--overwrite"], "two names"),
        (["prune", "model", "out", "--sparsity", "0.5", "--where", "no"], "'no'"),
        (["prune", "model", "out", "--sparsity", "0.9", "--structure", "2:4"], "2"),
        (["prune", "missing", "out", "--sparsity", "0.5"], "missing"),
        (["inspect", "missing"], "missing is not there"),
        (["inspect", "folder"], "Name the file"),
        (["inspect", "text"], "safetensors"),
        (["inspect", "weights.bin"], "never read"),
        (["convert", "model", "folder", "--overwrite"], "is no folder of jaxprune"),
        (["convert", "model", "out", "--axis", "-1"], "--pack only"),
        (["convert", "model", "nowhere/out.safetensors"], "nowhere"),
        (["predict", "--shape", "8x8", "--structure", "1x1"], "--sparsity is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(here, capsys, argv, said):
    pathlib.Path("text").write_text("no checkpoint, but long enough to look like one")
    pathlib.Path("weights.bin").write_bytes(b"\x80\x02" + bytes(20))
    pathlib.Path("folder").mkdir()
    before = sorted(here.rglob("*"))
    error = _run(capsys, *argv, code=1)
    assert error.startswith("jaxprune: ") and said in error
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["squash"],
        ["prune", "model"],
        ["prune", "model", "out", "--structure", "2:5x"],
        ["prune", "model", "out", "--structure", "5:4"],
        ["prune", "model", "out", "--axis", "0"],
        ["convert", "model", "out", "--pack", "--unpack"],
        ["predict", "--structure", "2:4"],
        ["predict", "--shape", "0x8", "--structure", "2:4"],
        ["predict", "--shape", "8x8", "--structure", "2:4", "--device", "abacus"],
    ],
)
def test_a_command_that_is_none_has_the_code_2(argv, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2
    assert "usage: jaxprune" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model", "b.safetensors"])
def test_a_damaged_checkpoint_is_refused(here, capsys, name):
    _run(capsys, "convert", "model", "b.safetensors")
    files = [x for x in pathlib.Path(name).rglob("*") if x.is_file()]
    path = max(files, key=os.path.getsize) if files else pathlib.Path(name)
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(data)
    _run(capsys, "inspect", name, code=1)
    _run(capsys, "convert", name, "out", code=1)
    assert not pathlib.Path("out").exists()


def test_overwrite_replaces(here, capsys):
    _run(capsys, "prune", "model", "a", "--sparsity", 0.5)
    _run(capsys, "prune", "model", "a", "--sparsity", 0.75, "--overwrite")
    back = jp.checkpoint.restore("a")
    assert (back["layers"][0]["kernel"] != 0).sum() == 64 * 16


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_what_fails_while_writing_leaves_nothing(here, capsys, monkeypatch, out):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    before = sorted(here.iterdir())
    from jaxprune.checkpoint import _files, _tensor_file

    monkeypatch.setattr(_files, "publish", stop)
    monkeypatch.setattr(_tensor_file, "write_header", stop)
    said = _run(capsys, "convert", "model", out, code=130)
    assert "interrupted" in said
    assert sorted(here.iterdir()) == before


def test_as_a_process(here):
    """It is installed, hides its bars, stops when it is told to, and takes a closed pipe."""
    program = [sys.executable, "-m", "jaxprune"]
    done = subprocess.run(
        [*program, "inspect", "model"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "layers/0/kernel" in done.stdout
    child = subprocess.Popen(
        [*program, "convert", "model", "out"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    child.communicate()
    assert child.returncode != 1
    assert not pathlib.Path("out.part").exists()
