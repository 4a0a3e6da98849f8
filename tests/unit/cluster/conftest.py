from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest
from sshserver import Connect, SshServer

from slurmeval.cluster.access import Access
from slurmeval.cluster.host import Prompt
from slurmeval.cluster.ssh import SshHost


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the files of whoever runs it."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    paramiko.ECDSAKey.generate().write_private_key_file(str(path))
    return path


@pytest.fixture
def server(key: Path) -> Iterator[SshServer]:
    accepted = paramiko.ECDSAKey.from_private_key_file(str(key))
    with SshServer(paramiko.ECDSAKey.generate(), [accepted]).running() as running:
        yield running


@pytest.fixture
def connect(server: SshServer, key: Path, tmp_path: Path) -> Iterator[Connect]:
    """Makes hosts of the server; keyword arguments replace keys of the profile."""
    made: list[SshHost] = []
    known = server.known_hosts(tmp_path / "known_hosts")

    def make(
        *,
        prompt: Prompt | None = None,
        timeout: float = 10,
        known_hosts: Path | None = known,
        config: Path | None = None,
        **env: object,
    ) -> SshHost:
        profile = {
            "tunnel": "ssh",
            "host": "127.0.0.1",
            "port": server.port,
            "user": "me",
            "identity": str(key),
            **env,
        }
        host = SshHost(
            Access(**profile),
            prompt=prompt,
            timeout=timeout,
            known_hosts=known_hosts,
            config=config,
        )
        made.append(host)
        return host

    yield make
    for host in made:
        host.close()
