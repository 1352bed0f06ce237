"""The files of a checkpoint: their lengths and checksums, and their final name."""

import concurrent.futures
import os
import pathlib
import re
import shutil
import stat
import zlib
from collections.abc import Iterable

_CHUNK = 1 << 22  # bytes read at a time
_OWNER = re.compile(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:/|$)")

Listing = dict[str, list[int]]  # name: length and CRC-32


def names(folder: pathlib.Path) -> list[str]:
    """The files below a folder.

    Raises:
      ValueError: if there is anything else, such as a link.
    """
    found = []
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = pathlib.Path(where, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"{path} is neither a file nor a folder")
            if stat.S_ISREG(mode):
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def owner(name: str, processes: int) -> int:
    """The process that has this file in its memory still, since it wrote it."""
    found = _OWNER.search(name)
    return int(found[1]) % processes if found else 0


def listing(folder: pathlib.Path, chosen: Iterable[str]) -> Listing:
    """Length and checksum of some files, read once."""

    def look(name: str) -> tuple[str, list[int]]:
        length = crc = 0
        with open(folder / name, "rb") as file:
            while block := file.read(_CHUNK):
                length, crc = length + len(block), zlib.crc32(block, crc)
        return name, [length, crc]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(look, chosen))


def check_lengths(folder: pathlib.Path, listed: Listing) -> None:
    """Raises `ValueError` unless the files are those listed, as long as they were."""
    found = set(names(folder))
    if missing := sorted(listed.keys() - found):
        raise ValueError(f"{folder / missing[0]} is missing")
    if extra := sorted(found - listed.keys()):
        raise ValueError(f"{folder / extra[0]} was not saved with it")
    for name, (length, _) in listed.items():
        if (size := (folder / name).stat().st_size) != length:
            raise ValueError(f"{folder / name} has {size} bytes, not {length}")


def check(folder: pathlib.Path, listed: Listing, chosen: Iterable[str]) -> None:
    """Raises `ValueError` unless the contents of some files are as they were."""
    for name, found in listing(folder, chosen).items():
        if found != listed[name]:
            raise ValueError(f"{folder / name} has other contents than were saved")


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file that is on the disk when this returns."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def publish(part: pathlib.Path, path: pathlib.Path, *, overwrite: bool) -> None:
    """Gives a finished folder its name."""
    old = path.with_name(path.name + ".replaced")
    if overwrite and path.exists():
        remove(old)
        path.rename(old)
    part.rename(path)
    _sync(path.parent)
    if overwrite:  # also what a process left that was killed here
        remove(old)


def others(path: pathlib.Path) -> list[str]:
    """What would be lost beside a checkpoint if `path` were replaced."""
    if not path.is_dir():
        return [path.name] if path.exists() else []
    inside = sorted(x.name for x in path.iterdir())
    if "manifest.json" not in inside:
        return inside
    own = re.compile(r"manifest\.json|process_\d+\.json|arrays")
    return [name for name in inside if not own.fullmatch(name)]


def remove(path: pathlib.Path) -> None:
    """Removes a folder or file, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: pathlib.Path) -> None:
    """Has the names in a folder written to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
