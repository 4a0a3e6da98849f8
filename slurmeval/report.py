"""A job's scores, or several jobs side by side: table, Markdown, JSON, CSV, HTML."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import jinja2

from slurmeval.resources import template_dir
from slurmeval.results import Cell, Comparison, Row

#: Colours that people with any colour vision tell apart (Okabe and Ito).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
CSV_COLUMNS = (
    "job",
    "benchmark",
    "metric",
    "value",
    "stderr",
    "samples",
    "seconds",
    "state",
    "reason",
    "delta",
    "delta_stderr",
    "mark",
)
LEGEND = (
    "differences are to the first job; * and **: beyond 1.96 and 2.58 standard errors of the "
    "difference, taken as if the samples were independent"
)


def cells_of(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the head and the lines of the table for people."""
    single = len(comparison.jobs) == 1
    head = ["benchmark", "metric"]
    head += ["value", "stderr", "samples", "seconds", "state"] if single else []
    if not single:
        first, *others = (job.label for job in comparison.jobs)
        head += [first, *(text for label in others for text in (label, "difference"))]
    lines = []
    for row in (*comparison.rows, comparison.means):
        line = [row.task, row.metric]
        line += single_cells(row.cells[0]) if single else pair_cells(row)
        lines.append(line)
    return head, lines


def single_cells(cell: Cell) -> list[str]:
    """Return one job's columns."""
    return [
        number(cell.value),
        number(cell.stderr),
        "-" if cell.samples is None else str(cell.samples),
        number(cell.seconds, 0),
        cell.state + (f": {cell.reason}" if cell.reason else ""),
    ]


def pair_cells(row: Row) -> list[str]:
    """Return several jobs' columns: each score, and from the second on its difference."""
    columns = []
    for index, cell in enumerate(row.cells):
        known = cell.value is not None and cell.stderr is not None
        error = f" ±{number(cell.stderr)}" if known else ""
        state = "" if cell.state in ("ok", "-") else f" ({cell.state})"
        columns.append(f"{number(cell.value)}{error}{state}")
        if index:
            columns.append(difference(cell))
    return columns


def difference(cell: Cell) -> str:
    """Return a difference with its standard error and mark."""
    if cell.delta is None:
        return "-"
    error = f" ±{number(cell.delta_stderr)}" if cell.delta_stderr is not None else ""
    return f"{cell.delta:+.4f}{error} {cell.mark}".rstrip()


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with so many digits, or a hyphen."""
    return "-" if value is None else f"{value:.{digits}f}"


def table(comparison: Comparison) -> str:
    """Return a table for a terminal."""
    head, lines = cells_of(comparison)
    rows = [head, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    text = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    if len(comparison.jobs) > 1:
        text += ["", LEGEND]
    text += [f"note: {note}" for note in comparison.notes]
    return "\n".join(text) + "\n"


def markdown(comparison: Comparison) -> str:
    """Return a Markdown table."""
    head, lines = cells_of(comparison)
    rule = ["---"] * len(head)
    text = ["| " + " | ".join(_escaped(c) for c in row) + " |" for row in (head, rule, *lines)]
    if len(comparison.jobs) > 1:
        text += ["", LEGEND.replace("*", "\\*")]
    text += ["", *(f"- {_escaped(note)}" for note in comparison.notes)]
    return "\n".join(text).rstrip() + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*") if text != "---" else text


def records(comparison: Comparison) -> list[dict[str, Any]]:
    """Return one mapping a job, benchmark and metric."""
    found = []
    for row in comparison.rows:
        for job, cell in zip(comparison.jobs, row.cells, strict=True):
            if cell.state != "-":
                place = {"job": job.label, "benchmark": row.task, "metric": row.metric}
                found.append({**place, **asdict(cell)})
    return found


def as_json(comparison: Comparison) -> str:
    """Return everything for programs: rows, aggregates, notes and each job's summary."""
    means = [
        {"job": job.label, **asdict(cell)}
        for job, cell in zip(comparison.jobs, comparison.means.cells, strict=True)
    ]
    values = {
        "rows": records(comparison),
        "means": means,
        "notes": list(comparison.notes),
        "jobs": [{"label": job.label, "summary": job.summary} for job in comparison.jobs],
    }
    return json.dumps(values, indent=2) + "\n"


def as_csv(comparison: Comparison) -> str:
    """Return one line a job, benchmark and metric."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records(comparison))
    return stream.getvalue()


def html(comparison: Comparison) -> str:
    """Return one self-contained page: tables, charts as inline SVG, nothing fetched."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_dir() / "report"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    head, lines = cells_of(comparison)
    return environment.get_template("report.html.j2").render(
        jobs=comparison.jobs,
        head=head,
        lines=lines,
        notes=comparison.notes,
        legend=LEGEND if len(comparison.jobs) > 1 else "",
        colours=[COLOURS[i % len(COLOURS)] for i in range(len(comparison.jobs))],
        charts=[
            chart("Scores", comparison.rows, comparison.jobs, lambda cell: cell.value, error=True),
            chart("Seconds", comparison.rows, comparison.jobs, lambda cell: cell.seconds),
        ],
    )


def chart(
    title: str,
    rows: Sequence[Row],
    jobs: Sequence[Any],
    value: Callable[[Cell], float | None],
    *,
    error: bool = False,
) -> dict[str, Any]:
    """Return what the page draws as horizontal bars: lengths as shares of the longest.

    Args:
        title: Its heading.
        rows: A group of bars each.
        jobs: A bar each.
        value: What a bar shows.
        error: Whether bars carry their standard error.
    """
    values = [found for row in rows for cell in row.cells if (found := value(cell)) is not None]
    longest = max([1.0 if error and all(0 <= v <= 1 for v in values) else 0.0, *values])
    groups = []
    for row in rows:
        bars = []
        for index, cell in enumerate(row.cells):
            shown = value(cell)
            if shown is None or longest <= 0:
                continue
            low, high = shown - (cell.stderr or 0), shown + (cell.stderr or 0)
            bars.append(
                {
                    "job": index,
                    "label": jobs[index].label,
                    "length": max(0.0, shown / longest),
                    "low": min(1.0, max(0.0, low / longest)),
                    "high": min(1.0, max(0.0, high / longest)),
                    "error": error and bool(cell.stderr),
                    "text": number(shown, 4 if error else 0),
                    "valid": cell.state == "ok",
                }
            )
        groups.append({"name": row.task, "metric": row.metric if error else "", "bars": bars})
    return {"title": title, "groups": groups}


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "table": table,
    "markdown": markdown,
    "json": as_json,
    "csv": as_csv,
    "html": html,
}
