"""A machine behind SSH as a host. Paramiko is imported when the first connection is made."""

from __future__ import annotations

import contextlib
import getpass
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from slurmeval.cluster.access import Access
from slurmeval.cluster.host import Prompt
from slurmeval.cluster.remote import RemoteHost
from slurmeval.cluster.ssh_config import Hop, hops, load_paramiko
from slurmeval.errors import ConnectionFailed

if TYPE_CHECKING:
    from paramiko import Channel, Transport

#: Seconds for each step of a connection.
CONNECT_TIMEOUT = 20.0
#: Bytes that the other side may send ahead, and in one packet.
_WINDOW, _PACKET = 1 << 24, 1 << 17
_MSG_CHANNEL_REQUEST = b"\x62"
_log = logging.getLogger(__name__)


def terminal_prompt() -> Prompt | None:
    """Return a prompt on the terminal, or None where standard input is not one."""
    if not sys.stdin.isatty():
        return None
    return lambda question, echo: input(question) if echo else getpass.getpass(question)


class SshHost(RemoteHost):
    """A machine behind SSH; connects when it is first used, and anew after a break.

    Args:
        env: Host, port, user, identity; the rest comes from ``~/.ssh/config``.
        prompt: Asks the user for passphrases and codes; None where nobody can answer.
        config: Another file than ``~/.ssh/config``.
        known_hosts: Another file than the usual known_hosts.
        timeout: Seconds for each step of a connection.
    """

    def __init__(
        self,
        env: Access,
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
        transport = self._connected()
        from paramiko import ChannelException, SSHException

        try:
            channel = transport.open_session(
                window_size=_WINDOW, max_packet_size=_PACKET, timeout=self._timeout
            )
            _start(channel, transport, command)
        except (SSHException, EOFError, OSError) as error:
            if not isinstance(error, ChannelException):
                # Where nobody answers any more, TCP notices after a quarter of an hour.
                self.close()
            raise ConnectionFailed(f"{self.name} opened no session: {error}") from error
        return _Remote(self.name, channel, transport)

    def _connected(self) -> Transport:
        load_paramiko()
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


def _start(channel: Channel, transport: Transport, command: str) -> None:
    """Have a command run. What it reads may follow at once; a refusal closes the channel."""
    from paramiko import Message

    # Channel.exec_command would wait for the answer, a whole round trip.
    request = Message()
    request.add_byte(_MSG_CHANNEL_REQUEST)
    request.add_int(channel.remote_chanid)
    request.add_string("exec")
    request.add_boolean(True)
    request.add_string(command)
    transport._send_user_message(request)  # type: ignore[attr-defined]


class _Remote:
    """A command on the other side."""

    def __init__(self, name: str, channel: Channel, transport: Transport) -> None:
        self._name, self._channel, self._transport = name, channel, transport

    def write(self, data: bytes) -> None:
        self._channel.sendall(data)

    def close_input(self) -> None:
        self._channel.shutdown_write()

    def read(self) -> bytes:
        # Less than all would move the rest of it to the buffer's beginning each time.
        return self._channel.recv(_WINDOW)

    def read_error(self) -> bytes:
        return self._channel.recv_stderr(_WINDOW)

    def wait(self) -> int:
        code = self._channel.recv_exit_status()
        self._channel.close()
        # Paramiko ends the channels of a lost connection before it calls that inactive.
        if code == -1:
            raise ConnectionFailed(
                f"the connection to {self._name} was lost",
                hint="The job is not affected by that. Run the command again.",
            )
        return code

    def kill(self) -> None:
        with contextlib.suppress(Exception):
            self._channel.close()
