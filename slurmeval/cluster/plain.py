"""A job as an ordinary process group of a host: what ``executor = "local"`` means.

The process writes its id and start time to ``.job-id`` and its exit status to ``.exit-code``; both
survive this client. A process id alone could belong to somebody else after a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slurmeval.cluster import scheduler
from slurmeval.cluster.host import Host
from slurmeval.cluster.scheduler import (
    JobState,
    Refused,
    Section,
    Snapshot,
    Started,
    Watched,
)
from slurmeval.cluster.text import one_line, quote_path
from slurmeval.errors import CommandFailed

_TIMEOUT = 30.0
#: Where the job's output goes, in the job directory.
LOG = "job.log"

# `remember PID` writes `.job-id`, of which `alive PID START` asks. Field 22 of stat is the start
# time, counted behind the name in parentheses.
_ALIVE = """started() {
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    set -- ${stat##*) }
    echo "${20}"
}
alive() { [ -n "$2" ] && [ "$(started "$1")" = "$2" ] && ! grep -q '^State:.Z' "/proc/$1/status"; }
remember() {
    [ -s .job-id ] || { echo "$1 $(started "$1")" > .job-id.part && mv .job-id.part .job-id; }
}
"""

# Without `&`: a background process of a shell would ignore SIGINT for ever.
_SUBMIT = """cd -- {job_dir} || exit 66
{alive}
[ -e job.sbatch ] || {{ echo "there is no job.sbatch" >&2; exit 66; }}
run='sh -c "echo \\$\\$ > .pid.part && mv .pid.part .pid && exec bash job.sbatch"
echo $? > .exit-code.part && mv .exit-code.part .exit-code'
if mkdir .submitting 2>/dev/null; then
    setsid --fork sh -c "$run" > {log} 2>&1 < /dev/null || exit 70
fi
tries=0
until [ -s .pid ]; do
    tries=$((tries + 1)); [ "$tries" -lt 100 ] || {{ echo "no process came up" >&2; exit 70; }}
    sleep 0.1
done
read -r id < .pid
remember "$id"
echo "$id"
"""

# A submission that was cut short may have left the process without its `.job-id`.
_FIND = """cd -- {job_dir} || exit 66
{alive}
if [ -s .pid ]; then read -r id < .pid; remember "$id"; fi
cat .job-id 2>/dev/null; exit 0
"""

_POLL = """{alive}{prelude}
process() {{
    read -r id start < .job-id || return 1
    if alive "$id" "$start"; then echo running; return; fi
    # The exit status is written just after the end of the process.
    tries=0
    until [ -e .exit-code ] || [ "$tries" = 20 ]; do sleep 0.1; tries=$((tries + 1)); done
    if [ -e .exit-code ]; then cat .exit-code; else echo gone; fi
}}
look() {{
    cd -- "$2" || return 0
    answer "process:$1" process
    [ ! -e .cancelled ] || answer "cancelled:$1" true
    [ ! -e status.json ] || answer "status:$1" cat status.json
    left "left:$1" "local-$4"
    [ "$3" -lt 0 ] || log "log:$1" {log} "$3"
}}
"""

_CANCEL = """cd -- {job_dir} || exit 66
{alive}
read -r id start < .job-id || exit 66
alive "$id" "$start" || exit 0
: > .cancelled
kill -TERM "$id"
"""


class Plain:
    """Jobs without a scheduler: ``bash job.sbatch`` in a session of its own."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def submit(
        self,
        job_dir: str,
        *,
        name: str,
        partition: str | None = None,
        extra: Sequence[str] = (),
    ) -> Started:
        """See `slurmeval.cluster.scheduler.Scheduler.submit`; options of sbatch have no meaning."""
        script = _SUBMIT.format(job_dir=quote_path(job_dir), log=LOG, alive=_ALIVE)
        done = self._host.run(script, timeout=_TIMEOUT)
        job_id = done.stdout.strip()
        if done.returncode != 0 or not job_id.isdecimal():
            raise Refused(
                f"cannot start {name} on {self._host.name}: {one_line(done.stderr + done.stdout)}"
            )
        return Started(job_id)

    def test_only(self, script: bytes, *, name: str) -> str:
        """See `slurmeval.cluster.scheduler.Scheduler.test_only`; only the syntax can be asked."""
        done = self._host.run("exec bash -n", timeout=_TIMEOUT, input=script)
        if done.returncode != 0:
            raise Refused(f"bash on {self._host.name} cannot read it: {one_line(done.stderr)}")
        return f"{name} would start at once on {self._host.name}: there is no queue"

    def find(self, job_dir: str, *, name: str) -> str | None:
        """See `slurmeval.cluster.scheduler.Scheduler.find`."""
        script = _FIND.format(job_dir=quote_path(job_dir), alive=_ALIVE)
        done = self._host.run(script, timeout=_TIMEOUT)
        if done.returncode != 0:
            raise CommandFailed(f"cannot enter the job directory: {one_line(done.stderr)}")
        return done.stdout.split()[0] if done.stdout.split() else None

    def poll(self, job_id: str, job_dir: str, *, log_offset: int) -> Snapshot:
        """See `slurmeval.cluster.scheduler.Scheduler.poll`."""
        return self.poll_many([Watched(job_id, job_dir, log_offset)])[0]

    def poll_many(self, jobs: Sequence[Watched]) -> list[Snapshot]:
        """See `slurmeval.cluster.scheduler.Scheduler.poll_many`."""
        script = _POLL.format(alive=_ALIVE, prelude=scheduler.PRELUDE, log=LOG)
        for number, job in enumerate(jobs):
            where = quote_path(job.job_dir)
            script += f"(look {number} {where} {int(job.log_offset)} {int(job.job_id)})\n"
        found = scheduler.look(self._host, script, timeout=_TIMEOUT)
        snapshots = [_snapshot(number, job, found) for number, job in enumerate(jobs)]
        left = {
            job.job_dir: f"local-{job.job_id}"
            for number, job in enumerate(jobs)
            if snapshots[number].state.ended and f"left:{number}" in found
        }
        scheduler.clear(self._host, left)
        return snapshots

    def cancel(self, job_id: str, job_dir: str) -> None:
        """See `slurmeval.cluster.scheduler.Scheduler.cancel`."""
        script = _CANCEL.format(job_dir=quote_path(job_dir), alive=_ALIVE)
        done = self._host.run(script, timeout=_TIMEOUT)
        if done.returncode != 0:
            raise CommandFailed(f"cannot end process {job_id}: {one_line(done.stderr)}")


def _snapshot(number: int, job: Watched, found: dict[str, Section]) -> Snapshot:
    status = scheduler.status_of(found.get(f"status:{number}"))
    state, exit_code, source = _judge(
        found.get(f"process:{number}"), f"cancelled:{number}" in found, status
    )
    log, offset = scheduler.log_of(found.get(f"log:{number}"), job.log_offset, live=not state.ended)
    return Snapshot(state, exit_code, source, status, log, offset)


def _judge(
    process: Section | None, cancelled: bool, status: dict[str, Any] | None
) -> tuple[JobState, str | None, str]:
    answer = process.text if process is not None and process.returncode == 0 else ""
    if answer == "running":
        return JobState.RUNNING, None, "process"
    if answer.isdecimal():
        if answer == "0":
            return JobState.COMPLETED, answer, "process"
        return JobState.CANCELLED if cancelled else JobState.FAILED, answer, "process"
    if answer == "gone":
        witness = scheduler.state_of_status(status)
        if witness.ended:
            return witness, None, "status.json"
        return JobState.FAILED, None, "the process ended without an exit status: it was killed"
    return JobState.UNKNOWN, None, "no process was started, or its directory is gone"
