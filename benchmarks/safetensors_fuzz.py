"""Damages safetensors files in every way and looks at what `load_safetensors` makes of them.

Run `python benchmarks/safetensors_fuzz.py`: half of the files are damaged by choices of
hypothesis, the other half by random ones. Of a file that was damaged by accident, an error
or an equal tree must come; of one that is made to deceive, with checksums that fit, an
error or a tree that is sound. No case may crash, take long or take much memory: the address
space has a limit of its own, and the allocations of Python and NumPy are counted.
"""

import argparse
import collections
import json
import math
import pathlib
import platform
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import jaxprune as jp

INDEX = "model.safetensors.index.json"
SECONDS = 20  # that no case may take
ROOM = 1 << 29  # bytes of address space above what is taken before the first case
# Bytes beyond twice the size of the honest files: objects of Python that do not grow.
SLACK = 1 << 16


class Case(NamedTuple):
    """Files that are sound, and what is in them."""

    name: str
    folder: pathlib.Path
    tree: Any
    separator: str | None = None

    @property
    def size(self) -> int:
        return sum(x.stat().st_size for x in self.folder.iterdir())


def cases(folder: pathlib.Path) -> list[Case]:
    """One file of arrays, one of packed weights, several with an index, and a foreign one."""
    dense, packed = dense_tree(), packed_tree()
    found = []
    for name, tree, kw in (
        ("dense", dense, {}),
        ("packed", packed, {}),
        ("several files", {"a": dense, "b": packed}, {"shard_bytes": 60_000}),
    ):
        path = folder / name
        if not kw:
            path.mkdir()
        jp.checkpoint.save_safetensors(
            path if kw else path / "model.safetensors", tree, **kw
        )
        found.append(Case(name, path, tree))
    shutil.copytree(folder / "dense", folder / "foreign")
    path = folder / "foreign" / "model.safetensors"
    header, data = split(path.read_bytes())
    del header["__metadata__"]
    path.write_bytes(joined(header, data))
    tree = jp.checkpoint.load_safetensors(path, separator="/")
    found.append(Case("foreign", path.parent, tree, "/"))
    for case in found:  # sound as they are; and what JAX sets up once is set up
        tree = jp.checkpoint.load_safetensors(case.folder, separator=case.separator)
        if not equal(tree, case.tree):
            raise FuzzError(f"{case.name}: another tree without any damage")
    return found


def dense_tree() -> dict[str, Any]:
    random = np.random.default_rng(0)
    w = random.normal(size=(64, 96)).astype(np.float32)
    return {
        "layers": [
            {"kernel": jnp.asarray(w + i), "bias": jnp.ones(96)} for i in range(3)
        ],
        "half": jnp.asarray(w, jnp.bfloat16),
        "small": (jnp.asarray(w, jnp.float8_e4m3fn), jnp.asarray(w * 4, jnp.int8)),
        "narrow": jnp.asarray(w * 2, jnp.int4),
        "mask": jnp.asarray(w > 0),
        "wide": np.arange(40) << 40,
        "step": 7,
        "nothing": None,
        "empty": {"list": [], "dict": {}},
        "by number": {3: jnp.zeros((0, 4)), 11: jnp.float32(2)},
    }


def packed_tree() -> dict[str, Any]:
    w = jax.random.normal(jax.random.key(0), (2, 96, 64))
    half = w.astype(jnp.bfloat16)
    wide = jax.random.normal(jax.random.key(1), (512, 128), jnp.bfloat16)

    def packed(w, sparsity, structure):
        new, masks = jp.prune({"kernel": w}, sparsity, structure=structure)
        return jp.formats.pack(new["kernel"], masks["kernel"], structure)

    return {
        "bitmap": packed(w, 0.7, jp.Unstructured()),
        "blocks": packed(w, 0.75, jp.Block(16, 16)),
        "nm": packed(w, 0.5, jp.NM(2, 4)),
        "places": packed(half, 0.875, jp.NM(2, 16)),
        "words": packed(wide, 0.5, jp.NM(2, 4)),
        "mask": jp.masks.pack({"kernel": w > 0, "bias": None}),
    }


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class Chosen:
    """What is used of a `random.Random`, by choices that hypothesis can go back to."""

    def __init__(self, data: st.DataObject):
        self._draw = data.draw

    def randrange(self, n: int) -> int:
        """From 0 to `n - 1`."""
        return self._draw(st.integers(0, n - 1))

    def choice(self, options: Any) -> Any:
        """One of them."""
        return options[self.randrange(len(options))]

    def randbytes(self, count: int) -> bytes:
        """So many bytes."""
        return self._draw(st.binary(min_size=count, max_size=count))


# Damage. All choices are made by `r`, a `random.Random` or `Chosen`.


def truncate(data: bytes, r) -> bytes:
    return data[: _somewhere(data, r)]


def flip(data: bytes, r) -> bytes:
    found = bytearray(data)
    for _ in range(r.choice([1, 1, 1, 2, 8])):
        at = _somewhere(data, r)
        if at < len(found):
            found[at] ^= 1 << r.randrange(8)
    return bytes(found)


def zero(data: bytes, r) -> bytes:
    at, length = _somewhere(data, r), r.choice([1, 8, 100, 4096])
    return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]


def drop(data: bytes, r) -> bytes:
    at = _somewhere(data, r)
    return data[:at] + data[at + r.choice([1, 8, 100, 4096]) :]


def insert(data: bytes, r) -> bytes:
    at = _somewhere(data, r)
    return data[:at] + r.randbytes(r.choice([1, 8, 100])) + data[at:]


def splice(data: bytes, r) -> bytes:
    """A part of the file stands in another place too, or instead of what was there."""
    at, start, length = (
        _somewhere(data, r),
        _somewhere(data, r),
        r.choice([4, 64, 4096]),
    )
    part = data[start : start + length]
    return data[:at] + part + data[at + r.choice([0, len(part)]) :]


def length(data: bytes, r) -> bytes:
    """Another length of the header."""
    (now,) = struct.unpack("<Q", data[:8])
    bits = r.randrange(64)
    new = r.choice(
        [0, 1, now - 1, now + 1, now + 8, len(data), 1 << bits, (1 << 64) - 1]
    )
    return struct.pack("<Q", new) + data[8:]


def header(data: bytes, r) -> bytes:
    """JSON that reads well and says something else of the tensors."""
    said, rest = split(data)
    for _ in range(r.choice([1, 1, 2])):
        said = edited(said, r)
    return joined(said, rest)


def twice(data: bytes, r) -> bytes:
    """A name stands there twice."""
    said, rest = split(data)
    names = [json.dumps(x) + ": " + json.dumps(said[x]) for x in said]
    names.insert(r.randrange(len(names) + 1), r.choice(names))
    text = ("{" + ", ".join(names) + "}").encode()
    return struct.pack("<Q", len(text)) + text + rest


def deceive(data: bytes, r) -> bytes:
    """Other geometry, sizes or containers, with a checksum that fits."""
    said, rest = split(data)
    text = said["__metadata__"]["jaxprune"]
    text = json.dumps(edited(json.loads(text), r))
    said["__metadata__"] |= {
        "jaxprune": text,
        "jaxprune.crc32": f"{zlib.crc32(text.encode()):08x}",
    }
    return joined(said, rest)


def deceive_data(data: bytes, r) -> bytes:
    """Other numbers, with checksums that fit."""
    said, rest = split(data)
    names = [x for x, y in said.items() if "shape" in y and math.prod(y["shape"])]
    name = r.choice(names)
    begin, end = said[name]["data_offsets"]
    part = r.choice([flip, zero, splice])(rest[begin:end], r)
    part = (part + bytes(end - begin))[: end - begin]
    meta = json.loads(said["__metadata__"]["jaxprune"])
    shape = ",".join(map(str, said[name]["shape"]))
    start = zlib.crc32(f"{said[name]['dtype']}[{shape}]".encode())
    meta["crc32"][name] = f"{zlib.crc32(part, start):08x}"
    lines = "".join(f"{k} {v}\n" for k, v in sorted(meta["crc32"].items()))
    meta["together"] = f"{zlib.crc32(lines.encode()):08x}"
    text = json.dumps(meta)
    said["__metadata__"] |= {
        "jaxprune": text,
        "jaxprune.crc32": f"{zlib.crc32(text.encode()):08x}",
    }
    return joined(said, rest[:begin] + part + rest[end:])


ACCIDENTS = (truncate, flip, zero, drop, insert, splice, length, header, twice)
DECEITS = (deceive, deceive_data)

_JUNK = (
    None, True, -1, 0, 1, 2, 3, 4, 7, 16, 1 << 31, 1 << 63, 1 << 70, 1.5, 1e300, "",
    "F32", "F16", "I32", "U8", "BOOL", "F4", "list", "tuple", "dict", "places", "bitmap",
    "words", "PackedMask", "BitmapArray", "a/b/c", "__metadata__", [], {}, [0], [1 << 40],
    [-1, 5], [[[[]]]],
)  # fmt: skip


def edited(said: Any, r) -> Any:
    """JSON with another value, name or entry somewhere."""
    said = json.loads(json.dumps(said))
    places = list(_places(said))
    owner, key = r.choice(places)
    kind = r.randrange(6)
    if kind == 0:
        owner[key] = r.choice(_JUNK)
    elif kind == 1:
        del owner[key]
    elif kind == 2 and isinstance(owner, dict):
        owner[r.choice([f"{key}x", "", *map(str, list(owner)[:5])])] = owner.pop(key)
    elif kind == 3 and type(owner[key]) is int:
        owner[key] += r.choice([-4, -1, 1, 4, 8, 1 << 20])
    elif kind == 4:
        other, there = r.choice(places)
        owner[key], other[there] = json.loads(json.dumps([other[there], owner[key]]))
    elif isinstance(owner, dict):
        owner[f"{key}.more"] = owner[key]
    else:
        owner.insert(key, owner[key])
    return said


def _places(said: Any) -> Iterator[tuple[Any, Any]]:
    items = said.items() if isinstance(said, dict) else enumerate(said)
    for key, x in items:
        yield said, key
        if isinstance(x, dict | list):
            yield from _places(x)


def _somewhere(data: bytes, r) -> int:
    """A place: in the header as often as in what is behind it."""
    (head,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    head = min(8 + head, len(data))
    return r.randrange(head + 1) if r.randrange(2) else r.randrange(len(data) + 1)


def damaged(case: Case, folder: pathlib.Path, r) -> str:
    """A damaged copy in `folder`; the name of what was done."""
    files = sorted(case.folder.glob("*.safetensors"))
    whole = len(files) > 1
    if whole and r.randrange(3) == 0:
        return _mixed(case, files, folder, r)
    kinds = ACCIDENTS if whole or case.separator else (*ACCIDENTS, *DECEITS)
    change = r.choice(kinds)
    file = r.choice(files)
    for x in case.folder.iterdir():
        if x != file:
            _link(x, folder)
    (folder / file.name).write_bytes(change(file.read_bytes(), r))
    return change.__name__


def _mixed(case: Case, files: list[pathlib.Path], folder: pathlib.Path, r) -> str:
    """Files of a folder missing or in each other's place, or another index."""
    kind = r.choice(["index JSON", "index bytes", "file missing", "files swapped"])
    for x in case.folder.iterdir():
        _link(x, folder)
    index = folder / INDEX
    if kind == "index JSON":
        said = edited(json.loads(index.read_text()), r)
        index.unlink()
        index.write_text(json.dumps(said))
    elif kind == "index bytes":
        data = index.read_bytes()
        index.unlink()
        change = r.choice([truncate, flip, zero, drop, insert, splice])
        index.write_bytes(change(data, r))
    elif kind == "file missing":
        (folder / r.choice(files).name).unlink()
    else:
        one = r.randrange(len(files))
        other = (one + 1 + r.randrange(len(files) - 1)) % len(files)
        (folder / files[one].name).unlink()
        _link(files[other], folder, files[one].name)
    return kind


def _link(file: pathlib.Path, folder: pathlib.Path, name: str = "") -> None:
    (folder / (name or file.name)).hardlink_to(file)


# What comes of it.


class FuzzError(Exception):
    """A damaged file did what it must not."""


class Outcome(NamedTuple):
    """What came of a case, and what it took."""

    change: str
    result: str  # "error", "equal" or "sound"
    seconds: float
    peak: int  # bytes beyond what was there before


def attempt(case: Case, folder: pathlib.Path, r) -> Outcome:
    """Damages and loads; raises `FuzzError` if what comes is not allowed."""
    folder.mkdir()
    try:
        change = damaged(case, folder, r)
        start = time.perf_counter()
        result, tree, peak = _loaded(case, folder, change)
        seconds = time.perf_counter() - start
        most = 2 * case.size + SLACK
        if peak > most:  # a cache of JAX or hypothesis was filled, or it is the file
            peak = min(peak, _loaded(case, folder, change)[2])
        if result == "other":
            # Without checksums, and with checksums that fit, other numbers are possible.
            allowed = case.separator is not None or change in (
                "deceive",
                "deceive_data",
            )
            if not allowed:
                raise FuzzError(f"{case.name}: {change} gave another tree")
            unpacked(tree)
            result = "sound"
        if peak > most:
            raise FuzzError(
                f"{case.name}: {change} took {peak:,} bytes; {most:,} allowed"
            )
        return Outcome(change, result, seconds, peak)
    finally:
        shutil.rmtree(folder)


def _loaded(case: Case, folder: pathlib.Path, change: str) -> tuple[str, Any, int]:
    """What came, and the bytes that it took beyond what was there before."""
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    tree = None
    try:
        tree = jp.checkpoint.load_safetensors(folder, separator=case.separator)
        result = "equal" if equal(tree, case.tree) else "other"
    except (ValueError, FileNotFoundError) as e:
        if not str(e).startswith("path: "):
            raise FuzzError(f"{case.name}: {change} gave the message {e}") from e
        result = "error"
    return result, tree, tracemalloc.get_traced_memory()[1] - before


def equal(a: Any, b: Any) -> bool:
    """Same containers, types, shapes and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if not hasattr(x, "dtype"):
            if type(x) is not type(y) or x != y:
                return False
            continue
        if not hasattr(y, "dtype") or (x.dtype, x.shape) != (y.dtype, y.shape):
            return False
        if np.asarray(x).tobytes() != np.asarray(y).tobytes():
            return False
    return True


def unpacked(tree: Any) -> None:
    """Unpacks small weights, which would fail if their fields did not fit."""
    kinds = (jp.formats.BitmapArray, jp.formats.BlockSparseArray, jp.formats.NMArray)
    for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(x, kinds) and math.prod(x.shape) < 1 << 22:
            w = jp.formats.unpack(x)
            kept = int((np.asarray(w).view(f"u{w.dtype.itemsize}") != 0).sum())
            stored = np.asarray(x.values).view(f"u{x.dtype.itemsize}")
            # More weights than there are values would be values that stand twice.
            if w.shape != x.shape or kept > int((stored != 0).sum()):
                raise FuzzError(f"a {type(x).__name__} is not sound")


def limited(room: int = ROOM) -> None:
    """Lets this process take so many more bytes of address space, and no more."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + room
    resource.setrlimit(
        resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1])
    )


def _timed(case: Case, folder: pathlib.Path, r) -> Outcome:
    """As `attempt`; raises `FuzzError` where it hangs."""

    def stop(*_: Any) -> None:
        raise FuzzError(f"{case.name}: it took more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return attempt(case, folder, r)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run(count: int, seed: int, folder: pathlib.Path, note: Callable) -> None:
    """Random choices."""
    made = cases(folder)
    for i in range(count):
        case = made[i % len(made)]
        note(case, _timed(case, folder / "damaged", random.Random(f"{seed} {i}")))


def run_hypothesis(count: int, folder: pathlib.Path, note: Callable) -> None:
    """Choices of hypothesis, which goes back to what was interesting."""
    made = cases(folder)

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],  # the first failure ends the run
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.integers(0, len(made) - 1), st.data())
    def attempts(which, data):
        note(made[which], _timed(made[which], folder / "damaged", Chosen(data)))

    attempts()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results: dict[tuple[str, str], collections.Counter] = {}
    slowest, most = 0.0, collections.defaultdict(float)

    def note(case: Case, outcome: Outcome) -> None:
        nonlocal slowest
        row = results.setdefault((case.name, outcome.change), collections.Counter())
        row[outcome.result] += 1
        slowest = max(slowest, outcome.seconds)
        most[case.name] = max(most[case.name], outcome.peak / case.size)

    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for name in ("first", "random", "hypothesis"):
            (root / name).mkdir()
        run(8, args.seed, root / "first", lambda *_: None)  # what is set up once
        limited()
        tracemalloc.start()
        start = time.perf_counter()
        run(args.count // 2, args.seed, root / "random", note)
        run_hypothesis(args.count - args.count // 2, root / "hypothesis", note)
        seconds = time.perf_counter() - start
        sizes = {
            x: sum(f.stat().st_size for f in (root / "random" / x).iterdir())
            for x in most
        }
    total = sum((row for row in results.values()), collections.Counter())
    print(
        f"Python {platform.python_version()}, JAX {jax.__version__}, seed {args.seed}\n"
    )
    print(f"{total.total():,} files in {seconds:.0f} s: {total['error']:,} errors,")
    print(
        f"{total['equal']:,} equal trees, {total['sound']:,} other sound trees (from files"
    )
    print("without checksums, or with checksums that were made to fit).")
    print(f"The slowest took {slowest:.2f} s. No crash.\n")
    print("| files | bytes | most memory, of that |")
    print("|---|---|---|")
    for name, share in most.items():
        print(f"| {name} | {sizes[name]:,} | {share:.2f} x |")
    print("\n| files | damage | error | equal | sound |")
    print("|---|---|---|---|---|")
    for (name, change), row in sorted(results.items()):
        counts = " | ".join(str(row[x]) for x in ("error", "equal", "sound"))
        print(f"| {name} | {change} | {counts} |")


if __name__ == "__main__":
    main()
