"""Bringing results home, and what they say about the job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from slurmeval import manifest
from slurmeval import record as records
from slurmeval.cluster.connect import connect, scheduler_of
from slurmeval.cluster.host import Host, Prompt, Transfer
from slurmeval.cluster.scheduler import JobState, Snapshot
from slurmeval.cluster.text import printable
from slurmeval.errors import ClusterError, ResultsIncomplete, SlurmevalError
from slurmeval.follow import Ui
from slurmeval.record import Record

#: What comes home of a job directory.
INCLUDE = ("eval_results", "logs", "status.json", "failure.txt", "job.log", "slurm-*.out")
SUMMARY = Path("eval_results", "summary.json")
_LISTED = 5


@dataclass(frozen=True)
class Outcome:
    """How a submission ended, or where it stands.

    Attributes:
        record: The record's name.
        job_id: The scheduler's id.
        state: The job's state.
        exit_code: What the command returns: 0, 1, 3 or 4 as documented, 130 after Ctrl-C.
        reason: The verdict in words.
        results: The local directory of the results, where there are any.
        summary: The content of ``summary.json``, where it came home.
    """

    record: str
    job_id: str
    state: JobState
    exit_code: int
    reason: str
    results: Path | None = None
    summary: dict[str, Any] | None = None


def pull(host: Host, remote_dir: str, target: Path, *, live: bool = False) -> Transfer:
    """Bring the results, the logs and the status of a job home, verified.

    Args:
        host: Where the job ran.
        remote_dir: Its job directory.
        target: The local directory, usually ``<results>/<record name>``.
        live: Whether the job goes on: what it listed then is of an earlier attempt.

    Raises:
        ResultsIncomplete: Files are missing or do not match; what did arrive was verified.
    """
    transfer = host.get_tree(remote_dir, target, include=INCLUDE)
    if live:
        return transfer
    wrong = manifest.differing(manifest.results_manifest(target), manifest.read_record(target))
    if names := [printable(name) for name in wrong if name not in transfer.kept]:
        listed = "".join(f"\n    {name}" for name in names[:_LISTED])
        more = f"\n    and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        raise ResultsIncomplete(
            f"{len(names)} file(s) in {target} are not what the job listed at its end:"
            f"{listed}{more}",
            hint=f"They changed or went since, on the cluster: {remote_dir}/"
            f"{manifest.RESULTS_MANIFEST} has their checksums.",
        )
    return transfer


def status_of(
    record: Record, *, prompt: Prompt | None = None, host: Host | None = None
) -> Snapshot:
    """Ask how a recorded job stands.

    Raises:
        ClusterError: There is no connection, or no answer.
    """
    env = record.access
    host = host or connect(env, prompt=prompt)
    if record.job_id is None:
        return Snapshot(JobState.UNKNOWN, None, "the scheduler never gave an id", None, "", 0)
    return scheduler_of(env, host).poll(record.job_id, record.remote_dir, log_offset=-1)


def pull_job(job: str, *, ui: Ui, prompt: Prompt | None = None) -> Outcome:
    """Bring a recorded job's results home: ``slurmeval pull JOB``.

    Raises:
        ConfigError: No such record.
        ClusterError: There is no connection.
        ResultsIncomplete: Files are missing or do not match.
    """
    record = records.find(job)
    host = connect(record.access, prompt=prompt)
    try:
        snapshot = status_of(record, host=host)
        return bring_home(host, record, snapshot, ui)
    finally:
        host.close()


def bring_home(host: Host, record: Record, snapshot: Snapshot, ui: Ui) -> Outcome:
    """Pull, tell what happened, and judge."""
    target = Path(record.results)
    transfer = pull(host, record.remote_dir, target, live=snapshot.state.live)
    _bring_log(host, record, target, ui)
    records.update(record, synced=records.now())
    ui.line(f"brought  {_files(len(transfer.moved))}; {transfer.unchanged} here already")
    for name in transfer.kept[:_LISTED]:
        ui.line(
            f"kept     {printable(name)}: you changed it; the cluster's version was not brought"
        )
    for name in transfer.partial[:_LISTED]:
        ui.line(f"partial  {printable(name)}: it was still growing; pull again for the rest")
    for name in transfer.skipped[:_LISTED]:
        ui.line(f"skipped  {printable(name)}: a symbolic link")
    summary = read_summary(target)
    table = _table(summary)
    if table:
        ui.line("")
        ui.line(table)
    outcome = judge(record, snapshot, target, summary)
    ui.line("")
    ui.line(f"{outcome.reason}")
    ui.line(f"results: {target}")
    if summary is not None and not snapshot.state.live:
        for line in export_at_home(record):
            ui.line(line)
    return outcome


def _files(number: int) -> str:
    return "1 file" if number == 1 else f"{number:,} files"


def export_at_home(record: Record) -> list[str]:
    """Export results as the job's configuration says; a failure is told, and changes no verdict."""
    from slurmeval import export
    from slurmeval.results import of_record

    try:
        results = of_record(record)
        done = export.export(results, export.outstanding(results), results.export)
    except SlurmevalError as error:
        return [f"not exported: {error.message}"]
    again = f"again: slurmeval export {record.name}"
    return [
        printable(export.line_of(entry)) + ("" if entry.state == "ok" else f"; {again}")
        for entry in done
    ]


def _bring_log(host: Host, record: Record, target: Path, ui: Ui) -> None:
    """Bring the log of a script that names another file than Slurm's default."""
    path = PurePosixPath(record.log or record.remote_dir)
    at_home = path.parent == PurePosixPath(record.remote_dir)
    if not record.log or (at_home and any(path.match(pattern) for pattern in INCLUDE)):
        return
    folder = target if at_home else target / "log"
    try:
        host.get_tree(str(path.parent), folder, include=(path.name,))
    except (ClusterError, ResultsIncomplete, ValueError):
        ui.line(f"not brought: the log {printable(record.log)}")


def read_summary(target: Path) -> dict[str, Any] | None:
    """Return ``summary.json``, or None where it is missing or not an object."""
    try:
        summary = json.loads((target / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return summary if isinstance(summary, dict) else None


def _table(summary: dict[str, Any] | None) -> str | None:
    from slurmeval.verdict import table

    if summary is None:
        return None
    try:
        return "\n".join(printable(line) for line in table(summary).splitlines())
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def judge(
    record: Record, snapshot: Snapshot, target: Path, summary: dict[str, Any] | None
) -> Outcome:
    """Return the outcome that the job's state and its summary give together."""
    code, reason = _verdict(snapshot, summary)
    return Outcome(record.name, record.job_id or "", snapshot.state, code, reason, target, summary)


def _verdict(snapshot: Snapshot, summary: dict[str, Any] | None) -> tuple[int, str]:
    state = snapshot.state
    verdict = printable(str(summary.get("state"))) if summary is not None else None
    if state is JobState.UNKNOWN:
        return 3, f"the job's state is not known: {snapshot.source}"
    if state.live:
        return 4, f"the job is {state}: these are partial results"
    code = f", exit code {snapshot.exit_code}" if snapshot.exit_code else ""
    detail = printable(str((snapshot.status or {}).get("detail") or ""))
    why = f": {detail}" if detail and state is not JobState.COMPLETED else ""
    if verdict == "unknown":
        return 4, f"the job is {state}{code}, and benchmarks have no verdict{why}"
    if state is not JobState.COMPLETED:
        return 1, f"the job is {state}{code}{why}"
    if verdict is None:
        return 4, "the job is COMPLETED, but eval_results/summary.json is missing"
    if verdict == "ok":
        return 0, "the evaluation is valid"
    return 1, f"the evaluation is {verdict}"
