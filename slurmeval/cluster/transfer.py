"""A tree to the other side in one command: tar on a pipe, never seen half done.

One stream carries any number of files, so the number of round trips does not grow with them.
`slurmeval.cluster.download` is the way back.
"""

from __future__ import annotations

import fnmatch
import io
import os
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from slurmeval.cluster.text import one_line, printable, quote_path
from slurmeval.errors import ClusterError

if TYPE_CHECKING:
    from slurmeval.cluster.shell import ShellHost

#: Seconds without any progress after which a transfer is given up.
_TIMEOUT = 60.0
_CHUNK = 1 << 18
#: The last member of an upload; without it the stream was cut.
_END = ".upload-complete"

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
