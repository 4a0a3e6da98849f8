"""What a pull decides, without any connection: listings, checksums, and which files may be written.

A pull compares three states of each file: what the cluster lists, what lies here, and what an
earlier pull wrote (the record in ``.pulled.json``). Where size and time of both sides are those of
the record, nothing has changed and nothing is read. A file that is not as an earlier pull left it
was changed by the user, and is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

#: The record of earlier pulls, in the target directory: path -> the values of `Known`.
RECORD = ".pulled.json"
#: Where files arrive before they are verified, in the target directory.
INCOMING = ".incoming"
#: The job's own list of its results, beside them: {"files": {path: {"size": …, "sha256": …}}}.
RESULTS_MANIFEST = PurePosixPath("eval_results", "manifest.json")
#: A file changed so short before it was listed may change again without a new size or time.
_SETTLED_NS = 2_000_000_000
_CHUNK = 1 << 20


class Known(NamedTuple):
    """A file that was pulled: its size, its time there and here, and its checksum."""

    size: int
    remote_mtime_ns: int
    local_mtime_ns: int
    sha256: str


Pulled = dict[str, Known]
Stats = Mapping[str, os.stat_result | None]
#: Size, time and inode of a local file, to see whether it is still the same; None where none is.
Seen = tuple[int, int, int] | None


class UnsafePath(ValueError):
    """A listed name that would be written outside its target directory."""


class Entry(NamedTuple):
    """One file of a remote listing.

    Attributes:
        path: POSIX path relative to the listed directory; undecodable bytes as surrogates.
        size: Bytes.
        mtime_ns: When it was last written, in ns since the epoch.
    """

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Listing:
    """The files below a remote directory.

    Attributes:
        files: The regular ones.
        symlinks: Those that are links; they are never followed.
        time_ns: The other side's clock.
        complete: Whether every directory could be read to its end.
    """

    files: list[Entry]
    symlinks: list[str]
    time_ns: int
    complete: bool

    def known(self, entry: Entry, local_mtime_ns: int, digest: str) -> Known:
        """Return what to remember of a file; no time where the next one might be the same."""
        settled = entry.mtime_ns < self.time_ns - _SETTLED_NS
        return Known(entry.size, entry.mtime_ns if settled else -1, local_mtime_ns, digest)


@dataclass(frozen=True)
class Doubt:
    """A file here with the size of the listed one: only its checksum tells whether it differs."""

    entry: Entry
    sha256: str
    pristine: bool


@dataclass
class Plan:
    """What a pull has to do.

    Attributes:
        move: Files to bring.
        unchanged: Files that are here.
        kept: Files that the user has changed, or made.
        doubts: Files to compare by checksum.
        seen: What lies in the place of a file to bring.
    """

    move: list[Entry] = field(default_factory=list)
    unchanged: list[Entry] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    seen: dict[str, Seen] = field(default_factory=dict)

    def settle(self, doubt: Doubt, remote: str | None) -> bool:
        """Sort a doubtful file in by its remote checksum; return whether both are the same."""
        same = doubt.sha256 == remote
        if same:
            self.unchanged.append(doubt.entry)
        elif doubt.pristine:
            self.move.append(doubt.entry)
        else:
            self.kept.append(doubt.entry)
        return same


def parse_entry(record: bytes) -> tuple[bool, Entry]:
    """Read one ``kind size seconds path`` record; return whether it is a symlink, and the file.

    Raises:
        ValueError: The record is not such a one.
    """
    kind, size, seconds, name = record.split(b" ", 3)
    whole, _, fraction = seconds.partition(b".")
    if kind not in (b"f", b"l") or not size.isdigit() or len(size) > 18 or len(whole) > 12:
        raise ValueError(f"not an entry: {record[:80]!r}")
    mtime_ns = int(whole) * 10**9 + int((fraction[:9] or b"0").ljust(9, b"0"))
    path = name.removeprefix(b"./").decode("utf-8", "surrogateescape")
    return kind == b"l", Entry(path, int(size), mtime_ns)


class Root:
    """A local directory and the places below it; each folder is looked at once.

    Args:
        path: The directory; it exists.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._real = str(path), path.resolve()
        self._names: dict[str, frozenset[str]] = {}

    def path(self, relative: str) -> str:
        """Return the place of a file whose name `find` has taken."""
        return f"{self._path}/{relative}"

    def find(self, relative: str) -> tuple[str, bool]:
        """Return where a listed file belongs, and whether anything was there at the first look.

        Raises:
            UnsafePath: The name is absolute, climbs, is reserved, or leaves by a symlink.
        """
        parts = relative.split("/")
        if not {"", ".", ".."}.isdisjoint(parts) or "\0" in relative:
            raise UnsafePath(relative)
        if parts[0] == RECORD or parts[0].startswith(INCOMING):
            raise UnsafePath(relative)
        parent = "/".join([self._path, *parts[:-1]])
        if parent not in self._names:
            if not Path(parent).resolve().is_relative_to(self._real):
                raise UnsafePath(relative)
            self._names[parent] = _names(parent)
        return f"{parent}/{parts[-1]}", parts[-1] in self._names[parent]


def _names(folder: str) -> frozenset[str]:
    try:
        return frozenset(path.name for path in Path(folder).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def sha256(path: Path) -> str:
    """Return the hex digest of a local file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def seen(path: str) -> Seen:
    """Return what tells whether a local file is still the same."""
    found = _lstat(path)
    return found and (found.st_size, found.st_mtime_ns, found.st_ino)


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def stats(root: Path, paths: Iterable[str]) -> Stats:
    """Return what lies here of the files of a record, before their listing has come."""
    return {path: _lstat(f"{root}/{path}") for path in paths}


def compare(
    entries: Iterable[Entry],
    root: Root,
    pulled: Mapping[str, Known],
    *,
    cheap: int,
    here: Stats | None = None,
) -> Plan:
    """Sort the listed files into those to move, those already here, and the user's own.

    Args:
        entries: The files.
        root: Where they belong.
        pulled: What earlier pulls brought.
        cheap: Bytes below which a file that may have changed is moved without a question.
        here: What `stats` found, so that those files are not looked at again.

    Raises:
        UnsafePath: A listed name would be written outside ``root``.
    """
    plan, known = Plan(), here or {}
    for entry in entries:
        path, there = root.find(entry.path)
        before = pulled.get(entry.path)
        found = known[entry.path] if entry.path in known else _lstat(path) if there else None
        if found is None:
            plan.seen[entry.path] = None
            plan.move.append(entry)
            continue
        untouched = before is not None and (found.st_size, found.st_mtime_ns) == before[:3:2]
        if before and untouched and (entry.size, entry.mtime_ns) == before[:2]:
            plan.unchanged.append(entry)
            continue
        plan.seen[entry.path] = (found.st_size, found.st_mtime_ns, found.st_ino)
        if not stat.S_ISREG(found.st_mode):
            plan.kept.append(entry)
            continue
        digest = before.sha256 if before and untouched else sha256(Path(path))
        pristine = before is not None and digest == before.sha256
        if found.st_size == entry.size and not (pristine and entry.size < cheap):
            plan.doubts.append(Doubt(entry, digest, pristine))
        elif pristine:
            plan.move.append(entry)
        else:
            plan.kept.append(entry)
    return plan


def read_record(root: Path) -> Pulled:
    """Return the record of earlier pulls; an unreadable one counts as none."""
    try:
        data = json.loads((root / RECORD).read_text(encoding="utf-8"))
        return {
            str(path): Known(int(size), int(there), int(here), str(digest))
            for path, (size, there, here, digest) in data.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_record(root: Path, pulled: Mapping[str, Known]) -> None:
    """Write the record so that it appears whole or not at all."""
    write_atomic(root / RECORD, json.dumps(pulled, sort_keys=True) + "\n")


def results_manifest(root: Path) -> dict[str, str]:
    """Return path -> sha256 of what the job says it wrote; empty where it did not say."""
    folder = RESULTS_MANIFEST.parent
    try:
        data = json.loads(root.joinpath(RESULTS_MANIFEST).read_text(encoding="utf-8"))
        return {str(folder / name): str(file["sha256"]) for name, file in data["files"].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}


def differing(expected: Mapping[str, str], pulled: Mapping[str, Known]) -> list[str]:
    """Return the files that did not come home as the job wrote them."""
    return [
        path
        for path, digest in sorted(expected.items())
        if path not in pulled or pulled[path].sha256 != digest
    ]


def write_atomic(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a small text file through a temporary name; its mode is set before its content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
