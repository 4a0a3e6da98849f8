"""A file server of a few lines of shell on the other side, and its client.

One command serves a whole pull. It lists, then answers requests from its standard input one after
the other, so that any number of them can be under way: after the listing the line is never idle.
Small files come as a tar archive behind their checksums. A large one comes from any offset, while
the other side reads it a second time for its checksum. The server only reads.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from slurmeval.cluster.text import one_line, quote_path
from slurmeval.manifest import Entry, Listing, parse_entry

if TYPE_CHECKING:
    from slurmeval.cluster.shell import Reader, ShellHost

T = TypeVar("T")
#: The server's exit status where there is no such directory.
NO_DIRECTORY = 66
#: Seconds without any progress after which a transfer is given up.
_TIMEOUT = 60.0
#: Bytes that the slowest other side reads and hashes in a second.
_HASH_RATE = 50_000_000
#: Digits of a checksum.
_HEX = 64
_BLOCK = 512
_RECORD = 128 * _BLOCK
#: Members of an archive that hold the name, or the link's target, of the next one.
_LONG_NAMES = (b"L", b"K")
#: No name, and so no record of the protocol, is longer.
_LONGEST = 1 << 16

_SERVER = r"""cd -- "$source" || exit 66
LC_ALL=C; export LC_ALL
exec 3>&1
# find and the checksums come a page at a time, and each would be a packet of its own.
together() { dd obs=64k 2> /dev/null; }
list() {
    code=0
    printf '%s\0' "$(date +%s)"
    set --
    for name in $include; do
        root=./$name; [ ! -d "$root" ] || root=$root/
        if [ -e "$root" ] || [ -L "$root" ]; then set -- "$@" "$root"; fi
    done
    if [ $# -gt 0 ]; then
        find "$@" -type f -printf 'f %s %T@ %p\0' -o -type l -printf 'l 0 0 %p\0' || code=1
    fi
    printf 'end %s\0' "$code"
}
sums() { { head -c "$1" | digests; printf '\0'; } | together; }
archive() {
    sums "$1"
    head -c "$1" |
        tar -b 128 --format=gnu --hard-dereference --no-recursion --null -T - -cf -
}
file() {
    name=$(head -c "$1"; echo .); name=${name%.}
    if [ ! -f "$name" ] || [ ! -r "$name" ]; then echo no; return; fi
    echo yes
    sum=$(
        head -c "$2" < "$name" | digest &
        sent=$(dd if="$name" bs=1M iflag=fullblock,skip_bytes,count_bytes skip="$3" \
            count=$(($2 - $3)) 2>&1 >&3 | sed -n 's/^\([0-9][0-9]*\) bytes\{0,1\} .*/\1/p')
        head -c $(($2 - $3 - ${sent:-0})) /dev/zero >&3
        wait
    )
    printf '%.64s %s\n' "$sum" "$(stat -c %s -- "$name")"
}
list | together
# OpenSSL takes half the time, where it works: a module that somebody loads may break it.
case $(openssl dgst -sha256 -r < /dev/null 2> /dev/null) in
    e3b0c44298fc1c149afb*' *'*)
        digest() { openssl dgst -sha256 -r; }
        digests() { xargs -0 openssl dgst -sha256 -r; } ;;
    *)
        digest() { sha256sum -b; }
        digests() { xargs -0 sha256sum -bz | tr '\0' '\n'; } ;;
esac
while read -r verb a b c; do
    case $verb in
        sums) sums "$a" ;;
        archive) archive "$a" ;;
        file) file "$a" "$b" "$c" ;;
    esac
done
exit 0
"""


class Garbled(ValueError):
    """The other side sent what no server of ours sends."""


@dataclass(frozen=True)
class Ended:
    """How a conversation ended: the server's exit status, and what it said of errors."""

    code: int
    words: str


class Remote:
    """The client's end of a conversation; answers are read in the order of their requests."""

    def __init__(self, reader: Reader, send: Callable[[bytes], None]) -> None:
        self._stream, self._send = _Stream(reader), send

    def end(self, *, wait: bool) -> None:
        """End the conversation; no answer may be left.

        Args:
            wait: Whether the end of the other side is waited for, a whole round trip.
        """
        if self._stream.left(wait=wait):
            raise Garbled("there is more than was asked for")

    def listing(self) -> Listing:
        """Read the listing that opens every conversation."""
        time = self._stream.record()
        if not time.isdigit():
            raise Garbled(f"{time[:80]!r} is no time")
        files: dict[str, Entry] = {}
        links: dict[str, Entry] = {}
        for record in self._stream.records():
            if record.startswith(b"end "):
                break
            link, entry = parse_entry(record)
            (links if link else files)[entry.path] = entry
        return Listing(list(files.values()), list(links), int(time) * 10**9, record == b"end 0")

    def ask_sums(self, entries: Sequence[Entry]) -> None:
        """Request the checksums of files."""
        names = _names(entries)
        self._send(b"sums %d\n" % len(names) + names)

    def sums(self, entries: Sequence[Entry]) -> dict[str, str]:
        """Read the checksums of those files that could be read."""
        self._stream.patience = sum(entry.size for entry in entries) / _HASH_RATE
        found, at, names = {}, 0, _names(entries)
        lines = self._stream.record(longest=2 * len(names) + 80 * len(entries))
        for entry, name in zip(entries, names.split(b"\0"), strict=False):
            # A file that could not be read has no line.
            for before, after in _around_checksum(name):
                begin = at + len(before)
                if lines.startswith(before, at) and lines.startswith(after, begin + _HEX):
                    found[entry.path] = lines[begin : begin + _HEX].decode("ascii", "replace")
                    at = begin + _HEX + len(after)
                    break
        self._stream.patience = 0.0
        return found

    def ask_archive(self, entries: Sequence[Entry]) -> None:
        """Request small files."""
        names = _names(entries)
        # One list for the checksums, one for tar.
        self._send(b"archive %d\n" % len(names) + names + names)

    def archive(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, str, bytes]]:
        """Read small files: each with its checksum and its content, where it has its size still."""
        sums = self.sums(entries)
        wanted = {entry.path: entry for entry in entries}
        begin, name = self._stream.position, None
        while any(block := self._stream.exact(_BLOCK)):
            header = _Header.read(block)
            padding = -header.size % _BLOCK
            if header.kind in _LONG_NAMES:
                if header.size > _LONGEST:
                    raise Garbled("a name in the archive has no end")
                text = self._stream.exact(header.size + padding)[: header.size]
                name = text.rstrip(b"\0") if header.kind == b"L" else name
                continue
            path, name = _relative(header.name if name is None else name), None
            entry = wanted.pop(path, None)
            if entry is not None and header.kind == b"0" and header.size == entry.size:
                yield entry, sums.get(path, ""), self._stream.exact(header.size)
                self._stream.skip(padding)
            else:
                self._stream.skip(header.size + padding)
        # An archive ends with two empty blocks, of which the second may open a record.
        self._stream.skip(_BLOCK)
        self._stream.skip((begin - self._stream.position) % _RECORD)

    def ask_file(self, entry: Entry, offset: int) -> None:
        """Request a large file from an offset, up to its listed size."""
        name = b"./" + entry.path.encode("utf-8", "surrogateescape")
        self._send(b"file %d %d %d\n%s" % (len(name), entry.size, offset, name))

    def file(self, entry: Entry, offset: int) -> Iterator[bytes] | None:
        """Read a large file from an offset, or None where it cannot be read."""
        if self._stream.record(b"\n") != b"yes":
            return None
        return self._stream.chunks(entry.size - offset)

    def file_end(self, entry: Entry) -> tuple[str, int]:
        """Read what follows a large file: the checksum of it all, and its size by now."""
        self._stream.patience = entry.size / _HASH_RATE
        digest, _, size = self._stream.record(b"\n").decode("ascii", "replace").partition(" ")
        self._stream.patience = 0.0
        return digest, int(size) if size.isdigit() else entry.size


def converse(
    host: ShellHost, source: str, include: Sequence[str], talk: Callable[[Remote], T]
) -> tuple[T | None, Ended]:
    """Start the server and talk to it.

    Args:
        host: Where.
        source: The directory that it serves.
        include: Shell patterns of the names directly below that it lists.
        talk: The conversation; where it returns something true, the server's end counts no more.

    Returns:
        What ``talk`` returned, or None where the other side ended early; and how it ended.

    Raises:
        ConnectionFailed: There is no connection, or it broke.
        Garbled: The other side sent what no server of ours sends.
    """
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def feed(write: Callable[[bytes], None]) -> None:
        while (request := requests.get()) is not None:
            write(request)

    def drain(reader: Reader) -> T | None:
        remote = Remote(reader, requests.put)
        try:
            result = talk(remote)
            requests.put(None)
            remote.end(wait=not result)
            if result:
                reader.leave()
            return result
        except EOFError:
            return None
        except ValueError as error:
            raise error if isinstance(error, Garbled) else Garbled(str(error)) from error
        finally:
            requests.put(None)

    head = f"source={quote_path(source)}\ninclude='{' '.join(include)}'\n"
    try:
        code, result, err = host.exchange(
            head + _SERVER, feed, drain, timeout=_TIMEOUT, idle=True, public=True
        )
    finally:
        requests.put(None)
    return result, Ended(code, one_line(err.decode("utf-8", "replace")))


def _names(entries: Sequence[Entry]) -> bytes:
    """Return names that are no options, each with a null byte behind it."""
    names = "".join([f"./{entry.path}\0" for entry in entries])
    return names.encode("utf-8", "surrogateescape")


def _around_checksum(name: bytes) -> Iterator[tuple[bytes, bytes]]:
    yield b"", b" *%s\n" % name
    if b"\n" in name:  # as OpenSSL writes it from version 3 on
        yield b"\\", b" *%s\n" % name.replace(b"\n", b"\\n")


def _relative(name: bytes) -> str:
    return name.removeprefix(b"./").decode("utf-8", "surrogateescape")


class _Header(NamedTuple):
    """What counts of a tar member. The tarfile module would be most of the time of a pull."""

    name: bytes
    size: int
    kind: bytes

    @classmethod
    def read(cls, block: bytes) -> _Header:
        if block[257:262] != b"ustar":
            raise Garbled("no archive where one should be")
        size = block[124:135]
        if not size.isdigit():
            raise Garbled(f"{size!r} is no size of a small file")
        return cls(block[:100].partition(b"\0")[0], int(size, 8), block[156:157])


class _Stream:
    """Pieces of known length, or with a known end, out of what arrives in chunks."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self._buffer, self._at = reader, b"", 0
        self._read = 0
        self.patience = 0.0

    @property
    def position(self) -> int:
        return self._read - len(self._buffer) + self._at

    def _more(self) -> bytes:
        chunk = self._reader.read(patience=self.patience)
        if not chunk:
            raise EOFError
        self._read += len(chunk)
        return chunk

    def left(self, *, wait: bool) -> bool:
        """Return whether anything has come, or comes before the end."""
        return self._at < len(self._buffer) or (wait and bool(self._reader.read()))

    def exact(self, size: int) -> bytes:
        """Return ``size`` bytes."""
        end = self._at + size
        if end > len(self._buffer):
            return b"".join(self.chunks(size))
        begin, self._at = self._at, end
        return self._buffer[begin:end]

    def skip(self, size: int) -> None:
        """Drop ``size`` bytes."""
        if self._at + size <= len(self._buffer):
            self._at += size
            return
        for _ in self.chunks(size):
            pass

    def chunks(self, size: int) -> Iterator[bytes]:
        """Yield ``size`` bytes as they come."""
        while size > 0:
            if self._at == len(self._buffer):
                self._buffer, self._at = self._more(), 0
            piece = self._buffer[self._at : self._at + size]
            self._at += len(piece)
            size -= len(piece)
            yield piece

    def records(self) -> Iterator[bytes]:
        """Yield what comes before each null byte; what follows the last one taken stays."""
        while True:
            for piece in self._buffer[self._at :].split(b"\0")[:-1]:
                self._at += len(piece) + 1
                yield piece
            yield self.record()

    def record(self, end: bytes = b"\0", *, longest: int = _LONGEST) -> bytes:
        """Return what comes before ``end``."""
        while (found := self._buffer.find(end, self._at)) < 0:
            if len(self._buffer) - self._at > longest:
                raise Garbled(f"no end of {self._buffer[self._at : self._at + 80]!r}")
            self._buffer, self._at = self._buffer[self._at :] + self._more(), 0
        begin, self._at = self._at, found + 1
        return self._buffer[begin:found]
