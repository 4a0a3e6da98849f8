"""The command line: thin commands over the logic below them.

Nothing heavy is imported here: what needs paramiko is imported by the command that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from slurmeval import __version__
from slurmeval.errors import ConfigError, SlurmevalError

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_CODES = """\b
Exit codes:
  0  ok
  1  the evaluation failed or is not valid
  2  usage or configuration error
  3  the cluster could not be reached, or refused
  4  results are incomplete"""


def config_options(command: Command) -> Command:
    """Add the options that choose a configuration."""
    options = [
        click.option(
            "-c",
            "--config",
            "configs",
            multiple=True,
            metavar="NAME|PATH",
            help="A shipped config or a YAML file; repeat to lay one over another.",
        ),
        click.option("--profile", metavar="NAME", help="A section of env.toml, or 'local'."),
        click.option(
            "--env-file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="The env.toml to read.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def overrides_argument(command: Command) -> Command:
    """Add the KEY=VALUE arguments."""
    return click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(command)


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="slurmeval")
def cli() -> None:
    """From a checkpoint to verified benchmark scores, on Slurm or on this machine."""


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
    """Print the resolved configuration."""
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
@click.argument("pattern", default="*")
def tasks(pattern: str) -> None:
    """List the known benchmarks whose name holds PATTERN."""
    from slurmeval.tasks import search

    found = search(pattern)
    if not found:
        raise ConfigError(f"no known benchmark matches {pattern!r}", hint="slurmeval tasks")
    for task in found:
        needs = f"  needs {', '.join(task.capabilities)}" if task.capabilities else ""
        click.echo(f"{task.name}  {task.harness}  {'/'.join(task.endpoint_types)}{needs}")


def tell(notes: list[str]) -> None:
    """Print notes and warnings on standard error."""
    for note in notes:
        click.echo(f"note: {note}", err=True)


def main() -> None:
    """Run the command line; every error that a user can meet ends in one message."""
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except SlurmevalError as error:
        click.echo(f"Error: {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
