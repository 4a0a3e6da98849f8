"""Slurm: sbatch, and a state from whoever answers: sacct, else squeue, else scontrol, else the job.

Facts: ``squeue -j`` ends with 1 and "Invalid job id" for a job that it does not know, which is an
answer; any other error is none. ``sacct`` ends with 1 where accounting is off, lags behind, and
writes ``CANCELLED by 1001``. A finished job leaves the controller after MinJobAge.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from slurmeval.cluster import scheduler
from slurmeval.cluster.host import Host
from slurmeval.cluster.scheduler import JobState, Refused, Section, Snapshot
from slurmeval.cluster.text import one_line, quote_path
from slurmeval.errors import ClusterError, CommandFailed, ConnectionFailed

#: Seconds for one answer of Slurm; a controller that is down takes about ten to say so.
_TIMEOUT = 90.0
_JOB_ID = re.compile(r"^\d+$")

# A non-interactive shell may lack the site's PATH; its profile then knows.
_SETUP = """if ! command -v sbatch >/dev/null 2>&1 && [ -r /etc/profile ]; then
    . /etc/profile >/dev/null 2>&1
fi
"""

# `.submitting` marks that sbatch was called, `.job-id` keeps its answer: a second call looks there,
# and then asks Slurm for the name, before it would ever make a second job.
_SUBMIT = """cd -- {job_dir} || exit 66
if [ -s .job-id ]; then cat .job-id; exit 0; fi
if [ -e .submitting ]; then
    id=$(squeue -h -t all --name={name} -o %A) || exit 75
    [ -n "$id" ] || id=$(sacct -n -X -P --name={name} -o JobIDRaw 2>/dev/null)
    if [ -n "$id" ]; then echo "$id" | head -n 1 | tee .job-id; exit 0; fi
fi
: > .submitting
if words=$(sbatch --parsable {options} job.sbatch 2>&1 > .job-id.part); then
    mv .job-id.part .job-id; cat .job-id; exit 0
fi
printf '%s\n' "$words" >&2; cat .job-id.part >&2; rm -f .job-id.part
# Slurm may have taken the job although its answer did not come.
case $words in *"timed out"* | *"ontact slurm controller"*) exit 75 ;; esac
rm -f .submitting; exit 76
"""

_POLL = """cd -- {job_dir} || exit 66
{prelude}
answer squeue squeue -h -t all -j {job} -o %T; asked="$? $out"
case $out in
    PENDING | RUNNING | CONFIGURING | COMPLETING | SUSPENDED) ;;
    *)
        answer sacct sacct -n -P -j {job} -o JobID,State,ExitCode
        # Where the controller does not answer, asking it twice only doubles the wait.
        case $asked in
            0* | *"nvalid job id"*) answer scontrol scontrol show job -o {job} ;;
        esac ;;
esac
[ ! -e status.json ] || answer status cat status.json
{log}
exit 0
"""

#: A piece of sbatch's own words -> what probably helps.
_REMEDIES = (
    ("account", "Check run.env.account; `sacctmgr show assoc user=$USER` lists yours."),
    ("partition", "Check run.env.partition; `sinfo -s` on the cluster lists the partitions."),
    ("qos", "Check run.env.qos; `sacctmgr show qos` lists what there is."),
    ("unable to contact", "The Slurm controller does not answer. Try again later."),
    ("not found", "Slurm's commands are not on the PATH of a non-interactive shell there."),
    ("container", "pyxis is not installed there: set run.env.container_runtime to none."),
    ("generic resource", "Check run.env.gpu_request and run.env.gpus_per_node."),
    ("gres", "Check run.env.gpu_request and run.env.gpus_per_node."),
    ("time limit", "Check run.env.time against the partition's limit (`sinfo -o '%P %l'`)."),
    ("node configuration", "Check nodes, gpus_per_node, cpus and mem in run.env."),
    ("node count", "Check run.env.nodes against the partition (`sinfo -s`)."),
    ("memory", "Check run.env.mem against the nodes (`sinfo -o '%P %m'`)."),
    ("unrecognized option", "This Slurm does not know that option; see run.env.sbatch_args."),
)


class Slurm:
    """Jobs of Slurm on a host where its commands are."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def submit(
        self,
        job_dir: str,
        *,
        name: str,
        partition: str | None = None,
        extra: Sequence[str] = (),
    ) -> str:
        """See `slurmeval.cluster.scheduler.Scheduler.submit`."""
        options = [
            f"--job-name={name}",
            *([f"--partition={partition}"] if partition else []),
            *extra,
        ]
        script = _SETUP + _SUBMIT.format(
            job_dir=quote_path(job_dir), name=shlex.quote(name), options=shlex.join(options)
        )
        done = self._host.run(script, timeout=_TIMEOUT)
        words = one_line(done.stderr) or one_line(done.stdout) or "no reason given"
        if done.returncode == 75:
            raise ConnectionFailed(f"Slurm on {self._host.name} does not answer: {words}")
        if done.returncode == 66:
            raise CommandFailed(f"cannot enter the job directory: {words}")
        if done.returncode != 0:
            raise Refused(
                f"sbatch on {self._host.name} refused the job: {words}", hint=_remedy(words)
            )
        return _parse_id(done.stdout)

    def poll(self, job_id: str, job_dir: str, *, log_offset: int) -> Snapshot:
        """See `slurmeval.cluster.scheduler.Scheduler.poll`."""
        script = _SETUP + _POLL.format(
            job_dir=quote_path(job_dir),
            prelude=scheduler.PRELUDE,
            job=_checked(job_id),
            log=scheduler.log_command(f"slurm-{job_id}.out", log_offset),
        )
        done = self._host.run(script, timeout=_TIMEOUT)
        if done.returncode != 0:
            raise CommandFailed(f"cannot look at {job_dir}: {one_line(done.stderr)}")
        found = scheduler.sections(done)
        status = scheduler.status_of(found.get("status"))
        state, exit_code, source, gone = _judge(job_id, found)
        if state is JobState.UNKNOWN and scheduler.state_of_status(status).ended:
            state, source, gone = scheduler.state_of_status(status), "status.json", False
        log, offset = scheduler.log_of(found.get("log"), log_offset, live=not state.ended)
        return Snapshot(state, exit_code, source, status, log, offset, gone)

    def cancel(self, job_id: str, job_dir: str) -> None:
        """See `slurmeval.cluster.scheduler.Scheduler.cancel`."""
        done = self._host.run(f"{_SETUP}scancel {_checked(job_id)}", timeout=_TIMEOUT)
        if done.returncode != 0:
            raise CommandFailed(f"scancel {job_id} failed: {one_line(done.stderr)}")


def _checked(job_id: str) -> str:
    if not _JOB_ID.match(job_id):
        raise ClusterError(f"not a Slurm job id: {job_id!r}")
    return job_id


def _parse_id(output: str) -> str:
    """Return the job id of ``id`` or ``id;cluster``, wherever a site's wrapper put more lines."""
    for line in reversed(output.splitlines()):
        job_id = line.strip().split(";")[0]
        if _JOB_ID.match(job_id):
            return job_id
    raise ClusterError(f"sbatch gave no job id, but: {one_line(output) or 'nothing'}")


def _remedy(words: str) -> str | None:
    low = words.lower()
    return next((remedy for piece, remedy in _REMEDIES if piece in low), None)


def _judge(job_id: str, found: dict[str, Section]) -> tuple[JobState, str | None, str, bool]:
    """Return (state, exit code, source, whether everybody answered that there is no such job)."""
    queue, in_queue = _squeue(found.get("squeue"))
    accounted = _sacct(job_id, found.get("sacct"))
    shown = _scontrol(found.get("scontrol"))
    if queue.live:
        return queue, None, "squeue", False
    code = accounted[1] or shown[1]
    # sacct may lag behind: what it calls running has ended when the controller says so.
    if accounted[0].ended:
        return accounted[0], code, "sacct", False
    if queue.ended:
        return queue, code, "squeue", False
    if shown[0] is not JobState.UNKNOWN:
        return shown[0], code, "scontrol", False
    if accounted[0].live and in_queue is None:
        return accounted[0], None, "sacct", False
    if in_queue is None:
        words = one_line(found["squeue"].text if "squeue" in found else "")
        return JobState.UNKNOWN, None, f"Slurm does not answer: {words}", False
    return JobState.UNKNOWN, None, "Slurm does not know the job any more", True


def _word(text: str) -> JobState:
    """Return the state of ``CANCELLED by 1001`` and the like."""
    word = text.strip().split()[0].rstrip("+") if text.strip() else ""
    aliases = {
        "REQUEUE_HOLD": "REQUEUED",
        "REQUEUE_FED": "REQUEUED",
        "SPECIAL_EXIT": "REQUEUED",
        "RESIZING": "RUNNING",
        "SIGNALING": "RUNNING",
        "STAGE_OUT": "COMPLETING",
        "STOPPED": "SUSPENDED",
        "RESV_DEL_HOLD": "PENDING",
        "REVOKED": "CANCELLED",
    }
    try:
        return JobState(aliases.get(word, word))
    except ValueError:
        return JobState.UNKNOWN


def _squeue(section: Section | None) -> tuple[JobState, bool | None]:
    """Return (state, whether the job is in the queue; None where squeue did not answer)."""
    if section is None:
        return JobState.UNKNOWN, None
    if section.returncode == 0:
        state = _word(section.text)
        return state, bool(section.text)
    return JobState.UNKNOWN, False if "invalid job id" in section.text.lower() else None


def _sacct(job_id: str, section: Section | None) -> tuple[JobState, str | None]:
    if section is None or section.returncode != 0:
        return JobState.UNKNOWN, None
    rows = [line.split("|") for line in section.text.splitlines() if line.count("|") == 2]
    own = [row for row in rows if row[0] == job_id or row[0] == f"{job_id}+0"]
    if not own:
        return JobState.UNKNOWN, None
    state = _word(own[-1][1])
    if state is JobState.FAILED and any(_word(row[1]) is JobState.OUT_OF_MEMORY for row in rows):
        state = JobState.OUT_OF_MEMORY
    return state, own[-1][2] or None


def _scontrol(section: Section | None) -> tuple[JobState, str | None]:
    if section is None or section.returncode != 0:
        return JobState.UNKNOWN, None
    state = re.search(r"\bJobState=(\S+)", section.text)
    code = re.search(r"\bExitCode=(\S+)", section.text)
    return _word(state[1] if state else ""), code[1] if code else None
