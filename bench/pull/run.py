#!/usr/bin/env python3
"""Measures ``slurmeval pull``'s transfer against rsync over the same sshd of the test cluster.

Usage, as root on Debian, in an environment that has slurmeval:

    python bench/pull/run.py [--work DIR] [--repeat N] [--delays 0 50] [--size-mib 1024]
        [--only large small same changed]

Brings up a cluster of its own with scripts/slurm-cluster, installs rsync where it is missing, and
prints a table in Markdown. Both tools take turns; a figure is the median, a ratio that of the
medians. "connected" is over a connection that is open already (for rsync an ssh ControlMaster),
"from scratch" is a whole process; "start" is how much of ours is Python's start and imports, as
`slurmeval pull` needs them. Results go to a file system in memory unless --work says otherwise: a
disk that writes back at its own time would be most of what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from slurmeval.cluster.access import Access
from slurmeval.cluster.ssh import SshHost
from slurmeval.cluster.ssh_config import load_paramiko

REPO = Path(__file__).resolve().parents[2]
USER = "tester"
FILES, FILE_SIZE = 5000, 4096
PORTS = (2822, 2823)
CASES = ["large", "small", "same", "changed"]


@dataclass(frozen=True)
class Cluster:
    """A running test cluster."""

    state: Path

    @property
    def home(self) -> Path:
        """Return the job user's home, at the same path inside and outside."""
        return self.state / "home" / USER

    def script(self, *words: str) -> None:
        """Run scripts/slurm-cluster on it."""
        env = {
            **os.environ,
            "SLURM_CLUSTER_DIR": str(self.state),
            "SLURM_CLUSTER_NODES": "1",
            "SLURM_CLUSTER_SSH_PORT": str(PORTS[0]),
            "SLURM_CLUSTER_JUMP_PORT": str(PORTS[1]),
        }
        command = [str(REPO / "scripts" / "slurm-cluster"), *words]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)

    def ssh(self, *options: str) -> list[str]:
        """Return an ssh command line without the host."""
        keys = self.state / "keys"
        return ["ssh", "-p", str(PORTS[0]), "-i", str(keys / "id_ed25519"),
                "-o", f"UserKnownHostsFile={keys / 'known_hosts'}", *options]  # fmt: skip

    def host(self) -> SshHost:
        """Return the login machine as slurmeval sees it."""
        env = {"tunnel": "ssh", "host": "127.0.0.1", "port": PORTS[0], "user": USER,
               "identity": str(self.state / "keys" / "id_ed25519")}  # fmt: skip
        return SshHost(
            Access(**env),
            config=Path("/dev/null"),
            known_hosts=self.state / "keys" / "known_hosts",
        )


def fresh(path: Path) -> Path:
    """Remove a directory of results."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def rewrite(path: Path, size: int) -> None:
    """Fill a file with new bytes, for its owner."""
    with path.open("wb") as sink:
        while size > 0:
            size -= sink.write(os.urandom(min(size, 1 << 24)))


def make_data(home: Path, size: int) -> None:
    """Write one large file, and many small ones."""
    (home / "one").mkdir(exist_ok=True)
    rewrite(home / "one" / "file", size)
    for number in range(FILES):
        folder = home / "many" / f"{number // 100:02}"
        folder.mkdir(parents=True, exist_ok=True)
        rewrite(folder / f"{number}.json", FILE_SIZE)
    # What was just written is not trusted to stay as it is.
    time.sleep(3)


def change(home: Path, turn: int) -> None:
    """Give one of a hundred small files another content of the same size."""
    for number in range(turn, FILES, 100):
        rewrite(home / "many" / f"{number // 100:02}" / f"{number}.json", FILE_SIZE)
    time.sleep(3)


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that something takes."""
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def run(command: list[str]) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@contextlib.contextmanager
def master(cluster: Cluster, socket: Path) -> Iterator[list[str]]:
    """Hold an open connection for rsync."""
    words = cluster.ssh("-S", str(socket))
    run([*words, "-M", "-f", "-N", f"{USER}@127.0.0.1"])
    try:
        yield words
    finally:
        subprocess.run([*words, "-O", "exit", f"{USER}@127.0.0.1"], capture_output=True, check=True)


class Contest:
    """Both tools in turns, into directories of their own."""

    def __init__(self, cluster: Cluster, work: Path, repeat: int) -> None:
        self.cluster, self.work, self.repeat = cluster, work, repeat
        self.starts: list[float] = []

    def rsync(self, what: str, shell: list[str]) -> None:
        """Bring a directory with rsync."""
        source, target = f"{USER}@127.0.0.1:{self.cluster.home / what}/", self.work / "rsync" / what
        target.mkdir(parents=True, exist_ok=True)
        run(["rsync", "-a", "-e", " ".join(shell), source, f"{target}/"])

    def ours(self, what: str, host: SshHost) -> None:
        """Bring a directory with slurmeval."""
        host.get_tree(str(self.cluster.home / what), self.work / "slurmeval" / what)

    def scratch(self, what: str) -> None:
        """Bring a directory with slurmeval, in a process of its own."""
        command = [sys.executable, __file__, "--get", what, "--state", str(self.cluster.state),
                   "--work", str(self.work), "--begun", str(time.monotonic())]  # fmt: skip
        done = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.starts.append(float(done.stdout))

    def turns(self, name: str, what: str, before: Callable[[int], None]) -> list[str]:
        """Measure one case in both modes; return the rows of the table."""
        rows = []
        with (
            master(self.cluster, self.work / "ctl") as shell,
            contextlib.closing(self.cluster.host()) as host,
        ):
            host.run("true", timeout=60)
            modes = {
                "connected": (lambda: self.rsync(what, shell), lambda: self.ours(what, host)),
                "from scratch": (
                    lambda: self.rsync(what, self.cluster.ssh()),
                    lambda: self.scratch(what),
                ),
            }
            for number, (mode, tools) in enumerate(modes.items()):
                found: tuple[list[float], list[float]] = ([], [])
                self.starts.clear()
                for turn in range(self.repeat):
                    before(number * self.repeat + turn)
                    order = (0, 1) if turn % 2 else (1, 0)
                    for tool in order:
                        found[tool].append(timed(tools[tool]))
                theirs, ours = (statistics.median(each) for each in found)
                start = f"{statistics.median(self.starts):.2f} s" if self.starts else "-"
                rows.append(
                    f"| {name} | {mode} | {theirs:.2f} s | {ours:.2f} s | {start} "
                    f"| {ours / theirs:.2f} |"
                )
                print(rows[-1], *(f"{s:.2f}" for each in found for s in each), file=sys.stderr)
        return rows

    def cases(self, size: int, only: list[str]) -> list[str]:
        """Measure cases at the present delay."""

        def nothing(turn: int) -> None:
            """Leave all as it is."""

        def anew(what: str) -> Callable[[int], None]:
            def prepare(turn: int) -> None:
                fresh(self.work / "rsync" / what)
                fresh(self.work / "slurmeval" / what)

            return prepare

        small = f"{FILES:,} files of {FILE_SIZE >> 10} KiB"
        cases = {
            "large": (f"1 file, {size >> 20} MiB", "one", anew("one")),
            "small": (small, "many", anew("many")),
            "same": ("the same, nothing changed", "many", nothing),
            "changed": (
                "the same, 1 % changed",
                "many",
                lambda turn: change(self.cluster.home, turn),
            ),
        }
        rows = []
        for name in only:
            if name in ("same", "changed"):
                self.fill("many")
            rows += self.turns(*cases[name])
        return rows

    def fill(self, what: str) -> None:
        """Have a directory here already, by both tools."""
        self.rsync(what, self.cluster.ssh())
        self.scratch(what)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, help="where results go (default: a temporary one)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 50], help="ms a round trip")
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--get", help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.get:
        load_paramiko()
        for name in ("cli", "pull", "cluster.ssh_connect"):
            importlib.import_module(f"slurmeval.{name}")
        cluster = Cluster(args.state)
        print(time.monotonic() - args.begun)
        with contextlib.closing(cluster.host()) as host:
            Contest(cluster, args.work, 1).ours(args.get, host)
        return
    if shutil.which("rsync") is None:
        run(["apt-get", "install", "-qq", "-y", "rsync"])
    with contextlib.ExitStack() as stack:
        memory = tempfile.TemporaryDirectory(dir="/dev/shm")
        work = args.work or Path(stack.enter_context(memory))
        work.mkdir(parents=True, exist_ok=True)
        cluster = Cluster(Path(tempfile.mkdtemp(prefix="sc-bench-", dir="/var/tmp")))
        stack.callback(shutil.rmtree, cluster.state)
        stack.callback(cluster.script, "down")
        cluster.script("up")
        make_data(cluster.home, args.size_mib << 20)
        uid = cluster.home.stat().st_uid
        run(["chown", "-R", f"{uid}:{uid}", str(cluster.home / "one"), str(cluster.home / "many")])
        for delay in args.delays:
            cluster.script("delay", str(delay))
            rows = Contest(cluster, work, args.repeat).cases(args.size_mib << 20, args.only)
            print(f"\n{delay} ms added to each round trip:\n")
            print("| | connection | rsync | slurmeval | of it start | ratio |")
            print("|---|---|--:|--:|--:|--:|")
            print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
