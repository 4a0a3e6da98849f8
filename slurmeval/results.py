"""Results at home: finding a job's summary, and putting several side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurmeval.config.schema import Export
from slurmeval.errors import ConfigError, ResultsIncomplete
from slurmeval.verdict import SCHEMA_VERSION

if TYPE_CHECKING:
    from slurmeval.record import Record

SUMMARY = "summary.json"
#: Two-sided limits of a normal distribution: |delta| / stderr above them is marked * and **.
MARKS = ((2.576, "**"), (1.960, "*"))


@dataclass(frozen=True)
class Results:
    """A job's results.

    Attributes:
        label: What people call it: the job's name, or the directory's.
        folder: The directory that holds ``summary.json``.
        summary: Its content.
        export: Where its configuration wants the scores to go. It comes from this machine's record
            of the job, not from the cluster.
    """

    label: str
    folder: Path
    summary: dict[str, Any]
    export: Export = field(default_factory=Export)


@dataclass(frozen=True)
class Cell:
    """One metric of one job; ``delta`` is the difference to the first job.

    Attributes:
        value: The score.
        stderr: Its standard error.
        samples: Samples that it stands for.
        seconds: How long the benchmark ran.
        state: The benchmark's state, ``-`` where the job does not have it.
        reason: The state in words.
        delta: ``value`` less that of the first job.
        delta_stderr: The standard error of the difference, as of independent samples.
        mark: ``*`` or ``**`` where the difference is significant at 5% or 1%, else empty.
    """

    value: float | None = None
    stderr: float | None = None
    samples: int | None = None
    seconds: float | None = None
    state: str = "-"
    reason: str = ""
    delta: float | None = None
    delta_stderr: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """One metric of one benchmark, a cell a job."""

    task: str
    metric: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Comparison:
    """Jobs side by side.

    Attributes:
        jobs: The jobs; the first is what the others are compared with.
        rows: Their benchmarks.
        means: Each job's aggregate.
        notes: What a reader has to know before believing a difference.
    """

    jobs: tuple[Results, ...]
    rows: tuple[Row, ...]
    means: Row
    notes: tuple[str, ...]


def load(name: str) -> Results:
    """Return the results that a person means.

    Args:
        name: A directory that holds ``summary.json`` or ``eval_results/summary.json``, the file
            itself, or a job: a record's name, its beginning, a job id, ``last``.

    Raises:
        ConfigError: Nothing of this name, or a file that is no summary.
        ResultsIncomplete: A job whose results are not at home.
    """
    path = Path(name)
    if path.exists():
        return _read(_summary_of(path), path.resolve().name if path.is_dir() else name)
    from slurmeval import record

    return of_record(record.find(name))


def of_record(record: Record) -> Results:
    """Return the results of a recorded job.

    Raises:
        ConfigError: A file that is no summary, or settings that cannot be used.
        ResultsIncomplete: They are not at home.
    """
    summary = Path(record.results, "eval_results", SUMMARY)
    if not summary.is_file():
        raise ResultsIncomplete(
            f"{record.name}: no results at home, {summary} is missing",
            hint=f"slurmeval pull {record.name}",
        )
    return replace(_read(summary, record.name), export=_settings(record.export))


def _settings(given: dict[str, Any] | None) -> Export:
    try:
        return Export.model_validate(given or {})
    except ValueError as error:
        raise ConfigError(f"the record's eval.export cannot be used: {error}") from error


def _summary_of(path: Path) -> Path:
    for candidate in (path, path / SUMMARY, path / "eval_results" / SUMMARY):
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"{path} holds no results: neither {SUMMARY} nor eval_results/{SUMMARY} is there"
    )


def _read(path: Path, label: str) -> Results:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        version = summary["schema_version"]
        parts = summary["tasks"], summary["aggregate"], summary["job"], summary["state"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} is no summary of an evaluation: {error!r}") from error
    if version != SCHEMA_VERSION or not isinstance(parts[0], list):
        raise ConfigError(
            f"{path} has schema version {version}, and this slurmeval reads {SCHEMA_VERSION}"
        )
    return Results(label, path.parent, summary)


def compare(jobs: Sequence[Results], *, all_metrics: bool = False) -> Comparison:
    """Put jobs side by side, each benchmark's primary metric or all metrics."""
    rows = []
    for task in _in_order([entry["name"] for job in jobs for entry in job.summary["tasks"]]):
        entries = [_task(job, task) for job in jobs]
        names = [
            name
            for entry in entries
            for name in (entry.get("metrics") or {} if all_metrics else [entry.get("primary")])
            if name
        ]
        for metric in _in_order(names) or ["-"]:
            cells = [_cell(entry, metric) for entry in entries]
            rows.append(Row(task, metric, _with_deltas(cells)))
    means = Row("mean", "", _mean_deltas(jobs))
    return Comparison(tuple(jobs), tuple(rows), means, tuple(_notes(jobs, rows)))


def _mean_deltas(jobs: Sequence[Results]) -> tuple[Cell, ...]:
    """Return the means with their difference to the first; only between the same benchmarks."""
    first, means = jobs[0], [_mean(job) for job in jobs]
    alike = [_measured(job) == _measured(first) for job in jobs]
    return tuple(
        _against(means[0], mean) if index and alike[index] else mean
        for index, mean in enumerate(means)
    )


def _measured(job: Results) -> set[tuple[str, str | None]]:
    """Return what a job's mean is the mean of."""
    return {(entry["name"], entry.get("primary")) for entry in job.summary["tasks"]}


def _in_order(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _task(job: Results, name: str) -> dict[str, Any]:
    return next((entry for entry in job.summary["tasks"] if entry["name"] == name), {})


def _cell(entry: dict[str, Any], metric: str) -> Cell:
    score = (entry.get("metrics") or {}).get(metric) or {}
    return Cell(
        value=score.get("value"),
        stderr=score.get("stderr"),
        samples=entry.get("samples"),
        seconds=entry.get("seconds"),
        state=entry.get("state", "-"),
        reason=entry.get("reason", ""),
    )


def _mean(job: Results) -> Cell:
    aggregate, tasks = job.summary["aggregate"], job.summary["tasks"]
    seconds = [task["seconds"] for task in tasks if task.get("seconds") is not None]
    return Cell(
        value=aggregate["value"],
        stderr=aggregate.get("stderr"),
        seconds=sum(seconds) if seconds else None,
        state=job.summary["state"],
    )


def _with_deltas(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Return cells with their difference to the first; only between valid scores."""
    first = cells[0]
    return (first, *(_against(first, cell) for cell in cells[1:]))


def _against(first: Cell, cell: Cell) -> Cell:
    if first.value is None or cell.value is None or {first.state, cell.state} != {"ok"}:
        return cell
    delta = cell.value - first.value
    stderr, mark = None, ""
    if first.stderr is not None and cell.stderr is not None:
        stderr = math.hypot(first.stderr, cell.stderr)
        # No spread among a handful of samples says nothing about the next one.
        signs = (sign for limit, sign in MARKS if stderr and abs(delta) > limit * stderr)
        mark = next(signs, "")
    values = {**cell.__dict__, "delta": delta, "delta_stderr": stderr, "mark": mark}
    return Cell(**values)


def _notes(jobs: Sequence[Results], rows: Sequence[Row]) -> list[str]:
    notes = [f"{job.label}: {text}" for job in jobs for text in job.summary.get("warnings", [])]
    for job in jobs:
        if job.summary["job"].get("failure"):
            notes.append(f"{job.label}: the job failed: {job.summary['job']['failure']}")
        for task in job.summary["tasks"]:
            if len(jobs) > 1 and task.get("reason"):  # one job's table has room for it
                notes.append(f"{job.label}: {task['name']} is {task['state']}: {task['reason']}")
            notes += [f"{job.label}: {task['name']}: {text}" for text in task.get("warnings", [])]
        if job.summary["job"].get("edited"):
            files = ", ".join(job.summary["job"]["edited"])
            notes.append(f"{job.label}: edited by hand after rendering: {files}")
        if _measured(job) != _measured(jobs[0]):
            notes.append(
                f"{job.label}: its mean is of other benchmarks or metrics than that of "
                f"{jobs[0].label}, and is not compared with it"
            )
    for row in rows:
        counts = _in_order([str(cell.samples) for cell in row.cells if cell.samples is not None])
        if len(counts) > 1:
            notes.append(f"{row.task}: {' and '.join(counts)} samples are not the same questions")
        images = [_task(job, row.task).get("versions") for job in jobs]
        if len({json.dumps(found, sort_keys=True) for found in images if found}) > 1:
            notes.append(f"{row.task}: evaluated with different versions of the evaluator")
    return _in_order(notes)
