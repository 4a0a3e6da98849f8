"""What Slurm's commands say of jobs, and the one state that follows from all their answers.

Facts: ``squeue -j`` ends with 1 and "Invalid job id" for a single job that it does not know, and
leaves unknown ones out of a list; any other error is no answer. ``sacct`` ends with 1 where
accounting is off, lags behind, and writes ``CANCELLED by 1001``. Elements of an array are ``7_0``,
those that still wait ``7_[1-3]``, parts of a heterogeneous job ``7+0``, steps ``7.batch``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slurmeval.cluster.scheduler import JobState, Section
from slurmeval.cluster.text import one_line

_ALIASES = {
    "REQUEUE_HOLD": "REQUEUED",
    "REQUEUE_FED": "REQUEUED",
    "SPECIAL_EXIT": "REQUEUED",
    "RESIZING": "RUNNING",
    "SIGNALING": "RUNNING",
    "STAGE_OUT": "COMPLETING",
    "STOPPED": "SUSPENDED",
    "RESV_DEL_HOLD": "PENDING",
    "POWER_UP_NODE": "CONFIGURING",
    "REVOKED": "CANCELLED",
}
#: Of several elements the first of these that any has is the state of all.
_ORDER = tuple(
    JobState(name)
    for name in (
        *("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "PENDING"),
        *("OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "TIMEOUT", "DEADLINE", "FAILED"),
        *("PREEMPTED", "CANCELLED", "COMPLETED"),
    )
)
# Of many waiting elements, squeue leaves out some: 7_[1,3,5,...].
_OWN = r"(?:_\[[^|]*|_[^.|]*|\+\d+)?"


@dataclass(frozen=True)
class Row:
    """What one command says of a job or of one of its elements."""

    state: JobState
    extra: str | None = None


@dataclass(frozen=True)
class Judged:
    """The state that follows from all answers; see `slurmeval.cluster.scheduler.Snapshot`."""

    state: JobState
    exit_code: str | None
    source: str
    gone: bool = False
    reason: str = ""


def judge(job_id: str, found: Mapping[str, Section]) -> Judged:
    """Return a job's state from the answers of squeue, sacct and scontrol."""
    queue, in_queue = _squeue(job_id, found.get("squeue"))
    accounted = _sacct(job_id, found.get("sacct"))
    shown = _scontrol(found.get(f"scontrol:{job_id}"))
    if queue.state.live:
        reason = queue.extra or ""
        return Judged(queue.state, None, "squeue", reason="" if reason == "None" else reason)
    code = accounted.extra or shown.extra
    # sacct may lag behind: what it calls running has ended when the controller says so.
    if accounted.state.ended:
        return Judged(accounted.state, code, "sacct")
    if queue.state.ended:
        return Judged(queue.state, code, "squeue")
    if shown.state is not JobState.UNKNOWN:
        return Judged(shown.state, code, "scontrol")
    if accounted.state.live and in_queue is not False:
        return Judged(accounted.state, None, "sacct")
    if in_queue:
        return Judged(JobState.UNKNOWN, None, "squeue's word for the state is not known here")
    if in_queue is None:
        words = one_line(found["squeue"].text if "squeue" in found else "")
        return Judged(JobState.UNKNOWN, None, f"Slurm does not answer: {words}")
    return Judged(JobState.UNKNOWN, None, "Slurm does not know the job any more", gone=True)


def state_of(text: str) -> JobState:
    """Return the state of ``CANCELLED by 1001`` and the like."""
    word = text.strip().split()[0].rstrip("+") if text.strip() else ""
    try:
        return JobState(_ALIASES.get(word, word))
    except ValueError:
        return JobState.UNKNOWN


def _together(rows: Sequence[Row]) -> Row:
    """Return what several elements are together: live while one is, else its worst end."""
    for state in _ORDER:
        for row in rows:
            if row.state is state:
                return row
    return Row(JobState.UNKNOWN)


def _squeue(job_id: str, section: Section | None) -> tuple[Row, bool | None]:
    """Return (row, whether the job is in the queue; None where squeue did not answer)."""
    if section is None:
        return Row(JobState.UNKNOWN), None
    if section.returncode != 0:
        return Row(JobState.UNKNOWN), False if "invalid job id" in section.text.lower() else None
    own = re.compile(rf"{job_id}{_OWN}\|([A-Z_]+)\|(.*)")
    rows = [
        Row(state_of(match[1]), match[2]) for match in map(own.match, section.text.splitlines())
        if match
    ]  # fmt: skip
    return _together(rows), bool(rows)


def _sacct(job_id: str, section: Section | None) -> Row:
    if section is None or section.returncode != 0:
        return Row(JobState.UNKNOWN)
    lines = [line.split("|") for line in section.text.splitlines() if line.count("|") == 2]
    mine = re.compile(rf"{job_id}{_OWN}(\..*)?")
    rows: list[Row] = []
    steps: list[Row] = []
    for name, state, code in lines:
        match = mine.fullmatch(name)
        if match:
            (steps if match[1] else rows).append(Row(state_of(state), code or None))
    row = _together(rows)
    # A step that ran out of memory is why the job failed.
    if row.state is JobState.FAILED and any(s.state is JobState.OUT_OF_MEMORY for s in steps):
        return Row(JobState.OUT_OF_MEMORY, row.extra)
    return row


def _scontrol(section: Section | None) -> Row:
    if section is None or section.returncode != 0:
        return Row(JobState.UNKNOWN)
    rows = []
    for line in section.text.splitlines():
        state = re.search(r"\bJobState=(\S+)", line)
        code = re.search(r"\bExitCode=(\S+)", line)
        if state:
            rows.append(Row(state_of(state[1]), code[1] if code else None))
    return _together(rows)
