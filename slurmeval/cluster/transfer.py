"""Trees over one command each way: tar on a pipe, verified, and never seen half done.

One stream carries any number of files, so the number of round trips does not grow with them.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from slurmeval import manifest
from slurmeval.cluster.host import Transfer
from slurmeval.cluster.text import one_line, printable, quote_path
from slurmeval.errors import ClusterError, ConnectionFailed, ResultsIncomplete

if TYPE_CHECKING:
    from slurmeval.cluster.shell import Reader, ShellHost

#: Times a pull lists again and fetches what did not match: files may change while they are read.
_ROUNDS = 3
#: Seconds without any progress after which a transfer is given up.
_TIMEOUT = 60.0
_CHUNK = 1 << 18
#: The last member of an upload; without it the stream was cut.
_END = ".upload-complete"
_PATTERN = re.compile(r"^[A-Za-z0-9_.*?-]+$")

_PUT = """umask 077
target={target}
if [ -e "$target" ] || [ -L "$target" ]; then exit 74; fi
part=$target.$$.part
mkdir -p -- "$(dirname -- "$target")" && mkdir -- "$part" || exit 75
trap 'rm -rf -- "$part"' EXIT
trap 'exit 76' HUP INT TERM PIPE
tar --no-same-owner -xpf - -C "$part" || exit 77
rm -- "$part/{end}" 2>/dev/null || {{ echo "the upload was cut short" >&2; exit 77; }}
mv -T -- "$part" "$target" && cd -- "$target" && pwd
"""

_LIST = """cd -- {source} || exit 66
LC_ALL=C; export LC_ALL
each() {{
    for name in {include}; do
        root=./$name; [ ! -d "$root" ] || root=$root/
        if [ -e "$root" ] || [ -L "$root" ]; then "$@"; fi
    done
}}
stats() {{ find "$root" -type f -printf 'f %s %p\\0' -o -type l -printf 'l 0 %p\\0'; }}
sums() {{ find "$root" -type f -exec sha256sum -z -- {{}} +; }}
each stats; printf '\\0'; each sums
"""

_FETCH = """cd -- {source} || exit 66
tar --hard-dereference --no-recursion --null -T - -cf -
"""


def put(
    host: ShellHost, source: Path, target: str, extra: Mapping[str, bytes], exclude: Sequence[str]
) -> str:
    """Upload a directory; see `slurmeval.cluster.host.Host.put_tree`."""
    files = local_files(source, exclude)
    script = _PUT.format(target=quote_path(target), end=_END)
    try:
        code, out, err = host.exchange(
            script,
            lambda write: _send(write, files, extra),
            lambda reader: reader.read_all(),
            timeout=_TIMEOUT,
            idle=True,
        )
    except OSError as error:
        raise ClusterError(
            f"cannot read {error.filename or source}: {error.strerror or error}"
        ) from error
    if code == 74:
        raise ClusterError(f"{target} exists already on {host.name}; nothing was changed")
    if code != 0:
        words = one_line(err.decode("utf-8", "replace")) or f"exit status {code}"
        raise ClusterError(
            f"cannot create {target} on {host.name}: {words}",
            hint="Set run.env.remote_job_dir to a directory that you can write, with space left.",
        )
    return printable(out.decode("utf-8", "replace")).strip("\n")


def local_files(source: Path, exclude: Sequence[str] = ()) -> list[tuple[str, Path]]:
    """Return (relative name, path) of each entry below ``source``; parents before children.

    Args:
        source: A directory.
        exclude: Shell patterns of names directly below ``source`` to leave out.

    Raises:
        ClusterError: ``source`` is no directory, or holds a link to one.
    """
    if not source.is_dir():
        raise ClusterError(f"{source} is not a directory")
    found = []
    for folder, names, files in os.walk(source):
        top = Path(folder) == source
        kept = [
            name
            for name in [*sorted(names), *sorted(files)]
            if not (top and any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude))
        ]
        names[:] = [name for name in names if name in kept]
        for name in kept:
            path = Path(folder, name)
            if path.is_symlink() and path.is_dir():
                raise ClusterError(
                    f"{path} is a link to a directory and cannot be sent",
                    hint="Replace it by what it points to.",
                )
            found.append((path.relative_to(source).as_posix(), path))
    return found


def _send(
    write: Callable[[bytes], None],
    files: Sequence[tuple[str, Path]],
    extra: Mapping[str, bytes],
) -> None:
    with tarfile.open(fileobj=_Sink(write), mode="w|", bufsize=_CHUNK) as archive:
        for name, path in files:
            stat = path.stat()
            if path.is_dir():
                archive.addfile(_member(name, tarfile.DIRTYPE, 0o700, 0, stat.st_mtime))
            else:
                mode = 0o700 if stat.st_mode & 0o100 else 0o600
                with path.open("rb") as stream:
                    size = os.fstat(stream.fileno()).st_size
                    archive.addfile(
                        _member(name, tarfile.REGTYPE, mode, size, stat.st_mtime), stream
                    )
        for name, data in {**extra, _END: b""}.items():
            archive.addfile(
                _member(name, tarfile.REGTYPE, 0o600, len(data), time.time()), io.BytesIO(data)
            )


def _member(name: str, kind: bytes, mode: int, size: int, mtime: float) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"./{name}")
    info.type, info.mode, info.size, info.mtime = kind, mode, size, int(mtime)
    return info


class _Sink(io.RawIOBase):
    """A write function as the file that tarfile wants."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write

    def write(self, data: object) -> int:
        chunk = bytes(cast(bytes, data))
        self._write(chunk)
        return len(chunk)


def get(host: ShellHost, source: str, target: Path, include: Sequence[str]) -> Transfer:
    """Bring files home; see `slurmeval.cluster.host.Host.get_tree`."""
    for pattern in include:
        if not _PATTERN.match(pattern):
            raise ValueError(f"not a pattern of file names: {pattern!r}")
    return _Pull(host, source, target, include).run()


class _Pull:
    """One pull: list, compare, fetch, verify; again where files changed or the line was cut."""

    def __init__(self, host: ShellHost, source: str, target: Path, include: Sequence[str]) -> None:
        self._host, self._source, self._target = host, source, target
        self._include = tuple(include)
        self._moved: dict[str, Path] = {}
        self._words = ""

    def run(self) -> Transfer:
        with self._local_errors():
            self._target.mkdir(parents=True, exist_ok=True)
        self._pulled = manifest.read_record(self._target)
        unchanged = None
        missing: list[manifest.Entry] = []
        for attempt in range(_ROUNDS):
            try:
                listing = self._list()
            except ConnectionFailed as error:
                if attempt == 0:
                    raise
                self._words = error.message
                break
            plan = self._compare(listing.files)
            unchanged = len(plan.unchanged) if unchanged is None else unchanged
            self._fetch(plan.move)
            missing = [entry for entry in plan.move if entry.path not in self._moved]
            if not missing:
                kept = [manifest.destination(self._target, entry.path) for entry in plan.kept]
                return Transfer(sorted(self._moved.values()), unchanged, kept, listing.symlinks)
        raise self._incomplete(missing)

    def _list(self) -> manifest.Listing:
        script = _LIST.format(source=quote_path(self._source), include=" ".join(self._include))
        code, out, err = self._host.exchange(
            script,
            lambda write: None,
            lambda reader: reader.read_all(),
            timeout=_TIMEOUT,
            idle=True,
        )
        if code == 66:
            raise ResultsIncomplete(
                f"no directory {self._source} on {self._host.name}: "
                f"{one_line(err.decode('utf-8', 'replace'))}"
            )
        try:
            listing = manifest.parse_listing(out)
        except ValueError as error:
            raise ClusterError(
                f"{self._host.name} gave no usable list of {self._source}: {error}",
                hint=one_line(err.decode("utf-8", "replace")) or None,
            ) from error
        for entry in listing.files:
            first = entry.path.split("/")[0]
            if not any(fnmatch.fnmatchcase(first, pattern) for pattern in self._include):
                raise self._unsafe(entry.path)
        return listing

    def _compare(self, files: Sequence[manifest.Entry]) -> manifest.Plan:
        try:
            with self._local_errors():
                return manifest.compare(files, self._target, self._pulled)
        except manifest.UnsafePath as error:
            raise self._unsafe(str(error)) from error

    def _fetch(self, entries: Sequence[manifest.Entry]) -> None:
        """Fetch what can be had; what is missing afterwards is for the caller to see."""
        wanted = {entry.path: entry for entry in entries}
        if not wanted:
            return
        names = b"".join(b"./" + name.encode("utf-8", "surrogateescape") + b"\0" for name in wanted)
        script = _FETCH.format(source=quote_path(self._source))
        try:
            with self._local_errors(), self._incoming() as folder:
                _, _, err = self._host.exchange(
                    script,
                    lambda write: write(names),
                    lambda reader: self._receive(reader, wanted, folder),
                    timeout=_TIMEOUT,
                    idle=True,
                )
            self._words = one_line(err.decode("utf-8", "replace"))
        except ConnectionFailed as error:
            self._words = error.message
        finally:
            if self._moved:
                manifest.write_record(self._target, self._pulled)

    def _receive(self, reader: Reader, wanted: Mapping[str, manifest.Entry], folder: Path) -> None:
        source = cast(io.BufferedIOBase, reader)
        utf8, lossless = "utf-8", "surrogateescape"
        with (
            contextlib.suppress(tarfile.TarError, EOFError),
            tarfile.open(
                fileobj=source, mode="r|", bufsize=_CHUNK, encoding=utf8, errors=lossless
            ) as archive,
        ):
            for number, member in enumerate(archive):
                entry = wanted.get(member.name.removeprefix("./"))
                stream = archive.extractfile(member) if member.isreg() else None
                if entry is not None and stream is not None:
                    self._accept(entry, stream, folder / str(number), member.mtime)
        while reader.read(_CHUNK):
            pass

    def _accept(self, entry: manifest.Entry, stream: IO[bytes], part: Path, mtime: float) -> None:
        """Write one file under a temporary name; it gets its own only when its digest is right."""
        digest = hashlib.sha256()
        with part.open("wb") as sink:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                sink.write(chunk)
        if digest.hexdigest() != entry.sha256:
            part.unlink()
            return
        os.utime(part, (mtime, mtime))
        path = manifest.destination(self._target, entry.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part.replace(path)
        stat = path.stat()
        self._pulled[entry.path] = (stat.st_size, stat.st_mtime_ns, entry.sha256)
        self._moved[entry.path] = path

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[Path]:
        """A directory for files under way; those that a killed pull left behind are removed."""
        for stale in self._target.glob(f"{manifest.INCOMING}*"):
            pid = stale.name.removeprefix(manifest.INCOMING).split("-")[0]
            if not Path("/proc", pid).exists():
                shutil.rmtree(stale, ignore_errors=True)
        prefix = f"{manifest.INCOMING}{os.getpid()}-"
        with tempfile.TemporaryDirectory(
            prefix=prefix, dir=self._target, ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)

    @contextlib.contextmanager
    def _local_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResultsIncomplete(
                f"cannot write below {self._target}: {error.strerror or error}",
                hint="Results that are there already were verified; run the command again later.",
            ) from error

    def _unsafe(self, path: str) -> ClusterError:
        return ClusterError(
            f"{self._host.name} listed a file that does not belong into {self._target}: "
            f"{printable(path)!r}. Nothing of it was written."
        )

    def _incomplete(self, missing: Sequence[manifest.Entry]) -> ResultsIncomplete:
        names = "".join(f"\n    {printable(entry.path)}" for entry in missing[:20])
        more = f"\n    and {len(missing) - 20} more" if len(missing) > 20 else ""
        words = f"\n  {self._words}" if self._words else ""
        return ResultsIncomplete(
            f"{len(missing)} file(s) of {self._source} on {self._host.name} did not arrive "
            f"as listed:{names}{more}{words}",
            hint="What did arrive was verified and stays; pull again to complete it.",
        )
