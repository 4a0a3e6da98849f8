"""What the ways of SSH share: scripts that run whole or not at all, and a log of commands."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from slurmeval.cluster.shell import Feed, Reader, ShellHost
from slurmeval.cluster.text import printable

T = TypeVar("T")
_log = logging.getLogger(__name__)


class RemoteHost(ShellHost):
    """A machine behind a connection that can break at any byte."""

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
        """See `slurmeval.cluster.shell.ShellHost.exchange`."""
        begin = time.monotonic()
        # The closing brace comes last: of a script that arrives in part, nothing runs.
        whole = f"{{\n{script}\n}}\n"
        try:
            code, result, error = super().exchange(
                whole, feed, drain, timeout=timeout, idle=idle, public=public
            )
        except Exception as problem:
            seconds = time.monotonic() - begin
            _log.debug("%s: %s -> %s in %.2f s", self.name, _title(script), problem, seconds)
            raise
        seconds = time.monotonic() - begin
        _log.debug("%s: %s -> %d in %.2f s", self.name, _title(script), code, seconds)
        return code, result, error


def _title(script: str) -> str:
    """Return the line that tells scripts apart; what travels on standard input is not shown."""
    lines = script.splitlines()
    begins = ("cd -- ", "answer ", "target=", "old=", "rm ", "scancel ", "exec ")
    return printable(next((line for line in lines if line.startswith(begins)), lines[0]))[:120]
