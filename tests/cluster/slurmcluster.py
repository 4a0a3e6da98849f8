"""The handle that the tests have on a cluster of scripts/slurm-cluster."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "scripts" / "slurm-cluster"
JOB_UID = 59999
SYSTEM_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc")
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}


def wait_for(what: str, ready: Callable[[], bool], timeout: float = 60.0) -> None:
    """Polls until ``ready()`` is true; fails the test with ``what`` after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout:.0f} s for {what}")
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Returns ports of 127.0.0.1 that nobody listens on now."""
    socks = [socket.socket() for _ in range(count)]
    try:
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]
    finally:
        for sock in socks:
            sock.close()


@dataclass
class SlurmCluster:
    """A running cluster. Machines are ``login``, ``jump`` and ``node1`` to ``nodeN``.

    Attributes:
        state: Directory of the cluster's state, at the same path inside the machines.
        nodes: Number of compute nodes.
        accounting: ``none`` or ``slurmdbd``.
        host: Address of the login machine's sshd; it forbids forwarding.
        port: Its port.
        jump_port: Port on ``host`` of the jump machine's sshd; from there the login machine is
            ``login``, port 22.
        user: The unprivileged user that jobs run as.
        identity: That user's private key.
        known_hosts: File with the key of both sshd.
        home: Shared home directory of the user, at the same path everywhere.
    """

    state: Path
    nodes: int
    accounting: str
    port: int
    jump_port: int
    host: str = "127.0.0.1"
    user: str = "tester"
    uid: int = JOB_UID
    identity: Path = field(init=False)
    known_hosts: Path = field(init=False)
    home: Path = field(init=False)

    def __post_init__(self) -> None:
        self.identity = self.state / "keys" / "id_ed25519"
        self.known_hosts = self.state / "keys" / "known_hosts"
        self.home = self.state / "home" / self.user

    def script(
        self, *args: str, check: bool = True, timeout: float = 300.0, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs scripts/slurm-cluster on this cluster."""
        done = subprocess.run(
            [str(SCRIPT), *args],
            env={**os.environ, "SLURM_CLUSTER_DIR": str(self.state), **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"slurm-cluster {' '.join(args)}: exit status {done.returncode}\n"
                f"{done.stdout}{done.stderr}"
            )
        return done

    def exec(
        self,
        machine: str,
        *command: str | Path,
        as_user: bool = False,
        check: bool = True,
        timeout: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on a machine: as root, or in the user's home as the user."""
        user = ["-u"] if as_user else []
        return self.script("exec", *user, machine, *map(str, command), check=check, timeout=timeout)

    def user_exec(
        self, *command: str | Path, check: bool = True, timeout: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the login machine as the user."""
        return self.exec("login", *command, as_user=True, check=check, timeout=timeout)

    def crash(self, machine: str) -> None:
        """Pulls the power of ``login`` or a node."""
        self.script("crash", machine)

    def boot(self, machine: str) -> None:
        """Switches a crashed machine on; returns when its daemons are started."""
        self.script("boot", machine)

    def delay(self, milliseconds: int) -> None:
        """Adds to the round trip of the ssh connections that are opened from now on."""
        self.script("delay", str(milliseconds))

    def idle(self) -> int:
        """Returns the number of idle nodes."""
        listing = self.exec("login", "sinfo", "-h", "-N", "-p", "batch", "-o", "%T").stdout
        return listing.split().count("idle")

    def wait_idle(self, timeout: float = 90.0) -> None:
        """Waits until every node is idle."""
        wait_for("all nodes to be idle", lambda: self.idle() == self.nodes, timeout)

    def job_state(self, job: str) -> str:
        """Returns the state of a job that ended less than five minutes ago, or still runs."""
        listing = self.exec("login", "squeue", "-h", "-t", "all", "-j", job, "-o", "%T").stdout
        return listing.strip()

    def wait_job(self, job: str, *states: str, timeout: float = 120.0) -> str:
        """Waits until a job is in one of ``states`` (default: ended) and returns its state."""
        wanted = set(states) or ENDED
        wait_for(
            f"job {job} to be {' or '.join(sorted(wanted))}",
            lambda: self.job_state(job) in wanted,
            timeout,
        )
        return self.job_state(job)

    def sbatch(self, script: str, directory: Path, *options: str) -> str:
        """Submits a script from ``directory`` as the user and returns the job's id."""
        path = directory / "test.sbatch"
        path.write_text(script)
        return self.user_exec(
            "sbatch", "--parsable", f"--chdir={directory}", *options, path
        ).stdout.strip()

    def ssh(self, *command: str) -> list[str]:
        """Returns the argument list of an ssh client that logs in to the login machine."""
        return [
            "ssh",
            "-F/dev/null",
            "-oBatchMode=yes",
            f"-oUserKnownHostsFile={self.known_hosts}",
            f"-i{self.identity}",
            f"-p{self.port}",
            f"{self.user}@{self.host}",
            *command,
        ]

    def give(self, path: Path) -> Path:
        """Hands a file or a whole directory over to the user."""
        for each in [path, *path.rglob("*")]:
            os.chown(each, self.uid, self.uid, follow_symlinks=False)
        return path

    def make_image(self, name: str, environment: Mapping[str, str] | None = None) -> Path:
        """Makes what the pyxis stand-in takes for an image, with the system and the tests' Python.

        Args:
            name: A registry's name, e.g. ``registry.example/group/image:tag``.
            environment: Variables that the image sets.

        Returns:
            The directory, which serves as an image by its path too. Inside a container of it the
            file ``/image-name`` holds ``name``.
        """
        image = self.state / "images" / re.sub("[/:#]", "_", name)
        image.mkdir()
        (image / "image-name").write_text(f"{name}\n")
        system = [path for path in map(Path, SYSTEM_PATHS) if path.exists()]
        paths = [*system, REPO, sys.prefix, sys.base_prefix]
        (image / ".host-paths").write_text("".join(f"{path}\n" for path in paths))
        lines = [f"{key}={value}\n" for key, value in (environment or {}).items()]
        (image / ".environment").write_text("".join(lines))
        return image

    def container_starts(self, job: str) -> list[dict[str, str]]:
        """Returns the containers that tasks of a job made or joined, as the stand-in recorded them.

        The keys are node, step, action (``create`` or ``join``) and the options' names.
        """
        starts = []
        for node in (f"node{k}" for k in range(1, self.nodes + 1)):
            log = self.exec(node, "cat", "/run/pyxis-standin/log", check=False).stdout
            for line in log.splitlines():
                fields = dict(word.split("=", 1) for word in line.split())
                if fields.pop("job") == job:
                    starts.append({"node": node, **fields})
        return starts

    def silent_container_failures(self, silent: bool) -> None:
        """Makes srun return 0 when a container cannot start, as pyxis 0.24 did, or ends that."""
        flag = self.state / "pyxis" / "silent-failure"
        if silent:
            flag.touch()
        else:
            flag.unlink(missing_ok=True)

    def fresh_dir(self) -> Path:
        """Makes an empty directory in the shared home that belongs to the user."""
        return self.give(Path(tempfile.mkdtemp(prefix="t-", dir=self.home)))
