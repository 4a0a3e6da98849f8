"""A machine behind the ``ssh`` command: what its configuration, agents and open connections can do.

For sites that take nothing but a connection which a person opened by hand (ControlMaster), and for
what paramiko lacks. Nothing is ever asked: whatever needs an answer is a failure that says so.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from slurmeval.cluster.access import Access
from slurmeval.cluster.local import _Process
from slurmeval.cluster.remote import RemoteHost
from slurmeval.cluster.ssh_config import CONFIG_ENV, KNOWN_HOSTS_ENV
from slurmeval.cluster.text import one_line
from slurmeval.errors import AccessDenied, ConfigError, ConnectionFailed, Unreachable

#: What ssh ends with when it is the connection that failed.
_BROKEN = 255
_REFUSED = ("permission denied", "host key verification failed", "identification has changed")


class OpenSshHost(RemoteHost):
    """A machine behind the ssh command.

    Args:
        env: How to get there; ``control_path`` is the socket of an open connection.

    Raises:
        ConfigError: There is no host, or no ssh command.
    """

    def __init__(self, env: Access) -> None:
        if not env.host:
            raise ConfigError('run.env.host is not set, and tunnel = "ssh" needs it')
        if shutil.which("ssh") is None:
            raise ConfigError('run.env.ssh is "openssh", and there is no ssh command on PATH')
        self._control = env.control_path and str(Path(env.control_path).expanduser())
        self._words = ["ssh", *_options(env, self._control), env.host]
        self.name = f"{env.user}@{env.host}" if env.user else env.host

    def _open(self, command: str) -> _Session:
        if self._control and not Path(self._control).exists():
            raise Unreachable(
                f"no connection is open at {self._control}",
                hint=f"Open it first: {shlex.join(self._master())}",
            )
        return _Session(self, [*self._words, command])

    def _master(self) -> list[str]:
        words = [word for word in self._words if word != "-oBatchMode=yes"]
        return [words[0], "-M", "-f", "-N", *words[1:]]

    def close(self) -> None:
        """Nothing is open between two commands; the master belongs to who opened it."""


def _options(env: Access, control: str | None) -> list[str]:
    policy = "accept-new" if env.host_key_policy == "accept-new" else "yes"
    values = {
        "BatchMode": "yes",
        "ConnectTimeout": "20",
        "ServerAliveInterval": "15",
        "ServerAliveCountMax": "4",
        "StrictHostKeyChecking": policy,
        "UserKnownHostsFile": os.environ.get(KNOWN_HOSTS_ENV),
        "ControlPath": control,
        "User": env.user,
        "Port": str(env.port) if env.port != 22 else None,
        "IdentityFile": env.identity,
    }
    config = os.environ.get(CONFIG_ENV)
    given = [f"-o{key}={value}" for key, value in values.items() if value]
    return [*([f"-F{config}"] if config else []), "-T", *given]


class _Session(_Process):
    """One run of ssh; remembers what it said, to tell a broken connection from a failed command."""

    def __init__(self, host: OpenSshHost, words: list[str]) -> None:
        super().__init__(shlex.join(["exec", *words]))
        self._host, self._said = host, b""

    def read_error(self) -> bytes:
        data = super().read_error()
        self._said = (self._said + data)[-2000:]
        return data

    def wait(self) -> int:
        code = super().wait()
        if code != _BROKEN:
            return code
        words = one_line(self._said.decode("utf-8", "replace")) or "ssh gave no reason"
        if any(piece in words.lower() for piece in _REFUSED):
            raise AccessDenied(
                f"ssh to {self._host.name}: {words}",
                hint=f"Nobody can answer ssh's questions here. "
                f"Open a connection first: {shlex.join(self._host._master())}",
            )
        raise ConnectionFailed(f"ssh to {self._host.name}: {words}")
