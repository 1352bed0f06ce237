"""The novels inside a Debian package, and the windows that they are cut into."""

import io
import lzma
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
import tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from smollm2 import text


def _rdb(novels: list[list[str]], version: int) -> bytes:
    """Vectors of strings as R writes them: big-endian, each compressed by itself."""
    data = b""
    for lines in novels:
        made = b"X\n" + struct.pack(">iii", version, 0x40203, 0x20300)
        if version == 3:
            made += struct.pack(">i", 5) + b"UTF-8"
        made += struct.pack(">ii", 16, len(lines))
        for line in lines:
            made += struct.pack(">ii", 0x40009, len(line.encode())) + line.encode()
        data += struct.pack(">i", len(made)) + zlib.compress(made)
    return data


def _deb(path: Path, novels: list[list[str]], version: int = 3) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        name = "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
        data = _rdb(novels, version)
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": b""}
    parts["data.tar.xz"] = lzma.compress(inner.getvalue())
    whole = b"!<arch>\n"
    for name, data in parts.items():
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n"
        whole += head.encode() + data + b"\n" * (len(data) % 2)
    path.write_bytes(whole)


NOVELS = [["EMMA", "", "naïve"], ["PERSUASION", "the end"]]


@pytest.mark.parametrize("version", [2, 3])
def test_novels(tmp_path, version):
    _deb(tmp_path / text.DEB, NOVELS, version)
    assert text.novel(tmp_path, "Emma") == "EMMA\n\nnaïve"
    assert text.novel(tmp_path, "persuasion") == "PERSUASION\nthe end"
    with pytest.raises(ValueError, match="title: got 'Ulysses'; there are emma, pers"):
        text.novel(tmp_path, "Ulysses")


def test_novels_that_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get download r-cran-janeaustenr"):
        text.novel(tmp_path, "Emma")
    (tmp_path / text.DEB).write_bytes(b"!<arch>\n")
    with pytest.raises(ValueError, match="not a Debian package: it has no data.tar"):
        text.novel(tmp_path, "Emma")


def test_windows(tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz"
    numbers = {letter: i for i, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(numbers, []))
    found = text.encode(tokenizer, letters, count=3, length=4)
    assert found.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]]
    with pytest.raises(ValueError, match="26 tokens; 7 windows of 4 need 28"):
        text.encode(tokenizer, letters, count=7, length=4)

    wanted = text.Windows("Emma", 3, 4, text.digest(found))
    text.check(found, wanted)
    with pytest.raises(ValueError, match=f"Emma: 3 windows.*; want.*{wanted.digest}"):
        text.check(found + 1, wanted)
    with pytest.raises(ValueError, match="want 2 of 4"):
        text.check(found, wanted._replace(pieces=2))

    _deb(tmp_path / text.DEB, [["emma", letters]])
    with pytest.raises(ValueError, match="Text or tokenizer are others"):
        text.read(tmp_path, tokenizer, wanted)  # the title is part of the novel
    whole = text.encode(tokenizer, "emma" + letters, count=3, length=4)
    named = wanted._replace(digest=text.digest(whole))
    assert text.read(tmp_path, tokenizer, named).tolist() == whole.tolist()
