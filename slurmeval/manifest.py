"""What a pull decides, without any connection: listings, checksums, and which files may be written.

A pull compares three states of each file: what the cluster lists, what lies here, and what an
earlier pull wrote (the record in ``.pulled.json``). A file that differs from both others was
changed by the user, and is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

#: The record of earlier pulls, in the target directory: path -> [size, mtime in ns, sha256].
RECORD = ".pulled.json"
#: Where files arrive before they are verified, in the target directory.
INCOMING = ".incoming-"
_CHUNK = 1 << 20

Pulled = dict[str, tuple[int, int, str]]


class UnsafePath(ValueError):
    """A listed name that would be written outside its target directory."""


@dataclass(frozen=True)
class Entry:
    """One file of a remote listing.

    Attributes:
        path: POSIX path relative to the listed directory; undecodable bytes as surrogates.
        size: Bytes.
        sha256: Hex digest, or an empty string where the file could not be read.
    """

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Listing:
    """The regular files below a remote directory, and the symlinks, which are never followed."""

    files: list[Entry]
    symlinks: list[str]


@dataclass(frozen=True)
class Plan:
    """What a pull has to do: files to move, files that are here, and the user's own to keep."""

    move: list[Entry] = field(default_factory=list)
    unchanged: list[Entry] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)


def parse_listing(output: bytes) -> Listing:
    """Read ``kind size path`` records, an empty record, then ``sha256  path`` records.

    Records end in NUL, so that any file name survives.

    Raises:
        ValueError: The output is not such a listing.
    """
    stats, separator, sums = output.partition(b"\0\0") if output[:1] != b"\0" else (b"", b"\0", b"")
    if not separator:
        raise ValueError("the listing is cut short")
    digests = {}
    for record in filter(None, sums.split(b"\0")):
        digest, _, name = record.partition(b"  ")
        digests[_relative(name)] = digest.decode("ascii", "replace")
    files, symlinks = [], []
    for record in filter(None, stats.split(b"\0")):
        kind, size, name = record.split(b" ", 2)
        path = _relative(name)
        if kind == b"l":
            symlinks.append(path)
        else:
            files.append(Entry(path, int(size), digests.get(path, "")))
    return Listing(files, symlinks)


def _relative(name: bytes) -> str:
    return name.removeprefix(b"./").decode("utf-8", "surrogateescape")


def destination(root: Path, relative: str) -> Path:
    """Return where a listed file belongs below ``root``.

    Raises:
        UnsafePath: The name is absolute, climbs, is reserved, or leaves ``root`` by a symlink.
    """
    pure = PurePosixPath(relative)
    first = pure.parts[0] if pure.parts else ""
    if not first or pure.is_absolute() or ".." in pure.parts or "\0" in relative:
        raise UnsafePath(relative)
    if first == RECORD or first.startswith(INCOMING):
        raise UnsafePath(relative)
    path = root.joinpath(*pure.parts)
    if not path.parent.resolve().is_relative_to(root.resolve()):
        raise UnsafePath(relative)
    return path


def sha256(path: Path) -> str:
    """Return the hex digest of a local file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def compare(
    entries: Iterable[Entry], root: Path, pulled: Mapping[str, tuple[int, int, str]]
) -> Plan:
    """Sort the listed files into those to move, those already here, and the user's own.

    Raises:
        UnsafePath: A listed name would be written outside ``root``.
    """
    plan = Plan()
    for entry in entries:
        path = destination(root, entry.path)
        if not os.path.lexists(path):
            plan.move.append(entry)
            continue
        here = _local_digest(path, pulled.get(entry.path))
        if here == entry.sha256:
            plan.unchanged.append(entry)
        elif entry.path in pulled and here == pulled[entry.path][2]:
            plan.move.append(entry)
        else:
            plan.kept.append(entry)
    return plan


def _local_digest(path: Path, before: tuple[int, int, str] | None) -> str | None:
    """Return a regular file's digest, from the record while its stat is the same, else None."""
    if path.is_symlink() or not path.is_file():
        return None
    stat = path.stat()
    if before is not None and (stat.st_size, stat.st_mtime_ns) == tuple(before[:2]):
        return before[2]
    return sha256(path)


def read_record(root: Path) -> Pulled:
    """Return the record of earlier pulls; an unreadable one counts as none."""
    try:
        data = json.loads((root / RECORD).read_text(encoding="utf-8"))
        return {str(k): (int(v[0]), int(v[1]), str(v[2])) for k, v in data.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return {}


def write_record(root: Path, pulled: Mapping[str, tuple[int, int, str]]) -> None:
    """Write the record so that it appears whole or not at all."""
    write_atomic(root / RECORD, json.dumps(pulled, indent=0, sort_keys=True) + "\n")


def write_atomic(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a small text file through a temporary name; its mode is set before its content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    temporary.replace(path)
