#!/usr/bin/env python3
"""Judge the results of benchmarks that nemo-evaluator wrote, and sum them up.

Stands alone: the standard library and PyYAML. The job script runs it after each benchmark and at the
end; it runs by hand on any results directory just as well::

    python verdict.py finished DIR            is there a valid verdict already?
    python verdict.py task NAME DIR           judge one benchmark: DIR/verdict.json
    python verdict.py summary ROOT NAME...    sum up: ROOT/summary.json and a table

States: ``ok``; ``invalid``, results are there and cannot be trusted; ``failed``, the evaluator
failed; ``interrupted``, it was cut short; ``unknown``, nothing says what happened. Exit codes: 0 ok,
1 anything else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

SCHEMA_VERSION = 1
#: Export-Deploy's HuggingFace deployable answers an exception with HTTP 200 and this text.
ERROR_TEXT = "An error occurred:"
#: Marker files of nemo-evaluator: the exit code of a run that was cut short cannot be trusted.
INTERRUPTED = ".nemo_evaluator_interrupted"
SERVER_ERROR = ".nemo_evaluator_server_error"
#: The metric that stands for a benchmark, where it has several; else its first.
PRIMARY_METRICS = ("acc", "exact_match", "pass@1", "score", "accuracy")
AGGREGATE = "unweighted mean of each benchmark's primary metric; only when all benchmarks are ok"


def judge(
    name: str, directory: Path, limits: dict[str, Any], exit_code: int | None, seconds: float | None
) -> dict[str, Any]:
    """Return the verdict on one benchmark's output directory.

    Args:
        name: The benchmark.
        directory: Its output directory.
        limits: ``max_error_share`` (0 to 1) and ``min_samples``.
        exit_code: The evaluator's exit code; None where nobody saw it.
        seconds: How long it ran.
    """
    verdict: dict[str, Any] = {
        "name": name,
        "state": "unknown",
        "reason": "",
        "primary": None,
        "metrics": {},
        "samples": None,
        "error_share": None,
        "requests": None,
        "failed_requests": None,
        "seconds": seconds,
        "exit_code": exit_code,
    }
    verdict["state"], verdict["reason"] = assess(directory, limits, exit_code, verdict)
    return verdict


def assess(
    directory: Path, limits: dict[str, Any], exit_code: int | None, verdict: dict[str, Any]
) -> tuple[str, str]:
    """Fill in what the results say and return state and reason."""
    if (directory / INTERRUPTED).exists():
        return "interrupted", "the evaluator was stopped before its end"
    results_file = directory / "results.yml"
    if not results_file.exists():
        if exit_code is None:
            return "unknown", "no results, and nobody saw the evaluator end"
        return "failed", f"the evaluator ended with exit code {exit_code} and wrote no results"
    try:
        results = yaml.safe_load(results_file.read_text()) or {}
        verdict["metrics"] = metrics = dict(flat_metrics(results.get("results") or {}))
        verdict["samples"] = samples = count_samples(directory)
        verdict["error_share"] = share = error_share(directory)
        requests = response_counts(directory)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        return "invalid", f"the results cannot be read: {error!r}"
    verdict["requests"], verdict["failed_requests"] = requests or (None, None)
    verdict["primary"] = next(
        (m for m in PRIMARY_METRICS if m in metrics), next(iter(metrics), None)
    )
    if exit_code:
        return "failed", f"the evaluator ended with exit code {exit_code}"
    if (directory / SERVER_ERROR).exists():
        return "invalid", "the endpoint answered with errors that the evaluator gave up on"
    if not metrics:
        return "invalid", "the results hold no metric"
    odd = [metric for metric, score in metrics.items() if not finite(score["value"])]
    if odd:
        return "invalid", f"not a number: {', '.join(odd)}"
    if samples is None:
        return "invalid", "the results do not say how many samples were evaluated"
    if samples < limits["min_samples"]:
        return "invalid", f"{samples} sample(s), at least {limits['min_samples']} wanted"
    if share is not None and share > limits["max_error_share"]:
        return "invalid", f"{share:.1%} of the answers are error texts"
    return "ok", ""


def finite(value: object) -> bool:
    """Say whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def flat_metrics(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every metric's name with its value and standard error.

    ``results.tasks`` and ``results.groups`` hold ``<task>.metrics.<metric>.scores.<score>``; the
    harness repeats a plain task as a group of that name.
    """
    tasks, groups = results.get("tasks") or {}, results.get("groups") or {}
    entries = {**tasks, **groups}
    for task, entry in entries.items():
        for metric, body in (entry.get("metrics") or {}).items():
            for score, numbers in (body.get("scores") or {}).items():
                name = metric if score == metric else f"{metric}/{score}"
                stderr = (numbers.get("stats") or {}).get("stderr")
                yield (
                    name if len(entries) == 1 else f"{task}/{name}",
                    {"value": numbers.get("value"), "stderr": stderr if finite(stderr) else None},
                )


def newest(directory: Path, pattern: str) -> Path | None:
    """Return the newest file that a pattern finds; a rerun adds files beside the older ones."""
    found = sorted(directory.glob(pattern), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def count_samples(directory: Path) -> int | None:
    """Return how many samples were evaluated, or None where no file says so."""
    report = newest(directory, "*/results_*.json")
    if report is None:
        return None
    counts = json.loads(report.read_text()).get("n-samples") or {}
    return sum(int(entry["effective"]) for entry in counts.values()) if counts else None


def error_share(directory: Path) -> float | None:
    """Return the share of samples with an error text for an answer, or None without samples."""
    answers = errors = 0
    for path in directory.glob("*/samples_*.jsonl"):
        with path.open() as lines:
            for line in lines:
                answers += 1
                texts = str((json.loads(line).get("resps") or [""])[0])
                errors += ERROR_TEXT in texts
    return errors / answers if answers else None


def response_counts(directory: Path) -> tuple[int, int] | None:
    """Return the adapter's count of requests and of those that failed; retries count as requests."""
    path = directory / "eval_factory_metrics.json"
    if not path.exists():
        return None
    stats = json.loads(path.read_text()).get("response_stats") or {}
    count = int(stats.get("count") or 0)
    return (count, count - int(stats.get("successful_count") or 0)) if count else None


def summarise(root: Path, names: list[str], job: dict[str, Any]) -> dict[str, Any]:
    """Return the summary of all benchmarks; one without a verdict is unknown, not failed."""
    tasks = []
    for name in names:
        path = root / name / "verdict.json"
        try:
            tasks.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            tasks.append({"name": name, "state": "unknown", "reason": "no verdict was written"})
    states = {task["state"] for task in tasks}
    primary = [task["metrics"][task["primary"]]["value"] for task in tasks if task["state"] == "ok"]
    all_ok = states == {"ok"}
    state = "ok" if all_ok else "unknown" if states <= {"ok", "unknown"} else "invalid"
    if states & {"failed", "interrupted"}:
        state = "failed"
    return {
        "schema_version": SCHEMA_VERSION,
        "state": state,
        "tasks": tasks,
        "aggregate": {
            "value": sum(primary) / len(primary) if all_ok and primary else None,
            "definition": AGGREGATE,
        },
        "job": job,
    }


def table(summary: dict[str, Any]) -> str:
    """Return the summary as a table for people."""
    rows = [("benchmark", "metric", "value", "stderr", "samples", "seconds", "state")]
    for task in summary["tasks"]:
        metrics = task.get("metrics") or {"-": {"value": None, "stderr": None}}
        for metric, score in metrics.items():
            rows.append(
                (
                    task["name"],
                    metric,
                    number(score["value"], 4),
                    number(score["stderr"], 4),
                    number(task.get("samples"), 0),
                    number(task.get("seconds"), 0),
                    task["state"] + (f": {task['reason']}" if task["reason"] else ""),
                )
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    mean = summary["aggregate"]["value"]
    lines.append(f"mean {number(mean, 4)}, state {summary['state']}")
    return "\n".join(lines)


def number(value: object, digits: int) -> str:
    """Return a number with so many digits, or a hyphen."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def write_atomically(path: Path, values: dict[str, Any]) -> None:
    """Write JSON under another name first, so that no reader sees a half."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    temporary.replace(path)


def read_json(path: Path | None) -> dict[str, Any] | None:
    """Return a JSON file's content, or None where it is missing or broken."""
    try:
        content = json.loads(path.read_text()) if path else None
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    finished = commands.add_parser("finished", help="is there a valid verdict already?")
    finished.add_argument("directory", type=Path)
    task = commands.add_parser("task", help="judge one benchmark")
    task.add_argument("name")
    task.add_argument("directory", type=Path)
    task.add_argument("--config", type=Path, help="config.yaml with the limits of its section eval")
    task.add_argument("--exit-code", type=int)
    task.add_argument("--seconds", type=float)
    summary = commands.add_parser("summary", help="sum up")
    summary.add_argument("root", type=Path)
    summary.add_argument("names", nargs="*", metavar="NAME")
    summary.add_argument("--job-id")
    summary.add_argument("--endpoint", type=Path, help="endpoint.json of deploy.py")
    return parser.parse_args(argv)


def limits_of(config: Path | None) -> dict[str, Any]:
    """Return the limits of a configuration's section ``eval``."""
    section = (yaml.safe_load(config.read_text()) if config else {}).get("eval") or {}
    return {
        "max_error_share": section.get("max_error_share", 0.05),
        "min_samples": section.get("min_samples", 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = parse_arguments(argv)
    if arguments.command == "finished":
        verdict = read_json(arguments.directory / "verdict.json")
        return 0 if verdict and verdict.get("state") == "ok" else 1
    if arguments.command == "task":
        verdict = judge(
            arguments.name,
            arguments.directory,
            limits_of(arguments.config),
            arguments.exit_code,
            arguments.seconds,
        )
        write_atomically(arguments.directory / "verdict.json", verdict)
        primary = verdict["metrics"].get(verdict["primary"]) or {"value": None}
        print(f"{verdict['state']}  {verdict['primary']} {number(primary['value'], 4)}", end="")
        print(f"  {verdict['samples']} samples  {verdict['reason']}".rstrip())
        return 0 if verdict["state"] == "ok" else 1
    now = datetime.datetime.now(datetime.timezone.utc)  # noqa: UP017  containers with Python 3.10
    job = {
        "id": arguments.job_id,
        "ended": now.isoformat(timespec="seconds"),
        "endpoint": read_json(arguments.endpoint),
    }
    summary = summarise(arguments.root, arguments.names, job)
    write_atomically(arguments.root / "summary.json", summary)
    print(table(summary))
    return 0 if summary["state"] == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
