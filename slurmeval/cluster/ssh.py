"""A machine behind SSH as a host. Paramiko is imported when the first connection is made."""

from __future__ import annotations

import contextlib
import getpass
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from slurmeval.cluster.host import Prompt
from slurmeval.cluster.remote import RemoteHost
from slurmeval.cluster.ssh_config import Hop, hops
from slurmeval.config.schema import Env
from slurmeval.errors import ConnectionFailed

if TYPE_CHECKING:
    from paramiko import Channel, Transport

#: Seconds for each step of a connection.
CONNECT_TIMEOUT = 20.0
_WINDOW = 1 << 24
_log = logging.getLogger(__name__)


def terminal_prompt() -> Prompt | None:
    """Return a prompt on the terminal, or None where standard input is not one."""
    if not sys.stdin.isatty():
        return None
    return lambda question, echo: input(question) if echo else getpass.getpass(question)


class SshHost(RemoteHost):
    """A machine behind SSH; connects when it is first used, and anew after a break.

    Args:
        env: ``run.env``: host, port, user, identity; the rest comes from ``~/.ssh/config``.
        prompt: Asks the user for passphrases and codes; None where nobody can answer.
        config: Another file than ``~/.ssh/config``.
        known_hosts: Another file than the usual known_hosts.
        timeout: Seconds for each step of a connection.
    """

    def __init__(
        self,
        env: Env,
        *,
        prompt: Prompt | None = None,
        config: Path | None = None,
        known_hosts: Path | None = None,
        timeout: float = CONNECT_TIMEOUT,
    ) -> None:
        self._hops: list[Hop] = hops(env, config=config, known_hosts=known_hosts)
        self._prompt, self._timeout = prompt, timeout
        self._accept_new = env.host_key_policy == "accept-new"
        self._transports: list[Transport] = []
        last = self._hops[-1]
        self.name = f"{last.user}@{last.alias}"
        for note in dict.fromkeys(note for hop in self._hops for note in hop.notes):
            _log.warning("%s", note)

    def _open(self, command: str) -> _Remote:
        import paramiko

        transport = self._connected()
        try:
            channel = transport.open_session(window_size=_WINDOW, timeout=self._timeout)
            channel.exec_command(command)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise ConnectionFailed(f"{self.name} opened no session: {error}") from error
        return _Remote(self.name, channel, transport)

    def _connected(self) -> Transport:
        from slurmeval.cluster.ssh_connect import connect

        if self._transports and all(transport.is_active() for transport in self._transports):
            return self._transports[-1]
        self.close()
        for hop in self._hops:
            through = self._transports[-1] if self._transports else None
            try:
                self._transports.append(
                    connect(
                        hop,
                        through,
                        prompt=self._prompt,
                        timeout=self._timeout,
                        accept_new=self._accept_new,
                    )
                )
            except BaseException:
                self.close()
                raise
        return self._transports[-1]

    def close(self) -> None:
        """End the connection; the next command connects anew."""
        while self._transports:
            # One that goes through a jump host fails to say goodbye when that is gone.
            with contextlib.suppress(EOFError, OSError):
                self._transports.pop().close()


class _Remote:
    """A command on the other side."""

    def __init__(self, name: str, channel: Channel, transport: Transport) -> None:
        self._name, self._channel, self._transport = name, channel, transport

    def write(self, data: bytes) -> None:
        self._channel.sendall(data)

    def close_input(self) -> None:
        self._channel.shutdown_write()

    def read(self, size: int) -> bytes:
        return self._channel.recv(size)

    def read_error(self, size: int) -> bytes:
        return self._channel.recv_stderr(size)

    def wait(self) -> int:
        code = self._channel.recv_exit_status()
        lost = code == -1 and not self._transport.is_active()
        self._channel.close()
        if lost:
            raise ConnectionFailed(
                f"the connection to {self._name} was lost",
                hint="The job is not affected by that. Run the command again.",
            )
        return code

    def kill(self) -> None:
        with contextlib.suppress(Exception):
            self._channel.close()
