"""Results leave home: files, Weights & Biases, MLflow, through each service's own library.

An export runs on the client, after the results came home, from ``summary.json`` alone: it occupies
no GPU and changes no verdict. It can be repeated: the same job is the same run there. What happened
is kept in ``exports.json`` beside the summary.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slurmeval.config.schema import Export, MlflowExport, WandbExport
from slurmeval.errors import SlurmevalError
from slurmeval.manifest import write_atomic
from slurmeval.report import FORMATS
from slurmeval.results import Results, compare

LOG = "exports.json"
INSTALL = "pip install 'slurmeval[export]'"
#: Seconds after which a service that does not answer is given up.
PATIENCE = 60


class ExportFailed(SlurmevalError):
    """Results could not be exported; they are unharmed, and it can be repeated."""

    exit_code = 3


@dataclass(frozen=True)
class Exported:
    """What became of one export.

    Attributes:
        to: ``local``, ``wandb`` or ``mlflow``.
        state: ``ok`` or ``failed``.
        where: What it wrote: a path, or the run's address.
        reason: Why it failed.
        time: When, UTC, ISO 8601.
        summary: The sha256 of the summary that it read.
    """

    to: str
    state: str
    where: str
    reason: str
    time: str
    summary: str


def overridden(settings: Export, given: Mapping[str, Any]) -> Export:
    """Return settings with those values over them that are given."""
    values = settings.model_dump()
    for name, value in given.items():
        if isinstance(value, dict):
            values[name] = {**(values[name] or {}), **{k: v for k, v in value.items() if v}}
        elif value:
            values[name] = value
    return Export.model_validate(values)


def wanted(settings: Export) -> list[str]:
    """Return the destinations that are configured."""
    found = ["local"] if settings.local else []
    found += ["wandb"] if settings.wandb and settings.wandb.project else []
    found += ["mlflow"] if settings.mlflow and settings.mlflow.tracking_uri else []
    return found


def outstanding(results: Results) -> list[str]:
    """Return the configured destinations that do not have these very scores yet."""
    known, now = _log(results.folder), _digest(results.folder)
    return [
        name
        for name in wanted(results.export)
        if (known.get(name) or {}).get("state") != "ok" or known[name].get("summary") != now
    ]


def export(results: Results, to: Sequence[str], settings: Export) -> list[Exported]:
    """Export results, one destination after the other; a failed one does not stop the next.

    Args:
        results: The job.
        to: ``local``, ``wandb``, ``mlflow``.
        settings: Where exactly.
    """
    exporters: dict[str, Callable[[], str]] = {
        "local": lambda: to_files(results, settings.local or ["json", "csv"]),
        "wandb": lambda: to_wandb(results, settings.wandb or WandbExport()),
        "mlflow": lambda: to_mlflow(results, settings.mlflow or MlflowExport()),
    }
    summary = _digest(results.folder)
    done = [_attempt(name, exporters[name], summary) for name in to]
    if done:
        known = {**_log(results.folder), **{entry.to: asdict(entry) for entry in done}}
        write_atomic(results.folder / LOG, json.dumps(known, indent=2) + "\n")
    return done


def _attempt(name: str, exporter: Callable[[], str], summary: str) -> Exported:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        return Exported(name, "ok", exporter(), "", now, summary)
    except ExportFailed as error:
        reason = "; ".join(line.strip() for line in error.format_message().splitlines())
    except Exception as error:  # the service's own library may raise anything
        words = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {words[0]}"
    return Exported(name, "failed", "", reason, now, summary)


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "summary.json").read_bytes()).hexdigest()


def _log(folder: Path) -> dict[str, Any]:
    try:
        known = json.loads((folder / LOG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def line_of(done: Exported) -> str:
    """Return what became of an export, for people."""
    if done.state == "ok":
        return f"exported to {done.to}: {done.where}"
    return f"export to {done.to} FAILED: {done.reason}"


def to_files(results: Results, formats: Sequence[str]) -> str:
    """Write the scores beside the summary and return the paths."""
    comparison = compare([results], all_metrics=True)
    paths = []
    for name in formats:
        path = results.folder / f"scores.{name}"
        write_atomic(path, FORMATS[name](comparison))
        paths.append(str(path))
    return ", ".join(paths)


def scores_of(results: Results) -> dict[str, float]:
    """Return all numbers as services name them: ``benchmark/metric``, ``mean``."""
    numbers: dict[str, float] = {}
    for task in results.summary["tasks"]:
        for metric, score in (task.get("metrics") or {}).items():
            for name, value in ((metric, score["value"]), (f"{metric}_stderr", score["stderr"])):
                if value is not None:
                    numbers[f"{task['name']}/{name}"] = value
        for name in ("samples", "seconds"):
            if task.get(name) is not None:
                numbers[f"{task['name']}/{name}"] = task[name]
    if results.summary["aggregate"]["value"] is not None:
        numbers["mean"] = results.summary["aggregate"]["value"]
    return numbers


def facts_of(results: Results) -> dict[str, str]:
    """Return what made the scores, as text."""
    job = results.summary["job"]
    names = ("id", "model_id", "checkpoint", "config_sha256", "slurmeval", "ended")
    facts = {name: str(job[name]) for name in names if job.get(name)}
    facts["state"] = results.summary["state"]
    for task in results.summary["tasks"]:
        facts[f"{task['name']}/state"] = task["state"]
    return facts


def key_of(results: Results) -> str:
    """Return what tells this job from all others, the same at each repetition."""
    job = results.summary["job"]
    parts = [job.get("id"), job.get("ended"), job.get("config_sha256"), job.get("model_id")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def to_wandb(results: Results, settings: WandbExport) -> str:
    """Write one run with all scores, a table of them, and the summary as an artifact.

    Raises:
        ExportFailed: The library or the key is missing.
    """
    try:
        import wandb
    except ImportError as error:
        raise ExportFailed(f"wandb is not installed here ({error})", hint=INSTALL) from error
    if not settings.project:
        raise ExportFailed("no project", hint="--project NAME, or eval.export.wandb.project")
    offline = os.environ.get("WANDB_MODE", "") in ("offline", "disabled", "dryrun")
    if not offline and not wandb.api.api_key:
        raise ExportFailed(
            "no API key for Weights & Biases",
            hint="export WANDB_API_KEY, or run 'wandb login'; WANDB_MODE=offline keeps it here",
        )
    run = wandb.init(
        entity=settings.entity,
        project=settings.project,
        id=key_of(results),
        name=results.label,
        job_type="evaluation",
        resume="allow",
        dir=str(results.folder),
        config=facts_of(results),
        settings=wandb.Settings(
            console="off", silent=True, init_timeout=PATIENCE, disable_git=True, disable_code=True
        ),
    )
    try:
        table = wandb.Table(columns=["benchmark", "metric", "value", "stderr", "samples", "state"])
        for row in compare([results], all_metrics=True).rows:
            cell = row.cells[0]
            table.add_data(row.task, row.metric, cell.value, cell.stderr, cell.samples, cell.state)
        run.log({**scores_of(results), "scores": table})
        artifact = wandb.Artifact(f"eval-{run.id}", type="evaluation", metadata=facts_of(results))
        artifact.add_file(str(results.folder / "summary.json"))
        run.log_artifact(artifact)
    finally:
        run.finish()
        wandb.teardown()  # finish alone returns before an offline run is on the disk
    folder = Path(run.dir).parent
    return f"{folder}; 'wandb sync {folder}' sends it" if offline else str(run.url)


def to_mlflow(results: Results, settings: MlflowExport) -> str:
    """Write one run with all scores and the summary.

    Raises:
        ExportFailed: The library is missing, or there is no server to write to.
    """
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
    except ImportError as error:
        raise ExportFailed(f"mlflow is not installed here ({error})", hint=INSTALL) from error
    uri = settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise ExportFailed(
            "no tracking URI", hint="--tracking-uri URI, eval.export.mlflow.tracking_uri"
        )
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(PATIENCE))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    client, key = MlflowClient(tracking_uri=uri), key_of(results)
    experiment = client.get_experiment_by_name(settings.experiment)
    number = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(settings.experiment, artifact_location=_beside(uri))
    )
    there = client.search_runs([number], filter_string=f"tags.`slurmeval.job` = '{key}'")
    run = (
        there[0]
        if there
        else client.create_run(number, run_name=results.label, tags={"slurmeval.job": key})
    )
    ended = datetime.datetime.fromisoformat(results.summary["job"]["ended"])
    moment = int(ended.timestamp() * 1000)
    client.log_batch(
        run.info.run_id,
        metrics=[
            Metric(_mlflow_name(name), value, moment, 0)
            for name, value in scores_of(results).items()
        ],
        params=[Param(_mlflow_name(k), v[:500]) for k, v in facts_of(results).items()],
    )
    client.log_artifact(run.info.run_id, str(results.folder / "summary.json"))
    client.set_terminated(run.info.run_id)
    return f"{uri}, experiment {settings.experiment}, run {run.info.run_id}"


def _beside(uri: str) -> str | None:
    """Return where artifacts of a database file go: beside it, not into the current directory."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "artifacts").as_uri()


def _mlflow_name(text: str) -> str:
    """Return a name of the signs that MLflow allows."""
    return "".join(c if c.isalnum() or c in "_-./ :" else "_" for c in text)
