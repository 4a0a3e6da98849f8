"""Trees go and come whole or not at all, over a pipe here and over SSH."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sshserver import Connect, SshServer

from slurmeval.cluster.local import LocalHost
from slurmeval.cluster.shell import ShellHost
from slurmeval.errors import ClusterError, ConnectionFailed


@pytest.fixture(params=["local", "ssh"])
def host(request: pytest.FixtureRequest) -> Iterator[ShellHost]:
    if request.param == "local":
        yield LocalHost()
    else:
        yield request.getfixturevalue("connect")()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    job = tmp_path / "job"
    (job / "eval").mkdir(parents=True)
    (job / "job.sbatch").write_text("#!/bin/bash\n")
    (job / "job.sbatch").chmod(0o755)
    (job / "eval" / "it's $(odd)\n.yaml").write_bytes(os.urandom(1_000_000))
    (job / "logs").mkdir()
    (job / "logs" / "old").touch()
    (job / "link").symlink_to("job.sbatch")
    return job


def tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".pulled.json"
    }


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_put_makes_a_private_copy(host: ShellHost, job: Path, tmp_path: Path) -> None:
    target = tmp_path / "far away" / "it's here"
    done = host.put_tree(job, str(target), extra={".secrets.env": b"secret"}, exclude=["logs"])
    assert done == str(target)
    expected = {k: v for k, v in tree(job).items() if not k.startswith("logs/")}
    assert tree(target) == {**expected, ".secrets.env": b"secret"}
    assert mode(target) == mode(target / "eval") == mode(target / "job.sbatch") == 0o700
    assert mode(target / ".secrets.env") == mode(next((target / "eval").iterdir())) == 0o600
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_put_below_the_home_of_the_other_side(host: ShellHost, job: Path) -> None:
    assert host.put_tree(job, "~/jobs/one") == str(Path.home() / "jobs" / "one")
    assert (Path.home() / "jobs" / "one" / "job.sbatch").is_file()


def test_put_leaves_what_is_there(host: ShellHost, job: Path, tmp_path: Path) -> None:
    target = tmp_path / "there"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(ClusterError, match=f"{target} exists already"):
        host.put_tree(job, str(target))
    assert tree(target) == {"mine": b"mine"}


def test_put_into_what_is_no_directory(host: ShellHost, job: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ClusterError, match=r"cannot create .*/file/x on .*File exists") as caught:
        host.put_tree(job, str(tmp_path / "file" / "x"))
    assert caught.value.hint is not None
    assert "run.env.remote_job_dir" in caught.value.hint
    assert caught.value.exit_code == 3


def test_put_of_a_link_to_a_directory(host: ShellHost, job: Path, tmp_path: Path) -> None:
    (job / "data").symlink_to("/etc")
    with pytest.raises(ClusterError, match="data is a link to a directory"):
        host.put_tree(job, str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_put_that_is_cut_leaves_nothing(connect: Connect, server: SshServer, job: Path) -> None:
    host = connect()
    host.run("true", timeout=20)
    with (job / "big").open("wb") as big:
        big.truncate(1 << 40)
    real = host._open

    def cut(command: str) -> object:
        pipe = real(command)
        write, sent = pipe.write, 0

        def writing(data: bytes) -> None:
            nonlocal sent
            sent += len(data)
            if sent > 3_000_000:
                server.transports[-1].close()
            write(data)

        pipe.write = writing  # type: ignore[method-assign]
        return pipe

    host._open = cut  # type: ignore[assignment, method-assign]
    with pytest.raises(ConnectionFailed, match="was lost"):
        host.put_tree(job, "~/jobs/one")
    assert not (Path.home() / "jobs" / "one").exists()


def test_put_that_is_cut_between_two_files_leaves_nothing(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(write: Callable[[bytes], None], *_: object) -> None:
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w") as archive:
            archive.add(job / "job.sbatch", "./job.sbatch")
        write(sink.getvalue())

    monkeypatch.setattr("slurmeval.cluster.transfer._send", half)
    with pytest.raises(ClusterError, match="the upload was cut short"):
        LocalHost().put_tree(job, str(tmp_path / "far" / "x"))
    assert list((tmp_path / "far").iterdir()) == []
