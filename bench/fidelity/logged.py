"""Run a program with its output in a file."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def run(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """Run a program in the log's directory; append all of its output to the log.

    Raises:
        RuntimeError: It failed; the message has the end of the log.
    """
    with log.open("a") as output:
        done = subprocess.run(
            command, env=environment, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT
        )
    if done.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(command)}\n{end}\n({log})")
