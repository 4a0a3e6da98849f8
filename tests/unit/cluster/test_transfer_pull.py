"""Files come home verified, or not at all: over a pipe here and over SSH."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import itertools
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sshserver import Connect, SshServer

from slurmeval.cluster import download, incoming
from slurmeval.cluster.local import LocalHost
from slurmeval.cluster.shell import ShellHost
from slurmeval.errors import (
    AccessDenied,
    ClusterError,
    ConnectionFailed,
    ResultsIncomplete,
    SlurmevalError,
    Unreachable,
)

LARGE = download.LARGE


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "delays", lambda: itertools.repeat(0.0))


@pytest.fixture(params=["local", "ssh"])
def host(request: pytest.FixtureRequest) -> Iterator[ShellHost]:
    if request.param == "local":
        yield LocalHost()
    else:
        yield request.getfixturevalue("connect")()


def tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".pulled.json" and ".incoming" not in path.parts
    }


def old(path: Path, data: bytes, when: float = 1e9) -> Path:
    """Write a file that has rested since ``when``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (when, when))
    return path


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
    assert set(done.moved) == set(expected)
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
    assert second.moved == ["logs/job.log"]
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
    assert sorted(done.kept) == ["eval_results/a/score.json", "logs/job.log"]
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
    with pytest.raises(ClusterError, match="symbolic link that leads out"):
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
    assert not (home / ".incoming").exists()

    connect().get_tree(str(results), home, include=INCLUDE)
    assert {k: v for k, v in whole.items() if k != ".secrets.env"} == tree(home)


def test_a_pull_reads_again_only_what_its_record_does_not_answer_for(
    results: Path, tmp_path: Path
) -> None:
    home, host = tmp_path / "got", Watched()
    for path in results.rglob("*"):
        os.utime(path, (1e9, 1e9))
    host.get_tree(str(results), home, include=INCLUDE)
    assert host.requests("sums") == 0
    host = Watched()
    assert host.get_tree(str(results), home, include=INCLUDE).unchanged == 7
    assert host.asked == b""
    os.utime(results / "logs" / "job.log", (1.1e9, 1.1e9))
    host = Watched()
    done = host.get_tree(str(results), home, include=INCLUDE)
    assert (done.moved, done.unchanged) == ([], 7)
    assert (host.requests("sums"), host.requests("archive")) == (0, 1)
    assert host.get_tree(str(results), home, include=INCLUDE).unchanged == 7
    assert (host.requests("sums"), host.requests("archive")) == (0, 1)


def test_a_file_of_the_same_size_and_time_that_is_new_is_found(
    host: ShellHost, results: Path, tmp_path: Path
) -> None:
    home, log = tmp_path / "got", results / "logs" / "job.log"
    host.get_tree(str(results), home, include=INCLUDE)
    time = log.stat().st_mtime_ns
    log.write_text("lag\n")
    os.utime(log, ns=(time, time))
    assert host.get_tree(str(results), home, include=INCLUDE).moved == ["logs/job.log"]
    assert (home / "logs" / "job.log").read_text() == "lag\n"


def test_files_without_a_record_are_compared_by_content(
    host: ShellHost, results: Path, tmp_path: Path
) -> None:
    home = tmp_path / "got"
    host.get_tree(str(results), home, include=INCLUDE)
    (home / ".pulled.json").write_text("{}")
    (home / "logs" / "job.log").write_text("bog\n")
    done = host.get_tree(str(results), home, include=INCLUDE)
    assert (done.moved, done.kept, done.unchanged) == ([], ["logs/job.log"], 6)


def test_a_file_that_the_user_makes_meanwhile_stays(results: Path, tmp_path: Path) -> None:
    home = tmp_path / "got"
    mine = home / "eval_results" / "a" / "score.json"

    class Slow(LocalHost):
        def exchange(self, script: str, feed: Any, drain: Any, **keys: Any) -> Any:
            def late(reader: Any) -> Any:
                real = download.manifest.compare

                def then(*args: Any, **options: Any) -> Any:
                    plan = real(*args, **options)
                    old(mine, b"mine")
                    return plan

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(download.manifest, "compare", then)
                    return drain(reader)

            return super().exchange(script, feed, late, **keys)

    done = Slow().get_tree(str(results), home, include=INCLUDE)
    assert done.kept == ["eval_results/a/score.json"]
    assert mine.read_bytes() == b"mine"
    assert len(done.moved) == 6


def test_a_path_with_blanks_and_one_below_the_home_of_the_other_side(
    host: ShellHost, tmp_path: Path
) -> None:
    folder = Path.home() / "my jobs" / "-it's $(one)\n"
    old(folder / "logs" / "x", b"x")
    for number, source in enumerate([str(folder), "~/my jobs/-it's $(one)\n"]):
        host.get_tree(source, tmp_path / str(number), include=["logs"])
        assert tree(tmp_path / str(number)) == {"logs/x": b"x"}


ODD = ["-rf", "a\nb", "\udcff\udc80", " ", "~", "it's", "*", "\\", "x" * 255, "\t", "$(touch x)"]


#: What the other side needs of programs; openssl is welcome.
PROGRAMS = [
    "base64",
    "date",
    "dd",
    "find",
    "head",
    "sed",
    "sh",
    "sha256sum",
    "stat",
    "tar",
    "tr",
    "xargs",
]


@pytest.fixture(params=["openssl works", "no openssl", "openssl is broken"])
def hashing(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in [*PROGRAMS, *(["openssl"] if request.param == "openssl works" else [])]:
        found = shutil.which(name)
        assert found
        (programs / name).symlink_to(found)
    if request.param == "openssl is broken":
        (programs / "openssl").write_text("#!/bin/sh\necho no library >&2\nexit 127\n")
        (programs / "openssl").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))


@pytest.mark.usefixtures("hashing")
def test_checksums_of_any_kind_settle_any_name(tmp_path: Path) -> None:
    there, home = tmp_path / "there", tmp_path / "got"
    for name in ODD:
        old(there / "logs" / name, b"here too")
        old(home / "logs" / name, b"here too", 2e9)
    old(there / "logs" / "large", os.urandom(LARGE))
    done = LocalHost().get_tree(str(there), home, include=["logs"])
    assert (done.moved, done.kept, done.unchanged) == (["logs/large"], [], len(ODD))


@pytest.mark.parametrize("size", [3, LARGE + 1])
def test_any_name_comes_home(host: ShellHost, tmp_path: Path, size: int) -> None:
    there, home = tmp_path / "there", tmp_path / "got"
    names = ODD if size < LARGE else ODD[:4]
    for name in names:
        old(there / "logs" / name, os.urandom(size))
    deep = "/".join(["d" * 120] * 4)
    old(there / "logs" / deep / "x", b"deep")
    assert len(host.get_tree(str(there), home, include=["logs"]).moved) == len(names) + 1
    assert tree(home) == tree(there)
    assert host.get_tree(str(there), home, include=["logs"]).unchanged == len(names) + 1


class Watched(LocalHost):
    """Remembers what the other side is asked for, and how much it answers."""

    def __init__(self) -> None:
        self.asked, self.received = b"", 0

    def requests(self, verb: str) -> int:
        return self.asked.count(f"{verb} ".encode())

    def exchange(self, script: str, feed: Any, drain: Any, **keys: Any) -> Any:
        def watched(write: Callable[[bytes], None]) -> None:
            def writing(data: bytes) -> None:
                self.asked += data
                write(data)

            feed(writing)

        return super().exchange(script, watched, drain, **keys)

    def _open(self, command: str) -> Any:
        pipe = super()._open(command)
        read = pipe.read

        def reading() -> bytes:
            data = read()
            self.received += len(data)
            return data

        pipe.read = reading  # type: ignore[method-assign]
        return pipe


class Cut(Watched):
    """The connection ends after so many bytes, each time or once."""

    def __init__(self, after: int, times: int = 1) -> None:
        super().__init__()
        self.after, self.times = after, times

    def _open(self, command: str) -> Any:
        pipe = super()._open(command)
        if self.times <= 0:
            return pipe
        self.times -= 1
        read, left = pipe.read, self.after

        def reading() -> bytes:
            nonlocal left
            if left <= 0:
                pipe.kill()
                return b""
            data = read()[:left]
            left -= len(data)
            return data

        def wait() -> int:
            raise ConnectionFailed("the connection was lost")

        pipe.read, pipe.wait = reading, wait  # type: ignore[method-assign]
        return pipe


class CutOff(Cut):
    """The connection ends after so many bytes, and there is no other."""

    def _open(self, command: str) -> Any:
        if self.times <= 0:
            raise AccessDenied("permission denied")
        return super()._open(command)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    there = tmp_path_factory.mktemp("mixed")
    for number in range(5):
        old(there / "logs" / f"small{number}", os.urandom(1500 * number))
        old(there / "logs" / f"large{number}", os.urandom(100_000 + 1000 * number))
    return there


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(st.integers(0, 600_000), min_size=1, max_size=4))
def test_cuts_anywhere_leave_only_whole_files_and_the_rest_follows(
    mixed: Path, tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    home, whole = tmp_path_factory.mktemp("got"), tree(mixed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "LARGE", 100_000)
        for cut in cuts:
            with contextlib.suppress(ConnectionFailed, ResultsIncomplete):
                CutOff(cut).get_tree(str(mixed), home, include=["logs"])
            assert tree(home).items() <= whole.items()
        LocalHost().get_tree(str(mixed), home, include=["logs"])
    assert tree(home) == whole
    assert not (home / ".incoming").exists()


@pytest.mark.parametrize("size", [4 * LARGE, 4 * LARGE + 1])
def test_a_large_file_goes_on_where_it_was_cut(tmp_path: Path, size: int) -> None:
    there, home = tmp_path / "there", tmp_path / "got"
    data = old(there / "big", os.urandom(size)).read_bytes()
    with pytest.raises(
        ResultsIncomplete, match=r"1 file.*\n    big\n  permission denied"
    ) as caught:
        CutOff(3 * LARGE).get_tree(str(there), home, include=["big"])
    assert caught.value.exit_code == 4
    assert tree(home) == {}
    host = Watched()
    assert host.get_tree(str(there), home, include=["big"]).moved == ["big"]
    assert tree(home) == {"big": data}
    assert host.received < size - 3 * LARGE + 1000
    assert sorted(path.name for path in home.iterdir()) == [".pulled.json", "big"]


def test_a_beginning_that_is_wrong_is_fetched_again(tmp_path: Path) -> None:
    there, home = tmp_path / "there", tmp_path / "got"
    data = old(there / "big", os.urandom(2 * LARGE)).read_bytes()
    with pytest.raises(ResultsIncomplete):
        CutOff(LARGE).get_tree(str(there), home, include=["big"])
    (part,) = (home / ".incoming").iterdir()
    part.write_bytes(b"wrong")
    LocalHost().get_tree(str(there), home, include=["big"])
    assert tree(home) == {"big": data}
    with pytest.raises(ResultsIncomplete):
        old(there / "two", data, when=2e9)
        CutOff(LARGE).get_tree(str(there), home, include=["two"])
    old(there / "two", data[: LARGE // 4])
    LocalHost().get_tree(str(there), home, include=["two"])
    assert (home / "two").read_bytes() == data[: LARGE // 4]


def test_of_a_log_that_grew_only_the_end_is_fetched(tmp_path: Path) -> None:
    there, home = tmp_path / "there", tmp_path / "got"
    old(there / "log", os.urandom(2 * LARGE))
    LocalHost().get_tree(str(there), home, include=["log"])
    with (there / "log").open("ab") as log:
        log.write(b"more")
    host = Watched()
    assert host.get_tree(str(there), home, include=["log"]).moved == ["log"]
    assert tree(home) == tree(there)
    assert host.received < 1000


class Meanwhile(LocalHost):
    """Something happens on the other side each time that a file is asked for."""

    def __init__(self, happens: Callable[[], None]) -> None:
        self.happens = happens

    def exchange(self, script: str, feed: Any, drain: Any, **keys: Any) -> Any:
        def watched(write: Callable[[bytes], None]) -> None:
            def writing(data: bytes) -> None:
                if data.startswith((b"archive", b"file")):
                    self.happens()
                write(data)

            feed(writing)

        return super().exchange(script, watched, drain, **keys)


@pytest.mark.parametrize("size", [3, LARGE])
def test_a_file_that_grows_all_the_time_comes_as_far_as_it_was_listed(
    tmp_path: Path, size: int
) -> None:
    there, home = tmp_path / "there", tmp_path / "got"
    log, other = old(there / "log", os.urandom(size)), old(there / "other", b"other")

    def grow() -> None:
        with log.open("ab") as sink:
            sink.write(b"more")

    done = Meanwhile(grow).get_tree(str(there), home, include=["*"])
    assert done.partial == ["log"]
    assert size <= (home / "log").stat().st_size < log.stat().st_size
    assert log.read_bytes().startswith((home / "log").read_bytes())
    assert (home / "other").read_bytes() == other.read_bytes()
    assert LocalHost().get_tree(str(there), home, include=["*"]).partial == []
    assert tree(home) == tree(there)


@pytest.mark.parametrize("blocks", [125, 126, 127, 254])
def test_archives_that_end_anywhere_in_a_record_of_tar(tmp_path: Path, blocks: int) -> None:
    """With 126 blocks of content, the second of tar's two closing blocks has its own record."""
    source, target = tmp_path / "source", tmp_path / "home"
    old(source / "logs" / "log", os.urandom(blocks * 512))
    old(source / "eval_results" / "large", os.urandom(LARGE))
    LocalHost().get_tree(str(source), target, include=("logs", "eval_results"))
    assert tree(target) == tree(source)


@pytest.mark.parametrize("size", [3, LARGE])
def test_a_file_that_is_replaced_or_goes_while_it_is_read(tmp_path: Path, size: int) -> None:
    there, home = tmp_path / "there", tmp_path / "got"
    for name in ("short", "gone", "same"):
        old(there / name, os.urandom(size))

    def change() -> None:
        (there / "short").write_bytes(b"s")
        (there / "gone").unlink(missing_ok=True)
        if (there / "same").stat().st_mtime == 1e9:
            (there / "same").write_bytes(os.urandom(size))

    done = Meanwhile(change).get_tree(str(there), home, include=["*"])
    assert sorted(done.moved) == ["same", "short"]
    assert tree(home) == tree(there)


@pytest.mark.parametrize("size", [3000, LARGE])
def test_bytes_that_change_on_the_way_get_no_name(tmp_path: Path, size: int) -> None:
    there, home = tmp_path / "there", tmp_path / "got"
    old(there / "file", b"x" * size)

    class Noisy(LocalHost):
        def _open(self, command: str) -> Any:
            pipe = super()._open(command)
            read = pipe.read
            pipe.read = lambda: read().replace(b"xxxxxxxx", b"xxxyxxxx", 1)  # type: ignore[method-assign]
            return pipe

    with pytest.raises(ResultsIncomplete, match=r"1 file.*\n    file"):
        Noisy().get_tree(str(there), home, include=["file"])
    assert tree(home) == {}


def test_a_pull_that_would_fill_the_disk_does_not_begin(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr(incoming.shutil, "disk_usage", lambda path: disk)
    with pytest.raises(ResultsIncomplete, match=r"need 3\.0 MB, and only 1\.0 MB are free"):
        LocalHost().get_tree(str(results), tmp_path / "got", include=INCLUDE)
    assert list((tmp_path / "got").iterdir()) == []
    disk.free = 4_000_000
    assert len(LocalHost().get_tree(str(results), tmp_path / "got", include=INCLUDE).moved) == 7


@pytest.mark.parametrize("size", [3, LARGE])
def test_what_has_no_place_here_is_named_and_the_rest_comes(tmp_path: Path, size: int) -> None:
    there, home = tmp_path / "there", tmp_path / "got"
    for name in ("a", "b/c", "d"):
        old(there / "logs" / name, os.urandom(size))
    old(home / "logs" / "b", b"my own file")
    with pytest.raises(ResultsIncomplete, match=r"1 file.*\n    logs/b/c: File exists"):
        LocalHost().get_tree(str(there), home, include=["logs"])
    assert sorted(tree(home)) == ["logs/a", "logs/b", "logs/d"]
    assert (home / "logs" / "b").read_bytes() == b"my own file"


def test_two_pulls_into_one_directory_do_not_mix(results: Path, tmp_path: Path) -> None:
    home = tmp_path / "got"
    (home / ".incoming").mkdir(parents=True)
    lock = os.open(home / ".incoming", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ResultsIncomplete, match="another pull is bringing results"):
        LocalHost().get_tree(str(results), home, include=INCLUDE)
    os.close(lock)
    assert len(LocalHost().get_tree(str(results), home, include=INCLUDE).moved) == 7


@pytest.mark.parametrize("name", ["logs", ".incoming", "eval_results/a"])
def test_a_directory_that_became_a_link(results: Path, tmp_path: Path, name: str) -> None:
    home, outside = tmp_path / "got", tmp_path / "outside"
    LocalHost().get_tree(str(results), home, include=INCLUDE)
    outside.mkdir()
    for path in (home / name).glob("*"):
        path.unlink()
    if (home / name).exists():
        (home / name).rmdir()
    (home / name).symlink_to(outside)
    old(results / "logs" / "new", b"new")
    old(results / "eval_results" / "a" / "new", b"new")
    with pytest.raises((ClusterError, ResultsIncomplete), match=r"link that leads|cannot write"):
        LocalHost().get_tree(str(results), home, include=INCLUDE)
    assert list(outside.iterdir()) == []


def test_one_link_among_the_files_is_kept(results: Path, tmp_path: Path) -> None:
    home, outside = tmp_path / "got", old(tmp_path / "outside", b"mine")
    (home / "logs").mkdir(parents=True)
    (home / "logs" / "job.log").symlink_to(outside)
    done = LocalHost().get_tree(str(results), home, include=INCLUDE)
    assert done.kept == ["logs/job.log"]
    assert outside.read_bytes() == b"mine"


class Lying(LocalHost):
    """A host that answers once what it is told to, whatever it is asked."""

    def __init__(self, answer: bytes) -> None:
        self.answers = [answer]

    def exchange(self, script: str, feed: Any, drain: Any, **keys: Any) -> Any:
        if not self.answers:
            raise AccessDenied("permission denied")
        stream = io.BytesIO(self.answers.pop())

        class Canned:
            def read(self, *, patience: float = 0.0) -> bytes:
                return stream.read(1 << 18)

            def leave(self) -> None:
                """Nothing runs."""

        return 0, drain(Canned()), b""


def listed(*names: bytes, size: int = 4) -> bytes:
    return b"2000000000\0" + b"".join(b"f %d 1.5 %s\0" % (size, n) for n in names) + b"end 0\0"


def archived(*members: tuple[str, bytes, bytes], sums: dict[bytes, bytes]) -> bytes:
    """Return checksums and an archive of (name, type, content) members."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT, bufsize=65536) as archive:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(content), "/tmp/evil"
            archive.addfile(member, io.BytesIO(content))
    lines = b"".join(
        hashlib.sha256(data).hexdigest().encode() + b" *./" + name.removeprefix(b"./") + b"\n"
        for name, data in sums.items()
    )
    return lines + b"\0" + sink.getvalue().ljust(65536, b"\0")


@pytest.mark.parametrize(
    "name",
    [
        b"../evil",
        b"/tmp/evil",
        b"eval_results/../../evil",
        b"eval_results//evil",
        b"eval_results/./evil",
        b"eval_results/",
        b"elsewhere/evil",
        b".incoming/evil",
        b".pulled.json",
    ],
)
def test_a_listing_that_leads_out_is_refused(tmp_path: Path, name: bytes) -> None:
    answer = listed(name) + archived(
        (name.decode(), tarfile.REGTYPE, b"evil"), sums={name: b"evil"}
    )
    with pytest.raises(ClusterError, match="does not belong"):
        Lying(answer).get_tree("/x", tmp_path / "got", include=["eval_results", ".*"])
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"f 4 1 eval_results/x",
        b"garbage\0end 0\0",
        b"1\0f x 1 y\0end 0\0",
        b"1\0f -4 1 eval_results/x\0end 0\0",
        b"1\0f 4 y eval_results/x\0end 0\0",
        b"1\0f 4 1\0end 0\0",
        b"1\0d 4 1 eval_results/x\0end 0\0",
        b"1\0f 99999999999999999999 1 eval_results/x\0end 0\0",
        b"1\0f 4 9999999999999999999 eval_results/x\0end 0\0",
        b"x" * 200_000,
        b"1\0end 0\0and more",
        listed(b"eval_results/x") + b"\0" + b"no archive" * 100,
    ],
)
def test_an_answer_that_makes_no_sense(tmp_path: Path, answer: bytes) -> None:
    with pytest.raises(ClusterError, match=r"no usable (list|answer)"):
        Lying(answer).get_tree("/x", tmp_path / "got", include=["eval_results"])
    assert tree(tmp_path / "got") == {}


@pytest.mark.parametrize(
    "members",
    [
        [("../evil", tarfile.REGTYPE, b"evil")],
        [("/tmp/evil", tarfile.REGTYPE, b"evil")],
        [("logs/x", tarfile.SYMTYPE, b""), ("logs/x/evil", tarfile.REGTYPE, b"evil")],
        [("logs", tarfile.SYMTYPE, b""), ("logs/other", tarfile.REGTYPE, b"evil")],
        [("logs/x", tarfile.LNKTYPE, b"")],
        [("logs/x", tarfile.DIRTYPE, b"")],
        [("logs/x", tarfile.CHRTYPE, b"")],
        [("logs/x", tarfile.REGTYPE, b"evil")],
        [("logs/x", tarfile.REGTYPE, b"too long")],
        [("logs/x", tarfile.REGTYPE, b"")],
        [("logs/" + "y" * 200, tarfile.REGTYPE, b"evil")],
    ],
)
def test_only_what_was_listed_is_taken_out_of_an_archive(
    tmp_path: Path, members: list[tuple[str, bytes, bytes]]
) -> None:
    answer = listed(b"./logs/x") + archived(*members, sums={b"./logs/x": b"good"})
    with pytest.raises(ResultsIncomplete, match=r"\n    logs/x"):
        Lying(answer).get_tree("/x", tmp_path / "got", include=["logs"])
    assert tree(tmp_path) == {}


def test_a_name_that_comes_twice_counts_once(tmp_path: Path) -> None:
    members = [("logs/x", tarfile.REGTYPE, b"good"), ("logs/x", tarfile.REGTYPE, b"evil")]
    answer = listed(b"./logs/x", b"./logs/x") + archived(*members, sums={b"./logs/x": b"good"})
    done = Lying(answer).get_tree("/x", tmp_path / "got", include=["logs"])
    assert done.moved == ["logs/x"]
    assert tree(tmp_path) == {"got/logs/x": b"good"}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_answer_leads_to_a_traceback_or_out_of_the_directory(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    member = ("logs/x", tarfile.REGTYPE, b"good")
    good = listed(b"./logs/x") + archived(member, sums={b"./logs/x": b"good"})
    at = data.draw(st.integers(0, 900))
    with_noise = (
        good[:at] + data.draw(st.binary(max_size=40)) + good[at + data.draw(st.integers(0, 40)) :]
    )
    with contextlib.suppress(SlurmevalError):
        Lying(with_noise).get_tree("/x", outside / "got", include=["logs", "*"])
    assert set(tree(outside).values()) <= {b"good"}
    assert [path.name for path in outside.iterdir()] == ["got"]


def test_the_message_shows_names_without_their_control_characters(tmp_path: Path) -> None:
    answer = listed(b"./logs/\x1b[31mred\nline\xff")
    with pytest.raises(ResultsIncomplete) as caught:
        Lying(answer + archived(sums={})).get_tree("/x", tmp_path / "got", include=["logs"])
    assert "\x1b" not in caught.value.message
    assert "red\\nline" in caught.value.message


def test_patterns_are_no_place_for_shell(results: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a pattern"):
        LocalHost().get_tree(str(results), tmp_path / "got", include=["$(touch x)"])


def test_large_files_that_were_written_anew_are_fetched_whole(tmp_path: Path) -> None:
    there, home = tmp_path / "there", tmp_path / "got"
    for name in "abc":
        old(there / name, os.urandom(LARGE))
    LocalHost().get_tree(str(there), home)
    for name in "abc":
        old(there / name, os.urandom(LARGE + 1), 1.1e9)
    assert LocalHost().get_tree(str(there), home).moved == ["a", "b", "c"]
    assert tree(home) == tree(there)


def test_a_pull_outlives_a_network_that_is_away_for_a_while(tmp_path: Path) -> None:
    class Away(Cut):
        looks = 0

        def exchange(self, script: str, feed: Any, drain: Any, **keys: Any) -> Any:
            self.looks += 1
            if 1 < self.looks <= 5:
                raise Unreachable("the network is away")
            return super().exchange(script, feed, drain, **keys)

    old(tmp_path / "there" / "big", os.urandom(2 * LARGE))
    Away(LARGE).get_tree(str(tmp_path / "there"), tmp_path / "got")
    assert tree(tmp_path / "got") == tree(tmp_path / "there")
