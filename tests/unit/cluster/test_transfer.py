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
from slurmeval.errors import ClusterError, ConnectionFailed, ResultsIncomplete


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


@pytest.fixture
def results(tmp_path: Path) -> Path:
    results = tmp_path / "results"
    for name, data in {
        "eval_results/a/score.json": b"{}",
        "eval_results/-n\nnew\udcff line": b"odd name",
        "eval_results/empty": b"",
        "eval_results/big": os.urandom(3_000_000),
        "logs/job.log": b"log\n",
        "slurm-7.out": b"out\n",
        ".secrets.env": b"secret",
    }.items():
        path = results / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    os.link(results / "slurm-7.out", results / "eval_results" / "twin")
    return results


INCLUDE = ["eval_results", "logs", "slurm-*.out", "nothing"]


def test_get_brings_what_is_asked_for(host: ShellHost, results: Path, tmp_path: Path) -> None:
    home = tmp_path / "home results"
    done = host.get_tree(str(results), home, include=INCLUDE)
    expected = {k: v for k, v in tree(results).items() if k != ".secrets.env"}
    assert tree(home) == expected
    assert {str(path.relative_to(home)) for path in done.moved} == set(expected)
    assert sorted(path.name for path in home.iterdir()) == [
        ".pulled.json",
        "eval_results",
        "logs",
        "slurm-7.out",
    ]


def test_a_second_get_moves_only_what_has_changed(
    host: ShellHost, results: Path, tmp_path: Path
) -> None:
    home = tmp_path / "got"
    first = host.get_tree(str(results), home, include=INCLUDE)
    before = (home / "eval_results" / "big").stat().st_ino
    (results / "logs" / "job.log").write_text("log\nmore\n")
    second = host.get_tree(str(results), home, include=INCLUDE)
    assert second.moved == [home / "logs" / "job.log"]
    assert second.unchanged == len(first.moved) - 1
    assert (home / "eval_results" / "big").stat().st_ino == before
    assert (home / "logs" / "job.log").read_text() == "log\nmore\n"


def test_what_the_user_changed_stays(host: ShellHost, results: Path, tmp_path: Path) -> None:
    home = tmp_path / "got"
    (home / "logs").mkdir(parents=True)
    (home / "logs" / "job.log").write_text("mine from before")
    host.get_tree(str(results), home, include=INCLUDE)
    score = home / "eval_results" / "a" / "score.json"
    score.write_text("my own notes")
    (results / "eval_results" / "a" / "score.json").write_text('{"new": 1}')
    done = host.get_tree(str(results), home, include=INCLUDE)
    assert sorted(done.kept) == [score, home / "logs" / "job.log"]
    assert score.read_text() == "my own notes"
    assert (home / "logs" / "job.log").read_text() == "mine from before"


def test_what_is_gone_remotely_stays_here(host: ShellHost, results: Path, tmp_path: Path) -> None:
    home = tmp_path / "got"
    host.get_tree(str(results), home, include=INCLUDE)
    (results / "eval_results" / "big").unlink()
    assert host.get_tree(str(results), home, include=INCLUDE).moved == []
    assert (home / "eval_results" / "big").stat().st_size == 3_000_000


def test_symlinks_are_named_and_not_followed(
    host: ShellHost, results: Path, tmp_path: Path
) -> None:
    (results / "eval_results" / "passwd").symlink_to("/etc/passwd")
    (results / "eval_results" / "up").symlink_to("..")
    home = tmp_path / "got"
    done = host.get_tree(str(results), home, include=INCLUDE)
    assert sorted(done.skipped) == ["eval_results/passwd", "eval_results/up"]
    assert not any(path.is_symlink() for path in home.rglob("*"))


def test_results_that_lie_elsewhere_behind_their_directory(
    host: ShellHost, results: Path, tmp_path: Path
) -> None:
    (results / "eval_results").rename(tmp_path / "elsewhere")
    (results / "eval_results").symlink_to(tmp_path / "elsewhere")
    host.get_tree(str(results), tmp_path / "got", include=["eval_results"])
    assert tree(tmp_path / "got" / "eval_results") == tree(tmp_path / "elsewhere")


def test_nothing_goes_through_a_local_link_that_leads_out(
    host: ShellHost, results: Path, tmp_path: Path
) -> None:
    home, outside = tmp_path / "got", tmp_path / "outside"
    home.mkdir()
    outside.mkdir()
    (home / "eval_results").symlink_to(outside)
    with pytest.raises(ClusterError, match="does not belong"):
        host.get_tree(str(results), home, include=INCLUDE)
    assert list(outside.iterdir()) == []


def test_no_such_directory(host: ShellHost, tmp_path: Path) -> None:
    with pytest.raises(ResultsIncomplete, match=r"no directory .*/gone on "):
        host.get_tree(str(tmp_path / "gone"), tmp_path / "got")


def test_a_target_that_is_a_file(host: ShellHost, results: Path, tmp_path: Path) -> None:
    (tmp_path / "got").write_text("mine")
    with pytest.raises(ResultsIncomplete, match="cannot write below"):
        host.get_tree(str(results), tmp_path / "got", include=INCLUDE)
    assert (tmp_path / "got").read_text() == "mine"


def test_a_connection_that_breaks_once_is_taken_up_again(
    connect: Connect, server: SshServer, results: Path, tmp_path: Path
) -> None:
    server.cut_after = 2_000_000
    done = connect().get_tree(str(results), tmp_path / "got", include=INCLUDE)
    assert server.connections == 2
    assert {k: v for k, v in tree(results).items() if k != ".secrets.env"} == tree(tmp_path / "got")
    assert len(done.moved) == len(tree(tmp_path / "got"))


def test_a_server_that_dies_leaves_only_whole_files_and_the_next_get_completes(
    connect: Connect, server: SshServer, results: Path, tmp_path: Path
) -> None:
    home = tmp_path / "got"
    host = connect()
    server.cut_after = 2_000_000
    real = host._connected

    # The tail of the stream is missing, and nobody listens any more when we come back.
    def refuse() -> object:
        if server.cut_after is None:
            raise ConnectionFailed("cannot connect to the cluster")
        return real()

    host._connected = refuse  # type: ignore[assignment, method-assign]
    with pytest.raises(ResultsIncomplete) as caught:
        host.get_tree(str(results), home, include=INCLUDE)
    assert "eval_results/big" in caught.value.message
    assert "cannot connect to the cluster" in caught.value.message
    assert caught.value.exit_code == 4
    whole = tree(results)
    assert all(whole[name] == data for name, data in tree(home).items())
    assert not (home / "eval_results" / "big").exists()
    assert not list(home.glob(".incoming-*"))

    connect().get_tree(str(results), home, include=INCLUDE)
    assert {k: v for k, v in whole.items() if k != ".secrets.env"} == tree(home)


class Lying(LocalHost):
    """A host whose listing says what it is told to."""

    def __init__(self, listing: bytes) -> None:
        self.listing = listing

    def exchange(self, script, feed, drain, **keys):  # type: ignore[no-untyped-def]
        if "sha256sum" in script:
            return 0, self.listing, b""
        return super().exchange(script, feed, drain, **keys)


SUM = b"0" * 64


@pytest.mark.parametrize(
    "name",
    [b"../evil", b"/tmp/evil", b"eval_results/../../evil", b"elsewhere/evil", b".incoming-1/evil"],
)
def test_a_listing_that_leads_out_is_refused(tmp_path: Path, name: bytes) -> None:
    host = Lying(b"f 4 " + name + b"\0\0" + SUM + b"  " + name + b"\0")
    with pytest.raises(ClusterError, match="does not belong"):
        host.get_tree(str(tmp_path), tmp_path / "got", include=["eval_results", "*incoming*"])
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("listing", [b"", b"f 4 eval_results/x", b"garbage\0\0", b"f x y\0\0"])
def test_a_listing_that_makes_no_sense(tmp_path: Path, listing: bytes) -> None:
    with pytest.raises(ClusterError, match="no usable list"):
        Lying(listing).get_tree(str(tmp_path), tmp_path / "got", include=["eval_results"])


def test_a_file_that_is_not_what_was_listed_gets_no_name(results: Path, tmp_path: Path) -> None:
    host = Lying(b"f 2 ./eval_results/a/score.json\0\0" + SUM + b"  ./eval_results/a/score.json\0")
    with pytest.raises(ResultsIncomplete, match=r"1 file.* did not arrive.*\n.*a/score\.json"):
        host.get_tree(str(results), tmp_path / "got", include=["eval_results"])
    assert tree(tmp_path / "got") == {}


def test_patterns_are_no_place_for_shell(results: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a pattern"):
        LocalHost().get_tree(str(results), tmp_path / "got", include=["$(touch x)"])
