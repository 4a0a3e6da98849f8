"""Records: what is written, by whom, and what is left of it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path

import pytest

from slurmeval import record as records
from slurmeval.cluster.access import Access
from slurmeval.cluster.scheduler import JobState, Snapshot
from slurmeval.config.schema import Env
from slurmeval.errors import ConfigError
from slurmeval.record import Record


def record(name: str = "a-1", **keys: object) -> Record:
    values: dict[str, object] = {
        "profile": "p",
        "env": dataclasses.asdict(Access(executor="local")),
        "remote_dir": f"/jobs/{name}",
        "job_id": "7",
        "created": "2026-01-01T00:00:00+00:00",
        "results": f"/results/{name}",
        **keys,
    }
    return Record(name=name, **values)  # type: ignore[arg-type]


def test_only_names_of_secrets_are_kept() -> None:
    env = Env.model_validate(
        {"env_vars": {"A": "hidden"}, "setup_lines": ["hidden"], "secrets": ["HF_TOKEN"]}
    )
    path = records.save(record(env=dataclasses.asdict(Access.of(env))))
    assert "hidden" not in path.read_text()
    assert "HF_TOKEN" in path.read_text()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def _change(number: int) -> None:
    for _ in range(20):
        records.update(record(), **({"state": "RUNNING"} if number % 2 else {"phase": "serve"}))
        records.save(record(f"b-{number}"))


def test_processes_lose_nothing_of_each_other() -> None:
    records.save(record())
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_change, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = records.find("a-1")
    assert (found.state, found.phase) == ("RUNNING", "serve")
    assert len(records.records()) == 5
    assert sorted(path.suffix for path in records.directory().iterdir()) == ["", *[".json"] * 5]


def test_a_removed_record_stays_removed() -> None:
    kept = record()
    records.save(kept)
    records.remove(kept.name)
    assert records.update(kept, state="RUNNING").state == "RUNNING"
    assert records.records() == []


def test_a_record_of_another_version_is_read() -> None:
    path = records.save(record())
    data = json.loads(path.read_text())
    del data["requeues"], data["config_hash"]
    path.write_text(json.dumps({**data, "colour": "blue"}))
    assert records.find("a-1") == record()


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"name": "x"}', ""])
def test_what_is_no_record_is_named_and_left_out(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    records.save(record())
    (records.directory() / "broken.json").write_text(text)
    assert records.records() == [record()]
    assert "broken.json cannot be read" in caplog.text


def test_a_look_is_remembered_and_an_unanswered_question_is_not() -> None:
    records.save(record())
    status = {"phase": "serve\x1b", "attempt": 2}
    seen = records.seen(record(), Snapshot(JobState.RUNNING, None, "squeue", status, "", -1))
    assert (seen.state, seen.phase, seen.requeues) == ("RUNNING", "serve", 2)
    assert seen.checked is not None
    unknown = Snapshot(JobState.UNKNOWN, None, "Slurm does not answer", None, "", -1)
    assert records.seen(seen, unknown) == seen
    ended = Snapshot(JobState.FAILED, "1:0", "sacct", None, "", -1)
    after = records.seen(seen, ended)
    assert (after.state, after.exit_code, after.phase, after.requeues) == (
        "FAILED",
        "1:0",
        "serve",
        2,
    )
    assert records.find("a-1") == after


def test_a_job_is_meant_by_name_beginning_id_or_last() -> None:
    for name, job_id in (("a-1", "7"), ("a-2", "8"), ("b-1", "8"), ("7-x", "9")):
        records.save(record(name, job_id=job_id, created=f"2026-01-01T00:00:0{name[-1:]}"))
    assert records.find("a-1").name == "a-1"
    assert records.find("b").name == "b-1"
    assert records.find("7").name == "a-1"
    assert records.find("7-").name == "7-x"
    assert records.find("last").name == "7-x"
    for several in ("a", "8"):
        with pytest.raises(ConfigError, match="is not unique"):
            records.find(several)
    for nothing in ("", "c", "../a-1"):
        with pytest.raises(ConfigError, match="is known in"):
            records.find(nothing)


def test_no_place_for_records_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="Not a directory") as caught:
        records.save(record())
    assert "XDG_STATE_HOME" in str(caught.value.hint)
