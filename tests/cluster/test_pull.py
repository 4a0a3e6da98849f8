"""Bringing results home from a real sshd."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurmcluster import SlurmCluster

from slurmeval.cluster import download
from slurmeval.cluster.access import Access
from slurmeval.cluster.ssh import SshHost
from slurmeval.errors import ResultsIncomplete
from slurmeval.pull import pull

pytestmark = pytest.mark.slurm


@pytest.fixture
def host(slurm_cluster: SlurmCluster, tmp_path: Path) -> Iterator[SshHost]:
    env = Access(
        tunnel="ssh",
        host=slurm_cluster.host,
        port=slurm_cluster.port,
        user=slurm_cluster.user,
        identity=str(slurm_cluster.identity),
    )
    (tmp_path / "ssh_config").touch()
    host = SshHost(env, config=tmp_path / "ssh_config", known_hosts=slurm_cluster.known_hosts)
    yield host
    host.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".pulled.json"
    }


def test_odd_names_and_sizes(
    host: SshHost, slurm_cluster: SlurmCluster, user_dir: Path, tmp_path: Path
) -> None:
    there = user_dir / "my 'results'"
    for number, name in enumerate(["-rf", "a\nb", "\udcff", "it's $(x)", "~"]):
        write(there / "logs" / name, os.urandom(number * 1_100_000))
    write(there / "eval_results" / "big", os.urandom(20_000_000))
    (there / "eval_results" / "passwd").symlink_to("/etc/passwd")
    slurm_cluster.give(user_dir)
    for number, source in enumerate([str(there), f"~/{user_dir.name}/my 'results'"]):
        home = tmp_path / str(number)
        done = pull(host, source, home)
        expected = tree(there)
        del expected["eval_results/passwd"]
        assert tree(home) == expected
        assert done.skipped == ["eval_results/passwd"]
        assert pull(host, source, home).unchanged == len(expected)


def fill(disk: Path, leave: int) -> Path:
    return write(disk / "filler", b"x" * (shutil.disk_usage(disk).free - leave))


@pytest.mark.parametrize("noticed", ["before", "in the middle"])
@pytest.mark.parametrize("size", [1_000_000, 3_000_000, download.LARGE + 1])
def test_a_full_disk(
    host: SshHost,
    slurm_cluster: SlurmCluster,
    user_dir: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    noticed: str,
) -> None:
    write(user_dir / "logs" / "a", b"first")
    write(user_dir / "logs" / "b", os.urandom(size))
    slurm_cluster.give(user_dir)
    filler = fill(small_disk, leave=500_000)
    if noticed == "in the middle":
        monkeypatch.setattr("slurmeval.cluster.incoming.Incoming.make_room", lambda *_: None)
    with pytest.raises(ResultsIncomplete, match=r"No space left|are free at") as caught:
        pull(host, str(user_dir), small_disk)
    assert caught.value.exit_code == 4
    assert tree(small_disk).keys() <= {"filler", "logs/a"}
    filler.unlink()
    pull(host, str(user_dir), small_disk)
    assert tree(small_disk) == tree(user_dir)


def test_a_directory_that_cannot_be_read_is_no_empty_one(
    host: SshHost, slurm_cluster: SlurmCluster, user_dir: Path, tmp_path: Path
) -> None:
    write(user_dir / "logs" / "fine", b"fine")
    write(user_dir / "logs" / "closed" / "x", b"x")
    slurm_cluster.give(user_dir)
    (user_dir / "logs" / "closed").chmod(0)
    with pytest.raises(ResultsIncomplete, match=r"could not be listed to its end\n.*logs/closed"):
        pull(host, str(user_dir), tmp_path / "home")
    assert tree(tmp_path / "home") == {"logs/fine": b"fine"}


def test_a_large_file_goes_on_where_the_connection_was_killed(
    host: SshHost,
    slurm_cluster: SlurmCluster,
    user_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = write(user_dir / "logs" / "big", os.urandom(60_000_000)).read_bytes()
    slurm_cluster.give(user_dir)
    seen: list[int] = []
    real: Callable[[str], object] = host._open

    def opened(command: str) -> object:
        pipe = real(command)
        read = pipe.read  # type: ignore[attr-defined]
        seen.append(0)

        def reading() -> bytes:
            chunk: bytes = read()
            seen[-1] += len(chunk)
            if len(seen) == 1 and seen[0] > 30_000_000:
                user = slurm_cluster.user
                slurm_cluster.exec("login", "pkill", "-KILL", "-f", f"sshd: {user}", check=False)
            return chunk

        pipe.read = reading  # type: ignore[attr-defined]
        return pipe

    monkeypatch.setattr(host, "_open", opened)
    pull(host, str(user_dir), tmp_path / "home")
    assert tree(tmp_path / "home") == {"logs/big": data}
    assert len(seen) == 2
    assert seen[1] < 60_000_000 - 25_000_000


def test_partial_results_of_a_running_job(
    host: SshHost, slurm_cluster: SlurmCluster, user_dir: Path, tmp_path: Path
) -> None:
    script = "mkdir -p logs; while :; do echo line >> logs/log; [ ! -e stop ] || exit 0; done"
    job = slurm_cluster.user_exec(
        "sbatch", "--parsable", f"--chdir={user_dir}", f"--wrap={script}"
    ).stdout.strip()
    log = user_dir / "logs" / "log"
    slurm_cluster.wait_job(job, "RUNNING")
    try:
        while not log.exists() or log.stat().st_size < 1000:
            assert slurm_cluster.job_state(job) == "RUNNING"
        home = tmp_path / "home"
        sizes = []
        for _ in range(3):
            pull(host, str(user_dir), home)
            sizes.append((home / "logs" / "log").stat().st_size)
            assert log.read_bytes().startswith((home / "logs" / "log").read_bytes())
        assert sizes == sorted(set(sizes))
    finally:
        (user_dir / "stop").touch()
        slurm_cluster.wait_job(job, "COMPLETED")
    pull(host, str(user_dir), home)
    assert (home / "logs" / "log").read_bytes() == log.read_bytes()
