"""Commands about benchmarks and their scores; they contact no cluster."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slurmeval.errors import ConfigError, ResultsIncomplete

if TYPE_CHECKING:
    from slurmeval.tasks import TaskInfo

_JOB = (
    "JOB: a directory with results, or a job submitted from here: a name, its unique beginning, "
    "a job id, or 'last'."
)


class _WithPattern(click.Group):
    """A group whose first word may also be an argument of its command ``list``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``list`` before words that are no command."""
        if not any(word in ("-h", "--help") for word in args) and (
            not args or args[0] not in self.commands
        ):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_WithPattern)
def tasks() -> None:
    """Look up benchmarks.

    tasks [PATTERN] lists them, tasks show NAME explains one.

    \b
      slurmeval tasks                    all that are known
      slurmeval tasks arc                those whose name holds it
      slurmeval tasks 'adlr_*_5_shot'    those that match
      slurmeval tasks show hellaswag     what it needs, and its parameters
    """


@tasks.command("list")
@click.argument("pattern", default="*")
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def list_tasks(pattern: str, as_json: bool) -> None:
    """List the known benchmarks whose name holds PATTERN, or matches it."""
    from slurmeval.tasks import search

    found = search(pattern)
    if not found:
        raise ConfigError(f"no known benchmark matches {pattern!r}", hint="slurmeval tasks")
    if as_json:
        click.echo(json.dumps([_facts(task) for task in found], indent=2))
        return
    width = max(len(task.name) for task in found)
    for task in found:
        needs = f"  needs {', '.join(task.capabilities)}" if task.capabilities else ""
        endpoint = "/".join(task.endpoint_types)
        click.echo(f"{task.name.ljust(width)}  {task.harness}  {endpoint}{needs}")


@tasks.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
def show(name: str, as_json: bool) -> None:
    """Explain a benchmark: what it needs, its image, its parameters and their defaults."""
    from slurmeval.tasks import find, launcher_version, needs

    task = find(name)
    if as_json:
        click.echo(json.dumps(_facts(task), indent=2))
        return
    click.echo(f"{task.name}, a benchmark of {task.harness}")
    for title, text in (
        ("type", task.type),
        ("endpoint", " or ".join(task.endpoint_types)),
        ("image", f"{task.container} ({task.arch})"),
        ("digest", task.digest),
    ):
        click.echo(f"  {title:<9} {text}")
    click.echo("it needs")
    for line in needs(task):
        click.echo(f"  {line}")
    click.echo("params, with their defaults")
    for parameter in sorted(task.parameters):
        click.echo(f"  {parameter:<28} {_default(task, parameter)}")
    click.echo(f"as of nemo-evaluator-launcher {launcher_version()}")


def _default(task: TaskInfo, parameter: str) -> str:
    section = task.defaults.get("extra", {}) if "." in parameter else task.defaults
    value = section.get(parameter.rpartition(".")[2])
    return "-" if value is None else json.dumps(value)


def _facts(task: TaskInfo) -> dict[str, object]:
    from slurmeval.tasks import needs

    facts = asdict(task)
    facts["parameters"] = sorted(task.parameters)
    return {"type": task.type, **facts, "needs": needs(task)}


@click.command(epilog=_JOB)
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "markdown", "json", "csv", "html"]),
    default="table",
    show_default=True,
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option("--all-metrics", is_flag=True, help="Not only each benchmark's primary metric.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write to this file instead of standard output.",
)
def report(
    jobs: tuple[str, ...], form: str, as_json: bool, all_metrics: bool, output: Path | None
) -> None:
    """Show a job's scores, or several jobs side by side.

    The first job is what the others are compared with.

    \b
      slurmeval report last
      slurmeval report base-job tuned-job --format html -o report.html
    """
    from slurmeval.report import FORMATS
    from slurmeval.results import compare, load

    comparison = compare([load(job) for job in jobs], all_metrics=all_metrics)
    text = FORMATS["json" if as_json else form](comparison)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResultsIncomplete(f"cannot write {output}: {error.strerror or error}") from error
    click.echo(f"{output}: {len(text.encode())} bytes")


@click.command(epilog=_JOB)
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@click.option(
    "--to",
    "destinations",
    type=click.Choice(["local", "wandb", "mlflow"]),
    multiple=True,
    help="Where to; repeat for several. Default: what the job's eval.export names.",
)
@click.option("--format", "formats", type=click.Choice(["json", "csv"]), multiple=True)
@click.option("--entity", help="W&B.")
@click.option("--project", help="W&B.")
@click.option("--tracking-uri", help="MLflow: a server, or sqlite:////path/of/a/file.db")
@click.option("--experiment", help="MLflow.")
@click.option("--json", "as_json", is_flag=True, help="Print what happened as JSON.")
def export(
    jobs: tuple[str, ...],
    destinations: tuple[str, ...],
    formats: tuple[str, ...],
    entity: str | None,
    project: str | None,
    tracking_uri: str | None,
    experiment: str | None,
    as_json: bool,
) -> None:
    """Write results to files, Weights & Biases or MLflow.

    Results that are at home; again, if need be. The same job becomes the same run there, so that a
    repetition replaces. A failed export changes no verdict.

    \b
      slurmeval export last --to wandb --project my-project
      WANDB_MODE=offline slurmeval export last --to wandb --project my-project
      slurmeval export last --to mlflow --tracking-uri sqlite:////home/me/mlflow.db
    """
    from slurmeval import export as exporting
    from slurmeval.results import load

    done = []
    for job in jobs:
        results = load(job)
        given = {
            "local": list(formats),
            "wandb": {"entity": entity, "project": project},
            "mlflow": {"tracking_uri": tracking_uri, "experiment": experiment},
        }
        settings = exporting.overridden(results.export, given)
        names = list(destinations) or exporting.wanted(settings)
        if not names:
            raise ConfigError(
                f"{results.label}: no destination is configured for it", hint="--to says where"
            )
        done += [(results.label, entry) for entry in exporting.export(results, names, settings)]
    if as_json:
        click.echo(json.dumps([{"job": label, **asdict(entry)} for label, entry in done], indent=2))
    for label, entry in done if not as_json else []:
        click.echo(f"{label}: {exporting.line_of(entry)}")
    if any(entry.state != "ok" for _, entry in done):
        sys.exit(exporting.ExportFailed.exit_code)


COMMANDS = (tasks, report, export)
