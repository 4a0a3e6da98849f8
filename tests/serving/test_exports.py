"""Exports with the services' own libraries, offline, and read back."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from slurmeval import export, results
from slurmeval.cli import cli
from slurmeval.config.schema import Export
from tests.unit.test_report import job, task

pytestmark = pytest.mark.serving

SCORES = {
    "piqa/acc": 0.7,
    "piqa/acc_stderr": 0.01,
    "piqa/acc_norm": 0.5,
    "piqa/samples": 100,
    "piqa/seconds": 12.4,
    "mean": 0.6,
}


@pytest.fixture
def scored(tmp_path: Path) -> results.Results:
    folder = job(tmp_path / "home" / "eval_results", task("piqa", 0.7), task("arc", 0.5))
    return results.load(str(folder.parent))


def run(*words: str) -> Any:
    return CliRunner().invoke(cli, list(words), standalone_mode=False)


def wandb_records(path: Path) -> Iterator[Any]:
    """Read the records of a W&B run file: a log of LevelDB's kind in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the W&B client is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_an_offline_run_of_weights_and_biases_holds_all_scores(scored, offline):
    settings = Export.model_validate({"wandb": {"entity": "us", "project": "evals"}})
    (done,) = export.export(scored, ["wandb"], settings)
    assert done.state == "ok", done.reason
    assert "wandb sync" in done.where
    (path,) = scored.folder.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(path))
    run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.entity, run.project, run.job_type) == ("us", "evals", "evaluation")
    assert run.run_id == export.key_of(scored)
    facts = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert facts["checkpoint"] == "/ckpt" and facts["piqa/state"] == "ok"
    logged = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "history"
        for item in record.history.item
    }
    assert {name: logged[name] for name in SCORES} == SCORES
    assert logged["scores/_type"] == "table-file"
    kinds = {r.artifact.type for r in records if r.WhichOneof("record_type") == "artifact"}
    assert kinds == {"run_table", "evaluation"}


def test_a_repeated_run_is_the_same_run(scored, offline):
    settings = Export.model_validate({"wandb": {"project": "evals"}})
    for _ in range(2):
        (done,) = export.export(scored, ["wandb"], settings)
        assert done.state == "ok", done.reason
    ids = {path.stem for path in scored.folder.glob("wandb/offline-run-*/*.wandb")}
    assert ids == {f"run-{export.key_of(scored)}"}


def test_without_a_key_it_fails_says_so_and_asks_nothing(scored, monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="the W&B client is not installed")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    done = run("export", str(scored.folder), "--to", "wandb", "--project", "evals")
    assert isinstance(done.exception, SystemExit) and done.exception.code == 3
    assert "FAILED: no API key for Weights & Biases" in done.output
    assert json.loads((scored.folder / "exports.json").read_text())["wandb"]["state"] == "failed"


def test_a_service_that_cannot_be_reached_is_a_failed_export(scored, monkeypatch):
    pytest.importorskip("mlflow", reason="the MLflow client is not installed")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = run(
        "export", str(scored.folder), "--to", "mlflow", "--tracking-uri", "http://127.0.0.1:9"
    )
    assert isinstance(done.exception, SystemExit) and done.exception.code == 3
    assert "export to mlflow FAILED" in done.output


def test_mlflow_on_a_database_file_holds_all_scores_once(scored, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="the MLflow client is not installed")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for _ in range(2):
        done = run(
            "export", str(scored.folder), "--to", "mlflow", "--tracking-uri", uri,
            "--experiment", "evals",
        )  # fmt: skip
        assert done.exception is None, done.output
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("evals")
    (found,) = client.search_runs([experiment.experiment_id])
    assert {name: found.data.metrics[name] for name in SCORES} == pytest.approx(SCORES)
    assert len(client.get_metric_history(found.info.run_id, "piqa/acc")) == 1
    assert found.data.params["checkpoint"] == "/ckpt"
    assert found.info.status == "FINISHED"
    (artifact,) = client.list_artifacts(found.info.run_id)
    assert artifact.path == "summary.json"
    assert (tmp_path / "artifacts").is_dir()
