"""Reads GGUF files, version 2 and 3, without llama.cpp.

A file is a header, key-value pairs, a table of tensors and, from a multiple of the
alignment on, their bytes. Of the types of tensors those that SmolLM2 uses are read: F32,
Q8_0 and Q4_1.
"""

import mmap
import pathlib
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

_MAGIC = b"GGUF"
_ALIGNMENT = 32
_BLOCK = 32  # weights that share a scale, neighbours along the input axis
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
    12: "d",
}  # fmt: skip


class File(NamedTuple):
    """What a file holds."""

    metadata: dict[str, Any]
    tensors: dict[str, Float[np.ndarray, "..."]]


def read(path: str | pathlib.Path) -> File:
    """All metadata, and all tensors as float32.

    A matrix is `[out, in]`: GGUF names the fastest axis first, and NumPy names it last.

    Raises:
        ValueError: If it is no GGUF file, of a version or with a type of tensors that is
            not known here, or cut off.
    """
    with open(path, "rb") as file:
        if file.read(4) != _MAGIC:
            raise ValueError(f"path: {path} is not a GGUF file; it has another start.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _File(data).read()
            except (struct.error, IndexError) as e:
                raise ValueError(
                    f"path: {path} ends too early, after {len(data):,} bytes. Install the "
                    "package that it came from again."
                ) from e


def dequantize_q4_1(data: bytes) -> Float[np.ndarray, "weights"]:
    """Blocks of a scale, a minimum (float16) and 32 numbers `q` from 0 to 15.

    The weight is `scale * q + minimum`; the lower halves of the 16 bytes are the first 16.
    """
    blocks = np.frombuffer(data, [("scale", "<f2"), ("least", "<f2"), ("q", "u1", 16)])
    q = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=-1)  # [blocks, 32]
    scale, least = (blocks[x].astype(np.float32)[:, None] for x in ("scale", "least"))
    return (scale * q + least).reshape(-1)


def dequantize_q8_0(data: bytes) -> Float[np.ndarray, "weights"]:
    """Blocks of a scale (float16) and 32 numbers from -128 to 127."""
    blocks = np.frombuffer(data, [("scale", "<f2"), ("q", "i1", _BLOCK)])
    return (blocks["scale"].astype(np.float32)[:, None] * blocks["q"]).reshape(-1)


class _Type(NamedTuple):
    name: str
    block: int  # weights of a block
    nbytes: int  # bytes of a block
    decode: Callable[[bytes], np.ndarray]


_TYPES = {
    0: _Type("F32", 1, 4, lambda data: np.frombuffer(data, "<f4").astype(np.float32)),
    3: _Type("Q4_1", _BLOCK, 20, dequantize_q4_1),
    8: _Type("Q8_0", _BLOCK, 34, dequantize_q8_0),
}


class _File:
    """A place in the bytes of a file, which moves on as values are read."""

    def __init__(self, data: mmap.mmap):
        self._data, self._place = data, len(_MAGIC)

    def read(self) -> File:
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(
                f"The file has version {version} of GGUF; 2 or 3 are read."
            )
        tensors, pairs = self._number("Q"), self._number("Q")
        metadata = {
            self._string(): self._value(self._number("I")) for _ in range(pairs)
        }
        table = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        start = -(-self._place // alignment) * alignment
        return File(
            metadata,
            {
                name: self._decode(name, start + at, shape, kind)
                for name, shape, kind, at in table
            },
        )

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self._string(), self._number("I")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _decode(self, name: str, start: int, shape: tuple[int, ...], kind: int):
        if kind not in _TYPES:
            known = ", ".join(f"{t.name} ({n})" for n, t in _TYPES.items())
            raise ValueError(f"{name} has type {kind} of GGML; {known} are read.")
        count, found = int(np.prod(shape)), _TYPES[kind]
        stop = start + count // found.block * found.nbytes
        if stop > len(self._data):
            raise IndexError(stop)
        return found.decode(self._data[start:stop]).reshape(shape)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, count = self._number("I"), self._number("Q")
            if kind in _NUMBERS:
                return list(self._numbers(f"{count}{_NUMBERS[kind]}"))
            return [self._value(kind) for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"A value of the metadata has type {kind}; 0 to 12 exist.")
        return self._number(_NUMBERS[kind])

    def _string(self) -> str:
        length = self._number("Q")
        found = self._data[self._place : self._place + length]
        if len(found) < length:
            raise IndexError(length)
        self._place += length
        return found.decode()

    def _number(self, code: str) -> Any:
        return self._numbers(code)[0]

    def _numbers(self, code: str) -> tuple:
        found = struct.unpack_from(f"<{code}", self._data, self._place)
        self._place += struct.calcsize(f"<{code}")
        return found
