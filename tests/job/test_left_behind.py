"""What a job finds that has outlived it, and what it says of a step that said nothing."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurmeval.config.schema import Config
from slurmeval.plan import make_plan
from slurmeval.render import render

Left = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def script() -> str:
    config = Config.model_validate(
        {
            "model": {"checkpoint_path": "/ckpt"},
            "run": {"env": {"executor": "local"}},
            "deploy": {"backend": "hf", "num_gpus": 0},
            "eval": {"tasks": [{"name": "arc", "type": "lm-evaluation-harness.arc"}]},
        }
    )
    return render(config, make_plan(config))["job.sbatch"].text


@pytest.fixture
def sweep(script: str, tmp_path: Path) -> Callable[[str], None]:
    """Runs the script that removes what a job has on a node."""
    found = re.search(r"<<'SWEEP'\n(.*?)\nSWEEP\n", script, re.DOTALL)
    assert found
    (tmp_path / "sweep.sh").write_text(found[1] + "\n")
    names = {"NODE_DIR": "node", "RUN_DIR": "run", "LOG_DIR": "logs"}
    env = {name: str(tmp_path / path) for name, path in names.items()}

    def run(when: str) -> None:
        command = ["bash", str(tmp_path / "sweep.sh"), when]
        subprocess.run(command, env={**env, "PATH": "/usr/bin:/bin", "JOB_ID": "7"}, check=True)

    return run


@pytest.fixture
def left(tmp_path: Path) -> Iterator[Left]:
    """Leaves a process with a mark, a title, or an open file of the node's directory."""
    processes = []
    (tmp_path / "node" / "r").mkdir(parents=True)

    def leave(title: str = "sleep", file: str = "elsewhere", **env: str) -> subprocess.Popen[bytes]:
        with (tmp_path / file).open("wb") as stream:
            process = subprocess.Popen(
                [title, "600"], executable="/bin/sleep", env=env, stdout=stream
            )
        processes.append(process)
        return process

    yield leave
    for process in processes:
        process.kill()
        process.wait()


def test_what_outlived_its_parents_is_ended(
    sweep: Callable[[str], None], left: Left, tmp_path: Path
) -> None:
    node = str(tmp_path / "node")
    ray = [left(SLURMEVAL_RAY=node), left("ray::IDLE", "node/r/log")]
    task = left(SLURMEVAL_TASK=node)
    others = [
        left(SLURMEVAL_RAY=f"{node}2", SLURMEVAL_TASK=f"{node}2"),
        left("ray::IDLE"),
        left("tail", "node/r/other"),
    ]
    sweep("ray")
    assert [process.wait(30) for process in ray] == [-9, -9]
    assert task.poll() is None
    assert not Path(node).exists()
    sweep("end")
    assert task.wait(30) == -9
    assert [process.poll() for process in others] == [None, None, None]


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("srun: lacks support\nit broke\nsrun: error: node1: Killed\n", "it broke"),
        ("it broke\nslurmstepd-n1: error: *** STEP 1.0 CANCELLED ***\n\n", "it broke"),
        (
            "srun: lacks support\nsrun: error: Task launch failed on node8\nsrun: error: failed\n",
            "srun: error: Task launch failed on node8",
        ),
        ("srun: lacks support\n", ""),
    ],
)
def test_the_line_that_tells_most(script: str, tmp_path: Path, log: str, line: str) -> None:
    found = re.search(r"^last_line\(\) \{.*?^\}$", script, re.DOTALL | re.MULTILINE)
    assert found
    (tmp_path / "log").write_text(log)
    told = subprocess.run(
        ["bash", "-c", f'{found[0]}\nlast_line "$1"', "bash", str(tmp_path / "log")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == f"{line}\n"


@pytest.mark.parametrize(
    "ephemeral", ["1024 65535", "2000 65000", "9000 65000", "10000 65535", "32768 60999"]
)
def test_every_range_of_outgoing_ports_leaves_a_block(
    script: str, tmp_path: Path, ephemeral: str
) -> None:
    (tmp_path / "range").write_text(ephemeral + "\n")
    functions = re.findall(
        r"^(?:take_lock|claim_ports)\(\) .*?^\}", script, re.DOTALL | re.MULTILINE
    )
    text = "\n".join(functions).replace(
        "/proc/sys/net/ipv4/ip_local_port_range", f"{tmp_path}/range"
    )
    done = subprocess.run(
        ["bash", "-uc", f'{text}\nclaim_ports && echo "$PORTS"'],
        env={
            "PATH": "/usr/bin:/bin",
            "JOB_ID": "7",
            "NODE_TMP": str(tmp_path),
            "NODE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert 2000 <= int(done.stdout or 0) <= 60000, done.stderr
