"""The ssh command as a way to a machine; a stand-in plays ssh."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurmeval.cluster.access import Access
from slurmeval.cluster.connect import connect
from slurmeval.cluster.openssh import OpenSshHost
from slurmeval.errors import AccessDenied, ConfigError, ConnectionFailed, Unreachable


def env(**keys: object) -> Access:
    return Access(**{"tunnel": "ssh", "ssh": "openssh", "host": "cluster", **keys})


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts an ssh on the PATH that runs the command here and writes down its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    path = folder / "ssh"
    path.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\n'
        'while [ $# -gt 1 ]; do shift; done\nexec sh -c "$1"\n'
    )
    path.chmod(0o755)
    return path


def test_commands_and_trees_go_through_it(ssh: Path, tmp_path: Path) -> None:
    host = connect(env(user="me", port=2222, control_path=str(tmp_path)))
    assert isinstance(host, OpenSshHost)
    assert host.name == "me@cluster"
    done = host.run("cat; echo bad >&2; exit 7", timeout=20, input=b"given")
    assert (done.returncode, done.stdout, done.stderr) == (7, "given", "bad\n")
    words = (tmp_path / "words").read_text().splitlines()
    for word in ("BatchMode=yes", "StrictHostKeyChecking=yes", "User=me", "Port=2222"):
        assert f"-o{word}" in words
    assert f"-oControlPath={tmp_path}" in words
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "file").write_text("x")
    remote = host.put_tree(tmp_path / "job", str(tmp_path / "there"))
    assert Path(remote, "file").read_text() == "x"


def test_a_new_host_key_on_request(ssh: Path, tmp_path: Path) -> None:
    connect(env(host_key_policy="accept-new")).run("true", timeout=20)
    assert "-oStrictHostKeyChecking=accept-new" in (tmp_path / "words").read_text()


def test_a_connection_that_is_not_open_says_how_to_open_it(ssh: Path, tmp_path: Path) -> None:
    host = connect(env(control_path=f"{tmp_path}/no such"))
    with pytest.raises(Unreachable, match="no connection is open") as caught:
        host.run("true", timeout=20)
    assert "ssh -M -f -N" in str(caught.value.hint)
    assert "BatchMode" not in str(caught.value.hint)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("me@cluster: Permission denied (publickey,keyboard-interactive).", AccessDenied),
        ("Host key verification failed.", AccessDenied),
        ("ssh: connect to host cluster port 22: Connection timed out", ConnectionFailed),
    ],
)
def test_what_ssh_says_is_passed_on(ssh: Path, words: str, kind: type[Exception]) -> None:
    ssh.write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 255\n")
    with pytest.raises(ConnectionFailed, match="ssh to cluster: ") as caught:
        connect(env()).run("true", timeout=20)
    assert type(caught.value) is kind
    assert words in caught.value.message


def test_a_connection_that_is_closed_in_the_middle(ssh: Path) -> None:
    ssh.write_text('#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\nsh -c "$1"; exit 255\n')
    with pytest.raises(ConnectionFailed, match="ssh to cluster: "):
        connect(env()).run("echo part", timeout=20)


def test_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no ssh command"):
        connect(env())
    with pytest.raises(ConfigError, match=r"run\.env\.host is not set"):
        connect(env(host=None))
