#!/usr/bin/env python3
"""Judge the results of benchmarks that nemo-evaluator wrote, and sum them up.

Stands alone: the standard library and PyYAML. The job script runs it around each benchmark and at
the end; it runs by hand on any results directory just as well::

    python verdict.py resume NAME DIR         valid already? else make way for a new run
    python verdict.py task NAME DIR           judge one benchmark: DIR/verdict.json
    python verdict.py summary ROOT NAME...    sum up: ROOT/summary.json and a table; and
                                              ROOT/manifest.json, every file's size and sha256

States: ``ok``; ``invalid``, results are there and cannot be trusted; ``failed``, the evaluator
failed; ``interrupted``, it was cut short; ``skipped``, it never started; ``unknown``, nothing says
what happened. Exit codes: 0 ok, 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
#: Export-Deploy's HuggingFace deployable answers an exception with HTTP 200 and this text.
ERROR_TEXT = "An error occurred:"
#: Marker files: nemo-evaluator's own, whose exit code cannot be trusted where they are, and ours.
INTERRUPTED = ".nemo_evaluator_interrupted"
SERVER_ERROR = ".nemo_evaluator_server_error"
STOPPED = ".stopped"
#: What a directory's answers were asked with; those of another model are nobody's.
MADE_WITH = ".made_with"
#: The metric that stands for a benchmark where the configuration names none; else its first.
PRIMARY_METRICS = ("acc", "exact_match", "pass@1", "pass_at_1", "score", "accuracy")
AGGREGATE = "unweighted mean of each benchmark's primary metric; only when all benchmarks are ok"
LIMITS = {"max_error_share": 0.05, "min_samples": 1, "suspicious": "warn"}
#: Bytes of the evaluator's cache near which it drops its oldest answers (its limit is 1 GiB).
CACHE_FULL = 0.9 * 2**30
#: Samples of each of two benchmarks from which on equal scores are no coincidence.
MANY = 200


def judge(
    facts: dict[str, Any],
    directory: Path,
    limits: dict[str, Any],
    exit_code: int | None,
    seconds: float | None,
    faults: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the verdict on one benchmark's output directory.

    Args:
        facts: ``name``, and where known ``type``, ``image``, ``digest``, ``primary``, ``asks``.
        directory: Its output directory.
        limits: ``max_error_share`` (0 to 1), ``min_samples``, ``suspicious``.
        exit_code: The evaluator's exit code; None where nobody saw it.
        seconds: How long it ran.
        faults: Those of the endpoint, as fidelity.py describes them.
    """
    verdict: dict[str, Any] = {
        "name": facts["name"],
        "type": facts.get("type"),
        "state": "unknown",
        "reason": "",
        "warnings": [],
        "primary": facts.get("primary"),
        "metrics": {},
        "samples": None,
        "answers": None,
        "requests": None,
        "failed_requests": None,
        "seconds": seconds,
        "exit_code": exit_code,
        "image": facts.get("image"),
        "image_digest": facts.get("digest"),
        "versions": versions(),
    }
    verdict["state"], verdict["reason"] = assess(directory, limits, exit_code, verdict)
    if verdict["state"] == "ok" and faults:
        verdict["state"], verdict["reason"] = heed(faults, facts.get("asks"), verdict)
    return verdict


def heed(
    faults: list[dict[str, Any]], asks: str | None, verdict: dict[str, Any]
) -> tuple[str, str]:
    """Return state and reason of a score that stands, given what the endpoint does wrong.

    A fault makes a score invalid where it is sure, and all that the benchmark asks for is spoilt.
    """
    for fault in faults:
        generates = fault["spoils"] == "generation"
        if asks == ("loglikelihood" if generates else "generation"):
            continue
        if fault["spoils"] == asks == "loglikelihood" and fault["sure"]:
            return "invalid", fault["message"]
        verdict["warnings"].append(fault["message"])
    return "ok", ""


def assess(
    directory: Path, limits: dict[str, Any], exit_code: int | None, verdict: dict[str, Any]
) -> tuple[str, str]:
    """Fill in what the results say and return state and reason."""
    if (directory / STOPPED).exists():
        return "interrupted", f"stopped: {(directory / STOPPED).read_text().strip()}"
    if (directory / INTERRUPTED).exists():
        signal = (read_json(directory / INTERRUPTED) or {}).get("signal") or "a signal"
        return "interrupted", f"the evaluator was stopped by {signal} before its end"
    results_file = directory / "results.yml"
    if not results_file.exists():
        if exit_code is None:
            return "unknown", "no results, and nobody saw the evaluator end"
        why = cause(verdict["name"], directory)
        return "failed", f"the evaluator ended with exit code {exit_code} and wrote no results{why}"
    try:
        results = yaml.safe_load(results_file.read_text()) or {}
        read_results(directory, results, verdict)
        samples = read_samples(directory)
        verdict["answers"] = answers = count_answers(directory)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        return "invalid", f"the results cannot be read: {error!r}"
    if exit_code:
        why = cause(verdict["name"], directory)
        return "failed", f"the evaluator ended with exit code {exit_code}{why}"
    if verdict["failed_requests"]:
        text = f"{verdict['failed_requests']} of {verdict['requests']} requests failed"
        in_the_end = (
            "; repeated, each got an answer" if answers and not answers["unanswered"] else ""
        )
        verdict["warnings"].append(text + in_the_end)
    wrong = metrics_problem(verdict) or answers_problem(answers, samples, limits)
    if wrong:
        return "invalid", wrong
    if verdict["samples"] is None:
        if not answers:
            return "unknown", "the results do not say how many samples were evaluated"
        text = f"the results do not say how many samples there were; {answers['asked']} requests"
        verdict["warnings"].append(text)
    elif verdict["samples"] < limits["min_samples"]:
        return "invalid", f"{verdict['samples']} sample(s), at least {limits['min_samples']} wanted"
    return suspicion(verdict, samples, limits)


def read_results(directory: Path, results: dict[str, Any], verdict: dict[str, Any]) -> None:
    """Fill in metrics, samples and requests."""
    verdict["metrics"] = metrics = dict(flat_metrics(results.get("results") or {}))
    task = ((results.get("config") or {}).get("params") or {}).get("task")
    verdict["primary"] = verdict["primary"] or primary_metric(metrics, task)
    verdict["samples"] = count_samples(directory, metrics)
    for score in metrics.values():
        del score["count"]
    if results.get("git_hash"):
        verdict["versions"]["harness_git"] = results["git_hash"]
    verdict["requests"], verdict["failed_requests"] = response_counts(directory) or (None, None)


def metrics_problem(verdict: dict[str, Any]) -> str | None:
    """Return what is wrong with the metrics."""
    metrics, primary = verdict["metrics"], verdict["primary"]
    if not metrics:
        return "the results hold no metric"
    if primary not in metrics:
        return f"the results hold no metric {primary}; they hold {', '.join(metrics)}"
    odd = [metric for metric, score in metrics.items() if not finite(score["value"])]
    return f"not a number: {', '.join(odd)}" if odd else None


def answers_problem(
    answers: dict[str, int] | None, samples: dict[str, Any], limits: dict[str, Any]
) -> str | None:
    """Return what is wrong with the answers: never given, error texts, samples left out."""
    limit = limits["max_error_share"]
    if answers and answers["asked"]:
        share = (answers["unanswered"] + answers["error_texts"]) / answers["asked"]
        if share > limit:
            return (
                f"{share:.1%} of {answers['asked']} requests have no answer: "
                f"{answers['unanswered']} never got one, {answers['error_texts']} got an error text"
            )
    if samples["count"] and samples["error_texts"] / samples["count"] > limit:
        return f"{samples['error_texts'] / samples['count']:.1%} of the answers are error texts"
    if samples["planned"] and samples["count"] < samples["planned"]:
        return f"{samples['count']} of {samples['planned']} samples were evaluated"
    if samples["choices"] > 1 and samples["same"] == samples["choices"]:
        return (
            f"all {samples['choices']} answers to choose from are equally likely, to the last "
            "digit: the probabilities are not those of the answers (tokenizer? BOS token?)"
        )
    return None


def suspicion(
    verdict: dict[str, Any], samples: dict[str, Any], limits: dict[str, Any]
) -> tuple[str, str]:
    """Say what is odd about a score that nothing speaks against, and return state and reason."""
    if verdict["metrics"][verdict["primary"]]["value"] != 0:
        return "ok", ""
    text = "the score is exactly 0"
    if samples["guesses"] >= 1:
        text += f", where guessing would get about {samples['guesses']:.0f} samples right"
    if limits["suspicious"] == "invalid":
        return "invalid", text
    verdict["warnings"].append(text)
    return "ok", ""


def finite(value: object) -> bool:
    """Say whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def flat_metrics(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every metric's name with its value, standard error and count.

    ``results.tasks`` and ``results.groups`` hold ``<task>.metrics.<metric>.scores.<score>``; the
    harness repeats a plain task as a group of that name.
    """
    entries = {**(results.get("groups") or {}), **(results.get("tasks") or {})}
    for task, entry in entries.items():
        for metric, body in (entry.get("metrics") or {}).items():
            for score, numbers in (body.get("scores") or {}).items():
                name = metric if score == metric else f"{metric}/{score}"
                stats = numbers.get("stats") or {}
                value, stderr = numbers.get("value"), stats.get("stderr")
                yield (
                    name if len(entries) == 1 else f"{task}/{name}",
                    {
                        "value": value if finite(value) else None,  # JSON has no NaN
                        "stderr": stderr if finite(stderr) else None,
                        "count": stats.get("count"),
                    },
                )


def primary_metric(metrics: dict[str, Any], task: str | None) -> str | None:
    """Return the metric that stands for a benchmark: of its group, not of a part of it."""
    mine = [name for name in metrics if name.startswith(f"{task}/")] or list(metrics)
    for wanted in PRIMARY_METRICS:
        for name in mine:
            if name.rpartition("/")[2].partition("__")[0] == wanted:
                return name
    return mine[0] if mine else None


def newest(directory: Path, pattern: str) -> Path | None:
    """Return the newest file that a pattern finds."""
    found = sorted(directory.glob(pattern), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def count_samples(directory: Path, metrics: dict[str, Any]) -> int | None:
    """Return how many samples were evaluated, or None where no file says so."""
    planned = planned_samples(directory)
    if planned is not None:
        return planned
    stated = [score["count"] for score in metrics.values() if isinstance(score["count"], int)]
    return max(stated, default=None)


def read_samples(directory: Path) -> dict[str, Any]:
    """Return what the harness's files of samples show; all zero where there are none.

    Returns:
        ``count`` of different samples and how many were ``planned``; ``error_texts`` among their
        answers; ``choices`` that had a probability, and how many of these have the ``same``;
        ``guesses``: samples that guessing would get right.
    """
    seen = {"count": 0, "error_texts": 0, "choices": 0, "same": 0, "guesses": 0.0}
    likely: dict[str, int] = {}
    for path in directory.glob("*/samples_*.jsonl"):
        documents = set()
        with path.open() as lines:
            for line in lines:
                sample = json.loads(line)
                if sample.get("doc_id") in documents:
                    continue  # one line a document and filter
                documents.add(sample.get("doc_id"))
                answers = [flat[0] for flat in map(flatten, sample.get("resps") or []) if flat]
                seen["error_texts"] += any(str(a).startswith(ERROR_TEXT) for a in answers)
                if len(answers) > 1 and sample.get("filter") == "none":
                    seen["guesses"] += 1 / len(answers)
                    seen["choices"] += len(answers)
                    for answer in answers:
                        likely[str(answer)] = likely.get(str(answer), 0) + 1
        seen["count"] += len(documents)
    seen["same"] = max(likely.values(), default=0)
    return {**seen, "planned": planned_samples(directory) or 0}


def planned_samples(directory: Path) -> int | None:
    """Return how many samples the harness meant to evaluate; None where no file says so.

    Its own count leaves ``downsampling_ratio`` out, of which each task takes its share.
    """
    found = newest(directory, "*/results_*.json")
    report = json.loads(found.read_text()) if found else {}
    ratio = (report.get("config") or {}).get("downsampling_ratio")
    counts = [int(entry["effective"]) for entry in (report.get("n-samples") or {}).values()]
    if not counts:
        return None
    return sum(counts if ratio is None else (int(count * ratio) for count in counts))


def flatten(value: Any) -> list[Any]:
    """Return the items of nested lists."""
    return (
        [item for part in value for item in flatten(part)] if isinstance(value, list) else [value]
    )


def count_answers(directory: Path) -> dict[str, int] | None:
    """Return how many requests the evaluator sent, and how many never got an answer.

    Its cache holds each request and, under the same key, each answer with HTTP 200: a request that
    failed and was repeated with success is there once, with its answer.

    Returns:
        ``asked``, ``unanswered``, ``error_texts``; None where there is no cache, or a full one.
    """
    requests, responses = (
        directory / "cache" / kind / "cache.db" for kind in ("requests", "responses")
    )
    if not (requests.exists() and responses.exists()):
        return None
    try:
        with contextlib.closing(sqlite3.connect(read_only(requests), uri=True)) as base:
            base.execute("ATTACH ? AS answered", (read_only(responses),))
            for name in ("main", "answered"):
                size = base.execute(f"SELECT sum(coalesce(length(value), size)) FROM {name}.Cache")
                if (size.fetchone()[0] or 0) > CACHE_FULL:
                    return None
            asked, unanswered = base.execute(
                "SELECT count(*), count(*) - count(b.key) FROM main.Cache a "
                "LEFT JOIN answered.Cache b ON a.key = b.key"
            ).fetchone()
            stored = base.execute("SELECT value, filename FROM answered.Cache")
            errors = sum(is_error(value, responses.parent, name) for value, name in stored)
    except sqlite3.Error:
        return None
    return {"asked": asked, "unanswered": unanswered, "error_texts": errors}


def read_only(path: Path) -> str:
    """Return SQLite's address of a file, whatever signs its path has."""
    return f"{path.resolve().as_uri()}?mode=ro"


def is_error(value: bytes | None, folder: Path, filename: str | None) -> bool:
    """Say whether a cached answer is an error text."""
    content = (folder / filename).read_bytes() if filename else value or b""
    if ERROR_TEXT.encode() not in content:
        return False
    try:
        choices = json.loads(content)["choices"]
        texts = [c.get("text") or (c.get("message") or {}).get("content") or "" for c in choices]
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
    return any(str(text).startswith(ERROR_TEXT) for text in texts)


def response_counts(directory: Path) -> tuple[int, int] | None:
    """Return the adapter's count of requests and of those that failed; each retry is one."""
    stats = (read_json(directory / "eval_factory_metrics.json") or {}).get("response_stats") or {}
    count = int(stats.get("count") or 0)
    return (count, count - int(stats.get("successful_count") or 0)) if count else None


def cause(name: str, directory: Path) -> str:
    """Return the last error that a benchmark's log names, as the end of a sentence."""
    log = Path(os.environ.get("LOG_DIR", directory), f"{name}.log")
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 65536))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line.strip() for line in lines if re.match(r"[\w.]*(Error|Exception)(: |$)", line)]
    named = [line for line in errors if "Evaluation failed!" not in line]
    return f": {named[-1][:300]}" if named else ""


def versions() -> dict[str, str]:
    """Return the versions of what evaluates: Python, nemo-evaluator, and the harnesses here."""
    found = {"python": platform.python_version()}
    harnesses = importlib.metadata.packages_distributions().get("core_evals", [])
    for name in ("nemo-evaluator", *harnesses):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name.replace("_", "-")] = importlib.metadata.version(name)
    return found


def resume(directory: Path, made_with: str = "") -> bool:
    """Say whether valid results are there already; else clear away what a new run must not see.

    Answers of a run that was cut short stay in the evaluator's cache, so that the next one goes on;
    those of a run that was not valid, or of another model or run configuration, do not.
    """
    verdict = read_json(directory / "verdict.json") or {}
    marker = directory / MADE_WITH
    changed = marker.exists() and marker.read_text() != made_with
    if verdict.get("state") == "ok" and not changed:
        return True
    with contextlib.suppress(OSError):
        answers = count_answers(directory)
        if changed or verdict.get("state") == "invalid" or (answers and answers["error_texts"]):
            for path in [directory / "cache", *directory.glob("lm_cache*")]:
                shutil.rmtree(path, ignore_errors=True)
    stale = ["verdict.json", "results.yml", INTERRUPTED, SERVER_ERROR, STOPPED]
    stale += ["*/results_*.json", "*/samples_*.jsonl"]
    for pattern in stale:
        for path in directory.glob(pattern):
            path.unlink()
    marker.write_text(made_with)
    return False


def made_with(name: str, job_dir: Path) -> str:
    """Return what tells a benchmark's model and run configuration from others."""
    parts = [digest(job_dir / "eval" / f"{name}.yaml"), read_config(job_dir).get("model")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def summarise(
    root: Path, names: list[str], job: dict[str, Any], limits: dict[str, Any]
) -> dict[str, Any]:
    """Return the summary of all benchmarks; one without a verdict is unknown, not failed."""
    tasks = [verdict_of(root, name) for name in names]
    warnings = coincidences(tasks, limits)
    states = {task["state"] for task in tasks}
    states |= {"failed"} if job.get("failure") else set()
    primary = [task["metrics"][task["primary"]] for task in tasks if task["state"] == "ok"]
    all_ok = states == {"ok"}
    state = "ok" if all_ok else "invalid" if "invalid" in states else "unknown"
    if states & {"failed", "interrupted"}:
        state = "failed"
    return {
        "schema_version": SCHEMA_VERSION,
        "state": state,
        "warnings": warnings,
        "tasks": tasks,
        "aggregate": {
            "value": sum(score["value"] for score in primary) / len(primary) if all_ok else None,
            "stderr": mean_stderr(primary) if all_ok else None,
            "definition": AGGREGATE,
        },
        "job": job,
    }


def verdict_of(root: Path, name: str) -> dict[str, Any]:
    """Return a benchmark's verdict, or what its absence means."""
    verdict = read_json(root / name / "verdict.json")
    if verdict is not None and "state" in verdict:
        return verdict
    empty: dict[str, Any] = {"name": name, "warnings": [], "primary": None, "metrics": {}}
    if not (root / name).is_dir():
        return {**empty, "state": "skipped", "reason": "it never started"}
    if (root / name / STOPPED).exists():
        why = (root / name / STOPPED).read_text().strip()
        return {**empty, "state": "interrupted", "reason": f"stopped: {why}"}
    return {**empty, "state": "unknown", "reason": "no verdict was written"}


def coincidences(tasks: list[dict[str, Any]], limits: dict[str, Any]) -> list[str]:
    """Return what is odd about the scores together; they are invalid if the limits say so."""
    good = [task for task in tasks if task["state"] == "ok"]
    values = {task["metrics"][task["primary"]]["value"] for task in good}
    large = len(good) > 1 and all((task["samples"] or 0) >= MANY for task in good)
    if len(values) != 1 or not (len(good) > 2 or large or (len(good) > 1 and values == {0})):
        return []
    text = f"all {len(good)} benchmarks have the same score, {values.pop():.6g}"
    if limits["suspicious"] == "invalid":
        for task in good:
            task["state"], task["reason"] = "invalid", text
    return [text]


def mean_stderr(scores: list[dict[str, Any]]) -> float | None:
    """Return the standard error of a mean of independent scores, or None where one has none."""
    if any(score["stderr"] is None for score in scores):
        return None
    return math.sqrt(sum(score["stderr"] ** 2 for score in scores)) / len(scores)


def table(summary: dict[str, Any]) -> str:
    """Return the summary as a table for people; of a group, the parts are left out."""
    rows = [("benchmark", "metric", "value", "stderr", "samples", "seconds", "state")]
    for task in summary["tasks"]:
        metrics = task.get("metrics") or {"-": {"value": None, "stderr": None}}
        group = str(task.get("primary") or "").rpartition("/")[0]
        for metric, score in metrics.items():
            if group and metric.rpartition("/")[0] != group:
                continue
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
    lines += [f"WARNING: {text}" for text in summary.get("warnings", [])]
    for task in summary["tasks"]:
        lines += [f"WARNING: {task['name']}: {text}" for text in task.get("warnings", [])]
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


def read_config(job_dir: Path) -> dict[str, Any]:
    """Return the job's configuration, or nothing where there is none."""
    try:
        content = yaml.safe_load((job_dir / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def limits_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the limits of a configuration's section ``eval``."""
    section = config.get("eval") or {}
    return {name: section.get(name, default) for name, default in LIMITS.items()}


def facts_of(name: str, job_dir: Path) -> dict[str, Any]:
    """Return what the job's manifest says of a benchmark."""
    tasks = (read_json(job_dir / "manifest.json") or {}).get("tasks") or []
    return next((task for task in tasks if task.get("name") == name), {"name": name})


def job_facts(
    job_dir: Path, job_id: str | None, endpoint: Path | None, failure: str | None
) -> dict[str, Any]:
    """Return what a reader needs in order to know which job made the scores, and with what."""
    manifest, config = read_json(job_dir / "manifest.json") or {}, read_config(job_dir)
    known: dict[str, str] = manifest.get("files") or {}
    now = {name: digest(job_dir / name) for name in known}
    model = config.get("model") or {}
    return {
        "id": job_id,
        "failure": failure,
        "ended": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017  Python 3.10
        "model_id": model.get("model_id"),
        "checkpoint": model.get("checkpoint_path"),
        "slurmeval": manifest.get("slurmeval"),
        "config_sha256": digest(job_dir / "config.yaml"),
        "edited": sorted(name for name, value in now.items() if value != known[name]),
        "endpoint": read_json(endpoint),
    }


def digest(path: Path) -> str | None:
    """Return a file's sha256, or None where it cannot be read."""
    found = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                found.update(chunk)
    except OSError:
        return None
    return found.hexdigest()


def manifest_of(root: Path) -> dict[str, Any]:
    """Return size and sha256 of every file below a directory, but those of a manifest."""
    files = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink() and path != root / MANIFEST:
            name = path.relative_to(root).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": digest(path)}
    return {"files": files}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--job-dir",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="the job directory with config.yaml and manifest.json (default: of this file)",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("resume", "valid already? else clear away"), ("task", "judge one")):
        command = commands.add_parser(name, help=text)
        command.add_argument("name")
        command.add_argument("directory", type=Path)
    command.add_argument("--exit-code", type=int)
    command.add_argument("--seconds", type=float)
    command.add_argument("--endpoint", type=Path, help="endpoint.json of deploy.py")
    summary = commands.add_parser("summary", help="sum up")
    summary.add_argument("root", type=Path)
    summary.add_argument("names", nargs="*", metavar="NAME")
    summary.add_argument("--job-id")
    summary.add_argument("--endpoint", type=Path, help="endpoint.json of deploy.py")
    summary.add_argument("--failure", help="why the job ends before all benchmarks have")
    return parser.parse_args(argv)


def one_line(verdict: dict[str, Any]) -> str:
    """Return a benchmark's verdict as the last line of its log."""
    score = verdict["metrics"].get(verdict["primary"]) or {"value": None}
    text = f"{verdict['state']}  {verdict['primary']} {number(score['value'], 4)}"
    return f"{text}  {verdict['samples']} samples  {verdict['reason']}".rstrip()


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = parse_arguments(argv)
    limits = limits_of(read_config(arguments.job_dir))
    if arguments.command == "resume":
        done = resume(arguments.directory, made_with(arguments.name, arguments.job_dir))
        if done:
            print(one_line(read_json(arguments.directory / "verdict.json") or {}), "(kept)")
        return 0 if done else 1
    if arguments.command == "task":
        facts = facts_of(arguments.name, arguments.job_dir)
        faults = (read_json(arguments.endpoint) or {}).get("faults")
        run = (arguments.exit_code, arguments.seconds)
        verdict = judge(facts, arguments.directory, limits, *run, faults)
        write_atomically(arguments.directory / "verdict.json", verdict)
        if verdict["state"] == "ok":  # else a repeated run may want them
            for name in ("cache", "response_stats_cache"):
                shutil.rmtree(arguments.directory / name, ignore_errors=True)
        print(one_line(verdict))
        return 0 if verdict["state"] == "ok" else 1
    job = job_facts(arguments.job_dir, arguments.job_id, arguments.endpoint, arguments.failure)
    summary = summarise(arguments.root, arguments.names, job, limits)
    write_atomically(arguments.root / "summary.json", summary)
    write_atomically(arguments.root / MANIFEST, manifest_of(arguments.root))
    print(table(summary))
    return 0 if summary["state"] == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
