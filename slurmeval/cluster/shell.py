"""What hosts with a POSIX shell share: scripts, framing, deadlines and the transfer of trees.

A host only has to start one command and hand over its three streams. The script itself travels on
standard input: it never shows in a process list, and no login shell (csh, fish) has to parse it.
Only a pull's script, which anybody may read, is part of the command: that saves a round trip.
What a login shell prints before the script starts is dropped with the help of a marker.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
import threading
import time
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from slurmeval.cluster import download, transfer
from slurmeval.cluster.host import Completed, Transfer
from slurmeval.cluster.text import one_line
from slurmeval.errors import ConnectionFailed

T = TypeVar("T")
_CHUNK = 1 << 18


class Pipe(Protocol):
    """A started command with its three streams."""

    def write(self, data: bytes) -> None:
        """Send all of ``data`` to its standard input; OSError when it has ended."""

    def close_input(self) -> None:
        """End its standard input."""

    def read(self) -> bytes:
        """Return some of its standard output, empty at the end."""

    def read_error(self) -> bytes:
        """Return some of its standard error, empty at the end."""

    def wait(self) -> int:
        """Return its exit status; raise ConnectionFailed when that was lost with the connection."""

    def kill(self) -> None:
        """Give the command up; all reads then end."""


Feed = Callable[[Callable[[bytes], None]], None]


class _Watchdog:
    """Calls ``kill`` at a deadline.

    Args:
        seconds: For the whole, or where ``idle`` is set, for each wait without any progress.
        idle: Whether what this side does between two waits does not count.
        kill: Ends all waits.
    """

    def __init__(self, seconds: float, idle: bool, kill: Callable[[], None]) -> None:
        self._seconds, self._idle, self._kill = seconds, idle, kill
        self._stop = threading.Event()
        self._due: float | None = time.monotonic() + seconds
        self.expired = False

    def touch(self) -> None:
        """Count anew: there was progress."""
        if self._idle and self._due is not None:
            self._due = time.monotonic() + self._seconds

    @contextlib.contextmanager
    def waiting(self, patience: float) -> Iterator[None]:
        """Count while the other side has to act, for so many seconds more."""
        if not self._idle:
            yield
            return
        self._due = time.monotonic() + self._seconds + patience
        try:
            yield
        finally:
            self._due = None

    def _watch(self) -> None:
        while True:
            due = self._due
            left = self._seconds if due is None else due - time.monotonic()
            if due is not None and left <= 0:
                self.expired = True
                self._kill()
                return
            # A wait that begins meanwhile has its deadline after this one.
            if self._stop.wait(max(0.01, min(left, self._seconds))):
                return

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            yield
        finally:
            self._stop.set()


class Reader:
    """Standard output behind the marker, as a file to read from."""

    def __init__(self, pipe: Pipe, dog: _Watchdog) -> None:
        self._pipe, self._dog, self._buffer = pipe, dog, b""
        self.noise = b""
        #: Whether nothing more is wanted of the command, not even its end.
        self.left = False

    def read(self, *, patience: float = 0.0) -> bytes:
        """Return what is there, after a wait for it; empty at the end.

        Args:
            patience: Seconds that the other side may need beyond the deadline without progress.
        """
        if self._buffer:
            data, self._buffer = self._buffer, b""
            return data
        with self._dog.waiting(patience):
            return self._pipe.read()

    def read_all(self) -> bytes:
        """Return everything up to the end."""
        return b"".join(iter(self.read, b""))

    def leave(self) -> None:
        """Have the command given up once what was read is dealt with: that was all of it."""
        self.left = True

    def skip_past(self, marker: bytes) -> bool:
        """Drop everything up to and with ``marker``; return whether it came."""
        seen = b""
        while chunk := self._pipe.read():
            seen += chunk
            head, found, rest = seen.partition(marker)
            self.noise = (self.noise + chunk)[:1000]
            if found:
                self._buffer = rest
                return True
            seen = head[-len(marker) :]
        return False


@dataclass
class _Side:
    """A stream that another thread serves: its bytes, and an error of the caller's own code."""

    data: bytes = b""
    error: BaseException | None = None


class ShellHost(ABC):
    """A `slurmeval.cluster.host.Host` on top of `_open`."""

    name: str

    @abstractmethod
    def _open(self, command: str) -> Pipe:
        """Start a command line; raise ConnectionFailed when the machine cannot be reached."""

    @abstractmethod
    def close(self) -> None:
        """End the connection."""

    def run(self, command: str | Sequence[str], *, timeout: float, input: bytes = b"") -> Completed:
        """See `slurmeval.cluster.host.Host.run`."""
        script = command if isinstance(command, str) else shlex.join(command)
        code, out, err = self.exchange(
            script, lambda write: write(input), Reader.read_all, timeout=timeout
        )
        return Completed(code, *(part.decode("utf-8", "surrogateescape") for part in (out, err)))

    def put_tree(
        self,
        source: Path,
        target: str,
        *,
        extra: Mapping[str, bytes] | None = None,
        exclude: Sequence[str] = (),
    ) -> str:
        """See `slurmeval.cluster.host.Host.put_tree`."""
        return transfer.put(self, source, target, extra or {}, exclude)

    def get_tree(self, source: str, target: Path, *, include: Sequence[str] = ("*",)) -> Transfer:
        """See `slurmeval.cluster.host.Host.get_tree`."""
        return download.get(self, source, target, include)

    def exchange(
        self,
        script: str,
        feed: Feed,
        drain: Callable[[Reader], T],
        *,
        timeout: float,
        idle: bool = False,
        public: bool = False,
    ) -> tuple[int, T, bytes]:
        """Run a script while one thread feeds it and this one drains it.

        Args:
            script: POSIX shell.
            feed: Writes the standard input with the function it is given.
            drain: Reads the standard output to where it wants.
            timeout: Seconds for the whole, or without progress where ``idle`` is set.
            idle: Whether progress extends the deadline, and what this side does does not count.
            public: Whether the script may show in a process list; sshd takes no input before it has
                started a command, so that such a script begins a round trip earlier.

        Returns:
            The exit status, what ``drain`` returned, and the standard error; where ``drain`` left
            before the end, 0 and nothing for the first and the last.

        Raises:
            ConnectionFailed: No connection, it broke, or the deadline passed.
        """
        marker = f"slurmeval:{secrets.token_hex(8)}"
        body = f"echo {marker}; echo {marker} >&2\n{script}".encode("utf-8", "surrogateescape")
        if public:
            source, body = f"echo {b64encode(body).decode()} | base64 -d", b""
        else:
            # dd reads exactly the script and leaves the rest of the input to it.
            source = f"dd bs=1 count={len(body)} 2>/dev/null"
        pipe = self._open(f"/bin/sh -c 'eval \"$({source})\"'")
        dog = _Watchdog(timeout, idle, pipe.kill)
        sides, touch = (_Side(), _Side()), dog.touch
        threads = (
            threading.Thread(target=_feed, args=(pipe, body, feed, touch, sides[0]), daemon=True),
            threading.Thread(target=_collect, args=(pipe, sides[1]), daemon=True),
        )
        done = False
        try:
            with dog.watching():
                for thread in threads:
                    thread.start()
                reader = Reader(pipe, dog)
                answered = reader.skip_past(marker.encode() + b"\n")
                result = drain(reader)
                if reader.left:
                    return 0, result, b""
                with dog.waiting(0.0):
                    for thread in threads:
                        thread.join()
                    code = pipe.wait()
            done = True
        finally:
            if not done:
                pipe.kill()
            if sides[0].error is not None:
                raise sides[0].error
            if dog.expired:
                raise ConnectionFailed(f"{self.name} gave no answer within {timeout:g} s")
        error = sides[1].data.rpartition(marker.encode() + b"\n")[2]
        if not answered:
            words = one_line((reader.noise + error).decode("utf-8", "replace"))
            raise ConnectionFailed(
                f"{self.name} did not run a command: {words or f'exit status {code}'}",
                hint=f"Try it by hand: ssh {self.name} true",
            )
        return code, result, error


def _feed(pipe: Pipe, body: bytes, feed: Feed, touch: Callable[[], None], side: _Side) -> None:
    def write(data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _CHUNK):
            try:
                pipe.write(bytes(view[start : start + _CHUNK]))
            except (OSError, EOFError) as error:
                raise _Ended from error
            touch()

    try:
        write(body)
        feed(write)
    except _Ended:
        return
    except BaseException as error:
        side.error = error
        pipe.kill()
        return
    with contextlib.suppress(OSError, EOFError):
        pipe.close_input()


class _Ended(Exception):
    """The command no longer reads its input; its exit status tells why."""


def _collect(pipe: Pipe, side: _Side) -> None:
    while chunk := pipe.read_error():
        side.data = (side.data + chunk)[-_CHUNK:]
