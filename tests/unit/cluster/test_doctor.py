"""What the doctor makes of a cluster's answers; the commands are stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from slurmeval.cli import cli
from slurmeval.cluster.local import LocalHost
from slurmeval.config.schema import Config
from slurmeval.doctor import Finding, checks, examine, selected
from slurmeval.errors import AccessDenied, ConfigError, Unreachable

GOOD = {
    "sbatch": "echo slurm 22.05.8",
    "sinfo": "echo 'batch|up|1:00|3|gpu:8'; echo 'batch|up|1:00|1|gpu:4'; echo 'old|down|1:00|9|x'",
    "sacctmgr": "echo 'mine||normal,high'; echo 'ours||normal'",
    "srun": "echo '  --container-image=x'",
}

Examine = Callable[..., dict[str, list[Finding]]]


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Examines with stand-in commands and a configuration: dotted keys of run.env."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def probe(
        env: dict[str, object] | None = None,
        environ: dict[str, str] | None = None,
        skip: tuple[str, ...] = (),
        config: dict[str, object] | None = None,
        **commands: str,
    ) -> dict[str, list[Finding]]:
        for name, script in {**GOOD, **commands}.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        values = {"remote_job_dir": f"{tmp_path}/new/jobs", "partition": "batch", **(env or {})}
        made = Config.model_validate({**(config or {}), "run": {"env": values}})
        found: dict[str, list[Finding]] = {}
        for finding in examine(made, LocalHost(), environ or {}, wanted=selected((), skip)):
            found.setdefault(finding.check, []).append(finding)
        return found

    return probe


def test_a_cluster_that_is_well(probe: Examine, tmp_path: Path) -> None:
    found = probe({"account": "mine", "qos": "high", "nodes": 4})
    states = {name: finding.state for name, (finding,) in found.items()}
    assert list(states) == checks()
    assert {name for name, state in states.items() if state != "ok"} == {"checkpoint"}
    assert found["partition"][0].words == "batch: 4 nodes, time limit 1:00, gpu:8"
    assert found["disk"][0].words.endswith(f"GiB free in {tmp_path}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("check", "env", "commands", "words", "remedy"),
    [
        ("slurm", {}, {"sbatch": "exit 127"}, "no answer of sbatch", "PATH"),
        ("partition", {"partition": "bach"}, {}, "no partition bach", "Did you mean batch?"),
        ("partition", {"partition": "zzz"}, {}, "there are batch, old", "run.env.partition"),
        ("partition", {"partition": "old"}, {}, "it is down", "another"),
        ("partition", {"nodes": 5}, {}, "the job needs 5 nodes", "another"),
        ("partition", {"run_partition": "x"}, {}, "no partition x", "run.env.partition"),
        ("account", {"account": "theirs"}, {}, "not in the account theirs, but in mine, ours",
         "run.env.account"),
        ("account", {"account": "ours", "qos": "high"}, {}, "yours are normal", "run.env.qos"),
        ("container", {"container_image": "/x.sqsh"}, {"srun": "echo usage"}, "not installed",
         "pyxis"),
        ("image", {"container_image": "/no/x.sqsh"}, {}, "no file /no/x.sqsh", "enroot import"),
        ("disk", {"remote_job_dir": "/bin/sh/x"}, {}, "it is not a directory", "remote_job_dir"),
        ("disk", {}, {"df": "echo 'h'; echo '/dev/x 100 90 10 90% /'"}, "0.0 GiB free", "room"),
        ("python", {}, {"python3": "exit 127"}, "no python3", "setup_lines"),
    ],
)  # fmt: skip
def test_what_is_wrong_and_what_to_do(
    probe: Examine,
    check: str,
    env: dict[str, object],
    commands: dict[str, str],
    words: str,
    remedy: str,
) -> None:
    finding = probe(env, **commands)[check][0]
    assert finding.state == "failed"
    assert words in finding.words
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("check", "env", "commands", "words"),
    [
        ("partition", {}, {"sinfo": "echo down >&2; exit 1"}, "sinfo does not answer: down"),
        ("account", {"account": "mine"}, {"sacctmgr": "exit 1"}, "sacctmgr does not tell"),
        ("account", {"account": "mine"}, {"sacctmgr": "exit 0"}, "accounting lists nothing"),
        ("image", {"container_image": "nvcr.io/x:1"}, {}, "comes from a registry"),
        ("mounts", {"mounts": ["/:/a", "/no/such dir:/b"]}, {}, "login node: /no/such dir"),
        ("disk", {}, {"df": "exit 1"}, "df does not tell"),
    ],
)
def test_what_cannot_be_told_is_no_failure(
    probe: Examine, check: str, env: dict[str, object], commands: dict[str, str], words: str
) -> None:
    finding = probe(env, **commands)[check][0]
    assert finding.state == "unknown"
    assert words in finding.words


def test_secrets_are_named_and_never_shown(probe: Examine) -> None:
    found = probe(environ={"HF_TOKEN": "hidden"})
    assert found["secrets"][0].words == "set: HF_TOKEN; not set: WANDB_API_KEY"
    wandb = {"eval": {"export": {"wandb": {"project": "p"}}}}
    assert probe(environ={"HF_TOKEN": "x"}, config=wandb)["secrets"][0].state == "failed"
    assert "hidden" not in str(found)


def test_a_checkpoint_is_looked_up(probe: Examine, tmp_path: Path) -> None:
    def at(path: Path) -> Finding:
        return probe(config={"model": {"checkpoint_path": str(path)}})["checkpoint"][0]

    missing = at(tmp_path / "none")
    assert (missing.state, "does not exist" in missing.words) == ("failed", True)
    (tmp_path / "iter").mkdir()
    (tmp_path / "iter" / "run_config.yaml").write_text("model: {}\n")
    (tmp_path / "iter" / ".metadata").touch()
    assert at(tmp_path / "iter").state == "ok"


def test_checks_are_chosen(probe: Examine) -> None:
    found = probe(skip=("slurm", "disk"))
    assert {name for name, (f,) in found.items() if f.state == "skipped"} == {"slurm", "disk"}
    assert selected(("disk",), ()) == {"disk"}
    assert selected(("disk", "slurm"), ("slurm",)) == {"disk"}
    with pytest.raises(ConfigError) as caught:
        selected((), ("partitoin",))
    assert caught.value.hint == "Did you mean partition?"


class Away(LocalHost):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self, command, **keys):  # type: ignore[no-untyped-def]
        raise self.error


def test_without_a_connection_nothing_else_is_known() -> None:
    wanted = set(checks())
    found = examine(Config(), Away(Unreachable("refused", hint="look")), {}, wanted=wanted)
    states = {finding.check: finding.state for finding in found}
    assert list(states) == checks()
    assert states.pop("connection") == "failed"
    assert states.pop("secrets") == "ok"
    assert set(states.values()) == {"unknown"}
    error = AccessDenied("the host key of x is not known", hint="ssh-keyscan")
    found = examine(Config(), Away(error), {}, wanted=wanted)
    assert found[1] == Finding("host-key", "failed", error.message, "ssh-keyscan")
    found = examine(Config(), Away(AccessDenied("permission denied")), {}, wanted=wanted)
    assert (found[1].check, found[1].state) == ("host-key", "ok")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    assert run(cli, ["doctor", "--list"]).output.split() == checks()
    assert run(cli, ["doctor", "--profile", "local", "--only", "disc"]).exit_code == 2
    only = ["doctor", "--profile", "local", "--only", "python", "--only", "disk", "--json"]
    result = run(cli, only)
    assert result.exit_code == 0
    findings = json.loads(result.stdout)
    made = [finding["check"] for finding in findings if finding["state"] != "skipped"]
    assert made == ["connection", "python", "disk"]
    result = run(cli, ["doctor", "--profile", "local", "run.env.remote_job_dir=/bin/sh/x"])
    assert result.exit_code == 3
    assert "Set run.env.remote_job_dir" in result.output
