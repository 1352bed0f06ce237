"""Trees in safetensors files: round trips, other readers, what is refused and why."""

import dataclasses
import functools
import json
import os
import struct
import tracemalloc
import zlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.flax
import safetensors.numpy
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune.checkpoint import _narrow, _save_safetensors, _tensor_file

pytestmark = pytest.mark.usefixtures("quick_compilation")

INDEX = "model.safetensors.index.json"


def _w(*shape, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def _packed(w, structure):
    """Masks by the places of weights, since to prune would take most of the time here."""
    places = np.indices(w.shape)
    match structure:
        case jp.NM(n, m, stride=stride):
            mask = (places[-2] // stride + places[-1]) % m < n
        case jp.Block(rows, cols):
            mask = (places[-2] // rows + places[-1] // cols) % 2 == 0
        case _:
            mask = np.random.default_rng(0).random(w.shape) < 0.3
    return jp.formats.pack(w, jnp.asarray(mask), structure)


def _equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if hasattr(x, "dtype"):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        else:
            assert type(x) is type(y) and x == y


def _there_and_back(tmp_path, tree, **kw):
    path = tmp_path / "model.safetensors"
    jp.checkpoint.save_safetensors(path, tree, overwrite=True)
    return jp.checkpoint.load_safetensors(path, **kw)


PACKED = {
    "bitmap": lambda: _packed(_w(40, 24), jp.Unstructured()),
    "stacked bitmap": lambda: _packed(_w(3, 64, 200), jp.Unstructured()),
    "blocks": lambda: _packed(_w(40, 24), jp.Block(16, 16)),
    "stacked blocks": lambda: _packed(_w(3, 32, 32), jp.Block(8, 8)),
    "grouped blocks": lambda: _packed(
        _w(4, 8, 16), jp.Block(8, 8, axis=(-3, -2), out_axis=-1)
    ),
    "nm": lambda: _packed(_w(41, 24), jp.NM(2, 4)),
    "int8 nm": lambda: jp.formats.pack(
        jnp.arange(48, dtype=jnp.int8).reshape(8, 6), jnp.arange(48).reshape(8, 6) < 24,
        jp.NM(4, 8),
    ),
    "places": lambda: _packed(_w(3, 34, 24, dtype=jnp.bfloat16), jp.NM(2, 16)),
    "stride": lambda: _packed(_w(64, 24), jp.NM(2, 4, stride=16)),
    "words": lambda: _packed(_w(512, 128, dtype=jnp.bfloat16), jp.NM(2, 4)),
    "words 1:4": lambda: _packed(_w(512, 128, dtype=jnp.float16), jp.NM(1, 4)),
    "mask": lambda: jp.masks.pack(_w(24, 40) > 0),
    "mask of odd sizes": lambda: jp.masks.pack(_w(3, 11) > 0),
    "mask of one number": lambda: jp.masks.pack(jnp.array(True)),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
def test_packed_leaves_come_back(tmp_path, name):
    tree = {"layers": [{"kernel": PACKED[name]()}, {"kernel": None}]}
    _equal(_there_and_back(tmp_path, tree), tree)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    _equal(_there_and_back(tmp_path, tree, like=like), tree)


DTYPES = [*_tensor_file.DTYPES.values(), *_narrow.BITS]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5)], ids=str)
def test_types_come_back_bit_by_bit(tmp_path, dtype, shape):
    raw = np.random.default_rng(0).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    if dtype == np.bool_:
        raw &= 1
    x = raw.view(dtype).reshape(shape)
    if dtype in _narrow.BITS and _narrow.BITS[dtype] < 8:
        x = np.arange(15).reshape(3, 5)[tuple(map(slice, shape))].astype(dtype)
        x = x.reshape(-1)[0].reshape(()) if shape == () else x
    back = _there_and_back(tmp_path, {"x": x})["x"]
    assert (back.dtype, back.shape) == (dtype, shape)
    assert np.asarray(back).tobytes() == x.tobytes()
    # JAX would cut these in half.
    assert isinstance(back, np.ndarray) == (dtype in (np.int64, np.uint64, np.float64))


def test_narrow_types_take_the_bits_that_they_have(tmp_path):
    path = tmp_path / "model.safetensors"
    x = jnp.array([-8, 7, -1, 0, 3], jnp.int4)
    jp.checkpoint.save_safetensors(path, {"x": x})
    found = safetensors.numpy.load_file(path)["x"]
    assert found.tolist() == [0x78, 0x0F, 0x03]


def test_containers_and_values_come_back(tmp_path):
    tree = {
        "list": [jnp.ones(2), (jnp.zeros(1), [])],
        "by number": {0: jnp.ones(1), 10: {"a": None}},
        "empty": {"dict": {}, "tuple": ()},
        "values": {"f": 2.5, "i": -(2**70), "s": "é\n\0", "b": True},
        "a.b": {"c d": jnp.ones(3)},
    }
    back = _there_and_back(tmp_path, tree)
    _equal(back, tree)
    assert back["empty"] == tree["empty"]
    assert _there_and_back(tmp_path, {}) == {}
    _equal(_there_and_back(tmp_path, [jnp.ones(1)]), [jnp.ones(1)])


def test_other_containers_come_back_in_those_of_like(tmp_path):
    class Net(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(3, 4, rngs=nnx.Rngs(0))])

    module = Net()
    _equal(_there_and_back(tmp_path, module, like=module), module)
    state = nnx.state(module)
    linear = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    adam = optax.adam(0.1).init({"w": jnp.ones(3)})
    tree = {"nnx": state, "eqx": eqx.filter(linear, eqx.is_array), "adam": adam}
    _equal(_there_and_back(tmp_path, tree, like=tree), tree)
    back = _there_and_back(tmp_path, tree)
    assert back["nnx"]["layers"][0].keys() == {"kernel", "bias"}
    assert back["adam"][0]["mu"]["w"].shape == (3,)
    assert back["eqx"]["weight"].shape == (4, 3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_arrays_come_back_with_their_shardings(tmp_path, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (kind, kind))
    rows, both = (NamedSharding(mesh, p) for p in (P("x"), P(None, ("y", "x"))))
    packed = _packed(_w(8, 64, 32), jp.Unstructured())
    tree = {
        "w": jax.device_put(_w(16, 24), both),
        "b": jax.device_put(_w(16), rows),
        "packed": jax.device_put(packed, rows),
        "int4": jax.device_put(_w(8, 4).astype(jnp.int4), rows),
        "numpy": np.arange(3),
        "step": 3,
    }
    back = _there_and_back(tmp_path, tree, like=tree)
    _equal(back, tree)
    there = lambda x: getattr(x, "sharding", None)  # noqa: E731
    assert jax.tree.map(there, back) == jax.tree.map(there, tree)
    # From one device to a mesh.
    whole = jax.tree.map(np.asarray, {"w": tree["w"], "packed": tree["packed"]})
    like = {"w": tree["w"], "packed": tree["packed"]}
    back = _there_and_back(tmp_path, whole, like=like)
    _equal(back, like)
    assert back["w"].sharding == both


def test_a_shard_is_read_without_the_whole_weight(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    w = _w(64, 64)
    jp.checkpoint.save_safetensors(path, {"w": w})
    monkeypatch.setattr(_tensor_file.TensorFile, "read", None)
    monkeypatch.setattr(_tensor_file, "_CHUNK", 1 << 10)
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, "x"))
    like = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)}
    _equal(jp.checkpoint.load_safetensors(path, like=like)["w"], w)


def test_other_readers_find_the_tensors(tmp_path):
    packed = _packed(_w(8, 8), jp.NM(2, 4))
    tree = {"layers": [{"kernel": packed, "bias": _w(8, dtype=jnp.bfloat16)}]}
    _there_and_back(tmp_path, tree)
    path = tmp_path / "model.safetensors"
    found = safetensors.flax.load_file(path)
    _equal(found["layers/0/bias"], tree["layers"][0]["bias"])
    _equal(found["layers/0/kernel.values"], packed.values)
    _equal(found["layers/0/kernel.codes"], packed.codes)
    assert len(found) == 3
    with safetensors.safe_open(path, "np") as file:
        said = json.loads(file.metadata()["jaxprune"])
    assert said["leaves"]["layers/0/kernel"]["n"] == 2
    # Every tensor begins at a multiple of its own size, the header at one of 8.
    with _tensor_file.TensorFile(path) as file:
        assert file._start % 8 == 0
        assert all(x.begin % x.dtype.itemsize == 0 for x in file.tensors.values())


def test_files_of_others(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a.w": _w(2, 3), "a.b": _w(3, dtype=jnp.bfloat16), "c": jnp.arange(3)}
    safetensors.flax.save_file(tensors, path, {"format": "pt"})
    load = jp.checkpoint.load_safetensors
    _equal(load(path, separator=""), tensors)
    a = {"w": tensors["a.w"], "b": tensors["a.b"]}
    _equal(load(path, separator="."), {"a": a, "c": tensors["c"]})
    _equal(load(tmp_path, separator="", like=tensors), tensors)
    with pytest.raises(
        ValueError, match="not written by save_safetensors.*separator=''"
    ):
        load(path)
    with pytest.raises(TypeError, match="separator: got 3; expected ''"):
        load(path, separator=3)
    safetensors.flax.save_file(tensors | {"a": _w(2)}, path)
    with pytest.raises(ValueError, match="'a', which is a leaf|'a' is a leaf"):
        load(path, separator=".")


def test_several_files(tmp_path):
    folder = tmp_path / "model"
    tree = {f"w{i}": _w(10, 10, seed=i) for i in range(5)}
    tree |= {"packed": _packed(_w(64, 64), jp.Unstructured()), "step": 3}
    tree |= {"small": jnp.ones(3, jnp.int4)}
    save, load = jp.checkpoint.save_safetensors, jp.checkpoint.load_safetensors
    save(folder, tree, shard_bytes=900)
    names = sorted(x.name for x in folder.iterdir())
    assert names[-1] == INDEX and names[0] == "model-00001-of-00004.safetensors"
    _equal(load(folder), tree)
    _equal(load(folder / INDEX, like=tree), tree)
    index = json.loads((folder / INDEX).read_text())
    for name, file in index["weight_map"].items():
        assert name in safetensors.numpy.load_file(folder / file)
    assert os.listdir(tmp_path) == ["model"]

    save(folder, {"x": tree["w0"]}, shard_bytes=10**9, overwrite=True)
    _equal(load(folder), {"x": tree["w0"]})
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds config.json too, which would be lost"):
        save(folder, tree, shard_bytes=900, overwrite=True)
    with pytest.raises(ValueError, match="is a folder; expected a file"):
        save(folder, tree, overwrite=True)


def test_files_of_several_saves_do_not_mix(tmp_path):
    folders = [tmp_path / x for x in "ab"]
    for i, folder in enumerate(folders):
        tree = {"a": _w(64, seed=i), "b": _w(64, seed=i)}
        jp.checkpoint.save_safetensors(folder, tree, shard_bytes=300)
    name = "model-00002-of-00002.safetensors"
    (folders[1] / name).replace(folders[0] / name)
    with pytest.raises(ValueError, match="there are files of several saves"):
        jp.checkpoint.load_safetensors(folders[0])
    with pytest.raises(FileNotFoundError, match=f"names {name}, which is not there"):
        jp.checkpoint.load_safetensors(folders[1])


def test_an_index_stays_in_its_folder(tmp_path):
    folder = tmp_path / "model"
    jp.checkpoint.save_safetensors(folder, {"a": _w(4)}, shard_bytes=300)
    index = folder / INDEX
    for file in ("../x.safetensors", "/etc/passwd", "x.bin", 7):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(ValueError, match="it names '.*; expected files beside it"):
            jp.checkpoint.load_safetensors(folder)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="there is no weight_map"):
        jp.checkpoint.load_safetensors(folder)
    file = "model-00001-of-00001.safetensors"
    index.write_text(json.dumps({"weight_map": {"a": file, "b": file}}))
    with pytest.raises(ValueError, match=f"b is not said to lie in {file}, or is not"):
        jp.checkpoint.load_safetensors(folder)


def test_appears_only_when_complete(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save, load = jp.checkpoint.save_safetensors, jp.checkpoint.load_safetensors
    save(path, {"a": _w(3)})
    with pytest.raises(FileExistsError, match="model.safetensors exists already"):
        save(path, {"a": _w(4)})

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_tensor_file, "write_header", stop)
    for kw in (
        {"path": path, "overwrite": True},
        {"path": tmp_path / "b", "shard_bytes": 9},
    ):
        with pytest.raises(KeyboardInterrupt):
            save(tree={"a": _w(4)}, **kw)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    _equal(load(path), {"a": _w(3)})


def test_what_a_process_of_the_same_number_left_is_removed(tmp_path):
    save = jp.checkpoint.save_safetensors
    (tmp_path / f"a.safetensors.{os.getpid()}.part").write_text("half")
    (tmp_path / f"b.{os.getpid()}.part").mkdir()
    save(tmp_path / "a.safetensors", {"a": _w(3)})
    save(tmp_path / "b", {"a": _w(3)}, shard_bytes=9)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b"]


def test_a_folder_is_whole_whenever_it_is_replaced(tmp_path, monkeypatch):
    """One interrupted while the old folder is removed has the new one in place."""
    path, load = tmp_path / "b", jp.checkpoint.load_safetensors
    save = functools.partial(
        jp.checkpoint.save_safetensors, path, shard_bytes=9, overwrite=True
    )
    save({"a": _w(3)})

    def stop(folder, **_):
        next(iter(folder.iterdir())).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            save({"a": _w(4)})
    _equal(load(path), {"a": _w(4)})
    save({"a": _w(5)})
    assert os.listdir(tmp_path) == ["b"]


def test_arrays_are_fetched_one_by_one(tmp_path, monkeypatch):
    alive = most = 0

    class Held(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= self.base is None

    def fetch(x):
        nonlocal alive, most
        alive, most = alive + 1, max(most, alive + 1)
        held = Held(x.shape, x.dtype)
        held[...] = np.asarray(x)
        return held

    monkeypatch.setattr(_save_safetensors, "fetch", fetch)
    tree = {f"w{i}": _w(16, 16, seed=i) for i in range(6)}
    _equal(_there_and_back(tmp_path, tree), tree)
    assert most == 1


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a/b": jnp.ones(1)}, ValueError, "the tree has the key 'a/b'.* without '/'"),
        ({"x": {"": jnp.ones(1)}}, ValueError, "x has the key ''; expected one that is"),
        ({"__metadata__": jnp.ones(1)}, ValueError, "the key '__metadata__'"),
        ({(1, 2): jnp.ones(1)}, TypeError, r"the key \(1, 2\); expected strings"),
        (jnp.ones(1), TypeError, "tree: got a ArrayImpl; expected a dict.*Put it into"),
        ({"a": object()}, TypeError, "tree: a is a object; expected an array"),
        ({"a": jax.random.key(0)}, TypeError, "a holds random keys.*key_data"),
        ({"a": float("nan")}, ValueError, "a is nan; expected a finite number"),
        ({"a": np.array(["x"])}, TypeError, "a has the type str.*; expected one of bool"),
        ({"a": np.ones(1, complex)}, TypeError, "a has the type complex128, which"),
        ({"a": jax.ShapeDtypeStruct((1,), int)}, TypeError, "a is a ShapeDtypeStruct"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_trees_that_cannot_be_saved(tmp_path, tree, error, message):
    with pytest.raises(error, match=message):
        jp.checkpoint.save_safetensors(tmp_path / "x.safetensors", tree)
    assert os.listdir(tmp_path) == []


def test_other_arguments_that_are_refused(tmp_path):
    path, nm = tmp_path / "x.safetensors", _packed(_w(8, 8), jp.NM(2, 4))
    save = jp.checkpoint.save_safetensors
    with pytest.raises(ValueError, match="two tensors have the name 'a.codes'"):
        save(path, {"a": nm, "a.codes": _w(1)})
    with pytest.raises(
        ValueError, match="shard_bytes: got 0; expected a number of bytes"
    ):
        save(path, {"a": nm}, shard_bytes=0)
    deep = _w(1)
    for _ in range(101):
        deep = [deep]
    with pytest.raises(ValueError, match="more than 100 containers within each other"):
        save(path, deep)
    lost = jax.jit(lambda w: jp.formats.pack(w, w != 0, jp.Unstructured(), capacity=3))
    with pytest.raises(
        ValueError, match="a is no sound BitmapArray: 64 bits are set, and"
    ):
        save(path, {"a": lost(_w(8, 8))})


def test_like_that_does_not_fit(tmp_path):
    tree = {"w": _w(4, 6), "nm": _packed(_w(8, 8), jp.NM(2, 4)), "step": 3}
    load = lambda like: _there_and_back(tmp_path, tree, like=like)  # noqa: E731
    with pytest.raises(ValueError, match="like: .* holds no b, c. Make like"):
        load(tree | {"b": 1, "c": 2})
    with pytest.raises(ValueError, match="like: it lacks nm, w, which .* holds"):
        load({"step": 3})
    with pytest.raises(
        ValueError, match=r"like: w is float32\[6, 4\], but .* float32\[4, 6\]"
    ):
        load(tree | {"w": _w(6, 4)})
    with pytest.raises(
        ValueError, match=r"like: w is bfloat16\[4, 6\], but .* float32"
    ):
        load(tree | {"w": _w(4, 6, dtype=jnp.bfloat16)})
    with pytest.raises(ValueError, match="like: nm is an array, but .* holds NMArray"):
        load(tree | {"nm": _w(8, 8)})
    with pytest.raises(
        ValueError, match="like: nm has m 8, but .* holds 4. Pack it as"
    ):
        load(tree | {"nm": _packed(_w(8, 8), jp.NM(2, 8))})
    with pytest.raises(
        ValueError, match="like: step is an array, but .* a number, string"
    ):
        load(tree | {"step": jnp.ones(1)})


# Files that are damaged or hostile.


def _file(tmp_path, tree):
    path = tmp_path / "model.safetensors"
    jp.checkpoint.save_safetensors(path, tree, overwrite=True)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return path, json.loads(data[8 : 8 + length]), data[8 + length :]


def _write(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _refused(path, message):
    with pytest.raises(ValueError, match=message) as e:
        jp.checkpoint.load_safetensors(path)
    assert str(e.value).startswith(f"path: in {path}, ") and "expected" in str(e.value)


def test_every_truncation_and_every_flipped_bit_is_refused(tmp_path):
    path, *_ = _file(tmp_path, {"w": _w(3, 4), "m": jp.masks.pack(_w(3, 5) > 0)})
    data = path.read_bytes()
    for n in range(len(data)):
        path.write_bytes(data[:n])
        _refused(path, "expected")
    same = 0
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
        try:
            found = jp.checkpoint.load_safetensors(path)
            same += 1
        except ValueError as e:
            assert str(e).startswith("path: in ")
            continue
        _equal(found, {"w": _w(3, 4), "m": jp.masks.pack(_w(3, 5) > 0)})
    assert same < 16  # the format, which is for others, and spaces


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F33"}, "'w' has the type 'F33'; expected one of BOOL"),
        ({"shape": [4, 3]}, "'w' has the checksum"),
        ({"shape": [3, 5]}, r"'w' lies at \[8, 56\]; expected 60 bytes, for F32"),
        ({"shape": [3, -4]}, r"'w' has the shape \[3, -4\]"),
        ({"shape": [3.0, 4]}, "'w' has the shape"),
        ({"shape": [True, 12]}, "'w' has the shape"),
        ({"shape": [1 << 40, 1 << 40, 0]}, "'w' has the shape"),
        ({"shape": [1] * 40}, "'w' has the shape"),
        ({"shape": [10**12, 10**6]}, "'w' lies at .*4,000,000,000,000,000,000 bytes"),
        (
            {"data_offsets": [4, 52]},
            "the bytes of 'w' begin at 4, and those before end at 8",
        ),
        ({"data_offsets": [8, 56, 0]}, "'w' lies at"),
        ({"data_offsets": None}, "'w' lies at None; expected 48 bytes"),
        ({"more": 1}, "'w' is no object with dtype, shape and data_offsets"),
    ],
    ids=str,
)
def test_headers_that_lie(tmp_path, change, message):
    path, header, data = _file(tmp_path, {"v": _w(2), "w": _w(3, 4)})
    header["w"] |= change
    _write(path, header, data)
    _refused(path, message)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "there is no '{' where one should be"),
        (b"[]", "there is no '{'"),
        (b"{} {}", "there is more after its end"),
        (b'{"a": 1', "what is said of 'a' does not end"),
        (b'{"a": [}', "the header, at 'a', cannot be read"),
        (b'{"a": {"dtype": NaN}}', "NaN is no JSON"),
        (b'{"a": {"dtype": 1, "dtype": 1}}', "'dtype' stands there twice"),
        (b'{"a": ' + b"[" * 3000 + b"{}", "cannot be read"),
        (b'{"a": {"x": "' + b"a" * 5000 + b'"}}', "what is said of 'a' does not end"),
        (b'{"__metadata__": {"a": 1}}', "something else where a string should be"),
        (b'{"__metadata__": {"a": "", "a": ""}}', "'a' stands twice in __metadata__"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "'__metadata__' stands there twice"),
        (b'{"\xff": {}}', "the header, at character 1, cannot be read .'utf-8'"),
        (b'{"\x00": {}}', "the header, at character 1, cannot be read .Invalid control"),
        (b'{"a\\\\\\": {}}', "the header is damaged at .*a string does not end"),
    ],
    ids=str,
)  # fmt: skip
def test_headers_that_are_none(tmp_path, header, message):
    path = tmp_path / "x.safetensors"
    _write(path, header, b"")
    _refused(path, message)


def test_a_long_header_takes_no_more_than_its_bytes(tmp_path):
    """A flipped bit of the length makes a header of the weights; they are no string."""
    path, *_ = _file(tmp_path, {"w": np.full(1 << 20, 0x41F09F98, np.uint32)})
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", len(data) - 8) + data[8:])
    tracemalloc.start()
    try:
        _refused(path, "the header is damaged")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.1 * len(data)


def test_names_and_sizes_that_do_not_fit(tmp_path):
    path, header, data = _file(tmp_path, {"w": _w(3, 4), "v": _w(2)})
    text = json.dumps(header).replace('"v"', '"w"').encode()
    _write(path, text, data)
    _refused(path, "'w' stands there twice")
    _write(path, header, data + b"\0")
    _refused(path, r"bytes, and its header accounts for [\d,]+; expected the same")
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    _refused(path, "the header has 1,152,921,504,606,846,976 bytes, and the file 10;")
    path.write_bytes(b"abc")
    _refused(path, "there are 3 bytes; expected 8 or more, a safetensors file")
    bools, header, data = _file(tmp_path, {"m": jnp.array([True, False])})
    _write(bools, header, b"\2\0")
    _refused(bools, "m has bytes above 1; expected 0 and 1")


def _deceive(tmp_path, tree, change, data=None):
    """A file whose metadata were changed and given a checksum that fits."""
    path, header, raw = _file(tmp_path, tree)
    said = json.loads(header["__metadata__"]["jaxprune"])
    change(said)
    text = json.dumps(said)
    header["__metadata__"]["jaxprune"] = text
    header["__metadata__"]["jaxprune.crc32"] = f"{zlib.crc32(text.encode()):08x}"
    _write(path, header, raw if data is None else data)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(version=2), "have version 2; expected 1. Read it with"),
        (lambda x: x.pop("crc32"), "the metadata have no crc32"),
        (lambda x: x["crc32"].pop("w"), "the checksums are not those of the tensors"),
        (lambda x: x["crc32"].update(w=5), "the checksums are not those of the tensors"),
        (lambda x: x["crc32"].update(w="00000000"), "files of several saves"),
        (lambda x: x.update(file=[1, 2]), r"there are the files \[\[1, 2\]\]"),
        (lambda x: x["leaves"].update(w={"kind": "value", "value": 1}), "something else"),
        (lambda x: x["leaves"].update(v={"kind": "exec"}), "'v' is of the kind 'exec'"),
        (lambda x: x["leaves"].update(v={"kind": "value"}), "the value of 'v' is none"),
        (lambda x: x["leaves"].update(v={"kind": "NMArray"}), "there is no v.codes, v.values"),
        (lambda x: x["dtypes"].update(w={"dtype": "int4", "shape": [1]}), "'w' is said to be"),
        (lambda x: x["containers"].update(w="list"), "'w', which is a leaf"),
        (lambda x: x["containers"].update({"": "list"}), "the tree, a list, has other keys"),
        (lambda x: x["containers"].update({"": "set"}), "the tree is a 'set'; expected one"),
        (lambda x: x["containers"].update({"": []}), r"the container '' is \[\]"),
        (lambda x: x["containers"].update({"a/" * 200: "list"}), "200 containers within|201"),
    ],
)  # fmt: skip
def test_metadata_that_lie(tmp_path, change, message):
    _refused(_deceive(tmp_path, {"w": _w(3, 4)}, change), message)


def test_metadata_that_are_damaged(tmp_path):
    path, header, data = _file(tmp_path, {"w": _w(3, 4)})
    said = header["__metadata__"]
    for new, message in (
        ({"jaxprune": said["jaxprune"] + " "}, "the metadata have the checksum"),
        ({"jaxprune": None}, "a part of the metadata is missing"),
        ({"jaxprune.crc32": None}, "a part of the metadata is missing"),
    ):
        left = {k: v for k, v in (said | new).items() if v is not None}
        _write(path, header | {"__metadata__": left}, data)
        _refused(path, message)
    deep = "[" * 100_000
    crc = f"{zlib.crc32(deep.encode()):08x}"
    metadata = {"jaxprune": deep, "jaxprune.crc32": crc}
    _write(path, header | {"__metadata__": metadata}, data)
    _refused(path, "the metadata cannot be read")


_LAYOUT = {"shape": [8, 8], "axes": [-2], "out_axes": [-1], "parts": None}


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("bitmap", {"layout": _LAYOUT | {"shape": [8, 9]}}, r"expected uint32\[1, 9\]"),
        ("bitmap", {"layout": _LAYOUT | {"shape": [7, 8]}}, "set beyond the 7 rows"),
        ("bitmap", {"layout": _LAYOUT | {"shape": [1 << 40, 1 << 40]}}, "fewer weights"),
        ("bitmap", {"layout": _LAYOUT | {"axes": [-1]}}, "expected each axis of"),
        ("bitmap", {"layout": 5}, "layout is 5; expected shape, axes, out_axes"),
        ("bitmap", {"more": 5}, r"it has \['layout', 'more'\]; expected layout of it"),
        ("blocks", {"layout": _LAYOUT | {"shape": [4, 8]}}, "do not go column by column"),
        ("nm", {"n": 5}, "5 of every 4 are kept; expected fewer"),
        ("nm", {"n": 1}, r"values is float32\[4, 8\]; expected any type\[2, 8\]"),
        ("nm", {"m": 0}, "n, m and stride is .*; expected integers from 1 on"),
        ("nm", {"stride": 1 << 70}, "n, m and stride is"),
        ("nm", {"coding": "words"}, "has codes in words; expected other ones"),
        ("nm", {"coding": "zip"}, "coding is 'zip'; expected bitmap, places or words"),
        ("mask", {"axis": 2}, r"axis is 2; expected an axis of \[8, 8\]"),
        ("mask", {"shape": [16, 8]}, r"bits is uint8\[1, 8\]; expected uint8\[2, 8\]"),
        ("mask", {"shape": [3, 8]}, "bits are set beyond the length 3"),
        ("mask", {"axis": None}, r"expected bool\[8, 8\]"),
    ],
)  # fmt: skip
def test_geometry_that_does_not_fit(tmp_path, leaf, change, message):
    w = _w(8, 8)
    tree = {
        "bitmap": jp.formats.pack(w, w < 9, jp.Unstructured()),
        "blocks": _packed(w, jp.Block(2, 2)),
        "nm": _packed(w, jp.NM(2, 4)),
        "mask": jp.masks.pack(w < 9),
    }
    path = _deceive(tmp_path, tree, lambda x: x["leaves"][leaf].update(change))
    _refused(path, f"'{leaf}' is no sound .*{message}")


@pytest.mark.parametrize(
    ("leaf", "field", "place", "value", "message"),
    [
        ("bitmap", "bits", 0, 0xFFFFFFFF, "starts are not|bits are set beyond"),
        ("bitmap", "starts", 0, 1, "starts are not what the bits"),
        ("bitmap", "values", None, None, "bits are set, and there are 3 values"),
        ("blocks", "rows", 0, 99, "column by column|one past the last|by_row"),
        ("blocks", "rows", 0, -1, "do not go column by column"),
        ("blocks", "columns", 1, 99, "do not go column by column"),
        ("blocks", "by_row", 0, 7, "by_row is not the order of the blocks"),
        ("nm", "codes", 0, 0xFF, "a group has not 2 of its 4 bits"),
        ("places", "codes", 0, 0xFF, "the places of a group are not rising"),
        ("mask", "bits", 0, 0xFF, "bits are set beyond the length 3"),
    ],
)
def test_places_that_do_not_fit(
    tmp_path, monkeypatch, leaf, field, place, value, message
):
    tree = {
        "bitmap": _packed(_w(40, 8), jp.Unstructured()),
        "blocks": _packed(_w(8, 8), jp.Block(2, 2)),
        "nm": _packed(_w(8, 8), jp.NM(2, 4)),
        "places": _packed(_w(64, 8), jp.NM(2, 16)),
        "mask": jp.masks.pack(_w(3, 11) > 0),
    }
    x = getattr(tree[leaf], field)
    new = x[:3] if place is None else np.array(x)
    if place is not None:
        new.reshape(-1)[place] = value
    tree[leaf] = dataclasses.replace(tree[leaf], **{field: new})
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=f"tree: {leaf} is no sound .*({message})"):
        jp.checkpoint.save_safetensors(path, tree)
    monkeypatch.setattr(_save_safetensors, "_check_packed", lambda *_: None)
    jp.checkpoint.save_safetensors(path, tree)
    with pytest.raises(ValueError, match=f"'{leaf}' is no sound .*({message})"):
        jp.checkpoint.load_safetensors(path)
    with pytest.raises(ValueError, match=f"'{leaf}' is no sound .*({message})"):
        jp.checkpoint.load_safetensors(path, like=jax.tree.map(jnp.asarray, tree))


def test_no_pickle_is_read(tmp_path):
    load = jp.checkpoint.load_safetensors
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"PK\3\4" + bytes(100))
    renamed = tmp_path / "x.safetensors"
    for start in (b"PK\3\4", b"\x80\2", b"\x80\4"):
        renamed.write_bytes(start + bytes(100))
        _refused(
            renamed, "there is a pickle, .*never read.*safetensors.torch.save_file"
        )
    renamed.unlink()
    for there in (path, tmp_path):
        with pytest.raises(ValueError, match="there is a pickle"):
            load(there)


def test_files_that_are_not_there(tmp_path):
    load = jp.checkpoint.load_safetensors
    with pytest.raises(FileNotFoundError, match="path: there is no file .*/x"):
        load(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"holds \(none\); expected model"):
        load(tmp_path)
    for name in "ab":
        jp.checkpoint.save_safetensors(tmp_path / f"{name}.safetensors", {"a": _w(1)})
    with pytest.raises(FileNotFoundError, match="holds a.safetensors, b.safetensors"):
        load(tmp_path)
