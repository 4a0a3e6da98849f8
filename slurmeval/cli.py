"""The command line: thin commands over the logic below them.

Nothing heavy is imported here: what needs paramiko is imported by the command that needs it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slurmeval import __version__
from slurmeval.commands.doctor import doctor
from slurmeval.commands.jobs import COMMANDS
from slurmeval.commands.results import COMMANDS as RESULT_COMMANDS
from slurmeval.commands.shared import (
    ask,
    config_options,
    overrides_argument,
    put_outcome,
    speak_up,
    tell,
)
from slurmeval.errors import ConfigError, SlurmevalError

if TYPE_CHECKING:
    from slurmeval.cluster.host import Host
    from slurmeval.config.schema import Config

EXIT_CODES = """\b
Exit codes:
  0  ok
  1  the evaluation failed or is not valid
  2  usage or configuration error
  3  the cluster could not be reached, or refused
  4  results are incomplete"""


#: The commands as ``--help`` lists them.
SECTIONS = {
    "Before a job": ("config", "plan", "render", "tasks", "doctor"),
    "Jobs": ("submit", "list", "status", "logs", "pull", "cancel", "resubmit", "rm"),
    "Scores": ("report", "export"),
}


class _Sections(click.Group):
    """A group that lists its commands in the order in which they are used."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list of commands for each section."""
        width = max(map(len, self.commands))
        for title, names in SECTIONS.items():
            rows = [
                (name.ljust(width), self.commands[name].get_short_help_str(64)) for name in names
            ]
            with formatter.section(title):
                formatter.write_dl(rows)


@click.group(
    cls=_Sections, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="slurmeval")
@click.option(
    "-v", "--verbose", count=True, help="Say what is done; -vv: each remote command. No secrets."
)
def cli(verbose: int) -> None:
    """From a checkpoint to verified benchmark scores, on Slurm or on this machine.

    \b
      slurmeval submit -c demo --profile local   a first look, on this machine
      slurmeval doctor --profile my-cluster      is all there that a job needs?
      slurmeval submit -c sft --profile my-cluster run.model=/checkpoints/my-model
      slurmeval report last
    """
    speak_up(verbose)


for command in (*COMMANDS, doctor, *RESULT_COMMANDS):
    cli.add_command(command)


@cli.command()
@config_options
@click.option("--origin", is_flag=True, help="Say beside each value where it was written.")
@overrides_argument
def config(
    configs: tuple[str, ...],
    profile: str | None,
    env_file: Path | None,
    origin: bool,
    overrides: tuple[str, ...],
) -> None:
    """Print the resolved configuration.

    \b
      slurmeval config -c sft --profile my-cluster --origin
    """
    from slurmeval.config.load import load, render_yaml

    loaded = load(
        configs, profile=profile, overrides=overrides, env_file=env_file, resolve_model=False
    )
    tell(loaded.notes)
    click.echo(render_yaml(loaded, origin=origin), nl=False)


@cli.command()
@config_options
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR|-",
    help="The job directory to write, or - for one self-contained script on standard output.",
)
@overrides_argument
def render(
    configs: tuple[str, ...],
    profile: str | None,
    env_file: Path | None,
    output: str,
    overrides: tuple[str, ...],
) -> None:
    """Write the job: a batch script and the files that it uses. Edit it, submit it.

    \b
      slurmeval render -c sft --profile my-cluster -o job      a directory
      slurmeval render -c sft --profile my-cluster -o - | sbatch
    """
    from slurmeval import jobdir
    from slurmeval.config.load import load
    from slurmeval.plan import make_plan
    from slurmeval.render import SCRIPT, render, render_script

    loaded = load(configs, profile=profile, overrides=overrides, env_file=env_file)
    plan = make_plan(loaded.config)
    tell([*loaded.notes, *plan.warnings])
    files = render(loaded.config, plan)
    if output == "-":
        click.echo(render_script(loaded.config, plan, carry=files), nl=False)
        return
    jobdir.write(files, Path(output))
    start = f"sbatch {SCRIPT}" if plan.slurm else f"bash {SCRIPT}"
    click.echo(f"{output}: {len(files)} files")
    click.echo(f"run it:  cd {output} && {start}")


@cli.command()
@config_options
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
@overrides_argument
def plan(
    configs: tuple[str, ...],
    profile: str | None,
    env_file: Path | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Explain what would run where.

    Nodes, GPUs, replicas and ranks, CPUs, requests, benchmarks; contacts nobody.

    \b
      slurmeval plan -c sft --profile my-cluster
      slurmeval plan -c sft --profile my-cluster run.env.nodes=4
    """
    from slurmeval import explain
    from slurmeval.config.load import load
    from slurmeval.plan import make_plan

    loaded = load(
        configs, profile=profile, overrides=overrides, env_file=env_file, resolve_model=False
    )
    config = explain.without_open_model(loaded.config)
    made = make_plan(config)
    tell([*loaded.notes, *made.warnings])
    if as_json:
        click.echo(json.dumps(explain.facts(config, made), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for line in explain.words(config, made):
        console.print(line, markup=False, soft_wrap=not console.is_terminal)
    for table in explain.tables(config, made):
        console.print(table)


@cli.command()
@config_options
@click.option("--detach", is_flag=True, help="Return as soon as the scheduler has the job.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent and run; contact nobody.")
@click.option("--test-only", is_flag=True, help="Ask Slurm what it makes of the job; send nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what happens as JSON lines.")
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("eval_results"),
    show_default=True,
    help="Results come home to a directory of the job's name below this one.",
)
@click.argument("arguments", nargs=-1, metavar="[DIR] [KEY=VALUE]...")
def submit(
    configs: tuple[str, ...],
    profile: str | None,
    env_file: Path | None,
    detach: bool,
    dry_run: bool,
    test_only: bool,
    as_json: bool,
    results: Path,
    arguments: tuple[str, ...],
) -> None:
    """Send a job, follow it, and bring its results home.

    Ctrl-C stops the following, not the job, and says how to return.

    With DIR, a directory that `slurmeval render` made goes as it stands, hand edits and all; the
    profile then says only where it goes.

    \b
      slurmeval submit -c sft --profile my-cluster            wait for the scores
      slurmeval submit -c sft --profile my-cluster --detach   return at once
      slurmeval submit -c sft --profile my-cluster --test-only
      slurmeval submit job --profile my-cluster               an edited job directory
    """
    from slurmeval import jobdir
    from slurmeval.cluster.access import Access
    from slurmeval.cluster.connect import connect
    from slurmeval.config.load import load, render_yaml
    from slurmeval.plan import make_plan
    from slurmeval.render import render
    from slurmeval.submit import preview
    from slurmeval.submit import submit as send
    from slurmeval.submit import test_only as ask_slurm
    from slurmeval.ui import make_ui

    directory, overrides = split_arguments(arguments)
    if profile is None:
        raise ConfigError(
            "--profile says where the job runs", hint="--profile local is always there"
        )
    if directory and configs:
        raise ConfigError(f"{directory} goes as it stands: -c has no effect on it")
    loaded = load(
        configs,
        profile=profile,
        overrides=overrides,
        env_file=env_file,
        attached=not detach,
        resolve_model=directory is None,
    )
    env = Access.of(loaded.config.run.env)
    host = None if dry_run else connect(env, prompt=ask)
    with tempfile.TemporaryDirectory(prefix="slurmeval-") as scratch:
        if directory:
            tell(loaded.notes)
            job, name = directory, loaded.config.run.name or directory.resolve().name
        else:
            settled = settle_checkpoint(loaded.config, host)
            plan = make_plan(settled)
            tell([*loaded.notes, *plan.warnings])
            job, name = Path(scratch) / "job", plan.job_name
            jobdir.write(render(settled, plan), job)
        if host is None:
            if not directory:
                click.echo(render_yaml(loaded))
            for line in preview(job, env, name=name, results=results):
                click.echo(line)
            return
        if test_only:
            words = ask_slurm(job, env, name=name, host=host)
            click.echo(json.dumps({"accepted": True, "words": words}) if as_json else words)
            return
        if env.executor == "local":
            find_programs_beside_python()
        outcome = send(
            job,
            env,
            name=name,
            detach=detach,
            results=results,
            ui=make_ui(as_json=as_json),
            profile=profile,
            host=host,
            environ={**os.environ, **loaded.secret_values},
        )
    if as_json:
        put_outcome(outcome)
    sys.exit(outcome.exit_code)


def split_arguments(arguments: tuple[str, ...]) -> tuple[Path | None, list[str]]:
    """Return the job directory, if one is given, and the KEY=VALUE texts.

    Raises:
        ConfigError: More than one directory, or one that does not exist.
    """
    overrides = [text for text in arguments if "=" in text and not Path(text).is_dir()]
    rest = [text for text in arguments if text not in overrides]
    if len(rest) > 1:
        raise ConfigError(
            f"one job directory is sent at a time, not {len(rest)}: {', '.join(rest)}"
        )
    if rest and not Path(rest[0]).is_dir():
        raise ConfigError(f"{rest[0]}: neither a job directory nor KEY=VALUE")
    return (Path(rest[0]) if rest else None), overrides


def settle_checkpoint(config: Config, host: Host | None) -> Config:
    """Return the configuration with the checkpoint that its path means, looked up where it lies."""
    from slurmeval.checkpoint import applied, locate, to_be_located

    path = to_be_located(config)
    if path is None or host is None:
        return config
    env = config.run.env
    mounts = env.mounts if env.runtime != "none" else ()
    found = locate(host, path, backend=config.deploy.backend, mounts=mounts)
    tell(found.notes)
    return applied(config, found)


def find_programs_beside_python() -> None:
    """Let a local job find ray and nemo-evaluator in the environment that holds slurmeval."""
    beside = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])


def _louder(context: click.Context, parameter: click.Parameter, count: int) -> None:
    if count:
        speak_up(context.find_root().params["verbose"] + count)


def _verbose_everywhere(group: click.Group) -> None:
    """Let -v stand behind a command's name too."""
    for each in group.commands.values():
        if isinstance(each, click.Group):
            _verbose_everywhere(each)
            continue
        option = click.Option(
            ["-v", "--verbose"], count=True, expose_value=False, callback=_louder,
            help="Say what is done; -vv: each remote command.",
        )  # fmt: skip
        each.params.append(option)


_verbose_everywhere(cli)


def main() -> None:
    """Run the command line; every error that a user can meet ends in one message."""
    try:
        sys.exit(cli.main(prog_name="slurmeval", standalone_mode=False) or 0)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except SlurmevalError as error:
        click.echo(f"Error: {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
