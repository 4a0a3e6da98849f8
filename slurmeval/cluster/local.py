"""This machine as a host."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

from slurmeval.cluster.shell import ShellHost

_CHUNK = 1 << 18


class _Process:
    """A child process in a session of its own, so that Ctrl-C here does not reach it."""

    def __init__(self, command: str) -> None:
        self._child = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._child.stdin and self._child.stdout and self._child.stderr
        self._in, self._out, self._err = self._child.stdin, self._child.stdout, self._child.stderr

    def write(self, data: bytes) -> None:
        self._in.write(data)
        self._in.flush()

    def close_input(self) -> None:
        self._in.close()

    def read(self) -> bytes:
        return os.read(self._out.fileno(), _CHUNK)

    def read_error(self) -> bytes:
        return os.read(self._err.fileno(), _CHUNK)

    def wait(self) -> int:
        code = self._child.wait()
        for stream in (self._in, self._out, self._err):
            with contextlib.suppress(OSError):
                stream.close()
        return code

    def kill(self) -> None:
        if self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()


class LocalHost(ShellHost):
    """This machine: for ``executor = "local"``, and for Slurm's commands on a login node."""

    name = "this machine"

    def _open(self, command: str) -> _Process:
        return _Process(command)

    def close(self) -> None:
        """Nothing is open between two commands."""
