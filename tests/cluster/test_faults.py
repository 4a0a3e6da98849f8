"""What a job does when something breaks: each fault on a real Slurm cluster, with a real Ray.

Each fault is a function that breaks a job and looks at its end. They run side by side on nodes of
their own, a few at a time; each test waits for one of them. With ``SLURMEVAL_FAULT_TABLE=FILE`` the
seen values are written there, as docs/faults.md shows them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from jobs import LONG, QUICK, Ended, Job, Lab, until
from slurmcluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.faults]

Fault = Callable[[Lab, tuple[str, ...]], Ended]
#: Name of each fault, how many nodes it needs, and what runs.
FAULTS: dict[str, tuple[int, Fault]] = {}
#: Those that start no Ray, or a stand-in for it, and so are quick enough for every run.
QUICK_ONES: set[str] = set()
SIDE_BY_SIDE = 3
#: Secrets of a job whose second attempt, or whose tidying up, needs them.
SECRETS = {"HF_TOKEN": "hf_4711"}


def fault(name: str, nodes: int = 1, ray: bool = True) -> Callable[[Fault], Fault]:
    """Registers a fault, and whether it needs the real Ray."""

    def register(function: Fault) -> Fault:
        FAULTS[name] = (nodes, function)
        if not ray:
            QUICK_ONES.add(name)
        return function

    return register


@pytest.fixture(scope="module")
def endings(
    request: pytest.FixtureRequest, large_slurm_cluster: SlurmCluster
) -> Iterator[dict[str, Future[Ended]]]:
    """The ends of the jobs, of the faults that were asked for."""
    cluster = large_slurm_cluster
    items = request.session.items
    wanted = [item.callspec.params.get("name") for item in items if hasattr(item, "callspec")]
    lab = Lab(cluster)

    def run(name: str) -> Ended:
        nodes, function = FAULTS[name]
        with lab.lend(nodes) as lent:
            return function(lab, lent)

    # Where a container fails, srun says so or says nothing; here, the worse of both.
    cluster.silent_container_failures(True)
    crew = ThreadPoolExecutor(SIDE_BY_SIDE)
    found = {name: crew.submit(run, name) for name in FAULTS if name in wanted}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURMEVAL_KNOWN_HOSTS", str(cluster.known_hosts))
        patch.setenv("SLURMEVAL_SSH_CONFIG", "/dev/null")
        yield found
        crew.shutdown(cancel_futures=True)
    if "SLURMEVAL_FAULT_TABLE" in os.environ:
        good = {k: f.result() for k, f in found.items() if not f.cancelled() and not f.exception()}
        Path(os.environ["SLURMEVAL_FAULT_TABLE"]).write_text(
            "".join(
                f"| {name} | {e.parts} | {e.state} {e.exit_code} "
                f"| `{e.first}` | {e.seconds:.0f} |\n"
                for name, e in sorted(good.items())
            )
        )


def assert_clean_end(ended: Ended, state: str, code: str) -> Ended:
    """Asserts how a job ended, and that it left nothing."""
    assert (ended.state, ended.exit_code) == (state, code), ended.log
    assert ended.left == [], ended.left
    return ended


def assert_failed(ended: Ended, first: str) -> Ended:
    """Asserts that a job failed and says why in its first line."""
    assert_clean_end(ended, "FAILED", "1:0")
    assert re.search(first, ended.first), ended.log
    return ended


def assert_green(ended: Ended) -> Ended:
    """Asserts that a job ended with valid results."""
    return assert_clean_end(ended, "COMPLETED", "0:0")


# --------------------------------------------------------------- 4: power, the longest first


def losing_power(lab: Lab, nodes: tuple[str, ...], victim: int, requeue: bool) -> tuple[Job, str]:
    """Starts a job on two nodes and pulls the power of one when a benchmark is finished."""
    env = {"requeue": requeue}
    job = lab.job(nodes, [QUICK, LONG], count=2, secrets=SECRETS, env=env).submit()
    job.wait_task("quick", "ok")
    job.wait_answers("long")
    lost = job.machines()[victim]
    job.fault_by(lambda: lab.cluster.crash(lost))
    return job, lost


def assert_secrets_arrived(job: Job, node: str) -> None:
    """Asserts that the evaluator, which may be about to start, has the secrets."""
    until("the evaluator", lambda: job.processes(node, "bin/nemo-evaluator|/nemo-evaluator run"))
    variables = job.environment(node, "nemo-evaluator run").split("\0")
    assert {f"{name}={value}" for name, value in SECRETS.items()} <= set(variables)


def assert_client_removes(job: Job, ended: Ended, left: set[str]) -> None:
    """Asserts that a job left something only in its directory, and a look at it removes that."""
    assert set(ended.left) == left
    assert job.look_at_home().ended
    ended.left = [name for name in ended.left if job.path(name).exists()]


def power_back(lab: Lab, node: str) -> None:
    """Switches a node on and waits until it may be lent again."""
    lab.cluster.boot(node)
    idle = ("sinfo", "-h", "-n", node, "-t", "idle", "-o", "%n")
    until(f"{node} to be idle", lambda: lab.cluster.exec("login", *idle).stdout.strip(), 400)


def goes_on_without(lab: Lab, nodes: tuple[str, ...], victim: int) -> Ended:
    """Asserts that a job that lost a node goes on elsewhere, with what it has finished."""
    job, lost = losing_power(lab, nodes, victim, requeue=True)
    try:
        job.wait_task("long", "running", attempt=1)
        assert lost not in job.machines()
        assert_secrets_arrived(job, job.machines()[0])
        job.enough()
        ended = job.end(500, [node for node in nodes if node != lost])
    finally:
        power_back(lab, lost)
    assert "(kept)" in job.path("logs/1/quick.log").read_text()
    return assert_green(ended)


@fault("04a a worker node loses power, requeue", nodes=3)
def worker_loses_power(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    return goes_on_without(lab, nodes, 1)


@fault("04b the head node loses power, requeue", nodes=3)
def head_loses_power(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    return goes_on_without(lab, nodes, 0)


@fault("04c a node loses power, no requeue", nodes=2)
def power_without_requeue(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job, lost = losing_power(lab, nodes, 1, requeue=False)
    try:
        ended = job.end(500, [node for node in nodes if node != lost])
    finally:
        power_back(lab, lost)
    return assert_clean_end(ended, "NODE_FAIL", "143:0")


@fault("04d the head node loses power, no requeue", nodes=2)
def head_without_requeue(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job, lost = losing_power(lab, nodes, 0, requeue=False)
    try:
        ended = job.end(500, [node for node in nodes if node != lost])
        # Nothing of the job runs any more that could remove these.
        assert_client_removes(job, ended, {"run", ".secrets.env"})
    finally:
        power_back(lab, lost)
    return assert_clean_end(ended, "NODE_FAIL", "0:0")


# --------------------------------------------------------------------------- 9: the walltime


@fault("09a USR2 before the walltime")
def walltime_near(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    tasks = [lab.demo_task("generate", 8), lab.demo_task("choice", 64)]
    job = lab.job(
        nodes,
        tasks,
        real=True,
        secrets=SECRETS,
        env={"requeue": True},
        eval={"parallelism": 1},
    ).submit()
    job.wait_task("slurmeval_demo_generate", "ok")
    job.wait_requests("slurmeval_demo_choice")
    job.fault("scancel", "--batch", "--signal=USR2", job.id)
    job.wait_task("slurmeval_demo_choice", "running", attempt=1)
    assert_secrets_arrived(job, nodes[0])
    ended = job.end(500)
    assert "(kept)" in job.path("logs/1/slurmeval_demo_generate.log").read_text()
    assert job.path("logs/0/slurmeval_demo_choice.log").exists()
    assert job.summary()["state"] == "ok"
    return assert_green(ended)


@fault("09b the walltime, again and again", ray=False)
def walltime_cap(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    run = {"requeue": {"max_attempts": 2, "warning_seconds": 300}}
    job = lab.job(nodes, [LONG], ray=False, run=run, env={"requeue": True}).submit()
    for attempt in (0, 1):
        job.wait_task("long", "running", attempt)
        # Slurm looks for walltimes that are near twice a minute.
        job.fault("scontrol", "update", f"JobId={job.id}", "TimeLimit=5")
        if attempt == 0:
            until("the requeue", lambda: "JobState=PENDING" in job.show())
            lab.cluster.exec("login", "scontrol", "update", f"JobId={job.id}", "TimeLimit=30")
    ended = job.end()
    assert job.path("logs/0/long.log").exists() and job.path("logs/1/long.log").exists()
    return assert_failed(ended, "the walltime ended in attempt 2, and no further one is allowed")


# ---------------------------------------------------------- 6, 7: the endpoint; 5: deploy.py


@fault("06 a Serve replica is killed")
def replica_killed(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job = lab.job(nodes, [lab.demo_task("choice", 64)], real=True, eval={"parallelism": 2})
    job.submit().wait_requests("slurmeval_demo_choice")
    job.signal(nodes[0], "ray::ServeReplica")
    ended = job.end()
    assert "is gone; 0 left" in job.path("logs/0/serve.log").read_text()
    assert job.summary()["tasks"][0]["samples"] == 64
    return assert_green(ended)


@fault("07 the endpoint hangs")
def endpoint_hangs(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    patience = {"parallelism": 2, "request_timeout": 4, "max_retries": 1}
    job = lab.job(nodes, [lab.demo_task("choice", 64)], real=True, eval=patience).submit()
    job.wait_requests("slurmeval_demo_choice")
    job.signal(nodes[0], "ray::ServeReplica", "STOP")
    return assert_failed(job.end(), "slurmeval_demo_choice")


@fault("05 deploy.py raises while loading")
def deploy_raises(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    model = {"checkpoint_path": "/no/such/checkpoint"}
    job = lab.job(nodes, [QUICK], real=True, model=model).submit()
    job.wait_phase("serve")
    job.fault_by(lambda: None)
    return assert_failed(job.end(), "in phase serve: deploy.py ended: .*/no/such/checkpoint")


# ------------------------------------------------------------------------- 1, 2, 3: Ray dies


@fault("01 Ray does not start on a worker", nodes=2)
def ray_missing(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    broken = "/tmp/broken-ray"
    lab.cluster.exec(nodes[1], "mkdir", broken)
    script = "printf '#!/bin/sh\\necho no Ray today\\nexit 1\\n' > $0/ray; chmod 755 $0/ray"
    lab.cluster.exec(nodes[1], "bash", "-c", script, broken)
    job = lab.job(nodes, [QUICK], path=broken).submit()
    job.wait_phase("ray")
    job.fault_by(lambda: None)
    ended = job.end()
    lab.cluster.exec(nodes[1], "rm", "-r", broken)
    assert "no Ray today" in job.path("failure.txt").read_text()
    return assert_failed(
        ended, f"in phase ray: Ray died: ray start on {nodes[1]} ended with exit code 1"
    )


def evaluating(lab: Lab, nodes: tuple[str, ...]) -> Job:
    """Starts a job and waits until it is in the middle of a benchmark."""
    job = lab.job(nodes, [LONG]).submit()
    job.wait_answers("long")
    return job


@fault("02a the head's gcs_server is killed")
def head_gcs_dies(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job = evaluating(lab, nodes)
    job.signal(nodes[0], "gcs_server")
    return assert_failed(job.end(), f"in phase evaluate: Ray died: .* on {nodes[0]} ")


@fault("02b the head's raylet is killed")
def head_raylet_dies(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job = evaluating(lab, nodes)
    job.signal(nodes[0], "raylet/raylet ")
    return assert_failed(job.end(), f"in phase evaluate: Ray died: .* on {nodes[0]} ")


@fault("03a a worker's raylet is killed", nodes=2)
def worker_raylet_killed(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    task = lab.demo_task("choice", 64)
    job = lab.job(nodes, [task], real=True, eval={"parallelism": 1}).submit()
    job.wait_requests(task["name"])
    job.signal(nodes[1], "raylet/raylet ")
    return assert_failed(job.end(), f"in phase evaluate: Ray died: .* on {nodes[1]} ")


@fault("03b a worker's raylet is terminated", nodes=2)
def worker_raylet_terminated(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job = evaluating(lab, nodes)
    job.signal(nodes[1], "raylet/raylet ", "TERM")
    return assert_failed(job.end(), f"in phase evaluate: Ray died: .* on {nodes[1]} ")


# ------------------------------------------------------------------------------- 10: scancel


def cancelled(job: Job) -> Ended:
    """Cancels a job as a person does, and asserts that nothing stays."""
    job.fault_by(lambda: job.cluster.user_exec("scancel", job.id))
    return assert_clean_end(job.end(), "CANCELLED", "143:0")


@fault("10a scancel in phase ray")
def cancelled_in_ray(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job = lab.job(nodes, [QUICK]).submit()
    job.wait_phase("ray")
    until("the raylet", lambda: job.processes(nodes[0], "raylet/raylet "))
    return cancelled(job)


@fault("10b scancel in phase serve")
def cancelled_in_serve(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job = lab.job(nodes, [QUICK], real=True).submit()
    job.wait_phase("serve")
    until("a worker of deploy.py", lambda: job.processes(nodes[0], "ray::"))
    return cancelled(job)


@fault("10c scancel in phase evaluate")
def cancelled_in_evaluate(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    return cancelled(evaluating(lab, nodes))


@fault("10d scancel in phase verdict", ray=False)
def cancelled_in_verdict(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job = lab.job(nodes, [QUICK], ray=False)
    job.path("verdict.py").rename(job.path("the_verdict.py"))
    job.path("verdict.py").write_text(SLOW_VERDICT)
    job.submit().wait_phase("verdict")
    until("the verdict to begin", job.path("judging").exists)
    return cancelled(job)


#: Judges each benchmark, and takes long over all of them.
SLOW_VERDICT = """\
import pathlib, runpy, sys, time
here = pathlib.Path(__file__)
if sys.argv[1] == "summary" and not here.with_name("judging").exists():
    here.with_name("judging").touch()
    time.sleep(600)
runpy.run_path(str(here.with_name("the_verdict.py")), run_name="__main__")
"""


@fault("10e scancel in phase start", ray=False)
def cancelled_in_start(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job = lab.job(nodes, [QUICK], secrets=SECRETS)
    slow = job.path("tools/mkdir")
    slow.write_text('#!/bin/bash\ntouch "$JOB_DIR/making"\nsleep 600\n')
    slow.chmod(0o755)
    job.submit()
    until("the first directory", job.path("making").exists)
    return cancelled(job)


@fault("10f scancel before the phases", ray=False)
def cancelled_before(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    env = {"setup_lines": ["touch setting-up", "sleep 600"]}
    job = lab.job(nodes, [QUICK], secrets=SECRETS, env=env).submit()
    until("the lines of the profile", job.path("setting-up").exists)
    job.fault_by(lambda: job.cluster.user_exec("scancel", job.id))
    ended = job.end()
    assert_client_removes(job, ended, {".secrets.env"})
    return assert_clean_end(ended, "CANCELLED", "0:15")


# -------------------------------------------------- 8, 11 to 14: benchmarks, disks, neighbours


@fault("08 one benchmark's evaluator fails", ray=False)
def one_benchmark_fails(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    error = {"params": {"extra": {"error": "the data set is not there"}}}
    bad = {**QUICK, "name": "bad", **error}
    job = lab.job(nodes, [bad, QUICK], ray=False).submit()
    job.wait_task("bad", "failed")
    job.fault_by(lambda: None)
    ended = job.end()
    states = {task["name"]: task["state"] for task in job.summary()["tasks"]}
    assert states == {"bad": "failed", "quick": "ok"}
    assert "the data set is not there" in job.path("failure.txt").read_text()
    return assert_failed(ended, r"in phase verdict: .*\bbad\b.*failed")


def with_disk(lab: Lab, nodes: tuple[str, ...], options: str) -> Job:
    """Writes a job whose results go to a small file system of its node."""
    make = f"mkdir /tmp/disk && mount -t tmpfs -o mode=1777,{options} tmpfs /tmp/disk"
    lab.cluster.exec(nodes[0], "bash", "-c", make)
    execution = {"execution": {"output_dir": "/tmp/disk"}}
    return lab.job(nodes, [LONG], ray=False, eval=execution)


def without_disk(lab: Lab, nodes: tuple[str, ...]) -> None:
    lab.cluster.exec(nodes[0], "bash", "-c", "umount /tmp/disk && rmdir /tmp/disk")


@fault("11a the output directory is full", ray=False)
def output_full(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job = with_disk(lab, nodes, "size=64k").submit()
    job.wait_answers("long", 1)
    fill = "cat /dev/zero > /tmp/disk/filler; true"
    job.fault("bash", "-c", fill, machine=nodes[0])
    job.enough()
    until("the end", lambda: job.status()["phase"] in {"failed", "done"})
    without_disk(lab, nodes)
    ended = assert_failed(job.end(), "verdict.py wrote no summary: .*No space left on device")
    assert "a file system is full" in job.path("failure.txt").read_text()
    return ended


@fault("11b the output directory is read-only", ray=False)
def output_read_only(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job = with_disk(lab, nodes, "ro").submit()
    job.fault_by(lambda: None)
    ended = job.end()
    without_disk(lab, nodes)
    return assert_failed(ended, "Read-only file system")


@fault("12 two jobs on one node")
def two_jobs(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    jobs = [lab.job(nodes, [LONG]).submit() for _ in range(2)]
    for job in jobs:
        job.wait_answers("long")
    assert all(job.status()["phase"] == "evaluate" for job in jobs)
    for job in jobs:
        job.enough()
    blocks = [
        re.findall(r"ports (\d+-\d+)", job.path(f"logs/0/ray-{nodes[0]}.log").read_text())
        for job in jobs
    ]
    assert blocks[0] and blocks[1] and blocks[0] != blocks[1]
    ports = [json.loads(job.path("endpoint.json").read_text())["port"] for job in jobs]
    assert ports[0] != ports[1]
    ends = [job.end(nodes=[]) for job in jobs]
    ends[1].left = jobs[1].left(nodes)
    return [assert_green(ended) for ended in ends][1]


@fault("14a a leftover of the same id", nodes=2)
def leftover(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job = lab.job(nodes, [QUICK])
    for name in ("run/ray-died", "run/ray-ready", "done", "endpoint.json", "failure.txt"):
        job.path(name).parent.mkdir(exist_ok=True)
        job.path(name).write_text("old\n")
    job.submit("--hold")
    make = (
        "d=/tmp/slurmeval-$0; mkdir -p $d/r/session_latest; echo $d/r/x > $d/locks; chown -R $1 $d"
    )
    for node in nodes:
        lab.cluster.exec(node, "bash", "-c", make, job.id, str(lab.cluster.uid))
    job.fault("scontrol", "release", job.id)
    return assert_green(job.end())


@fault("14b a leftover of somebody else", ray=False)
def leftover_of_another(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job = lab.job(nodes, [QUICK]).submit("--hold")
    folder = f"/tmp/slurmeval-{job.id}"
    lab.cluster.exec(nodes[0], "mkdir", "-p", f"{folder}/x")
    job.fault("scontrol", "release", job.id)
    ended = job.end()
    lab.cluster.exec(nodes[0], "rm", "-r", folder)
    return assert_failed(ended, f"cannot make {folder} on {nodes[0]}")


# ---------------------------------------------------------------- 15: containers do not start

IMAGE = "registry.example/faults:1"


@fault("15a no container starts, and srun returns 0", nodes=2, ray=False)
def no_container(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    env = {"container": "registry.example/absent:1"}
    job = lab.job(nodes, [QUICK], ray=False, env=env)
    job.fault_by(job.submit)
    ended = job.end()
    assert "the container did not start" in job.path("failure.txt").read_text()
    return assert_failed(ended, "in phase ray: .*container start failed: .*no such image")


@fault("15b a worker's container does not start, and srun returns 0", nodes=2, ray=False)
def no_container_on_a_worker(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    image = lab.cluster.make_image(IMAGE)
    lab.cluster.exec(nodes[0], "mkdir", "/tmp/only-here")
    env = {"container": str(image), "mounts": ["/tmp/only-here:/in"]}
    job = lab.job(nodes, [QUICK], ray=False, env=env).submit()
    job.wait_phase("ray")
    job.fault_by(lambda: None)
    ended = job.end()
    lab.cluster.exec(nodes[0], "rmdir", "/tmp/only-here")
    assert "the container did not start" in job.path("failure.txt").read_text()
    return assert_failed(
        ended, f"Ray died: .*container start failed: .*; it never began on {nodes[1]}$"
    )


@fault("15c a benchmark's container does not start, and srun returns 0", ray=False)
def no_container_of_a_benchmark(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    image = lab.cluster.make_image(f"{IMAGE}-serving")
    absent = {**QUICK, "name": "absent", "container": "registry.example/absent:1"}
    job = lab.job(nodes, [absent, QUICK], ray=False, env={"container": str(image)}).submit()
    job.fault_by(lambda: None)
    ended = job.end()
    states = {task["name"]: task["state"] for task in job.summary()["tasks"]}
    assert states["quick"] == "ok"
    return assert_failed(ended, r"in phase verdict: absent \w+.*container start failed")


@fault("13 started by hand outside Slurm", ray=False)
def outside_slurm(lab: Lab, nodes: tuple[str, ...]) -> Ended:
    job = lab.job(nodes, [QUICK])
    lab.cluster.give(job.directory)
    before = sorted(job.directory.rglob("*"))
    done = lab.cluster.user_exec("bash", job.path("job.sbatch"), check=False)
    assert done.returncode == 2
    assert "sbatch job.sbatch" in done.stderr
    assert sorted(job.directory.rglob("*")) == before
    return Ended("-", "2", done.stderr.strip(), 0, job.left(nodes), done.stderr, "-")


@pytest.mark.timeout(1800)  # the first one waits for others, too
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK_ONES else pytest.mark.long)
        for name in sorted(FAULTS)
    ],
)
def test_fault(name: str, endings: dict[str, Future[Ended]]) -> None:
    endings[name].result()
