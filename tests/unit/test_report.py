"""Reports: one job, several side by side, in each format; and exports to files."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from slurmeval import export, record, report, results
from slurmeval.cli import cli
from slurmeval.config.schema import Export
from slurmeval.errors import ConfigError, ResultsIncomplete
from slurmeval.verdict import AGGREGATE, SCHEMA_VERSION


def task(
    name: str, value: float | None, stderr: float | None = 0.01, **more: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "state": "ok",
        "reason": "",
        "warnings": [],
        "primary": "acc",
        "metrics": {
            "acc": {"value": value, "stderr": stderr},
            "acc_norm": {"value": 0.5, "stderr": None},
        },
        "samples": 100,
        "seconds": 12.4,
        "image": "nvcr.io/x",
        "image_digest": "sha256:1",
        "versions": {"nemo-evaluator": "0.2.8"},
        **more,
    }


def job(folder: Path, *tasks: dict[str, Any], **more: Any) -> Path:
    values = [t["metrics"]["acc"]["value"] for t in tasks if t["metrics"]]
    folder.mkdir(parents=True)
    summary = {
        "schema_version": SCHEMA_VERSION,
        "state": "ok",
        "warnings": [],
        "tasks": list(tasks),
        "aggregate": {
            "value": sum(values) / len(values) if values else None,
            "stderr": 0.007,
            "definition": AGGREGATE,
        },
        "job": {
            "id": "7",
            "ended": "2026-01-02T03:04:05+00:00",
            "model_id": "tiny",
            "checkpoint": "/ckpt",
            "slurmeval": "0.1.0",
            "config_sha256": "ab",
            "edited": [],
            "endpoint": {"versions": {"ray": "2.60.0"}},
        },
        **more,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return job(tmp_path / "base" / "eval_results", task("piqa", 0.70), task("arc", 0.50)).parent


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    tasks = (task("piqa", 0.73), task("arc", 0.60), task("new", 0.1))
    return job(tmp_path / "tuned", *tasks)


def compared(*jobs: Path, **options: Any) -> results.Comparison:
    return results.compare([results.load(str(path)) for path in jobs], **options)


def test_a_directory_a_file_and_a_job_directory_are_found(base):
    for path in (base, base / "eval_results", base / "eval_results" / "summary.json"):
        assert results.load(str(path)).folder == base / "eval_results"


def test_a_recorded_job_is_found_by_name(base, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    settings = {"wandb": {"project": "p", "entity": None}}
    known = record.Record(
        name="my-job-1",
        profile=None,
        env={},
        remote_dir="/r",
        job_id="7",
        created="2026",
        results=str(base),
        export=settings,
    )
    record.save(known)
    for name in ("my-job-1", "my", "7", "last"):
        found = results.load(name)
        assert (found.label, found.folder) == ("my-job-1", base / "eval_results")
        assert export.wanted(found.export) == ["wandb"]
    record.save(record.Record(**{**known.__dict__, "name": "other", "results": "/nowhere"}))
    with pytest.raises(ResultsIncomplete) as caught:
        results.load("other")
    assert caught.value.hint == "slurmeval pull other"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}'])
def test_what_is_no_summary_is_refused(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ConfigError, match="no summary"):
        results.load(str(tmp_path))


def test_a_summary_of_another_version_is_refused(base):
    path = base / "eval_results" / "summary.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(ConfigError, match="schema version 99"):
        results.load(str(base))


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no results"):
        results.load(str(tmp_path))


def test_differences_have_a_standard_error_and_a_mark(base, tuned):
    piqa, arc, new = compared(base, tuned).rows
    assert piqa.cells[1].delta == pytest.approx(0.03)
    assert piqa.cells[1].delta_stderr == pytest.approx(0.01 * 2**0.5)
    assert (piqa.cells[1].mark, arc.cells[1].mark) == ("*", "**")
    assert (new.cells[0].state, new.cells[1].delta) == ("-", None)


def test_small_differences_and_those_without_stderr_have_no_mark(tmp_path):
    one = job(tmp_path / "a", task("x", 0.50), task("y", 0.1, stderr=None))
    two = job(tmp_path / "b", task("x", 0.51), task("y", 0.9, stderr=None))
    first, second = compared(one, two).rows
    assert first.cells[1].mark == "" and first.cells[1].delta == pytest.approx(0.01)
    assert second.cells[1].delta_stderr is None and second.cells[1].mark == ""


def test_scores_that_are_not_valid_have_no_difference(tmp_path, base):
    bad = job(tmp_path / "bad", task("piqa", 0.9, state="invalid", reason="10% without answer"))
    comparison = compared(base, bad)
    assert comparison.rows[0].cells[1].delta is None
    assert "0.9000 ±0.0100 (invalid)" in report.table(comparison)
    assert "invalid: 10% without answer" in report.table(compared(bad))


def test_what_makes_scores_hard_to_compare_is_said(tmp_path, base):
    other = job(
        tmp_path / "other",
        task("piqa", 0.7, samples=10, versions={"nemo-evaluator": "0.2.7"}, warnings=["odd"]),
        warnings=["all the same"],
    )
    notes = compared(base, other).notes
    assert "piqa: 100 and 10 samples are not the same questions" in notes
    assert "piqa: evaluated with different versions of the evaluator" in notes
    assert {"other: all the same", "other: piqa: odd"} <= set(notes)


def test_why_a_score_does_not_count_is_said_beside_others_too(tmp_path, base):
    broken = {**task("arc", 0.9), "state": "invalid", "reason": "no answers"}
    other = job(tmp_path / "other", task("piqa", 0.7), broken, state="failed")
    summary = json.loads((other / "summary.json").read_text())
    summary["job"]["failure"] = "Ray died"
    (other / "summary.json").write_text(json.dumps(summary))
    assert compared(base, other).notes == (
        "other: the job failed: Ray died",
        "other: arc is invalid: no answers",
    )
    assert compared(other).notes == ("other: the job failed: Ray died",)


def test_all_metrics_or_the_primary_ones(base):
    assert [row.metric for row in compared(base).rows] == ["acc", "acc"]
    assert len(compared(base, all_metrics=True).rows) == 4


def test_the_table_of_one_job(base):
    text = report.table(compared(base))
    assert re.search(r"^piqa +acc +0\.7000 +0\.0100 +100 +12 +ok$", text, re.MULTILINE)
    assert re.search(r"^mean +0\.6000 +0\.0070 +- +25 +ok$", text, re.MULTILINE)


def test_the_table_of_two_jobs(base, tuned):
    text = report.table(compared(base, tuned))
    assert "+0.0300 ±0.0141 *" in text and "+0.1000 ±0.0141 **" in text
    assert "differences are to the first job" in text


def test_markdown_is_a_table_of_equal_columns(base, tuned):
    lines = report.markdown(compared(base, tuned)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 6
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "+0.1000 ±0.0141 \\*\\*" in lines[3]


def test_csv_and_json_hold_the_same_numbers(base, tuned):
    comparison = compared(base, tuned)
    lines = list(csv.DictReader(io.StringIO(report.as_csv(comparison))))
    values = json.loads(report.as_json(comparison))
    assert [float(line["value"]) for line in lines] == [row["value"] for row in values["rows"]]
    assert [line["mark"] for line in lines if line["job"] == "tuned"] == ["*", "**", ""]
    assert [mean["job"] for mean in values["means"]] == ["base", "tuned"]
    assert values["jobs"][0]["summary"]["job"]["id"] == "7"


class Page(HTMLParser):
    """Collects tags, and checks that they close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file_with_charts_and_fetches_nothing(base, tuned):
    text = report.html(compared(base, tuned))
    page = Page(text)
    assert page.open == []
    assert not [a for _, attributes in page.tags for a in attributes if a in ("src", "href")]
    assert "url(" not in text and "@import" not in text and "<script" not in text
    assert [tag for tag, _ in page.tags].count("svg") == 2
    bars = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert len(bars) == 2 * 5
    widths = [float(bar["width"] or 0) for bar in bars[:5]]
    assert widths == pytest.approx([740 * v for v in (0.70, 0.73, 0.50, 0.60, 0.1)], abs=0.1)
    assert "ray" in text and "2.60.0" in text and "sha256:1" in text


def test_the_page_shows_hostile_names_as_text(tmp_path):
    name = '<script>alert("x")</script>'
    folder = job(tmp_path / "x", task(name, 0.5, reason=name), warnings=[name])
    assert "<script" not in report.html(compared(folder))


def test_the_page_of_benchmarks_without_scores(tmp_path):
    failed = task("x", None, state="failed", reason="exit code 1", metrics={}, primary=None)
    folder = job(tmp_path / "x", {**failed, "seconds": None})
    assert "failed: exit code 1" in report.html(compared(folder))


def run(*words: str) -> Any:
    return CliRunner().invoke(cli, list(words), standalone_mode=False)


def test_the_command_writes_any_format(base, tuned, tmp_path):
    for form in report.FORMATS:
        shown = run("report", str(base), str(tuned), "--format", form)
        target = tmp_path / f"out.{form}"
        written = run("report", str(base), str(tuned), "--format", form, "-o", str(target))
        assert written.exit_code == 0, written.exception
        assert target.read_text() == shown.output
    assert run("report", str(base), "--json").output.startswith("{")


def test_exports_to_files_and_what_became_of_them(base):
    done = run("export", str(base), "--to", "local", "--format", "json", "--format", "csv")
    assert done.exit_code == 0, done.exception
    folder = base / "eval_results"
    rows = json.loads((folder / "scores.json").read_text())["rows"]
    assert len(rows) == 4 == len((folder / "scores.csv").read_text().splitlines()) - 1
    log = json.loads((folder / "exports.json").read_text())
    assert log["local"]["state"] == "ok"


def test_an_export_without_a_destination_is_refused(base):
    assert "--to says where" in run("export", str(base)).exception.format_message()


def test_a_failed_export_is_told_can_be_repeated_and_changes_nothing(base, monkeypatch):
    loaded = results.load(str(base))
    before = (loaded.folder / "summary.json").read_bytes()
    settings = Export.model_validate({"local": ["json"], "wandb": {"project": "p"}})
    loaded = results.Results(loaded.label, loaded.folder, loaded.summary, settings)

    def refuse(*_: Any) -> str:
        raise OSError("connection refused\nand more")

    monkeypatch.setattr(export, "to_wandb", refuse)
    done = export.export(loaded, export.outstanding(loaded), settings)
    assert [(entry.to, entry.state) for entry in done] == [("local", "ok"), ("wandb", "failed")]
    assert export.line_of(done[1]) == "export to wandb FAILED: OSError: connection refused"
    assert (loaded.folder / "summary.json").read_bytes() == before
    assert export.outstanding(loaded) == ["wandb"]
    monkeypatch.setattr(export, "to_wandb", lambda *_: "there")
    export.export(loaded, export.outstanding(loaded), settings)
    assert export.outstanding(loaded) == []
    (loaded.folder / "summary.json").write_bytes(before + b"\n")
    assert export.outstanding(loaded) == ["local", "wandb"]


def test_the_command_ends_with_3_where_an_export_failed(base, monkeypatch):
    monkeypatch.setattr(export, "to_mlflow", lambda *_: 1 / 0)
    done = run("export", str(base), "--to", "mlflow", "--json")
    assert isinstance(done.exception, SystemExit) and done.exception.code == 3
    assert json.loads(done.output)[0]["reason"].startswith("ZeroDivisionError")


def test_options_win_over_the_configuration():
    settings = Export.model_validate({"wandb": {"project": "p", "entity": "e"}})
    given = {"wandb": {"project": "q", "entity": None}, "local": [], "mlflow": {"experiment": None}}
    found = export.overridden(settings, given)
    assert found.wandb is not None
    assert (found.wandb.project, found.wandb.entity) == ("q", "e")
    assert export.wanted(found) == ["wandb"]


def test_means_of_other_benchmarks_are_not_compared(tmp_path):
    first = results.load(str(job(tmp_path / "a", task("arc", 0.8), task("piqa", 0.8))))
    other = results.load(str(job(tmp_path / "b", task("arc", 0.8), task("mmlu", 0.3))))
    found = results.compare([first, other])
    assert found.means.cells[1].delta is None
    assert any("its mean is of other benchmarks" in note for note in found.notes)
    assert "**" not in report.table(found).split("\n\n")[0]


def test_no_spread_is_no_significance(tmp_path):
    first = results.load(str(job(tmp_path / "a", task("arc", 1.0, 0.0, samples=2))))
    other = results.load(str(job(tmp_path / "b", task("arc", 0.5, 0.0, samples=2))))
    cell = results.compare([first, other]).rows[0].cells[1]
    assert (cell.delta, cell.mark) == (-0.5, "")
