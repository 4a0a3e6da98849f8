"""SshHost against OpenSSH's sshd: logging in, what each failure says, trees both ways."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurmcluster import SlurmCluster

from slurmeval.cluster.access import Access
from slurmeval.cluster.ssh import SshHost
from slurmeval.errors import ClusterError, ConnectionFailed, ResultsIncomplete

pytestmark = pytest.mark.slurm

Connect = Callable[..., SshHost]


@pytest.fixture
def connect(
    slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Connect]:
    """Makes hosts of the login machine; keyword arguments replace keys of the profile."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    made: list[SshHost] = []

    def make(known_hosts: Path | None = None, config: Path | None = None, **env: object) -> SshHost:
        profile = {
            "tunnel": "ssh",
            "host": slurm_cluster.host,
            "port": slurm_cluster.port,
            "user": slurm_cluster.user,
            "identity": str(slurm_cluster.identity),
            **env,
        }
        host = SshHost(
            Access(**profile),
            known_hosts=known_hosts or slurm_cluster.known_hosts,
            config=config,
        )
        made.append(host)
        return host

    yield make
    for host in made:
        host.close()


def test_commands_run_as_the_user(connect: Connect, slurm_cluster: SlurmCluster) -> None:
    done = connect().run("id -un; pwd; cat; exit 3", timeout=30, input=b"given")
    assert done.returncode == 3
    assert done.stdout == f"{slurm_cluster.user}\n{slurm_cluster.home}\ngiven"


def test_a_key_that_is_not_known_there(connect: Connect, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", wrong], check=True)
    with pytest.raises(ConnectionFailed) as caught:
        connect(identity=str(wrong)).run("true", timeout=30)
    assert "permission denied (publickey) for" in caught.value.message
    assert f"tried: {wrong}" in caught.value.message


def test_an_account_that_is_not_there(connect: Connect) -> None:
    with pytest.raises(ConnectionFailed, match=r"permission denied .* for nobody-there@"):
        connect(user="nobody-there").run("true", timeout=30)


def test_an_agent_holds_the_key(
    connect: Connect,
    slurm_cluster: SlurmCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConnectionFailed, match="no key was found"):
        connect(identity=None).run("true", timeout=30)
    socket = f"{tmp_path}/agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", socket)
        while not os.path.exists(socket):  # noqa: PTH110
            assert agent.poll() is None
        subprocess.run(["ssh-add", "-q", slurm_cluster.identity], check=True)
        assert connect(identity=None).run("echo in", timeout=30).stdout == "in\n"
    finally:
        agent.terminate()
        agent.wait()


def test_a_host_key_is_accepted_with_the_command_that_the_refusal_names(
    connect: Connect, tmp_path: Path
) -> None:
    known = tmp_path / "my known_hosts"
    known.touch()
    with pytest.raises(ConnectionFailed, match="is not known: ssh-ed25519 SHA256:") as caught:
        connect(known_hosts=known).run("true", timeout=30)
    assert caught.value.hint is not None
    command = caught.value.hint.partition("accept it with: ")[2]
    subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    assert connect(known_hosts=known).run("echo in", timeout=30).stdout == "in\n"


def test_a_changed_host_key(connect: Connect, slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True
    )
    kind, key = (tmp_path / "other.pub").read_text().split()[:2]
    known = tmp_path / "known"
    known.write_text(f"[{slurm_cluster.host}]:{slurm_cluster.port} {kind} {key}\n")
    with pytest.raises(ConnectionFailed, match="HAS CHANGED"):
        connect(known_hosts=known).run("true", timeout=30)


def test_a_hashed_known_hosts_file(
    connect: Connect, slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    known = tmp_path / "known"
    known.write_text(slurm_cluster.known_hosts.read_text())
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True, capture_output=True)
    assert slurm_cluster.host not in known.read_text()
    assert connect(known_hosts=known).run("echo in", timeout=30).stdout == "in\n"


def test_through_a_jump_host(connect: Connect, slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"Host gate\n HostName {slurm_cluster.host}\n Port {slurm_cluster.jump_port}\n"
        f"Host gate login\n User {slurm_cluster.user}\n IdentityFile {slurm_cluster.identity}\n"
        "Host login\n ProxyJump gate\n"
    )
    keys = {}
    for line in slurm_cluster.known_hosts.read_text().splitlines():
        name, kind, key = line.split()[:3]
        keys[name] = f"{kind} {key}"
    known = tmp_path / "known"
    port = slurm_cluster.port
    known.write_text(
        slurm_cluster.known_hosts.read_text() + f"login {keys[f'[{slurm_cluster.host}]:{port}']}\n"
    )
    host = connect(known, config, host="login", port=22, user=None, identity=None)
    assert host.run("hostname", timeout=30).stdout == "login\n"
    config.write_text(config.read_text() + "Host nowhere\n ProxyJump gate\n")
    host = connect(known, config, host="nowhere", port=22)
    with pytest.raises(ConnectionFailed, match="jump host before it cannot reach nowhere port 22"):
        host.run("true", timeout=30)


def test_trees_go_there_and_come_back(
    connect: Connect, slurm_cluster: SlurmCluster, user_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "big").write_bytes(os.urandom(5_000_000))
    (source / "job.sbatch").write_text("#!/bin/bash\n")
    (source / "job.sbatch").chmod(0o755)
    host = connect()
    there = host.put_tree(source, f"~/{user_dir.name}/it's one", extra={".secret": b"x"})
    assert there == str(user_dir / "it's one")
    modes = {p.name: p.stat().st_mode & 0o777 for p in [Path(there), *Path(there).rglob("*")]}
    assert modes == {"it's one": 0o700, "deep": 0o700, "big": 0o600, "job.sbatch": 0o700,
                     ".secret": 0o600}  # fmt: skip
    assert all(p.stat().st_uid == slurm_cluster.uid for p in Path(there).rglob("*"))
    host.get_tree(there, tmp_path / "home", include=["deep"])
    assert (tmp_path / "home" / "deep" / "big").read_bytes() == (
        source / "deep" / "big"
    ).read_bytes()
    assert host.get_tree(there, tmp_path / "home", include=["deep"]).moved == []


def test_a_directory_that_cannot_be_written(
    connect: Connect, slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    closed = slurm_cluster.state / "jobs"
    with pytest.raises(ClusterError, match=rf"cannot create {closed}/x on .*Permission denied"):
        connect().put_tree(tmp_path / "source", f"{closed}/x")
    assert not closed.exists()


def test_results_that_cannot_be_read(
    connect: Connect, user_dir: Path, tmp_path: Path, slurm_cluster: SlurmCluster
) -> None:
    for name in ("good", "bad"):
        (user_dir / name).write_text(name)
    slurm_cluster.give(user_dir)
    os.chown(user_dir / "bad", 0, 0)
    (user_dir / "bad").chmod(0o600)
    with pytest.raises(ResultsIncomplete, match=r"1 file.*\n    bad"):
        connect().get_tree(str(user_dir), tmp_path / "home", include=["good", "bad"])
    assert sorted(p.name for p in (tmp_path / "home").iterdir()) == [".pulled.json", "good"]


def test_a_session_that_is_killed_in_the_middle_of_a_download(
    connect: Connect, user_dir: Path, tmp_path: Path, slurm_cluster: SlurmCluster
) -> None:
    for number in range(4):
        (user_dir / f"part{number}").write_bytes(os.urandom(20_000_000))
    slurm_cluster.give(user_dir)
    host, home = connect(), tmp_path / "home"
    killed = []
    real = host._open

    def kill_after_a_while(command: str) -> object:
        pipe = real(command)
        read, seen = pipe.read, 0

        def reading() -> bytes:
            nonlocal seen
            seen += len(data := read())
            if seen > 30_000_000:
                seen = 0
                killed.append(1)
                user = slurm_cluster.user
                slurm_cluster.exec("login", "pkill", "-KILL", "-f", f"sshd: {user}", check=False)
            return data

        pipe.read = reading  # type: ignore[method-assign]
        return pipe

    host._open = kill_after_a_while  # type: ignore[assignment, method-assign]
    try:
        host.get_tree(str(user_dir), home, include=["part*"])
    except ResultsIncomplete:
        assert all((home / p.name).read_bytes() == p.read_bytes() for p in home.glob("part*"))
    assert killed
    connect().get_tree(str(user_dir), home, include=["part*"])
    assert sorted(p.name for p in home.iterdir()) == [
        ".pulled.json",
        *(f"part{n}" for n in range(4)),
    ]
    for number in range(4):
        assert (home / f"part{number}").read_bytes() == (user_dir / f"part{number}").read_bytes()
