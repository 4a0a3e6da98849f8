"""What all schedulers share: the states of a job, a look at one, and the framing of a poll.

A poll is one remote command. Its script prints sections, each with a header line that tells the
section's name, exit status and size in bytes, so that whatever a section holds cannot be mistaken
for another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from slurmeval.cluster.host import Completed, Host
from slurmeval.cluster.text import one_line, printable, quote_path
from slurmeval.errors import ClusterError, CommandFailed

#: Bytes of the job's log that one poll brings at most.
LOG_CHUNK = 1 << 18


class JobState(StrEnum):
    """The state of a job, in Slurm's words; `UNKNOWN` is an unanswered question, not a failure."""

    PENDING = "PENDING"
    CONFIGURING = "CONFIGURING"
    RUNNING = "RUNNING"
    COMPLETING = "COMPLETING"
    SUSPENDED = "SUSPENDED"
    REQUEUED = "REQUEUED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMEOUT = "TIMEOUT"
    DEADLINE = "DEADLINE"
    NODE_FAIL = "NODE_FAIL"
    BOOT_FAIL = "BOOT_FAIL"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    PREEMPTED = "PREEMPTED"
    UNKNOWN = "UNKNOWN"

    @property
    def live(self) -> bool:
        """Whether the job waits or runs."""
        return self in _LIVE

    @property
    def ended(self) -> bool:
        """Whether the job has come to an end, good or bad."""
        return self is not JobState.UNKNOWN and not self.live


_LIVE = {
    JobState.PENDING,
    JobState.CONFIGURING,
    JobState.RUNNING,
    JobState.COMPLETING,
    JobState.SUSPENDED,
    JobState.REQUEUED,
}


@dataclass(frozen=True)
class Watched:
    """A job to look at.

    Attributes:
        job_id: The scheduler's id.
        job_dir: Its directory.
        log_offset: Bytes of its log that are known; a negative number leaves the log out.
    """

    job_id: str
    job_dir: str
    log_offset: int = -1


@dataclass(frozen=True)
class Started:
    """The scheduler's answer to a submission.

    Attributes:
        job_id: Its id of the job.
        log: The absolute path of the job's log, where it is known.
        words: What the scheduler expected of the job before it was queued; may be empty.
        doubtful: Whether it expects that the job cannot start as things are.
    """

    job_id: str
    log: str | None = None
    words: str = ""
    doubtful: bool = False


@dataclass(frozen=True)
class Snapshot:
    """One look at a job.

    Attributes:
        state: Its state; for an array, what its elements are together.
        exit_code: As the source writes it (Slurm: ``code:signal``), where it is known.
        source: Who said so: sacct, squeue, scontrol, status.json, process; or why nobody did.
        status: The job's own ``status.json``, where it is there and whole.
        log: New text of the job's log, in whole lines while the job is live.
        log_offset: Bytes of the log up to the end of ``log``; pass it to the next poll.
        gone: Whether everybody answered and nobody knows the job any more.
        reason: Why a waiting job waits, in the scheduler's word.
    """

    state: JobState
    exit_code: str | None
    source: str
    status: dict[str, Any] | None
    log: str
    log_offset: int
    gone: bool = False
    reason: str = ""

    @property
    def requeues(self) -> int:
        """How often the job was started again, as it says itself."""
        attempt = (self.status or {}).get("attempt")
        return attempt if type(attempt) is int and attempt > 0 else 0


class Refused(ClusterError):
    """The scheduler said no: there is certainly no job."""


class Scheduler(Protocol):
    """How a job starts on a host, is watched, and is ended."""

    def submit(
        self,
        job_dir: str,
        *,
        name: str,
        partition: str | None = None,
        extra: Sequence[str] = (),
    ) -> Started:
        """Start ``job.sbatch`` of a directory.

        Calling it again for the same directory returns the job that is there already, so that a
        lost answer never makes two jobs.

        Raises:
            Refused: There is no job; in the scheduler's own words.
            ConnectionFailed: It is not known whether there is a job; call it again.
        """

    def test_only(self, script: bytes, *, name: str) -> str:
        """Ask what would become of a script, and return the answer; nothing is queued or written.

        Raises:
            Refused: The scheduler would not take it, or could never start it.
            ConnectionFailed: There was no answer.
        """

    def find(self, job_dir: str, *, name: str) -> str | None:
        """Return the id of the job that was started from a directory, or None where there is none.

        Raises:
            ConnectionFailed: It is not known whether there is a job.
        """

    def poll(self, job_id: str, job_dir: str, *, log_offset: int) -> Snapshot:
        """Look at a job with one remote command; a negative ``log_offset`` leaves its log out."""

    def poll_many(self, jobs: Sequence[Watched]) -> list[Snapshot]:
        """Look at any number of jobs with one remote command; one snapshot each, in order."""

    def cancel(self, job_id: str, job_dir: str) -> None:
        """Ask for the job's end; its script's own trap cleans up."""


@dataclass(frozen=True)
class Section:
    """One answer within a poll."""

    returncode: int
    data: bytes

    @property
    def text(self) -> str:
        """The answer as text."""
        return self.data.decode("utf-8", "replace").strip()


#: ``answer NAME COMMAND...`` prints one section, ``log NAME PATH OFFSET`` one with a file's bytes,
#: ``left NAME JOB`` one where a job's secrets or its directory ``run`` are there.
PRELUDE = f"""out=
answer() {{
    section=$1; shift
    out=$("$@" 2>&1); code=$?
    printf '%s %s %s\\n%s\\n' "$section" "$code" "$(printf %s "$out" | wc -c)" "$out"
    return "$code"
}}
log() {{
    size=$(wc -c 2>/dev/null < "$2") || size=0
    from=$3; [ "$from" -le "$size" ] || from=0
    count=$((size - from)); [ "$count" -le {LOG_CHUNK} ] || count={LOG_CHUNK}
    printf '%s %s %s\\n' "$1" "$from" "$count"
    [ "$count" = 0 ] || tail -c +$((from + 1)) -- "$2" | head -c "$count"
    echo
}}
left() {{
    if [ -e .secrets.env ] || [ "$(cat run/job 2>/dev/null)" = "$2" ]; then answer "$1" true; fi
}}
"""

_CLEAR = """(cd -- {job_dir} && rm -f .secrets.env
[ "$(cat run/job 2>/dev/null)" != {job} ] || rm -rf run)
"""


def clear(host: Host, left: Mapping[str, str]) -> None:
    """Remove what jobs could not remove that were killed, or never began.

    Args:
        host: Where they ran.
        left: Their directories, and their ids as their scripts know them.

    Raises:
        ConnectionFailed: It may still be there.
    """
    script = "".join(
        _CLEAR.format(job_dir=quote_path(directory), job=job) for directory, job in left.items()
    )
    if script:
        host.run(f"{script}exit 0\n", timeout=60)


def sections(done: Completed) -> dict[str, Section]:
    """Read the sections that a poll printed.

    Raises:
        ClusterError: The output is not what the script prints.
    """
    data = done.stdout.encode("utf-8", "surrogateescape")
    found: dict[str, Section] = {}
    while data:
        header, newline, rest = data.partition(b"\n")
        try:
            name, code, size = header.split()
            end = int(size)
            section = Section(int(code), rest[:end])
        except ValueError:
            newline = b""
        if not newline or rest[end : end + 1] != b"\n":
            words = printable(done.stdout[:200] + done.stderr[:200])
            raise ClusterError(f"cannot read the answer to a look at the job: {words!r}")
        found[name.decode("ascii", "replace")] = section
        data = rest[end + 1 :]
    return found


def look(host: Host, script: str, *, timeout: float) -> dict[str, Section]:
    """Run the script of a poll and read its sections.

    Raises:
        ClusterError: It failed, or its output is not what such a script prints.
    """
    done = host.run(f"{script}exit 0\n", timeout=timeout)
    if done.returncode != 0:
        raise CommandFailed(f"cannot look at jobs on {host.name}: {one_line(done.stderr)}")
    return sections(done)


def status_of(section: Section | None) -> dict[str, Any] | None:
    """Return the content of ``status.json``, or None where it is missing or not an object."""
    if section is None or section.returncode != 0:
        return None
    try:
        status = json.loads(section.data)
    except (ValueError, RecursionError):
        return None
    return status if isinstance(status, dict) else None


def state_of_status(status: dict[str, Any] | None) -> JobState:
    """Return what the job itself wrote about its end: the last witness, where nobody else knows."""
    ends = {"done": JobState.COMPLETED, "failed": JobState.FAILED}
    return ends.get(str((status or {}).get("phase")), JobState.UNKNOWN)


def log_of(section: Section | None, offset: int, *, live: bool) -> tuple[str, int]:
    """Return the new text of the log and the offset behind it.

    While the job is live, or more of the log is there, an unfinished last line is left for the
    next poll.
    """
    if section is None:
        return "", offset
    start, data = section.returncode, section.data
    if len(data) >= LOG_CHUNK:
        data = data[: data.rfind(b"\n", LOG_CHUNK // 2) + 1 or None]
    elif live:
        data = data[: data.rfind(b"\n") + 1]
    return data.decode("utf-8", "replace"), start + len(data)
