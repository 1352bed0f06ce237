"""Leaves one by one are those of the whole tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _tree():
    w = jax.random.normal(jax.random.key(0), (32, 64), jnp.bfloat16)
    params = {str(i): w * (i + 1) for i in range(4)}
    kinds = jp.NM(2, 4), jp.Block(16, 16), jp.Unstructured()
    masks = [jp.prune(w, 0.5, structure=s)[1] for s in kinds]
    packed = [jp.formats.pack(w, m, s) for m, s in zip(masks, kinds, strict=True)]
    return {"a": params, "b": packed, "c": jp.masks.pack(masks[0]), "d": 7, "e": "x"}


@pytest.fixture(params=["folder", "file", "several files"])
def path(request, tmp_path):
    path = tmp_path / "there"
    if request.param == "folder":
        jp.checkpoint.save(path, _tree())
    else:
        size = 10_000 if request.param == "several files" else None
        jp.checkpoint.save_safetensors(path, _tree(), shard_bytes=size)
    return path


def test_leaves_are_those_of_the_tree(path):
    found = {
        leaf.row.path: (leaf.row, leaf.read()) for leaf in jp.checkpoint.leaves(path)
    }
    tree = _tree()
    wanted = {f"a/{k}": x for k, x in tree["a"].items()}
    wanted |= {f"b/{i}": x for i, x in enumerate(tree["b"])}
    wanted |= {k: tree[k] for k in "cde"}
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        row, read = found[name]
        assert jax.tree.structure(read) == jax.tree.structure(x)
        jax.tree.map(np.testing.assert_array_equal, read, x)
        assert row.shape == tuple(getattr(x, "shape", ()))
        held = sum(y.nbytes for y in jax.tree.leaves(x) if hasattr(y, "nbytes"))
        assert row.nbytes == held
    assert [found[x][0].kind for x in ("a/0", "b/0", "b/1", "b/2", "c", "d")] == [
        "array", "NMArray", "BlockSparseArray", "BitmapArray", "packed mask", "value",
    ]  # fmt: skip


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    jp.checkpoint.save(tmp_path / "a", _tree())
    for file in (tmp_path / "a" / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    leaves = list(jp.checkpoint.leaves(tmp_path / "a"))
    assert len(leaves) == 10
    assert leaves[-1].row.path == "e"
    with pytest.raises(ValueError, match="not as it was saved"):
        leaves[0].read()


def test_keys_come_back(tmp_path):
    jp.checkpoint.save(tmp_path / "a", {"key": jax.random.key(3), "none": None})
    (leaf,) = jp.checkpoint.leaves(tmp_path / "a")
    assert leaf.row.kind == "key" and leaf.read() == jax.random.key(3)


def test_empty_arrays_come_back(tmp_path):
    jp.checkpoint.save(tmp_path / "a", {"a": jnp.zeros((0, 3)), "b": jnp.ones(2)})
    assert [x.read().shape for x in jp.checkpoint.leaves(tmp_path / "a")] == [
        (0, 3),
        (2,),
    ]


def test_files_of_other_libraries(tmp_path):
    save_file({"x.y": np.arange(3)}, tmp_path / "a.safetensors")
    leaves = jp.checkpoint.leaves(tmp_path / "a.safetensors")
    found = [(leaf.row, leaf.read().tolist()) for leaf in leaves]
    assert found == [(("x.y", "array", (3,), "int64", 24), [0, 1, 2])]


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        list(jp.checkpoint.leaves(tmp_path / "a"))
