"""The phase that evaluates, run by bash with a small stand-in for nemo-evaluator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slurmeval.config.schema import Config
from slurmeval.plan import make_plan
from slurmeval.render import render

#: Notes when it runs and on which port, draws a bar, and writes results as its task's name says.
STANDIN = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
config = sys.argv[sys.argv.index("--run_config") + 1]
url = sys.argv[sys.argv.index("--model_url") + 1]
name, log = out.name, pathlib.Path(os.environ["EVENTS"])
def note(what):
    with log.open("a") as stream:
        stream.write(json.dumps({{"name": name, "what": what, "port": os.environ["ADAPTER_PORT"],
            "url": url, "out": str(out), "cwd": os.getcwd(),
            "no_proxy": os.environ["no_proxy"], "there": os.path.exists(config)}}) + "\\n")
def stopped(*_):
    (out / ".nemo_evaluator_interrupted").write_text('{{"signal": "SIGTERM"}}')
    note("stopped")
    sys.exit(0)
signal.signal(signal.SIGTERM, stopped)
note("start")
print("\\rRequesting API:  50%|###   | 5/10 [00:01<00:01]", end="", flush=True)
time.sleep(60 if name == "hangs" else 0.8)
note("end")
if name == "breaks":
    raise ValueError("no such data set")
stats = {{"stderr": 0.1, "count": 10}}
scores = {{"acc": {{"value": 0.5, "stats": stats}}}}
tasks = {{name: {{"metrics": {{"acc": {{"scores": scores}}}}}}}}
(out / "results.yml").write_text(json.dumps({{"results": {{"tasks": tasks}}}}))
"""

PHASE = """- main
prepare
mkdir -p "$NODE_DIR"
PORTS=20000
trap 'code=$?; stop 5 "${!PID[@]}"; echo "exit $code"' EXIT
evaluate
judge
"""

#: Ray dies while the second benchmark runs, and the job goes through its own teardown.
RAY_DIES = """- main
prepare
mkdir -p "$NODE_DIR"
PORTS=20000
start ray bash -c 'until grep -q "hangs.*start" "$EVENTS"; do sleep 0.2; done; echo raylet is gone'
evaluate
"""


class Job:
    """A job directory whose phases around the evaluation do nothing."""

    def __init__(self, folder: Path, tasks: list[dict[str, Any]], **settings: Any) -> None:
        self.folder = folder
        deadline = settings.pop("deadline", 30)
        config = Config.model_validate(
            {
                "model": {"checkpoint_path": "/ckpt"},
                "run": {"env": {"executor": "local"}, "deadlines": {"task": deadline}},
                "deploy": {"backend": "hf", "num_gpus": 0},
                "eval": {"tasks": tasks, **settings},
            }
        )
        for name, file in render(config, make_plan(config)).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(file.text)
        program = folder / "bin" / "nemo-evaluator"
        program.parent.mkdir()
        program.write_text(STANDIN)
        program.chmod(0o755)
        self.script = (folder / "job.sbatch").read_text()

    def run(self, phase: str = PHASE, **env: str) -> str:
        """Run the phase and the verdict; return what they print."""
        head = self.script.rpartition("- main\n")[0]
        script = head.replace("NODE_TMP=/tmp", f"NODE_TMP={self.folder}/n") + phase
        (self.folder / "phase.sh").write_text(script)
        path = os.pathsep.join(
            [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        done = subprocess.run(
            ["bash", self.folder / "phase.sh"],
            env={
                "PATH": path,
                "EVENTS": str(self.folder / "events"),
                "HOME": os.environ["HOME"],
                **env,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout + done.stderr

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "events").read_text().splitlines()]

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "status.json").read_text())
        return found

    def summary(self) -> dict[str, Any]:
        path = self.folder / "eval_results" / "summary.json"
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def tasks(*names: str) -> list[dict[str, Any]]:
    return [{"name": name, "type": f"lm-evaluation-harness.{name}"} for name in names]


def most_at_once(events: list[dict[str, Any]]) -> int:
    running = most = 0
    for event in events:
        running += 1 if event["what"] == "start" else -1
        most = max(most, running)
    return most


def test_one_by_one_in_order_each_with_a_port_of_its_own(tmp_path):
    job = Job(tmp_path, tasks("one", "two"))
    output = job.run()
    events = job.events()
    assert [(e["name"], e["what"]) for e in events] == [
        ("one", "start"),
        ("one", "end"),
        ("two", "start"),
        ("two", "end"),
    ], output
    assert len({event["port"] for event in events}) == 2
    assert {event["url"] for event in events} == {"http://127.0.0.1:8000/v1/completions/"}
    assert all(event["there"] and event["cwd"] == str(tmp_path / "tasks") for event in events)
    assert output.endswith("exit 0\n")
    assert job.summary()["state"] == "ok"
    assert job.status()["tasks"] == {"one": "ok", "two": "ok"}
    assert job.status()["progress"] == {"one": [5, 10], "two": [5, 10]}
    assert job.run().count("(kept)") == 2, "valid results are not made again"
    assert job.events() == events


def test_several_at_once_but_not_more_than_allowed(tmp_path):
    job = Job(tmp_path, tasks("one", "two", "three"), concurrency=2)
    job.run()
    assert most_at_once(job.events()) == 2
    assert job.summary()["state"] == "ok"


def test_what_has_no_group_runs_alone(tmp_path):
    job = Job(tmp_path, tasks("one", "two", "alone"), concurrency=3)
    assert "alone completions - any" in job.script
    job.script = job.script.replace("alone completions - any", "alone completions - -")
    job.run()
    events = job.events()
    start = next(i for i, e in enumerate(events) if (e["name"], e["what"]) == ("alone", "start"))
    assert most_at_once(events) == 2 == most_at_once(events[:start])
    assert {event["name"] for event in events[start:]} == {"alone"}


def test_a_failed_benchmark_leaves_the_others_alone(tmp_path):
    job = Job(tmp_path, tasks("breaks", "two"))
    output = job.run()
    assert output.endswith("exit 1\n")
    assert job.status()["tasks"] == {"breaks": "failed", "two": "ok"}
    (broken, _) = job.summary()["tasks"]
    assert broken["reason"].endswith("ValueError: no such data set")


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_benchmark_that_hangs_is_stopped_at_its_deadline(tmp_path, concurrency):
    job = Job(tmp_path, tasks("hangs", "two"), deadline=8, concurrency=concurrency)
    output = job.run()
    assert "hangs: stopped at its deadline of 8 s" in output
    assert job.status()["tasks"] == {"hangs": "interrupted", "two": "ok"}
    (hangs, _) = job.summary()["tasks"]
    assert hangs["reason"] == "stopped: its deadline of 8 s"


def test_a_job_that_fails_on_its_way_sums_up_what_is_finished(tmp_path):
    job = Job(tmp_path, tasks("one", "hangs", "three"))
    output = job.run(RAY_DIES)
    assert "FAILED in phase evaluate: Ray died: raylet is gone" in output
    summary = job.summary()
    assert summary["state"] == "failed"
    assert summary["job"]["failure"] == "Ray died: raylet is gone"
    assert [task["state"] for task in summary["tasks"]] == ["ok", "interrupted", "skipped"]
    assert job.status()["phase"] == "failed"
    again = job.run("- main\nprepare\nls eval_results/summary.json\ntrap - EXIT\n")
    assert "No such file" in again, "a new start does not show the summary of an old one"


@pytest.mark.parametrize("signal", ["HUP", "USR1", "XCPU"])
def test_a_signal_that_ends_the_script_makes_no_job_green(tmp_path, signal):
    job = Job(tmp_path, tasks("one"))
    job.run(f"- main\nprepare\nstatus ray x\nkill -{signal} $$ &\nwait $!\nsleep 5 & wait $!\n")
    assert job.status()["phase"] == "failed"


def test_a_reader_of_the_log_that_is_gone_ends_no_job(tmp_path):
    job = Job(tmp_path, tasks("one"))
    job.run("- main\nprepare\nexec > >(true)\nsleep 0.5\nsay one\nfail two /dev/null\n")
    assert "FAILED in phase start: two" in (tmp_path / "failure.txt").read_text()
    assert job.status()["detail"] == "two"


def test_the_evaluator_gets_a_path_that_a_line_of_shell_takes_as_it_stands(tmp_path):
    folder = tmp_path / "my job $(touch x); it's"
    folder.mkdir()
    job = Job(folder, tasks("one"))
    job.script = job.script.replace("NODE_TMP=/tmp", f'NODE_TMP="{tmp_path}"')
    output = job.run()
    assert output.endswith("exit 0\n"), output
    assert not set(job.events()[0]["out"]) & set(" $();'")
    assert (folder / "eval_results" / "one" / "results.yml").is_file()


def test_results_of_another_model_or_other_parameters_are_not_kept(tmp_path):
    job = Job(tmp_path, tasks("one", "two"))
    job.run()
    run_config = tmp_path / "eval" / "one.yaml"
    run_config.write_text(run_config.read_text() + "# edited\n")
    assert job.run().count("(kept)") == 1
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("/ckpt", "/other"))
    assert job.run().count("(kept)") == 0
    assert job.run().count("(kept)") == 2


def test_a_second_job_leaves_one_that_runs_in_its_directory_alone(tmp_path):
    job = Job(tmp_path, tasks("one"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job").write_text(f"local-{os.getpid()}\n")
    assert f"job local-{os.getpid()} runs in {tmp_path}" in job.run()
    assert (tmp_path / "run" / "job").is_file()


def test_a_second_run_of_a_directory_starts_its_clock_anew_and_links_its_own_results(tmp_path):
    job = Job(tmp_path, tasks("one"))
    job.script = job.script.replace("OUTPUT_DIR=eval_results", f"OUTPUT_DIR={tmp_path}/elsewhere")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "first-start").write_text("1000\n")
    for number in ("7", "8"):
        job.run(f"- main\nprepare\ntrap - EXIT\necho {number} > $RESULTS_DIR/summary.json\n")
        assert (tmp_path / "eval_results" / "summary.json").read_text() == f"{number}\n"
        assert int((tmp_path / "logs" / "first-start").read_text()) > 1000


def test_the_way_to_the_endpoint_needs_no_proxy(tmp_path):
    job = Job(tmp_path, tasks("one"))
    job.script = job.script.replace("SERVE_HOST=127.0.0.1", "SERVE_HOST=10.1.2.3")
    job.run(no_proxy=".corp")
    (event, _) = job.events()
    assert event["url"] == "http://10.1.2.3:8000/v1/completions/"
    assert event["no_proxy"] == ".corp,127.0.0.1,localhost,10.1.2.3"


@pytest.mark.parametrize("last", [b"\0", b"\xe2\x96 "])
def test_a_log_with_odd_bytes_is_read_all_the_same(tmp_path, last):
    job = Job(tmp_path, tasks("one"))
    (tmp_path / "log").write_bytes(b"bar " + last + b"\n  ERROR: it broke\nok  acc 0.5\n")
    output = job.run('- main\nlast_line "$JOB_DIR/log"\nlast_error "$JOB_DIR/log"\n')
    assert output == "ok  acc 0.5\nit broke\n"
