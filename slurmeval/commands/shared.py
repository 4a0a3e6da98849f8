"""What several commands share: options, questions, notes."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from slurmeval.pull import Outcome

Command = TypeVar("Command", bound=Callable[..., Any])


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


def ask(question: str, visible: bool) -> str:
    """Ask the user for a passphrase or a one-time code."""
    return str(click.prompt(question, hide_input=not visible, prompt_suffix=" ", err=True))


def tell(notes: Iterable[str]) -> None:
    """Print notes and warnings on standard error."""
    for note in notes:
        click.echo(f"note: {note}", err=True)


def put_outcome(outcome: Outcome) -> None:
    """Print how a submission ended, as the last of the JSON lines."""
    facts = {"event": "outcome", **dataclasses.asdict(outcome)}
    click.echo(json.dumps(facts, default=str))


class _Notes(logging.Handler):
    """Log records on standard error: warnings as notes, the rest with the part that speaks."""

    def emit(self, record: logging.LogRecord) -> None:
        head = "note" if record.levelno >= logging.WARNING else record.name
        click.echo(f"{head}: {record.getMessage()}", err=True)


def speak_up(verbose: int) -> None:
    """Log to standard error: warnings; with 1 what is done; with 2 each remote command.

    Only slurmeval's own records: paramiko's would hold what a login asks and answers.
    """
    logger = logging.getLogger("slurmeval")
    logger.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG))
    logger.handlers = [_Notes()]
