"""Leaves of every kind, saved in one way and restored in another."""

import json
import pathlib
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune.checkpoint import _manifest, _sums

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _words(x):
    is_key = jnp.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


def _equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert type(x) is type(y)
        x, y = _words(x), _words(y)
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
        np.testing.assert_array_equal(x, y)


def _weights(shape=(64, 32), dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(0), shape, dtype)


def _packed(w):
    found = {}
    for name, structure in {
        "nm": jp.NM(2, 4),
        "words": jp.NM(1, 4),
        "blocks": jp.Block(8, 8),
        "bitmap": jp.Unstructured(),
    }.items():
        own = jnp.tile(w, (8, 4)) if name == "words" else w
        sparsity = 0.75 if name == "words" else 0.5
        _, masks = jp.prune({"k": own}, sparsity=sparsity, structure=structure)
        found[name] = jp.formats.pack(own, masks["k"], structure)
    assert found["words"].coding == "words"
    return found


def test_without_a_template(tmp_path):
    w = _weights()
    tree = {
        "params": {"w": w, "list": [w[0], (w[1], None)], "empty": {}, "nothing": w[:0]},
        "packed": _packed(w),
        "masks": jp.masks.pack({"w": w > 0}),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "narrow": [w[0].astype(t) for t in ("int4", "float8_e4m3fn", "float4_e2m1fn")],
        "complex": w[0].astype(jnp.complex64),
        "host": [np.arange(3.0), np.float64(0.1), np.zeros((0, 2), np.int64)],
        "data": {"n": 7, "x": [0.1, float("inf"), 10**30], "s": "ä", "b": b"\0\xff", "t": True},
        "by number": {3: "three"},
    }  # fmt: skip
    jp.checkpoint.save(tmp_path / "a", tree)
    _equal(jp.checkpoint.restore(tmp_path / "a"), tree)
    _equal(jp.checkpoint.restore(tmp_path / "a", like=tree), tree)


def test_optimizer_states_come_back_as_dicts_without_a_template(tmp_path):
    packed = {"w": _packed(_weights())["nm"]}
    params = jp.formats.values(packed)
    for tx in (
        optax.adamw(1e-3),
        optax.chain(optax.clip(1.0), optax.masked(optax.sgd(0.1, 0.9), {"w": False})),
        optax.MultiSteps(optax.adafactor(1e-3), 2),
    ):
        state = tx.init(params)
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        jp.checkpoint.save(path, state)
        _equal(jp.checkpoint.restore(path, like=jax.eval_shape(tx.init, params)), state)
    state = optax.adam(1e-3).init(packed)  # moments in the containers of packed leaves
    jp.checkpoint.save(tmp_path / "packed", state)
    back = jp.checkpoint.restore(tmp_path / "packed")
    assert list(back[0]) == ["count", "mu", "nu"]
    _equal(back[0]["mu"], state[0].mu)


def test_another_order_of_bytes(tmp_path):
    x = np.arange(5.0, dtype=">f4")
    jp.checkpoint.save(tmp_path / "a", {"w": x})
    back = jp.checkpoint.restore(tmp_path / "a")
    assert back["w"].dtype == np.float32
    np.testing.assert_array_equal(back["w"], x)


def test_metadata(tmp_path):
    w = _weights()
    bitmap = _packed(w)["bitmap"]
    tree = {"a": bitmap, "b": w > 0, "n": 1}
    tree["m"] = jp.masks.pack({"k": w > 0})["k"]
    jp.checkpoint.save(tmp_path / "a", tree)
    found = jp.checkpoint.metadata(tmp_path / "a")
    assert found.version == 1 and found.processes == 1
    assert [tuple(row) for row in found.leaves] == [
        ("a", "BitmapArray", (64, 32), "bfloat16", bitmap.nbytes),
        ("b", "array", (64, 32), "bool", 2048),
        ("m", "packed mask", (64, 32), "bool", 256),
        ("n", "value", (), "int", 0),
    ]


def test_size_follows_density(tmp_path):
    w = _weights((512, 512))
    for name, sparsity, structure, most in (
        ("unstructured", 0.9, jp.Unstructured(), 0.20),
        ("2:4", 0.5, jp.NM(2, 4), 0.57),
        ("blocks", 0.9, jp.Block(32, 32), 0.11),
    ):
        params, masks = jp.prune({"kernel": w}, sparsity=sparsity, structure=structure)
        packed = jp.formats.pack_tree(params, masks)
        jp.checkpoint.save(tmp_path / name, packed)
        files = (f for f in (tmp_path / name / "arrays").rglob("*") if f.is_file())
        size = sum(f.stat().st_size for f in files)
        assert size <= most * w.nbytes + 8000  # the names of files, and their lists
        back = jp.formats.unpack_tree(jp.checkpoint.restore(tmp_path / name))
        np.testing.assert_array_equal(back["kernel"], params["kernel"])


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
    w = _weights((512, 512), jnp.float32)
    tree = {"large": w, "small": w[0] + 0, "host": np.arange(100_000.0)}
    expected = jax.tree.map(np.array, tree)
    saving = jp.checkpoint.save_async(tmp_path / "a", tree)
    gone = jax.jit(lambda x: jax.tree.map(lambda y: y * 0, x), donate_argnums=0)
    gone({k: tree[k] for k in ("large", "small")})
    tree["host"][:] = 0
    # Whether JAX takes a buffer that is still being read is its own affair.
    assert saving.result() is None
    back = jp.checkpoint.restore(tmp_path / "a")
    _equal(jax.tree.map(np.asarray, back), expected)


def test_what_goes_wrong_in_the_background_is_raised(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr("jaxprune.checkpoint._files.publish", fail)
    saving = jp.checkpoint.save_async(tmp_path / "a", {"w": jnp.ones(3)})
    with pytest.raises(OSError, match="no space left"):
        saving.result()
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()
    jp.checkpoint.save(tmp_path / "a", {"w": jnp.ones(3)})  # what was left is removed
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_program_waits_for_what_is_under_way_at_its_end(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    script = f"""
import jax.numpy as jnp, jaxprune as jp
from jaxprune.checkpoint import _files

def publish(part, path, publish=_files.publish, **options):
    if path.name == "bad":
        raise OSError("no space left")
    publish(part, path, **options)

_files.publish = publish
tree = {{"w": jnp.zeros((1000, 1000)), "v": [jnp.arange(i + 1) for i in range(20)]}}
jp.checkpoint.save_async({str(good)!r}, tree)
jp.checkpoint.save_async({str(bad)!r}, tree)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert jp.checkpoint.restore(good)["w"].shape == (1000, 1000)
    assert done.stderr.strip().endswith("OSError: no space left")
    assert not bad.exists()


def test_a_save_waits_for_another_to_the_same_path(tmp_path):
    path, x = tmp_path / "a", jnp.zeros(300_000)
    savings = [
        jp.checkpoint.save_async(path, {"w": x + i}, overwrite=True) for i in range(3)
    ]
    for saving in savings:
        saving.result()
    _equal(jp.checkpoint.restore(path), {"w": x + 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_only_checkpoints_are_replaced(tmp_path):
    path, tree = tmp_path / "a", {"w": jnp.ones(3)}
    path.mkdir()
    jp.checkpoint.save(path, tree, overwrite=True)  # in place of an empty folder
    (path / "notes.txt").write_text("mine")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for name, lost in (("a", "notes.txt"), ("folder", "inside"), ("file", "file")):
        with pytest.raises(ValueError, match=f"path: .*{name} would be.*: {lost}"):
            jp.checkpoint.save(tmp_path / name, tree, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_killed_while_one_checkpoint_took_the_place_of_another(tmp_path):
    path, tree = tmp_path / "a", {"w": jnp.ones(3)}
    jp.checkpoint.save(path, tree)
    path.rename(tmp_path / "a.replaced")
    with pytest.raises(FileNotFoundError, match=r"a\.replaced is the one.*rename it"):
        jp.checkpoint.restore(path)
    jp.checkpoint.save(path, {"w": jnp.zeros(3)}, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    _equal(jp.checkpoint.restore(path), {"w": jnp.zeros(3)})


def test_a_data_iterator_goes_on_at_the_same_element(tmp_path):
    def batches():
        data = grain.MapDataset.range(100).shuffle(seed=3).to_iter_dataset()
        return iter(data.batch(4))

    first = batches()
    for _ in range(3):
        next(first)
    state = first.get_state()
    jp.checkpoint.save(tmp_path / "a", {"step": 3, "data": state})
    second = batches()
    second.set_state(jp.checkpoint.restore(tmp_path / "a")["data"])
    for _ in range(5):
        np.testing.assert_array_equal(next(first), next(second))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_from_8_devices_to_4_to_1(tmp_path, kind):
    def mesh(n):
        return jax.make_mesh((n // 2 or 1, 2 if n > 1 else 1), ("x", "y"), (kind,) * 2)

    w = _weights((64, 64), jnp.float32)
    tree = {"w": w, "mask": jp.masks.pack({"k": w > 0}), "step": jnp.int32(3)}

    def put(n, spec):
        here = NamedSharding(mesh(n), spec)
        placed = jax.device_put(w, here)
        masks = jp.masks.pack({"k": jax.jit(lambda w: w > 0)(placed)})
        return {"w": placed, "mask": masks, "step": jnp.int32(3)}

    before, path = put(8, P("x", "y")), tmp_path / "8"
    jp.checkpoint.save(path, before)
    sums = json.loads((path / "manifest.json").read_text())["arrays"]
    jp.checkpoint.save(tmp_path / "whole", before | {"w": w})
    whole = json.loads((tmp_path / "whole" / "manifest.json").read_text())["arrays"]
    assert [row["sum"] for row in sums] == [row["sum"] for row in whole]
    for n, spec in ((4, P(None, ("y", "x"))), (1, P()), (8, P(("x", "y")))):
        like = put(n, spec)
        back = jp.checkpoint.restore(path, like=like)
        assert jax.typeof(back["w"]) == jax.typeof(like["w"])
        assert back["w"].sharding == like["w"].sharding
        bits = [x["mask"]["k"].bits for x in (back, like)]
        assert bits[0].sharding.is_equivalent_to(bits[1].sharding, 2)
        np.testing.assert_array_equal(back["w"], tree["w"])
        np.testing.assert_array_equal(jp.masks.unpack(back["mask"])["k"], w > 0)
        path = tmp_path / f"{n} {spec}".replace("/", "")
        jp.checkpoint.save(path, back)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_packed_in_parts(tmp_path, kind):
    """Packed leaves that are sharded come back so, from folders and from files."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), (kind,) * 2)
    w, tree = _weights((64, 64)), {}
    placed = jax.device_put(w, NamedSharding(mesh, P("x", "y")))
    for name, structure in {
        "nm": jp.NM(2, 4), "blocks": jp.Block(8, 8), "bitmap": jp.Unstructured(),
    }.items():  # fmt: skip
        _, masks = jp.prune({"k": placed}, sparsity=0.5, structure=structure)
        tree[name] = jp.formats.pack(placed, masks["k"], structure)
        assert tree[name].layout.parts == (4, 2)
    jp.checkpoint.save(tmp_path / "a", tree)
    jp.checkpoint.save_safetensors(tmp_path / "a.safetensors", tree)
    host = jax.tree.map(np.asarray, tree)
    for like in (None, tree):
        back = jp.checkpoint.restore(tmp_path / "a", like=like)
        _equal(jax.tree.map(np.asarray, back), host)
        back = jp.checkpoint.load_safetensors(tmp_path / "a.safetensors", like=like)
        _equal(jax.tree.map(np.asarray, back), host)
    for x, y in zip(*map(jax.tree.leaves, (back, tree)), strict=True):
        assert x.sharding == y.sharding


def test_sums_are_those_of_the_host_and_see_every_bit():
    mesh = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Explicit,) * 2)
    for dtype in ("bfloat16", "float32", "int8", "bool", "int4", "complex64"):
        x = _weights((256, 512), jnp.float32).astype(dtype)  # large enough for devices
        x = jnp.concatenate([x, x]) if x.nbytes <= 1 << 16 else x
        host = _sums._host_sums(np.asarray(x))
        there = jax.device_put(x, NamedSharding(mesh, P("x", "y")))
        wanted = "".join(f"{int(s):08x}" for s in host)
        assert (
            _sums.finish(_sums.start(x)) == _sums.finish(_sums.start(there)) == wanted
        )
    x = np.arange(50, dtype=np.float64)
    seen = {_sums.finish(_sums.start(x))}
    for bit in range(64 * 50):
        y = x.copy()
        y.view(np.uint64)[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
        seen.add(_sums.finish(_sums.start(y)))
    seen.add(_sums.finish(_sums.start(x[::-1])))
    assert len(seen) == 64 * 50 + 2


def test_places_past_two_words():
    """Elements 2**32 apart have other hashes: their steps are not multiples of it."""
    x = jax.ShapeDtypeStruct((3, 1 << 16, 1 << 16), jnp.uint8)
    jaxpr = jax.make_jaxpr(_sums._place)(x)
    steps = [int(c.val) for e in jaxpr.eqns for c in e.invars if hasattr(c, "val")]
    assert _sums._ODD in steps and 0 not in steps[-1:]


def test_types_that_differ(tmp_path):
    jp.checkpoint.save(
        tmp_path / "a", {"x": jnp.float32(1.5), "n": jnp.int32(300), "s": 2}
    )

    def back(**like):
        return jp.checkpoint.restore(
            tmp_path / "a",
            like={"x": jnp.float32(0), "n": jnp.int32(0), "s": 0} | like,
        )

    assert back(x=jnp.bfloat16(0))["x"].dtype == jnp.bfloat16
    assert back(n=jnp.int16(0))["n"] == 300
    assert back(n=0)["n"] == 300 and back(s=jnp.int32(0))["s"] == 2
    for like in ({"n": jnp.int8(0)}, {"n": jnp.uint32(0)}, {"x": jnp.int32(0)}):
        with pytest.raises(ValueError, match=r"like: . is of type .* was saved"):
            back(**like)
    with pytest.raises(ValueError, match="like: x is a int, but 1.5 was saved"):
        back(x=0)
    with pytest.raises(ValueError, match="like: s is an array, but a int was saved"):
        back(s=jnp.ones(2, int))


def test_packed_leaves_and_keys_that_differ(tmp_path):
    w, key = _weights(), jax.random.key(0)
    packed = _packed(w)
    jp.checkpoint.save(tmp_path / "a", {"w": packed["bitmap"], "k": key})
    with pytest.raises(ValueError, match=r"like: .* holds no w\. Restore"):
        jp.checkpoint.restore(tmp_path / "a", like={"w": w, "k": key})
    with pytest.raises(ValueError, match="like: k is no typed key"):
        like = {"w": packed["bitmap"], "k": jnp.zeros(2, jnp.uint32)}
        jp.checkpoint.restore(tmp_path / "a", like=like)
    fields = {k: getattr(packed["bitmap"], k) for k in ("bits", "values", "starts")}
    with pytest.raises(ValueError, match="like: w is not packed, but .* a BitmapArray"):
        jp.checkpoint.restore(tmp_path / "a", like={"w": fields, "k": key})


def test_trees_that_cannot_be_saved(tmp_path):
    with pytest.raises(
        TypeError, match="tree: f/0 is of type function; expected arrays"
    ):
        jp.checkpoint.save(tmp_path / "a", {"f": [_weights]})
    with pytest.raises(TypeError, match=r"tree: a has the key 1\.5; expected strings"):
        jp.checkpoint.save(tmp_path / "a", {"a": {1.5: jnp.ones(2)}})
    for x in (jnp.ones(3, jnp.uint4), np.zeros(3, [("x", "f4")])):
        with pytest.raises(
            TypeError, match="tree: x/y has the type .*, which Orbax has"
        ):
            jp.checkpoint.save(tmp_path / "a", {"x": {"y": x}})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("saved") / "a"
    w = _weights()
    jp.checkpoint.save(path, {"w": w, "p": _packed(w)["nm"], "n": 1})
    return path


def _forged(saved, tmp_path, change) -> pathlib.Path:
    """A copy whose manifest was changed, its checksums made to fit."""
    import shutil

    path = tmp_path / "forged"
    shutil.copytree(saved, path)
    parts = [_manifest.read(path / n) for n in ("manifest.json", "process_0.json")]
    change(*parts)
    parts[1]["manifest"] = _manifest.crc(parts[0])
    for name, part in zip(("manifest.json", "process_0.json"), parts, strict=True):
        (path / name).write_text(_manifest.sealed(part))
    return path


def _set(place, value):
    def change(body, part):
        *way, last = place
        x = {"manifest": body, "part": part}
        for key in way:
            x = x[key]
        x[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(["manifest", "version"], 2), "version 2, and this jaxprune reads 1"),
        (_set(["manifest", "format"], "x"), "it is no checkpoint of jaxprune"),
        (_set(["manifest", "arrays", 2, "shape"], [10**8, 10**7]), "would take"),
        (_set(["manifest", "arrays", 2, "shape"], [32, 64]), r"an array is bfloat16\[64, 32\]"),
        (_set(["manifest", "arrays", 2, "shape"], [-1]), "is no shape"),
        (_set(["manifest", "arrays", 2, "dtype"], "object"), "'object' is no type"),
        (_set(["manifest", "arrays", 2, "dtype"], "float16"), "w has other values|an array is"),
        (_set(["manifest", "arrays", 2, "sum"], "0" * 16), "w has other values"),
        (_set(["manifest", "tree"], {"array": 0}), "not those of its tree"),
        (_set(["manifest", "tree"], {"file": "../x"}), "a node of its tree has file"),
        (_set(["part", "files", "../x"], [0, 0]), "'../x' is no file inside"),
        (_set(["part", "files", "/etc/passwd"], [0, 0]), "is no file inside"),
        (_set(["part", "files", "x"], [0, 0]), "x is missing"),
        (_set(["part", "values"], []), "values are missing"),
        (_set(["part", "values"], [{"bytes": "?"}]), "not as it was saved"),
        (_set(["part", "values"], [{"bytes": {}}]), "is no value"),
        (_set(["part", "values"], [{"complex": [1, "x"]}]), "is no value"),
    ],
)  # fmt: skip
def test_forged_manifests(saved, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        jp.checkpoint.restore(_forged(saved, tmp_path, change))


def test_geometry_that_does_not_fit(saved, tmp_path):
    def change(body, part):
        ((_, node),) = [x for x in body["tree"]["dict"] if x[0] == "p"]
        node["static"]["m"] = 8

    with pytest.raises(ValueError, match="a NMArray of .* has other arrays"):
        jp.checkpoint.restore(_forged(saved, tmp_path, change))


def test_a_missing_manifest_is_no_checkpoint(saved, tmp_path):
    import shutil

    shutil.copytree(saved, tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    for read in (jp.checkpoint.restore, jp.checkpoint.metadata):
        with pytest.raises(FileNotFoundError, match="is no complete checkpoint"):
            read(tmp_path / "a")
