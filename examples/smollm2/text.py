"""Novels of Jane Austen out of the Debian package r-cran-janeaustenr, cut into windows."""

import hashlib
import io
import pathlib
import struct
import tarfile
import zlib
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int

DEB = "r-cran-janeaustenr_1.0.0-1_all.deb"

_DATA = "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
_STRINGS, _STRING = 16, 9  # types of R objects: a vector of strings, and a string


class Windows(NamedTuple):
    """Which windows of a text, so that all numbers are of the same tokens."""

    title: str
    pieces: int
    length: int
    digest: str


def novel(data_dir: str | pathlib.Path, title: str) -> str:
    """One of the six novels, with the line breaks of the package.

    Args:
        data_dir: The folder that holds the package.
        title: As on the first line of the novel, in any case: `"Emma"`.

    Raises:
        FileNotFoundError: If the package is not there.
        ValueError: If it holds no novel of that title.
    """
    path = pathlib.Path(data_dir) / DEB
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing. On Debian or Ubuntu run, in {path.parent}: apt-get "
            "download r-cran-janeaustenr=1.0.0-1. Elsewhere copy the file from a mirror of "
            "Debian, pool/main/r/r-cran-janeaustenr."
        )
    found = {lines[0].lower(): "\n".join(lines) for lines in _vectors(_database(path))}
    if title.lower() not in found:
        raise ValueError(f"title: got {title!r}; there are {', '.join(sorted(found))}.")
    return found[title.lower()]


def encode(
    tokenizer: tokenizers.Tokenizer, text: str, *, count: int, length: int
) -> Int[np.ndarray, "count length"]:
    """Token ids of `count` windows, evenly spaced over the whole text.

    The text is cut into pieces of `length` tokens, of which some are taken, the first
    among them; what is left at the end is no piece.

    Raises:
        ValueError: If the text is too short.
    """
    ids = np.array(tokenizer.encode(text).ids, np.int32)
    pieces = ids[: len(ids) // length * length].reshape(-1, length)
    if len(pieces) < count:
        raise ValueError(
            f"text: it has {len(ids):,} tokens; {count} windows of {length} need "
            f"{count * length:,}. Take fewer windows, or shorter ones."
        )
    return pieces[np.arange(count) * len(pieces) // count]


def digest(windows: Int[np.ndarray, "count length"]) -> str:
    """The first 16 digits of the SHA-256 of the ids, as little-endian 32-bit integers."""
    return hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()[:16]


def check(windows: Int[np.ndarray, "count length"], wanted: Windows) -> None:
    """Raises `ValueError` unless these are the windows that numbers were made on."""
    found = digest(windows)
    if (*windows.shape, found) != wanted[1:]:
        raise ValueError(
            f"{wanted.title}: {windows.shape[0]} windows of {windows.shape[1]} tokens have "
            f"the digest {found}; want {wanted.pieces} of {wanted.length} with "
            f"{wanted.digest}. Text or tokenizer are others than perplexities were measured "
            "on: install the versions that the Makefile pins."
        )


def read(
    data_dir: str | pathlib.Path, tokenizer: tokenizers.Tokenizer, wanted: Windows
) -> Int[np.ndarray, "count length"]:
    """Windows of a novel, checked; raises what `novel`, `encode` and `check` raise."""
    found = novel(data_dir, wanted.title)
    windows = encode(tokenizer, found, count=wanted.pieces, length=wanted.length)
    check(windows, wanted)
    return windows


def _database(path: pathlib.Path) -> bytes:
    """The R database inside a Debian package: an archive of `ar`, and one of `tar`."""
    data = path.read_bytes()
    place = len(b"!<arch>\n")
    while place < len(data):
        name, size = data[place : place + 16], int(data[place + 48 : place + 58])
        place += 60
        if name.startswith(b"data.tar"):
            archive = io.BytesIO(data[place : place + size])
            with tarfile.open(fileobj=archive) as tar:
                return tar.extractfile(_DATA).read()
        place += size + size % 2
    raise ValueError(f"{path} is not a Debian package: it has no data.tar.")


def _vectors(database: bytes) -> list[list[str]]:
    """The vectors of strings: each is a length and a compressed R object."""
    found, place = [], 0
    while place < len(database):
        part = zlib.decompressobj()
        found.append(_strings(part.decompress(database[place + 4 :])))
        place = len(database) - len(part.unused_data)
    return found


def _strings(data: bytes) -> list[str]:
    """A vector of strings in R's binary format: header, type, and a length each."""
    place = 2 + 3 * 4  # the format, and versions
    if struct.unpack_from(">i", data, 2)[0] == 3:
        place += 4 + struct.unpack_from(">i", data, place)[0]  # an encoding
    kind, count = struct.unpack_from(">ii", data, place)
    place, found = place + 8, []
    for _ in range(count):
        each, length = struct.unpack_from(">ii", data, place)
        if kind & 255 != _STRINGS or each & 255 != _STRING:
            raise ValueError(
                "The database holds something else than vectors of strings."
            )
        found.append(data[place + 8 : place + 8 + length].decode())
        place += 8 + max(length, 0)  # -1 stands for a missing string
    return found
