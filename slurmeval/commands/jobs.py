"""Commands about jobs that were submitted from here."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from slurmeval.commands.shared import ask, put_outcome

if TYPE_CHECKING:
    from slurmeval.cluster.host import Host
    from slurmeval.jobs import Standing

_JOB = "JOB: a name, its unique beginning, a job id, or 'last'."
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows]  # fmt: skip


@click.command("list")
@as_json_option
def list_jobs(as_json: bool) -> None:
    """List the jobs submitted from here.

    As they were seen last; contacts nobody.
    """
    from slurmeval import record
    from slurmeval.jobs import facts_of

    known = record.records()
    if as_json:
        click.echo(json.dumps([facts_of(each) for each in known], indent=2))
        return
    if not known:
        click.echo("nothing was submitted from here yet")
        return
    head = ["NAME", "JOB", "STATE", "SEEN", "SYNCED", "PROFILE"]
    rows = [
        [
            each.name,
            each.job_id or "-",
            each.state or ("?" if each.sent else "NOT STARTED"),
            each.checked or "-",
            each.synced or "-",
            each.profile or "-",
        ]
        for each in known
    ]
    for line in _columns([head, *rows]):
        click.echo(line)


@click.command(epilog=_JOB)
@click.argument("jobs", nargs=-1, metavar="[JOB]...")
@click.option("--watch", is_flag=True, help="Look again until all have ended; Ctrl-C stops that.")
@click.option("--every", default=5.0, show_default=True, help="Seconds between two looks.")
@as_json_option
def status(jobs: tuple[str, ...], watch: bool, every: float, as_json: bool) -> None:
    """Ask how jobs stand.

    Without JOB, all that have not ended; in one round trip a cluster. With --json and --watch,
    each look is one line. Exit status 3 where nobody could be asked.

    \b
      slurmeval status
      slurmeval status last --watch
    """
    from slurmeval.jobs import chosen, look

    records = chosen(jobs)
    if not records:
        click.echo("[]" if as_json else "nothing was submitted from here yet")
        return
    show = _Board(as_json, watch)
    hosts: dict[str, Host] = {}
    try:
        while True:
            found = look(records, prompt=ask, hosts=hosts)
            show(found)
            if not (watch and any(standing.live for standing in found)):
                break
            records = [standing.record for standing in found]
            time.sleep(max(every, 0.2))
    except KeyboardInterrupt:
        click.echo("the jobs go on", err=True)
        sys.exit(130)
    finally:
        for host in hosts.values():
            host.close()
    sys.exit(3 if any(standing.state == "UNKNOWN" for standing in found) else 0)


class _Board:
    """Shows looks: in place on a terminal, else what has changed."""

    def __init__(self, as_json: bool, watch: bool) -> None:
        self._as_json, self._watch = as_json, watch
        self._last: dict[str, list[str]] = {}

    def __call__(self, found: list[Standing]) -> None:
        if self._as_json:
            facts: list[Any] = [standing.facts() for standing in found]
            click.echo(json.dumps(facts, indent=None if self._watch else 2))
            return
        if self._watch and sys.stdout.isatty():
            click.clear()
            self._last = {}
        for standing in found:
            words = standing.words()
            if self._last.get(standing.record.name) != words:
                click.echo("\n".join(words))
                self._last[standing.record.name] = words


@click.command(epilog=_JOB)
@click.argument("job", default="last")
@click.option("--phase", metavar="PHASE", help="model, ray, serve, evaluate or verdict.")
@click.option("--task", metavar="NAME", help="A benchmark's own log.")
@click.option(
    "-n", "--lines", default="100", show_default=True, metavar="N|all", help="The last N lines."
)
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends; Ctrl-C stops that.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
def logs(
    job: str, phase: str | None, task: str | None, lines: str, follow: bool, as_json: bool
) -> None:
    """Print a job's log.

    The script's own (of each element, for an array), a phase's, or a benchmark's.

    \b
      slurmeval logs last -f
      slurmeval logs last --phase serve -n all
      slurmeval logs last --task hellaswag
    """
    from slurmeval import record
    from slurmeval.cluster.text import printable
    from slurmeval.joblogs import stream

    if phase and task:
        raise click.UsageError("--phase and --task exclude each other")
    if lines != "all" and not lines.isdecimal():
        raise click.BadParameter(f"{lines!r} is neither a number nor 'all'", param_hint="-n")
    last = None
    try:
        for chunk in stream(
            record.find(job),
            phase=phase,
            task=task,
            lines=None if lines == "all" else int(lines),
            follow=follow,
            prompt=ask,
            tell=lambda text: click.echo(f"note: {text}", err=True),
        ):
            text = printable(chunk.text)
            if as_json:
                click.echo(json.dumps({"log": chunk.name, "text": text}))
                continue
            several = phase is not None or last is not None or chunk.name.startswith("job_")
            if chunk.name != last and several:
                click.echo(f"==> {chunk.name} <==")
            last = chunk.name
            click.echo(text, nl=not text.endswith("\n"))
    except KeyboardInterrupt:
        sys.exit(130)


@click.command(epilog=_JOB)
@click.argument("job", default="last")
@as_json_option
def pull(job: str, as_json: bool) -> None:
    """Bring a job's results home, verified.

    Those of a running job as far as they are. What is here already is not brought again; a file
    that you have changed is kept. Exit status 4 and a list where something is missing.

    \b
      slurmeval pull last
    """
    from slurmeval.pull import pull_job
    from slurmeval.ui import make_ui

    outcome = pull_job(job, ui=make_ui(as_json=as_json), prompt=ask)
    if as_json:
        put_outcome(outcome)
    sys.exit(outcome.exit_code)


@click.command(epilog=_JOB)
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
def cancel(jobs: tuple[str, ...]) -> None:
    """End jobs; their scripts clean up.

    \b
      slurmeval cancel last
    """
    from slurmeval.jobs import cancel as end
    from slurmeval.jobs import chosen
    from slurmeval.ui import make_ui

    for record in chosen(jobs):
        end(record, ui=make_ui(), prompt=ask)


@click.command(epilog=_JOB)
@click.argument("job", default="last")
@click.option("--keep-results", is_flag=True, help="Valid benchmarks are not run again.")
@as_json_option
def resubmit(job: str, keep_results: bool, as_json: bool) -> None:
    """Start a job again, as a job of its own.

    From its files on the cluster. After a lost answer, it looks for the job first and starts it
    only where it is not there.

    \b
      slurmeval resubmit last --keep-results
    """
    from slurmeval import record
    from slurmeval.jobs import facts_of
    from slurmeval.jobs import resubmit as again
    from slurmeval.ui import make_ui

    ui = make_ui(as_json=as_json)
    started = again(record.find(job), ui=ui, keep=keep_results, prompt=ask)
    if as_json:
        click.echo(json.dumps({"event": "outcome", **facts_of(started)}))
    else:
        ui.line(f"follow and bring home its results: slurmeval pull {started.name}")


@click.command(epilog=_JOB)
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@click.option("--remote", is_flag=True, help="Remove its directory on the cluster too.")
@click.option("--force", is_flag=True, help="Forget it though it may live; asks nobody.")
def rm(jobs: tuple[str, ...], remote: bool, force: bool) -> None:
    """Forget jobs that have ended; results at home stay.

    \b
      slurmeval rm last --remote
    """
    from slurmeval.jobs import chosen, forget
    from slurmeval.ui import make_ui

    for record in chosen(jobs):
        forget(record, remote=remote, force=force, ui=make_ui(), prompt=ask)


COMMANDS = (list_jobs, status, logs, pull, cancel, resubmit, rm)
