"""What nemo-evaluator leaves in an output directory, made by hand."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def metric(value: float, stderr: float | None = 0.05, count: int | None = None) -> dict[str, Any]:
    return {"scores": {"acc": {"value": value, "stats": {"stderr": stderr, "count": count}}}}


def write_results(folder: Path, tasks: Mapping[str, Any], groups: Mapping[str, Any] | None = None,
                  task: str = "mine") -> Path:  # fmt: skip
    """Write results.yml; ``tasks`` maps names to metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {name: {"metrics": metrics} for name, metrics in tasks.items()}
    repeated = groups if groups is not None else tasks
    values = {
        "command": "lm-eval",
        "config": {"params": {"task": task}, "type": f"lm-evaluation-harness.{task}"},
        "results": {
            "tasks": entries,
            "groups": {name: {"metrics": metrics} for name, metrics in repeated.items()},
        },
    }
    (folder / "results.yml").write_text(yaml.safe_dump(values))
    return folder


def write_samples(
    folder: Path, samples: Sequence[Mapping[str, Any]], *, planned: int | None = None,
    name: str = "mine",
) -> None:  # fmt: skip
    """Write lm-eval's own files."""
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    count = len(samples) if planned is None else planned
    report = {"n-samples": {name: {"original": count, "effective": count}}}
    (model / f"results_{name}.json").write_text(json.dumps(report))
    lines = [json.dumps({"doc_id": i, "filter": "none", **s}) for i, s in enumerate(samples)]
    (model / f"samples_{name}_2026.jsonl").write_text("".join(line + "\n" for line in lines))


def choice(*likely: float) -> dict[str, Any]:
    """Return a sample of multiple choice, as lm-eval logs it."""
    return {"resps": [[[str(value), "False"]] for value in likely]}


def said(text: str) -> dict[str, Any]:
    """Return a generated sample."""
    return {"resps": [[text]]}


def write_cache(folder: Path, asked: Sequence[str], answers: Mapping[str, str]) -> None:
    """Write the adapter's cache: requests, and answers by request."""
    contents = {
        "requests": {key: json.dumps({"prompt": key}) for key in asked},
        "responses": {k: json.dumps({"choices": [{"text": t}]}) for k, t in answers.items()},
    }
    for kind, rows in contents.items():
        place = folder / "cache" / kind
        place.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(place / "cache.db")) as base, base:
            base.execute(
                "CREATE TABLE IF NOT EXISTS Cache "
                "(key BLOB, value BLOB, filename TEXT, size INTEGER DEFAULT 0)"
            )
            base.execute("DELETE FROM Cache")
            for number, (key, text) in enumerate(rows.items()):
                name = f"{number}.val" if kind == "responses" and len(text) > 100 else None
                if name:
                    (place / name).write_text(text)
                base.execute(
                    "INSERT INTO Cache VALUES (?, ?, ?, ?)",
                    (key, None if name else text.encode(), name, len(text)),
                )


def write_counts(folder: Path, count: int, successful: int) -> None:
    """Write the adapter's count of requests."""
    stats = {"response_stats": {"count": count, "successful_count": successful}}
    (folder / "eval_factory_metrics.json").write_text(json.dumps(stats))


def good(folder: Path, value: float = 0.5, samples: int = 4) -> Path:
    """Write results with nothing wrong."""
    write_results(folder, {"mine": {"acc": metric(value)}})
    write_samples(folder, [choice(-1.0 - i, -2.0) for i in range(samples)])
    return folder
