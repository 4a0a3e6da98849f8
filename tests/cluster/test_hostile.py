"""Hostile values and secrets through the whole chain: rendered, sent over ssh, run by Slurm."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import LONG, RAY_STANDIN, STANDIN, until
from slurmcluster import SlurmCluster

pytestmark = pytest.mark.slurm

TEXT = """it's "q" \\ $HOME `touch x` $(touch x) ; touch x & | < > ( ) * ? # ! ~ %j {} é ∑"""
#: What is left of that for a path that pyxis mounts, and for a name that the evaluator knows.
MILD = "it's(a)job;touch&<x>|é#!~*?"
MODEL = "org/model-1.0@%j"
VARIABLES = {
    "PROBE_ALL": TEXT,
    "PROBE_LINES": "a\nb; touch x\n#SBATCH --uid=0\n",
    "PROBE_OPTION": "--help",
    "PROBE_EQUALS": "A=B C='D",
    "PROBE_COMMA": "a,b,",
}
SECRETS = {
    "WANDB_API_KEY": "wandb-4711-abcdef",
    "HF_TOKEN": """hf_it's "q" $HOME `touch x` $(touch x) \\ #!é""",
    "NGC_API_KEY": "nvapi-4711 second line\ntouch x",
}
IMAGE = "registry.example/hostile:1"
MOUNT = "/mnt/it's(a)mount"
RESULTS = f"results of {TEXT}"


def client(
    cluster: SlurmCluster, folder: Path, environment: dict[str, str], *arguments: str
) -> subprocess.Popen[str]:
    """Starts a command of the client."""
    return subprocess.Popen(
        [sys.executable, "-m", "slurmeval", *arguments],
        cwd=folder,
        env={**environment, "SLURMEVAL_KNOWN_HOSTS": str(cluster.known_hosts)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def configure(cluster: SlurmCluster, folder: Path, env: dict[str, Any], checkpoint: str) -> None:
    """Writes the profile and the configuration of a job into the client's directory."""
    profile = {
        "tunnel": "ssh",
        "host": cluster.host,
        "port": cluster.port,
        "user": cluster.user,
        "identity": str(cluster.identity),
        "partition": "batch",
        "mem": "2000",
        "gpus_per_node": 0,
        "secrets": list(SECRETS),
        **env,
    }
    # What JSON writes for text, numbers and lists of text, TOML reads.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in profile.items()]
    lines += ["[here.env_vars]"]
    lines += [
        f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in VARIABLES.items()
    ]
    (folder / "env.toml").write_text("[here]\n" + "\n".join(lines) + "\n")
    values = {
        "model": {"model_id": MODEL, "checkpoint_path": checkpoint, "tokenizer": "a/b"},
        "deploy": {"backend": "hf", "num_gpus": 0, "num_cpus_per_replica": 1},
        "eval": {"execution": {"output_dir": RESULTS}, "tasks": [LONG]},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))


def add_standins(job: Path) -> None:
    """Puts the stand-ins into a rendered job directory, as a person edits one."""
    shutil.copy(STANDIN / "deploy.py", job / "deploy.py")
    (job / "tools").mkdir()
    shutil.copy(STANDIN / "nemo_evaluator.py", job / "tools" / "nemo-evaluator.py")
    shutil.copy(STANDIN / "witness.py", job / "tools" / "nemo-evaluator")
    (job / "tools" / "nemo-evaluator").chmod(0o755)


def holders(directory: Path) -> dict[Path, int]:
    """Returns the files that hold a secret, as it is or quoted for a shell, and their modes."""
    found = {}
    values = [value.encode() for value in SECRETS.values()]
    values += [value.replace(b"'", b"'\\''") for value in values]
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in names):
            try:
                if not path.is_symlink() and any(value in path.read_bytes() for value in values):
                    found[path] = stat.S_IMODE(path.stat().st_mode)
            except OSError:
                continue  # a socket, or gone meanwhile
    return found


def shown(cluster: SlurmCluster, job: str) -> str:
    """Returns what anybody may see of a job: Slurm's words, and all commands of its machines."""
    texts = [
        cluster.exec("login", "scontrol", "show", *what).stdout
        for what in (("job", "-dd", job), ("step", job), ("hostnames", "node1"))
    ]
    texts.append(cluster.exec("login", "scontrol", "write", "batch_script", job, "-").stdout)
    for machine in ("login", *(f"node{k}" for k in range(1, cluster.nodes + 1))):
        commands = 'for f in /proc/[0-9]*/cmdline; do tr "\\0" " " < "$f"; echo; done 2>/dev/null'
        texts.append(cluster.exec(machine, "sh", "-c", commands).stdout)
    return "\n".join(texts)


@pytest.fixture
def image(slurm_cluster: SlurmCluster) -> Iterator[Path]:
    """An image that sets a variable of the job."""
    path = slurm_cluster.make_image(IMAGE, {"PROBE_ALL": "the image's own"})
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("contained", [False, True], ids=["node", "container"])
def test_values_arrive_and_secrets_stay_secret(
    contained: bool,
    slurm_cluster: SlurmCluster,
    image: Path,
    user_dir: Path,
    tmp_path: Path,
    client_env: dict[str, str],
) -> None:
    cluster = slurm_cluster
    # Slurm takes a backslash and a percent sign in the path of a log for its own.
    remote = user_dir / (MILD if contained else re.sub(r"[\\%]", "", TEXT))
    checkpoint = f"/no {TEXT}\ntouch x\n"
    tools = f"$SLURM_SUBMIT_DIR/tools:{RAY_STANDIN}/bin:{Path(sys.executable).parent}"
    env: dict[str, Any] = {
        "setup_lines": [
            f'export PATH="{tools}:$PATH" PYTHONPATH={RAY_STANDIN}/lib',
            'export STANDIN_DIR="$SLURM_SUBMIT_DIR/ray"; mkdir -p "$STANDIN_DIR"',
        ]
    }
    if contained:
        source = user_dir / MILD.replace("job", "model")
        source.mkdir()
        (source / "file").write_text("through the mount\n")
        env |= {"container": IMAGE, "mounts": [f"{source}:{MOUNT}"]}
        checkpoint = str(source)
    configure(cluster, tmp_path, {**env, "remote_job_dir": str(remote)}, checkpoint)
    environment = {**client_env, **SECRETS}
    job = tmp_path / f"a {MILD}"
    where = ("--profile", "here", "--env-file", "env.toml")
    render = client(
        cluster, tmp_path, environment, "render", "-c", "./job.yaml", *where, "-o", job.name
    )
    said, _ = render.communicate(timeout=120)
    assert render.returncode == 0, said
    add_standins(job)
    assert holders(job) == {}

    submit = client(
        cluster, tmp_path, environment, "-vv", "submit", job.name, *where, "--results", f"at {MILD}"
    )
    try:
        seen_json = f"*/{RESULTS}/long/seen.json"
        until("the job", lambda: submit.poll() is not None or any(remote.glob(seen_json)))
        assert submit.poll() is None, submit.communicate()[0]
        (there,) = remote.iterdir()
        number = (there / ".job-id").read_text().strip()
        public = shown(cluster, number)
        secret_files = holders(user_dir) | holders(tmp_path)
        on_nodes = [holders(cluster.state / "machines"), holders(cluster.state / "spool")]
        (there / "enough").touch()
        said, _ = submit.communicate(timeout=120)
    finally:
        submit.kill()
    assert submit.returncode == 0, said
    # The secrets are in one place, which is gone at the end, and nobody sees them.
    assert secret_files == {there / ".secrets.env": 0o600}
    assert on_nodes == [{}, {}]
    assert holders(user_dir) | holders(tmp_path) | holders(cluster.state / "log") == {}
    for value in SECRETS.values():
        assert all(line not in public + said for line in value.splitlines() if len(line) > 9)

    # Every value is there as it was given, and none was taken for a command.
    seen = json.loads((there / "eval_results" / "long" / "seen.json").read_text())
    assert seen["probes"] == VARIABLES
    assert seen["secrets"] == {
        name: hashlib.sha256(value.encode()).hexdigest() for name, value in SECRETS.items()
    }
    assert seen["image"] == (f"{IMAGE}\n" if contained else None)
    assert seen["mount"] == ("through the mount\n" if contained else None)
    assert (there / RESULTS / "summary.json").exists()
    (home,) = tmp_path.glob("at */*/eval_results/summary.json")
    assert json.loads(home.read_text())["state"] == "ok"
    config = yaml.safe_load((there / "config.yaml").read_text())
    assert config["run"]["env"]["env_vars"] == VARIABLES
    assert config["model"]["checkpoint_path"] == checkpoint
    assert list(user_dir.rglob("x")) + list(tmp_path.rglob("x")) == []
    assert not (cluster.home / "x").exists() and not Path("x").exists()
