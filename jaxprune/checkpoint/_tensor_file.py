"""One safetensors file: a small JSON header, and behind it the bytes of the tensors.

The format is read and written here, not by the package of the same name, which holds the
whole file in memory to write it, has no place for a checksum that is known only when a
tensor has gone by, and knows fewer types in NumPy.

References:
  https://github.com/huggingface/safetensors, section Format of the README.
"""

import json
import math
import mmap
import os
import pathlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

# By the names that the format has for them. Its types of 4 and 6 bits are not among them.
DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_, "C64": np.complex64,
        "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64,
        "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
        "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
        "F8_E4M3FNUZ": jnp.float8_e4m3fnuz, "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
        "F8_E8M0": jnp.float8_e8m0fnu,
        "F16": np.float16, "BF16": jnp.bfloat16, "F32": np.float32, "F64": np.float64,
    }.items()
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER = 100_000_000  # bytes of a header, a limit of the format

_METADATA = "__metadata__"
_CHUNK = 1 << 22  # bytes that are read, written and summed at a time
_MOST_ENTRY = 4096  # characters of what stands for one tensor
_MOST_AXES = 32
_MOST_SIZE = 1 << 62
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")  # their starts
_SPACE = re.compile(rb"[ \t\n\r]*")


class Tensor(NamedTuple):
    """What a header says of a tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # from the end of the header on
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class TensorFile:
    """A file that is open for reading; its header is checked, and its tensors fill it."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._file = open(path, "rb")
        self._map: mmap.mmap | None = None
        try:
            self._start, self.tensors, self.metadata = _read_header(self._file, path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def read(self, name: str) -> tuple[np.ndarray, int]:
        """A tensor, and the checksum of its type, shape and bytes."""
        tensor = self.tensors[name]
        raw = np.empty(tensor.nbytes, np.uint8)
        total, at = checksum_of(tensor), 0
        for chunk in self._chunks(name, raw):
            total, at = zlib.crc32(chunk, total), at + len(chunk)
        return raw.view(tensor.dtype).reshape(tensor.shape), total

    def checksum(self, name: str) -> int:
        """The checksum that `read` gives, without keeping the tensor."""
        total = checksum_of(self.tensors[name])
        for chunk in self._chunks(name, None):
            total = zlib.crc32(chunk, total)
        return total

    def view(self, name: str) -> np.ndarray:
        """A tensor as it lies in the file; what is taken of it is read then."""
        tensor = self.tensors[name]
        if not tensor.nbytes:
            return np.empty(tensor.shape, tensor.dtype)
        if self._map is None:  # closed with the last array that looks at it
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        start = self._start + tensor.begin
        return np.ndarray(tensor.shape, tensor.dtype, self._map, start)

    def _chunks(self, name: str, into: np.ndarray | None) -> Iterator[memoryview]:
        tensor, done = self.tensors[name], 0
        whole = np.empty(min(_CHUNK, tensor.nbytes), np.uint8).data
        self._file.seek(self._start + tensor.begin)
        while done < tensor.nbytes:
            size = min(_CHUNK, tensor.nbytes - done)
            part = whole[:size] if into is None else into.data[done:][:size]
            if self._file.readinto(part) != size:
                refuse(self.path, f"it ended within {name}", "a file that nobody cuts")
            if tensor.dtype == np.bool_ and np.frombuffer(part, np.uint8).max() > 1:
                refuse(self.path, f"{name} has bytes above 1", "0 and 1 for a BOOL")
            yield part
            done += size


def write(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    fetch: Callable[[str], np.ndarray],
    room: int,
) -> dict[str, int]:
    """Writes the tensors behind `room` bytes for a header; gives their checksums."""
    sums = {}
    file.seek(8 + room)
    for name, tensor in tensors.items():
        sums[name] = _append(file, tensor, fetch(name))  # and let go of it
    return sums


def _append(file: BinaryIO, tensor: Tensor, x: np.ndarray) -> int:
    raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8).data
    total = checksum_of(tensor)
    for at in range(0, tensor.nbytes, _CHUNK):
        chunk = raw[at : at + _CHUNK]
        total = zlib.crc32(chunk, total)
        file.write(chunk)
    return total


def write_header(file: BinaryIO, header: bytes) -> None:
    """Writes what `header` gave in front of the tensors, and all of it to the disk."""
    file.seek(0)
    file.write(struct.pack("<Q", len(header)) + header)
    file.flush()
    os.fsync(file.fileno())


def header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The header, with spaces up to a multiple of 8 bytes."""
    named: dict[str, Any] = {_METADATA: dict(metadata)}
    for name, x in tensors.items():
        named[name] = {
            "dtype": NAMES[x.dtype],
            "shape": x.shape,
            "data_offsets": (x.begin, x.end),
        }
    text = json.dumps(named, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def placed(
    tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]],
) -> dict[str, Tensor]:
    """Tensors one behind the other: first those of wide types, so that all are aligned."""
    found, at = {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda x: (-x[1].itemsize, x[0])):
        end = at + math.prod(shape) * dtype.itemsize
        found[name] = Tensor(dtype, shape, at, end)
        at = end
    return found


def checksum_of(tensor: Tensor) -> int:
    """Where the checksum of a tensor begins: with its type and shape."""
    shape = ",".join(map(str, tensor.shape))
    return zlib.crc32(f"{NAMES[tensor.dtype]}[{shape}]".encode())


def refuse(path: pathlib.Path, came: str, wanted: str, fix: str = "") -> NoReturn:
    """Raises `ValueError`."""
    fix = fix or "Copy or download the file again, or save it anew."
    raise ValueError(f"path: in {path}, {came}; expected {wanted}. {fix}")


def loads(path: pathlib.Path, text: str | bytes, what: str) -> Any:
    """JSON without names that stand twice, and without NaN."""
    try:
        text = text if isinstance(text, str) else text.decode()
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        refuse(path, f"{what} cannot be read ({_short(e)})", "JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(x for x in names if names.count(x) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _short(e: BaseException) -> str:
    return str(e)[:200] or type(e).__name__


def _read_header(
    file: BinaryIO, path: pathlib.Path
) -> tuple[int, dict[str, Tensor], dict[str, str]]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if len(start) < 8:
        refuse(path, f"there are {size} bytes", "8 or more, a safetensors file")
    (length,) = struct.unpack("<Q", start)
    if length > min(size - 8, MOST_HEADER):
        if start[:2] in _PICKLES:
            refuse_pickle(path)
        refuse(
            path,
            f"the header has {length:,} bytes, and the file {size:,}",
            f"a header within the file, and {MOST_HEADER:,} bytes at most: a safetensors "
            "file that is whole",
        )
    tensors, metadata = _Parser(path, file.read(length)).parse()
    at = 0
    for name, x in sorted(tensors.items(), key=lambda x: (x[1].begin, x[1].end)):
        if x.begin != at:
            refuse(
                path,
                f"the bytes of {name!r} begin at {x.begin:,}, and those before end at {at:,}",
                "tensors that follow each other without holes and overlaps",
            )
        at = x.end
    if 8 + length + at != size:
        refuse(
            path,
            f"the file has {size:,} bytes, and its header accounts for {8 + length + at:,}",
            "the same",
        )
    return 8 + length, tensors, metadata


class _Parser:
    """Reads a header entry by entry, as bytes: as a string it could be four times as long."""

    def __init__(self, path: pathlib.Path, text: bytes):
        self._path, self._text, self._at = path, text, 0

    def parse(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors: dict[str, Tensor] = {}
        metadata: dict[str, str] | None = None
        for name in self._members():
            if name in tensors or (name == _METADATA and metadata is not None):
                self._refuse(f"{name!r} stands there twice")
            if name == _METADATA:
                metadata = {}
                for key in self._members():
                    if key in metadata:
                        self._refuse(f"{key!r} stands twice in {_METADATA}")
                    metadata[key] = self._string()
            else:
                tensors[name] = self._tensor(name)
        self._skip()
        if self._at < len(self._text):
            self._refuse("there is more after its end")
        return tensors, metadata or {}

    def _members(self) -> Iterator[str]:
        """The names in an object; the caller reads what stands after each of them."""
        self._take(b"{")
        if self._next() == b"}":
            self._at += 1
            return
        while True:
            name = self._string()
            self._take(b":")
            yield name
            if self._next() == b"}":
                self._at += 1
                return
            self._take(b",")

    def _tensor(self, name: str) -> Tensor:
        start = self._at
        end = self._text.find(b"}", start, start + _MOST_ENTRY) + 1
        if not end:
            self._refuse(f"what is said of {name!r} does not end")
        said = loads(self._path, self._text[start:end], f"the header, at {name!r},")
        self._at = end
        keys = {"dtype", "shape", "data_offsets"}
        if not isinstance(said, dict) or said.keys() != keys:
            self._refuse(f"{name!r} is no object with dtype, shape and data_offsets")
        dtype, shape, offsets = (said[x] for x in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in DTYPES:
            refuse(
                self._path,
                f"{name!r} has the type {str(dtype)[:40]!r}",
                f"one of {', '.join(DTYPES)}",
                "Convert it with the library that wrote it.",
            )
        found = sizes(shape)
        if found is None:
            self._refuse(f"{name!r} has the shape {str(shape)[:80]}")
        bounds = sizes(offsets)
        wanted = math.prod(found) * DTYPES[dtype].itemsize
        if bounds is None or len(bounds) != 2 or bounds[1] - bounds[0] != wanted:
            refuse(
                self._path,
                f"{name!r} lies at {str(offsets)[:80]}",
                f"{wanted:,} bytes, for {dtype} of the shape {list(found)}",
            )
        return Tensor(DTYPES[dtype], found, *bounds)

    def _string(self) -> str:
        if self._next() != b'"':
            self._refuse("there is something else where a string should be")
        start = self._at
        while True:
            end = self._text.find(b'"', self._at + 1)
            if end < 0:
                self._refuse("a string does not end")
            self._at = end
            before = end
            while self._text[before - 1] == 0x5C:  # a backslash
                before -= 1
            if (end - before) % 2 == 0:
                break
        self._at += 1
        token = self._text[start : self._at]
        found = loads(self._path, token, f"the header, at character {start:,},")
        if not isinstance(found, str):
            self._refuse("there is something else where a string should be")
        return found

    def _take(self, wanted: bytes) -> None:
        if self._next() != wanted:
            self._refuse(f"there is no {wanted.decode()!r} where one should be")
        self._at += 1
        self._skip()

    def _next(self) -> bytes:
        self._skip()
        return self._text[self._at : self._at + 1]

    def _skip(self) -> None:
        found = _SPACE.match(self._text, self._at)
        self._at = found.end() if found else self._at

    def _refuse(self, came: str) -> NoReturn:
        came = f"the header is damaged at character {self._at:,}: {came}"
        refuse(self._path, came, "one as the format of safetensors says")


def sizes(x: Any) -> tuple[int, ...] | None:
    """A list of sizes or offsets, or `None` if it is none that an array could have."""
    if not isinstance(x, list) or len(x) > _MOST_AXES:
        return None
    if not all(type(n) is int and n >= 0 for n in x):
        return None
    return tuple(x) if math.prod(n or 1 for n in x) < _MOST_SIZE else None


def refuse_pickle(path: pathlib.Path) -> NoReturn:
    """Raises `ValueError`."""
    refuse(
        path,
        "there is a pickle, or an archive of one",
        "a safetensors file",
        "Pickles can run code and are never read. Take the safetensors file of the same "
        "model, or convert it where you trust it, with safetensors.torch.save_file.",
    )
