"""deploy.py on a Ray cluster of this machine, run as a user does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
DEPLOY = Path(__file__).resolve().parents[2] / "slurmeval" / "deploy.py"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class LocalRay:
    """A Ray cluster of one node, on the loopback only.

    Args:
        folder: A short directory for Ray's sockets.
        cpus: Logical CPUs.
        gpus: Logical GPUs.
        env: Further variables of all its processes.
    """

    def __init__(self, folder: Path, cpus: int, gpus: int = 0, **env: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "2",
            **env,
            "PYTHONUNBUFFERED": "1",
        }
        self.log = folder / "ray.log"
        command = [BIN / "ray", "start", "--head", "--block", "--include-dashboard=false"]
        command += [f"--port={self.address.split(':')[1]}", "--node-ip-address=127.0.0.1"]
        command += [f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--temp-dir={folder / 'r'}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, start_new_session=True
            )
        self.wait("Ray", lambda: "started" in self.log.read_text())

    def wait(self, what: str, ready: Callable[[], bool], timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{what} is not there:\n{self.log.read_text()}")
            time.sleep(0.1)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


class Deployment:
    """One run of deploy.py."""

    def __init__(self, ray: LocalRay, folder: Path, checkpoint: Path | str, *flags: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, free_port()
        self.endpoint_file, self.log_file = folder / "endpoint.json", folder / "serve.log"
        command = [sys.executable, DEPLOY, "--address", ray.address, "--port", str(self.port)]
        command += ["--checkpoint_path", checkpoint, "--num_cpus_per_replica", "1", *flags]
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=ray.env, stdout=log, stderr=log
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait(self, ready: Callable[[], bool], timeout: float = 300) -> None:
        """Wait for something while deploy.py lives."""
        deadline = time.monotonic() + timeout
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"deploy.py: {self.process.poll()}\n{self.log}")
            time.sleep(0.1)

    def wait_said(self, pattern: str, timeout: float = 300) -> re.Match[str]:
        """Wait until the log holds a pattern and return the match."""
        self.wait(lambda: re.search(pattern, self.log) is not None, timeout)
        found = re.search(pattern, self.log)
        assert found
        return found

    def endpoint(self) -> dict[str, Any]:
        """Wait for the endpoint and return what its file says."""
        self.wait(self.endpoint_file.exists)
        values: dict[str, Any] = json.loads(self.endpoint_file.read_text())
        return values

    def ask(self, **body: Any) -> dict[str, Any]:
        """Return the first choice of a completion."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions/",
            json.dumps({"prompt": "The answer is", "max_tokens": 1, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            choice: dict[str, Any] = json.load(response)["choices"][0]
        return choice

    def status_of(self, **body: Any) -> int:
        """Return the HTTP status of a completion."""
        try:
            self.ask(**body)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def end(self, timeout: float = 60) -> int:
        """Wait for the end of deploy.py and return its exit code."""
        return self.process.wait(timeout)

    def stop(self) -> int:
        """Tell deploy.py to stop as a job does."""
        (self.folder / "done").touch()
        return self.end()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End it in any case, for the sake of the next test."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(60)


def actors(pattern: str) -> list[int]:
    """Return the processes of this machine whose title matches a pattern."""
    listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    rows = (line.split(None, 1) for line in listing.stdout.splitlines()[1:])
    return [int(pid) for pid, title in rows if re.match(pattern, title)]
