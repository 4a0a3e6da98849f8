"""``slurmeval doctor``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import click

from slurmeval.commands.shared import ask, config_options, overrides_argument, tell


@click.command()
@config_options
@click.option("--only", multiple=True, metavar="CHECK", help="Make only this check; repeat it.")
@click.option("--skip", multiple=True, metavar="CHECK", help="Leave this check out; repeat it.")
@click.option("--list", "listed", is_flag=True, help="List the checks; contact nobody.")
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
@overrides_argument
def doctor(
    configs: tuple[str, ...],
    profile: str | None,
    env_file: Path | None,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    listed: bool,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Check what could keep a job from running.

    Connection, Slurm, files, secrets. Exit status 3 where a check failed. "unknown" is a question
    without an answer, not a failure.

    \b
      slurmeval doctor -c sft --profile my-cluster
      slurmeval doctor --profile my-cluster --only connection --only host-key
    """
    from slurmeval import doctor as logic
    from slurmeval.cluster.access import Access
    from slurmeval.cluster.connect import connect
    from slurmeval.config.load import load

    if listed:
        for name in logic.checks():
            click.echo(name)
        return
    wanted = logic.selected(only, skip)
    loaded = load(
        configs, profile=profile, overrides=overrides, env_file=env_file, resolve_model=False
    )
    tell(loaded.notes)
    host = connect(Access.of(loaded.config.run.env), prompt=ask)
    try:
        environ = {**os.environ, **loaded.secret_values}
        findings = logic.examine(loaded.config, host, environ, wanted=wanted)
    finally:
        host.close()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            click.echo(f"{finding.state:8}{finding.check:12}{finding.words}".rstrip())
            if finding.remedy and finding.state in ("failed", "unknown"):
                click.echo(f"{'':20}{finding.remedy}")
    sys.exit(3 if any(finding.state == "failed" for finding in findings) else 0)
