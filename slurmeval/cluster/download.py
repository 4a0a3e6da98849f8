"""A pull: list, compare, fetch, verify; again where files changed or the connection broke.

Nothing gets its name before its checksum is right. What a broken connection leaves of a large file
waits below ``.incoming`` and is taken up where it ended, by this pull or by a later one.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import gc
import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slurmeval import manifest
from slurmeval.cluster.host import Transfer
from slurmeval.cluster.incoming import Incoming
from slurmeval.cluster.remote_files import NO_DIRECTORY, Garbled, converse
from slurmeval.cluster.text import one_line, printable
from slurmeval.errors import AccessDenied, ClusterError, ConnectionFailed, ResultsIncomplete
from slurmeval.manifest import Entry, Known, Listing, Plan, Pulled, Stats
from slurmeval.retry import PAUSES, delays

if TYPE_CHECKING:
    from slurmeval.cluster.remote_files import Remote
    from slurmeval.cluster.shell import ShellHost

#: Rounds without any progress after which a pull gives up, where the connection holds.
_ROUNDS = 3
#: Files from this size on are taken up again where a broken connection left them.
LARGE = 4 << 20
#: The most bytes of one archive, and the files of the first one; the others hold more and more, so
#: that there is something to do here soon.
_ARCHIVE_BYTES, _ARCHIVE_FILES = 32 << 20, 256
_LISTED = 20
_CHUNK = 1 << 20
_PATTERN = re.compile(r"^[A-Za-z0-9_.*?-]+$")
#: Errors of the whole disk; others belong to one file.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


def get(host: ShellHost, source: str, target: Path, include: Sequence[str]) -> Transfer:
    """Bring files home; see `slurmeval.cluster.host.Host.get_tree`."""
    for pattern in include:
        if not _PATTERN.match(pattern):
            raise ValueError(f"not a pattern of file names: {pattern!r}")
    return _Pull(host, source, target, include).run()


class _Pull:
    def __init__(self, host: ShellHost, source: str, target: Path, include: Sequence[str]) -> None:
        self._host, self._source, self._target = host, source, target
        self._include = tuple(include)
        self._incoming = Incoming(target)
        self._listing: Listing | None = None
        self._plan = Plan()
        self._unchanged: int | None = None
        self._folders: set[str] = set()
        self._moved: set[str] = set()
        self._partial: set[str] = set()
        self._arrived: set[str] = set()
        #: Files that changed while an archive was made: from now on each comes as it was listed.
        self._restless: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._words = ""
        self._progress = 0
        #: How often a large file came with another checksum than its own.
        self._mismatches: Counter[str] = Counter()

    def run(self) -> Transfer:
        with self._local_errors(), _without_collector():
            self._target.mkdir(parents=True, exist_ok=True)
            with self._incoming.locked():
                self._rounds()
        assert self._listing is not None
        return Transfer(
            moved=sorted(self._moved),
            unchanged=self._unchanged or 0,
            kept=[entry.path for entry in self._plan.kept],
            skipped=self._listing.symlinks,
            partial=sorted(self._partial),
        )

    @functools.cached_property
    def _pulled(self) -> Pulled:
        return manifest.read_record(self._target)

    def _rounds(self) -> None:
        idle, pauses = 0, delays()
        while not self._round():
            idle, self._progress = (0 if self._progress else idle + 1), 0
            rounds = len(PAUSES) if self._broken else _ROUNDS
            if idle >= rounds or max(self._mismatches.values(), default=0) >= _ROUNDS:
                raise self._incomplete()
            if self._broken:
                time.sleep(next(pauses))

    def _round(self) -> bool:
        """Have one conversation; return whether everything is here now."""
        self._broken, self._changed = False, False
        try:
            done, ended = converse(self._host, self._source, self._include, self._talk)
        except ConnectionFailed as error:
            if self._listing is None:
                raise
            self._broken, self._words = True, error.message
            if isinstance(error, AccessDenied):
                raise self._incomplete() from error
            return False
        except Garbled as error:
            raise self._no_answer(one_line(str(error))) from error
        finally:
            if self._changed:
                # Without the record, the next pull compares checksums.
                with contextlib.suppress(OSError):
                    manifest.write_record(self._target, self._pulled)
        self._words = ended.words
        if done is None and self._listing is None:
            if ended.code == NO_DIRECTORY:
                raise ResultsIncomplete(
                    f"no directory {self._source} on {self._host.name}: {ended.words}"
                )
            raise self._no_answer(f"exit status {ended.code}: {ended.words}")
        return bool(done)

    def _talk(self, remote: Remote) -> bool:
        """List, compare and fetch over one connection; return whether nothing is missing."""
        # The record and what it speaks of are read while the other side lists.
        here = manifest.stats(self._target, self._pulled)
        self._listing = remote.listing()
        self._plan = self._compare(self._listing, here)
        self._resolve(self._plan, self._listing, remote)
        if self._unchanged is None:
            self._unchanged = len(self._plan.unchanged)
        self._arrived.clear()
        self._folders.clear()
        self._reasons.clear()
        self._fetch(self._plan.move, remote)
        return self._listing.complete and not self._missing()

    def _missing(self) -> list[Entry]:
        return [entry for entry in self._plan.move if entry.path not in self._arrived]

    def _compare(self, listing: Listing, here: Stats) -> Plan:
        tops = {entry.path.partition("/")[0]: entry.path for entry in listing.files}
        for top, path in tops.items():
            if not any(fnmatch.fnmatchcase(top, pattern) for pattern in self._include):
                raise self._unsafe(path)
        try:
            self._root = manifest.Root(self._target)
            return manifest.compare(listing.files, self._root, self._pulled, cheap=LARGE, here=here)
        except manifest.UnsafePath as error:
            raise self._unsafe(str(error)) from error

    def _resolve(self, plan: Plan, listing: Listing, remote: Remote) -> None:
        """Settle by checksum what size and time leave open."""
        if not plan.doubts:
            return
        entries = [doubt.entry for doubt in plan.doubts]
        remote.ask_sums(entries)
        sums = remote.sums(entries)
        for doubt in plan.doubts:
            path = doubt.entry.path
            if plan.settle(doubt, sums.get(path)):
                here = (self._target / path).lstat().st_mtime_ns
                self._remember(path, listing.known(doubt.entry, here, doubt.sha256))

    def _fetch(self, entries: Sequence[Entry], remote: Remote) -> None:
        """Request everything, then receive it; what did not come is for the caller to see."""
        large = [e for e in entries if e.size >= LARGE or e.path in self._restless]
        apart = {entry.path for entry in large}
        archives = list(_archives([entry for entry in entries if entry.path not in apart]))
        self._incoming.make_room(entries, large)
        begun = [(entry, self._incoming.begin(entry, self._base(entry))) for entry in large]
        for archive in archives:
            remote.ask_archive(archive)
        for entry, offset in begun:
            remote.ask_file(entry, offset)
        for archive in archives:
            for entry, digest, content in remote.archive(archive):
                try:
                    self._receive_small(entry, digest, content)
                except OSError as error:
                    self._bear(entry, error)
            self._restless |= {entry.path for entry in archive} - self._arrived
        for entry, offset in begun:
            self._receive_large(entry, offset, remote)

    def _receive_small(self, entry: Entry, expected: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() == expected and not self._same(entry, expected):
            _write(self._incoming.small, data, entry.mtime_ns)
            self._place(entry, self._incoming.small, expected)

    def _same(self, entry: Entry, digest: str) -> bool:
        """Return whether what came is what lies here: a file with another time only."""
        here, known = self._plan.seen[entry.path], self._pulled.get(entry.path)
        if here is None or known is None or known.sha256 != digest:
            return False
        if manifest.seen(self._root.path(entry.path)) != here:
            return False
        assert self._listing is not None
        assert self._unchanged is not None
        self._remember(entry.path, self._listing.known(entry, here[1], digest))
        self._arrived.add(entry.path)
        self._unchanged += 1
        return True

    def _remember(self, path: str, known: Known) -> None:
        self._pulled[path] = known
        self._changed = True

    def _base(self, entry: Entry) -> Path | None:
        """Return the local file where an earlier pull brought a shorter state of it."""
        if self._mismatches[entry.path]:
            return None  # it did not only grow
        seen = self._plan.seen[entry.path]
        shorter = seen is not None and seen[0] < entry.size
        return Path(self._root.path(entry.path)) if shorter else None

    def _receive_large(self, entry: Entry, offset: int, remote: Remote) -> None:
        content = remote.file(entry, offset)
        if content is None:
            self._reasons[entry.path] = "it cannot be read there"
            return
        digest, part = "", str(self._incoming.part(entry))
        with self._errors_of(entry):
            digest = self._append(part, content, entry.mtime_ns)
        for _ in content:
            pass
        expected, size = remote.file_end(entry)
        with self._errors_of(entry):
            if digest != expected:
                self._mismatches[entry.path] += 1
                Path(part).unlink(missing_ok=True)
            elif self._place(entry, part, digest) and size > entry.size:
                self._partial.add(entry.path)

    def _append(self, part: str, content: Iterator[bytes], mtime_ns: int) -> str:
        """Append to what is there; return the checksum of all."""
        digest = hashlib.sha256()
        with Path(part).open("ab+") as sink:
            sink.seek(0)
            while chunk := sink.read(_CHUNK):
                digest.update(chunk)
            for chunk in content:
                digest.update(chunk)
                sink.write(chunk)
                self._progress += len(chunk)
            sink.flush()
            _set_time(sink.fileno(), mtime_ns)
        return digest.hexdigest()

    def _place(self, entry: Entry, part: str, digest: str) -> bool:
        """Give a verified file its name, unless the user wrote one there meanwhile."""
        assert self._listing is not None
        path = self._root.path(entry.path)
        if manifest.seen(path) != self._plan.seen[entry.path]:
            Path(part).unlink()
            self._plan.kept.append(entry)
            self._arrived.add(entry.path)
            return False
        if (folder := path.rpartition("/")[0]) not in self._folders:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._folders.add(folder)
        os.replace(part, path)  # noqa: PTH105 - Path.replace takes longer than the system
        # Where the time is kept less exactly here, the next pull compares the content.
        self._remember(entry.path, self._listing.known(entry, entry.mtime_ns, digest))
        self._moved.add(entry.path)
        self._arrived.add(entry.path)
        self._partial.discard(entry.path)
        self._progress += 1
        return True

    @contextlib.contextmanager
    def _errors_of(self, entry: Entry) -> Iterator[None]:
        """What is wrong with one file's place here does not hold the others up."""
        try:
            yield
        except OSError as error:
            self._bear(entry, error)

    def _bear(self, entry: Entry, error: OSError) -> None:
        if error.errno in _DISK:
            # Half a file must not be what keeps a disk full.
            self._incoming.part(entry).unlink(missing_ok=True)
            raise error
        self._reasons[entry.path] = error.strerror or str(error)

    @contextlib.contextmanager
    def _local_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResultsIncomplete(
                f"cannot write below {self._target}: {error.strerror or error}",
                hint="Results that are there already were verified; run the command again later.",
            ) from error

    def _no_answer(self, words: str) -> ClusterError:
        return ClusterError(
            f"{self._host.name} gave no usable list of {self._source}: {words}",
            hint=f"Try it by hand: ssh {self._host.name} ls -l {self._source}",
        )

    def _unsafe(self, path: str) -> ClusterError:
        for folder in reversed((self._target / path).parents):
            if folder.is_symlink() and self._target in folder.parents:
                return ClusterError(
                    f"{folder} is a symbolic link that leads out of {self._target}; "
                    "nothing was written through it",
                    hint="Remove the link, or pull into another directory.",
                )
        return ClusterError(
            f"{self._host.name} listed a file that does not belong into {self._target}: "
            f"{_shown(path)}. Nothing of it was written."
        )

    def _incomplete(self) -> ResultsIncomplete:
        missing = self._missing()
        names = "".join(
            f"\n    {_shown(entry.path)}"
            + (f": {self._reasons[entry.path]}" if entry.path in self._reasons else "")
            for entry in missing[:_LISTED]
        )
        more = f"\n    and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        source = f"{self._source} on {self._host.name}"
        if missing:
            what = f"{len(missing)} file(s) of {source} did not arrive as listed:"
        else:
            what = f"{source} could not be listed to its end"
        words = f"\n  {self._words}" if self._words else ""
        return ResultsIncomplete(
            f"{what}{names}{more}{words}",
            hint="What did arrive was verified and stays; pull again to complete it.",
        )


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Thousands of entries live as long as a pull; to look for garbage among them takes time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _archives(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Cut a list of small files into pieces of limited size and number."""
    archive: list[Entry] = []
    size, most = 0, _ARCHIVE_FILES
    for entry in entries:
        if archive and (size + entry.size > _ARCHIVE_BYTES or len(archive) == most):
            yield archive
            archive, size, most = [], 0, 2 * most
        archive.append(entry)
        size += entry.size
    if archive:
        yield archive


def _set_time(descriptor: int, mtime_ns: int) -> None:
    try:  # noqa: SIM105 - thousands of times: suppress() takes longer than the system
        os.utime(descriptor, ns=(mtime_ns, mtime_ns))
    except (OSError, OverflowError):
        pass  # the next pull compares the content


def _write(path: str, data: bytes, mtime_ns: int) -> None:
    """Write a file with as few system calls as can be: there may be thousands."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        _set_time(descriptor, mtime_ns)
    finally:
        os.close(descriptor)


def _shown(path: str) -> str:
    return one_line(path) if path.isprintable() else repr(printable(path))
