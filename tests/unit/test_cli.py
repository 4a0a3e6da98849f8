"""The command line: light imports, clear messages, documented exit codes, nothing half-written."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from slurmeval.cli import SECTIONS, cli
from slurmeval.errors import SlurmevalError

HEAVY = ("paramiko", "ray", "torch", "nemo_evaluator", "wandb", "mlflow", "rich")
MODEL = "model.checkpoint_path=/ckpt/iter_0000100"


def slurmeval(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the client as a user does, without any profile of this machine's user."""
    return subprocess.run(
        [sys.executable, "-m", "slurmeval", *arguments],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["render", "-c", "sft", MODEL, "-o", "-"], ["config", "-c", "tiny"]]
)
def test_nothing_heavy_is_imported(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom slurmeval.cli import main\n"
        f"sys.argv = ['slurmeval', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1] == "[]", ended.stderr


def test_a_look_at_a_job_needs_no_schema() -> None:
    code = "import sys, slurmeval.cli, slurmeval.jobs, slurmeval.pull, slurmeval.cluster.ssh\n"
    code += "sys.exit(str(sorted({'pydantic', 'jinja2'} & set(sys.modules))))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stderr == b"[]\n"


def test_help_names_the_exit_codes(tmp_path: Path) -> None:
    text = slurmeval("--help", cwd=tmp_path).stdout
    for line in ("0  ok", "1  the evaluation failed", "2  usage", "3  the cluster", "4  results"):
        assert line in text


def test_every_command_has_help() -> None:
    runner = CliRunner()
    for name in cli.commands:
        shown: Result = runner.invoke(cli, [name, "--help"])
        assert shown.exit_code == 0 and len(shown.output.splitlines()) > 3, name


def test_the_list_of_commands_is_whole_and_fits() -> None:
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(cli.commands)
    shown = CliRunner().invoke(cli, ["--help"]).output
    assert "..." not in shown.partition("\n")[2]
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["rendr"], 2, "render"),
        (["render", "-c", "sftt", "-o", "x"], 2, "did you mean sft"),
        (["render", "-c", "sft", MODEL, "-o", "x", "eval.paralelism=3"], 2, "parallelism"),
        (["render", MODEL, "-o", "x", "deploy.num_gpus=7"], 2, "num_gpus"),
        (["render", MODEL, "-o", "x", "eval.tasks=[{name: hellaswagg}]"], 2, "hellaswag"),
        (["render", "-o", "x"], 2, "checkpoint"),
        (["submit", "-c", "sft"], 2, "--profile"),
        (["submit", "--profile", "nope", "-c", "sft"], 2, "nope"),
        (["submit", "--profile", "local", "nowhere"], 2, "nowhere"),
        (["submit", "--profile", "local", "-c", "demo", "model.checkpoint_path=/nope"], 2, "/nope"),
        (["tasks", "no-such-benchmark"], 2, "no-such-benchmark"),
        (["pull"], 2, "submitted"),
    ],
)
def test_a_mistake_ends_in_one_message(
    arguments: list[str], code: int, words: str, tmp_path: Path
) -> None:
    ended = slurmeval(*arguments, cwd=tmp_path)
    assert ended.returncode == code, ended.stderr
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.glob("*")) == []


def test_a_directory_and_a_script_are_rendered(tmp_path: Path) -> None:
    ended = slurmeval("render", "-c", "sft", MODEL, "-o", "job", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "sbatch job.sbatch" in ended.stdout
    alone = slurmeval("render", "-c", "sft", MODEL, "-o", "-", cwd=tmp_path).stdout
    assert alone.startswith("#!/bin/bash\n") and "unpack" in alone
    again = slurmeval("render", "-c", "sft", MODEL, "-o", "-", cwd=tmp_path).stdout
    assert again == alone


def test_a_dry_run_contacts_nobody_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "env.toml").write_text(
        '[far]\ntunnel = "ssh"\nhost = "does.not.exist.example"\nremote_job_dir = "/lustre/me"\n'
    )
    ended = slurmeval("submit", "-c", "sft", MODEL, "--profile", "far", "--dry-run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "job.sbatch" in ended.stdout and "sbatch --parsable" in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["env.toml"]


def test_errors_have_documented_exit_codes() -> None:
    def subclasses(kind: type[SlurmevalError]) -> set[type[SlurmevalError]]:
        return {kind} | {leaf for sub in kind.__subclasses__() for leaf in subclasses(sub)}

    assert {kind.exit_code for kind in subclasses(SlurmevalError)} <= {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("words", "level"),
    [
        (["list"], "WARNING"),
        (["-v", "list"], "INFO"),
        (["list", "-v"], "INFO"),
        (["-v", "list", "-v"], "DEBUG"),
        (["list", "-vv"], "DEBUG"),
        (["tasks", "show", "hellaswag", "-v"], "INFO"),
    ],
)
def test_verbose_stands_before_or_behind_the_command(
    words: list[str], level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    logger = logging.getLogger("slurmeval")
    before = (logger.level, logger.handlers)
    try:
        assert CliRunner().invoke(cli, words).exit_code == 0
        assert logging.getLevelName(logger.level) == level
    finally:
        logger.level, logger.handlers = before
