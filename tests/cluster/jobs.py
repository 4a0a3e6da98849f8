"""Jobs of the real job script on the test cluster, for the tests that break them."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from slurmcluster import ENDED, REPO, SlurmCluster

from slurmeval.cluster.access import Access
from slurmeval.cluster.scheduler import JobState
from slurmeval.cluster.slurm import Slurm
from slurmeval.cluster.ssh import SshHost
from slurmeval.config.schema import Config
from slurmeval.plan import make_plan
from slurmeval.render import render
from slurmeval.submit import secrets_file

STANDIN = Path(__file__).parent / "standin"
#: A Ray that starts at once and does nothing.
RAY_STANDIN = REPO / "bench" / "bringup" / "standin"
#: A benchmark that the stand-in evaluator finishes at once, and one that ends when it may.
QUICK: dict[str, Any] = {
    "name": "quick",
    "type": "lm-evaluation-harness.quick",
    "check_extra": False,
}
LONG: dict[str, Any] = {
    "name": "long",
    "type": "lm-evaluation-harness.long",
    "check_extra": False,
    "params": {"extra": {"until": "enough"}},
}
#: Generous: other work may share the machine.
DEADLINES = {"ray": 400, "serve": 400, "task": 400, "verdict": 100, "shutdown": 10}


def until(what: str, ready: Callable[[], Any], seconds: float = 120.0, pause: float = 0.4) -> Any:
    """Polls until ``ready()`` is true and returns its value; each question takes its time."""
    deadline = time.monotonic() + seconds
    while not (value := ready()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s for {what}")
        time.sleep(pause)
    return value


@dataclass
class Ended:
    """What a job's end looks like.

    Attributes:
        state: Slurm's state of the job.
        exit_code: Slurm's exit code and signal, ``1:0``.
        first: What a person reads first: the first line of failure.txt, without the time; the last
            one of the job's log where there is no such file.
        seconds: From the fault to the end of the job.
        left: What it left on its nodes and in its directory though it should not.
        log: What the job printed.
        parts: ``real`` where deploy.py and nemo-evaluator ran, else ``stand-ins``; whether Ray was
            one too.
    """

    state: str
    exit_code: str
    first: str
    seconds: float
    left: list[str]
    log: str
    parts: str


@dataclass
class Job:
    """A job directory in the user's home, and the job that ran from it."""

    cluster: SlurmCluster
    directory: Path
    nodes: tuple[str, ...]
    parts: str = "stand-ins"
    id: str = ""
    broken: float = field(default_factory=time.monotonic)

    def path(self, name: str) -> Path:
        """Returns a file of the job directory."""
        return self.directory / name

    def submit(self, *options: str) -> Job:
        """Submits the job as a person does."""
        self.cluster.give(self.directory)
        done = self.cluster.user_exec(
            "bash",
            "-c",
            'cd "$0" && sbatch --parsable "$@" job.sbatch',
            self.directory,
            *options,
        )
        self.id = done.stdout.strip()
        return self

    def status(self) -> dict[str, Any]:
        """Returns the content of status.json; empty before there is one."""
        try:
            content: dict[str, Any] = json.loads(self.path("status.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return content

    def must_run(self) -> bool:
        """Fails the test where the job has ended, and is no reason to wait no longer."""
        if self.status().get("phase") in {"failed", "done"}:
            pytest.fail(f"job {self.id} has ended:\n{self.log()}")
        return False

    def show(self) -> str:
        """Returns what ``scontrol show job`` says."""
        return self.cluster.exec("login", "scontrol", "show", "job", "-o", self.id).stdout

    def log(self) -> str:
        """Returns what the job printed."""
        path = self.path(f"slurm-{self.id}.out")
        return path.read_text() if path.exists() else ""

    def wait_phase(self, phase: str, detail: str = "") -> None:
        """Waits for a phase of the job, and for some words in its detail."""

        def reached() -> bool:
            status = self.status()
            there = status.get("phase") == phase and detail in status["detail"]
            return there or self.must_run()

        until(f"job {self.id} to be in {phase} {detail}", reached, 500)

    def wait_task(self, task: str, state: str, attempt: int = 0) -> None:
        """Waits until a benchmark is in a state."""

        def reached() -> bool:
            status = self.status()
            there = bool(status.get("tasks", {}).get(task) == state)
            return (there and status["attempt"] == attempt) or self.must_run()

        until(f"benchmark {task} of job {self.id} to be {state}", reached, 500)

    def wait_answers(self, task: str, count: int = 3) -> None:
        """Waits until a benchmark has got some answers."""
        until(
            f"{count} answers to {task} of job {self.id}",
            lambda: self.status().get("progress", {}).get(task, [0])[0] >= count or self.must_run(),
            500,
        )

    def wait_requests(self, task: str) -> None:
        """Waits until the real evaluator has got an answer; it goes on within the second."""
        path = self.path(f"eval_results/{task}/cache/responses/cache.db")

        def answered() -> bool:
            if not path.exists():
                return self.must_run()
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as base:
                # Between the file and its table there is a moment.
                tables = base.execute("SELECT name FROM sqlite_master").fetchall()
                return ("Cache",) in tables and bool(
                    base.execute("SELECT count(*) FROM Cache").fetchone()[0]
                )

        until(f"an answer to {task} of job {self.id}", answered, 500, 0.1)

    def processes(self, node: str, pattern: str = "") -> dict[int, str]:
        """Returns the user's processes on a node, by their id; the node is this job's alone."""
        user = str(self.cluster.uid)  # ps ends with 1 where there is none
        words = ("ps", "-ww", "-u", user, "-o", "pid=,args=")  # xdist's COLUMNS would cut them
        lines = self.cluster.exec(node, *words, check=False).stdout
        found = dict(line.split(None, 1) for line in lines.splitlines())
        return {int(pid): args for pid, args in found.items() if re.search(pattern, args)}

    def environment(self, node: str, pattern: str) -> str:
        """Returns the environments of the user's processes that a pattern finds, as one text."""
        pids = self.processes(node, pattern)
        assert pids, f"no process {pattern} on {node}"
        files = [f"/proc/{pid}/environ" for pid in pids]
        return self.cluster.exec(node, "cat", *files, check=False).stdout

    def signal(self, node: str, pattern: str, name: str = "KILL") -> None:
        """Sends a signal to the processes of a node that a pattern finds: the fault."""
        pids = self.processes(node, pattern)
        assert pids, f"no process {pattern} on {node}"
        self.fault("kill", f"-{name}", *map(str, pids), machine=node)

    def fault_by(self, break_it: Callable[[], object]) -> None:
        """Does what breaks the job."""
        self.broken = time.monotonic()
        break_it()

    def fault(self, *command: str, machine: str = "login") -> None:
        """Runs, as root, the command that breaks the job."""
        self.fault_by(lambda: self.cluster.exec(machine, *command))

    def look_at_home(self) -> JobState:
        """Asks for the job's state over SSH, as the client does."""
        env = Access(
            tunnel="ssh",
            host=self.cluster.host,
            port=self.cluster.port,
            user=self.cluster.user,
            identity=str(self.cluster.identity),
        )
        host = SshHost(env)
        try:
            return Slurm(host).poll(self.id, str(self.directory), log_offset=-1).state
        finally:
            host.close()

    def enough(self) -> None:
        """Lets ``LONG`` end."""
        self.path("enough").touch()

    def machines(self) -> list[str]:
        """Returns the nodes where the job runs, the head first."""
        found = re.search(r" NodeList=(\S+)", self.show())
        assert found
        return self.cluster.exec("login", "scontrol", "show", "hostnames", found[1]).stdout.split()

    def summary(self) -> dict[str, Any]:
        """Returns the content of summary.json."""
        content: dict[str, Any] = json.loads(self.path("eval_results/summary.json").read_text())
        return content

    def end(self, timeout: float = 300.0, nodes: Sequence[str] | None = None) -> Ended:
        """Waits for the job's end, and looks at what it left on its nodes."""
        state = until(
            f"the end of job {self.id}",
            lambda: (
                found := re.search(r"JobState=(\w+)", self.show()),
                found and found[1] in ENDED and found[1],
            )[-1],
            timeout,
        )
        seconds = time.monotonic() - self.broken
        code = re.search(r" ExitCode=(\S+)", self.show())
        return Ended(
            state,
            code[1] if code else "",
            self.first_line(),
            seconds,
            self.left(self.nodes if nodes is None else nodes),
            self.log(),
            self.parts,
        )

    def first_line(self) -> str:
        """Returns what a person reads first."""
        failure = self.path("failure.txt")
        lines = failure.read_text().splitlines() if failure.is_file() else []
        lines = lines[:1] or self.log().splitlines()[-1:] or [""]
        return re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", lines[0])

    def left(self, nodes: Sequence[str]) -> list[str]:
        """Returns the user's processes and files on nodes, and what should not stay elsewhere."""
        found = []
        for node in nodes:
            found += [f"{node}: {args}" for args in self.processes(node).values()]
            files = self.cluster.exec(
                node, "find", "/tmp", "/dev/shm", "-user", str(self.cluster.uid)
            ).stdout
            found += [f"{node}: {path}" for path in files.splitlines()]
        for name in ("run", ".secrets.env", ".status.json"):
            found += [name] if self.path(name).exists() else []
        return found


class Lab:
    """A cluster whose nodes are lent to one test at a time, and the demo's model on it."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster = cluster
        self._free = [f"node{k}" for k in range(1, cluster.nodes + 1)]
        self._changed = threading.Condition()
        self._demo: Path | None = None

    @contextmanager
    def lend(self, count: int) -> Iterator[tuple[str, ...]]:
        """Lends nodes that no other test uses."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) >= count)
            nodes = tuple(self._free[:count])
            del self._free[:count]
        try:
            yield nodes
        finally:
            with self._changed:
                self._free = sorted([*self._free, *nodes])
                self._changed.notify_all()

    def demo(self) -> Path:
        """Returns the demo's directory in the user's home."""
        with self._changed:
            if self._demo is None:
                from slurmeval import demo

                target = self.cluster.home / "demo"
                self._demo = demo.make(target)
                self.cluster.give(target)
        return self._demo

    def job(
        self,
        nodes: tuple[str, ...],
        tasks: Sequence[Mapping[str, Any]],
        *,
        real: bool = False,
        ray: bool = True,
        secrets: Mapping[str, str] | None = None,
        count: int | None = None,
        path: str = "",
        directory: Path | None = None,
        run: Mapping[str, Any] | None = None,
        env: Mapping[str, Any] | None = None,
        **sections: Mapping[str, Any],
    ) -> Job:
        """Writes a job directory.

        Args:
            nodes: Where the job may run.
            tasks: The benchmarks.
            real: Serve the demo's model with deploy.py and evaluate it with nemo-evaluator; else
                with the stand-ins.
            ray: Start the real Ray; else a stand-in for it.
            secrets: Secrets that travel with the job.
            count: How many of the nodes the job takes; all by default.
            path: A directory that the job's PATH begins with.
            directory: The job directory; a fresh one by default.
            run: Further keys of the section ``run``.
            env: Further keys of ``run.env``.
            **sections: Further keys of ``model``, ``deploy`` and ``eval``.
        """
        directory = directory or self.cluster.fresh_dir()
        tools = directory / "tools"
        search = [path, "$SLURM_SUBMIT_DIR/tools", str(Path(sys.executable).parent), "$PATH"]
        setup = [f"export PATH={':'.join(filter(None, search))}"]
        if not ray:
            setup += [
                f"export PATH={RAY_STANDIN}/bin:$PATH PYTHONPATH={RAY_STANDIN}/lib",
                "export STANDIN_DIR=$SLURM_SUBMIT_DIR/ray-${SLURM_RESTART_COUNT:-0}",
                'mkdir -p "$STANDIN_DIR"',
            ]
        others = {f"node{k}" for k in range(1, self.cluster.nodes + 1)} - set(nodes)
        model = str(self.demo() / "model") if real else str(directory)
        values: dict[str, Any] = {
            "run": {
                "deadlines": DEADLINES,
                **(run or {}),
                "env": {
                    "nodes": count or len(nodes),
                    "partition": "batch",
                    "mem": "7000",
                    "time": "00:30:00",
                    "exclude": ",".join(sorted(others)) or None,
                    "requeue": False,
                    "secrets": list(secrets or {}),
                    **(env or {}),
                    "setup_lines": setup + list((env or {}).get("setup_lines", [])),
                },
            },
            "model": {
                "checkpoint_path": model,
                "tokenizer": model,
                "model_id": "slurmeval_demo",
                **sections.get("model", {}),
            },
            "deploy": {
                "backend": "hf",
                "num_gpus": 0,
                "num_cpus_per_replica": 1,
                **sections.get("deploy", {}),
            },
            "eval": {
                "parallelism": 4,
                "request_timeout": 60,
                "tasks": list(tasks),
                **sections.get("eval", {}),
            },
        }
        config = Config.model_validate(values)
        for name, file in render(config, make_plan(config)).items():
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(file.text)
        if not real:
            tools.mkdir()
            shutil.copy(STANDIN / "deploy.py", directory / "deploy.py")
            evaluator = shutil.copy(STANDIN / "nemo_evaluator.py", tools / "nemo-evaluator")
            Path(evaluator).chmod(0o755)
        for name, content in secrets_file(list(secrets or {}), secrets or {}).items():
            (directory / name).write_bytes(content)
            (directory / name).chmod(0o600)
        parts = "real" if real else "stand-ins" if ray else "stand-ins, also for Ray"
        return Job(self.cluster, directory, nodes, parts)

    def demo_task(self, kind: str = "choice", samples: int = 16) -> dict[str, Any]:
        """Returns one of the demo's benchmarks."""
        name = f"slurmeval_demo_{kind}"
        return {
            "name": name,
            "type": f"lm-evaluation-harness.{name}",
            "include_path": str(self.demo() / "tasks"),
            "params": {"limit_samples": samples, "extra": {"num_fewshot": 0}},
        }
