"""Jobs that were submitted from here: how they stand, ending, repeating and forgetting them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from slurmeval import record as records
from slurmeval.cluster.access import Access
from slurmeval.cluster.connect import connect, scheduler_of
from slurmeval.cluster.host import Host, Prompt
from slurmeval.cluster.scheduler import JobState, Scheduler, Snapshot, Watched
from slurmeval.cluster.text import one_line, printable, quote_path
from slurmeval.errors import ClusterError, CommandFailed, ConfigError
from slurmeval.follow import Ui, progress_of, tasks_of
from slurmeval.record import Record
from slurmeval.retry import persistently
from slurmeval.submit import LEFTOVERS, SECRETS, make_name, secrets_file, start

Connect = Callable[..., Host]
#: What `make_name` adds to a name.
_STAMP = re.compile(r"-\d{8}T\d{6}Z-[0-9a-f]{4}$")
_ENDED = {state.value for state in JobState if state.ended}


@dataclass(frozen=True)
class Standing:
    """How a job stands.

    Attributes:
        record: The record, with what was found.
        snapshot: The look at it; None where nobody could be asked.
        problem: Why nobody could be asked.
        never_started: Whether it is certain that the scheduler never had the job.
    """

    record: Record
    snapshot: Snapshot | None = None
    problem: str = ""
    never_started: bool = False

    @property
    def state(self) -> str:
        """The state as people and programs see it."""
        if self.snapshot is not None:
            return str(self.snapshot.state)
        return "NOT STARTED" if self.never_started else "UNKNOWN"

    @property
    def live(self) -> bool:
        """Whether the job waits or runs, or may do so."""
        if self.snapshot is None:
            return not self.never_started
        gone = self.snapshot.gone
        return self.snapshot.state.live or (self.snapshot.state is JobState.UNKNOWN and not gone)

    def facts(self) -> dict[str, Any]:
        """Return everything about the job, for programs."""
        found: dict[str, Any] = facts_of(self.record)
        found |= {"state": self.state, "problem": self.problem or None}
        if self.snapshot is not None:
            status = self.snapshot.status or {}
            found |= {
                "source": self.snapshot.source,
                "reason": self.snapshot.reason or None,
                "exit_code": self.snapshot.exit_code,
                "phase": status.get("phase"),
                "detail": status.get("detail"),
                "tasks": tasks_of(status),
                "progress": {task: list(pair) for task, pair in progress_of(status).items()},
            }
        return found

    def words(self) -> list[str]:
        """Return the same for people, a line each."""
        record, snapshot = self.record, self.snapshot
        head = f"{record.name}  job {record.job_id or '-'}  {self.state}"
        model = [f"  model {words}"] if (words := model_words(record)) else []
        if snapshot is None:
            return [head, *model, f"  {self.problem}"] if self.problem else [head, *model]
        code = f", exit code {snapshot.exit_code}" if snapshot.exit_code else ""
        why = f": {snapshot.reason}" if snapshot.reason else ""
        again = f", started again {record.requeues} times" if record.requeues else ""
        lines = [f"{head}{code}{why} ({printable(snapshot.source)}){again}", *model]
        status = snapshot.status or {}
        if status.get("phase"):
            detail = f": {status['detail']}" if status.get("detail") else ""
            lines.append(printable(f"  phase {status['phase']}{detail}"))
        progress = progress_of(status)
        for task, state in tasks_of(status).items():
            done = f"  {progress[task][0]}/{progress[task][1]}" if task in progress else ""
            lines.append(f"    {task}: {state}{done}")
        return lines


def model_words(record: Record) -> str:
    """Return which model a job serves, for people; empty where the record does not say."""
    model = record.model or {}
    checkpoint = model.get("checkpoint") or ""
    if not model.get("version"):
        return printable(checkpoint)
    pinned = f"{model.get('name')}:{model['version']}"
    return printable(f"{pinned} (asked for {model.get('requested')}): {checkpoint}")


def facts_of(record: Record) -> dict[str, Any]:
    """Return a record for programs, without what it takes to connect."""
    facts = dataclasses.asdict(record)
    env = facts.pop("env")
    return {**facts, "state": record.state or None, "host": env.get("host")}


def chosen(names: Sequence[str]) -> list[Record]:
    """Return the records that are meant: all that may still live, where none is named.

    Raises:
        ConfigError: A name means no record, or more than one.
    """
    if names:
        return list({record.name: record for record in map(records.find, names)}.values())
    known = records.records()
    return [record for record in known if record.state not in _ENDED] or known[:1]


def look(
    wanted: Sequence[Record],
    *,
    prompt: Prompt | None = None,
    connect: Connect = connect,
    hosts: dict[str, Host] | None = None,
) -> list[Standing]:
    """Ask how jobs stand, in one round trip for each host, and remember the answers.

    Hosts that cannot be reached make their jobs unknown, and no others.

    Args:
        wanted: The jobs.
        prompt: Asks the user for passphrases and codes.
        connect: Returns the host of an access.
        hosts: Where connections stay for the next look, so that nobody is asked for a code again;
            whoever gives it closes them.
    """
    groups: dict[str, list[Record]] = {}
    for record in wanted:
        env = {k: v for k, v in record.env.items() if k not in ("remote_job_dir", "secrets")}
        groups.setdefault(json.dumps(env, sort_keys=True), []).append(record)
    found: dict[str, Standing] = {}
    kept = {} if hosts is None else hosts
    try:
        for way, group in groups.items():
            for standing in _look_at_one_host(group, kept, way, partial(connect, prompt=prompt)):
                found[standing.record.name] = standing
    finally:
        if hosts is None:
            for host in kept.values():
                host.close()
    return [found[record.name] for record in wanted]


def _look_at_one_host(
    group: Sequence[Record], hosts: dict[str, Host], way: str, connect: Connect
) -> list[Standing]:
    env = group[0].access
    unsent = [record for record in group if not record.sent]
    standings = [Standing(record, None, "its files were not sent", True) for record in unsent]
    sent = [record for record in group if record.sent]
    if not sent:
        return standings
    try:
        if way not in hosts:
            hosts[way] = connect(env)
        scheduler = scheduler_of(env, hosts[way])
        known = []
        for record in sent:
            try:
                adopted = _adopted(scheduler, record)
            except CommandFailed as error:
                # Its directory is gone: that says nothing of the others.
                standings.append(Standing(record, None, error.message))
                continue
            if adopted.job_id is None:
                problem = f"start it: slurmeval resubmit {record.name}"
                standings.append(Standing(adopted, None, problem, never_started=True))
            else:
                known.append(adopted)
        jobs = [Watched(record.job_id or "", record.remote_dir) for record in known]
        for record, snapshot in zip(known, scheduler.poll_many(jobs), strict=True):
            standings.append(Standing(records.seen(record, snapshot), snapshot))
    except (ClusterError, ConfigError) as error:
        answered = {standing.record.name for standing in standings}
        standings += [
            Standing(record, None, error.message) for record in sent if record.name not in answered
        ]
    return standings


def _adopted(scheduler: Scheduler, record: Record) -> Record:
    """Return the record with the id that the scheduler knows, where its answer was lost."""
    if record.job_id is not None:
        return record
    job_id = scheduler.find(record.remote_dir, name=record.name)
    return records.update(record, job_id=job_id) if job_id else record


def cancel(
    record: Record, *, ui: Ui, prompt: Prompt | None = None, connect: Connect = connect
) -> None:
    """Ask for a job's end; one that has ended already is left alone.

    Raises:
        ClusterError: There is no connection, or the scheduler refused.
    """
    env = record.access
    host = connect(env, prompt=prompt)
    try:
        scheduler = scheduler_of(env, host)
        record = _adopted(scheduler, record) if record.sent else record
        job_id = record.job_id
        if job_id is None:
            ui.line(f"{record.name} was never started")
            return
        snapshot = scheduler.poll(job_id, record.remote_dir, log_offset=-1)
        record = records.seen(record, snapshot)
        if snapshot.state.ended:
            ui.line(f"{record.name} has ended already: {snapshot.state}")
            return
        scheduler.cancel(job_id, record.remote_dir)
        if snapshot.state is JobState.PENDING:  # its script, which would tidy up, never ran
            scheduler.poll(job_id, record.remote_dir, log_offset=-1)
        ui.line(f"{record.name}: job {job_id} was told to end")
    finally:
        host.close()


# Copies what was submitted, without the traces of its run; the new directory appears whole.
_COPY = """umask 077
old={old} new={new}
[ ! -e "$new" ] || exit 0
part=$new.$$.part
cd -- "$old" || exit 66
mkdir -- "$part" || exit 75
trap 'rm -rf -- "$part"' EXIT
find . -mindepth 1 -maxdepth 1 {but} -exec cp -a -t "$part" -- {{}} + || exit 75
[ -f "$part/job.sbatch" ] || {{ echo "there is no job.sbatch" >&2; exit 66; }}
{secrets}
# The try before may have come to its end meanwhile.
mv -T -- "$part" "$new" || [ -f "$new/job.sbatch" ]
"""
# A connection that breaks here looks like the end of the input.
_TAKE = """cat > "$part/{file}" || exit 75
[ "$(wc -c < "$part/{file}")" -eq {size} ] || exit 75
"""


def resubmit(
    record: Record,
    *,
    ui: Ui,
    keep: bool = False,
    prompt: Prompt | None = None,
    environ: Mapping[str, str] | None = None,
    connect: Connect = connect,
    sleep: Callable[[float], None] = time.sleep,
) -> Record:
    """Start a job again from its files on the cluster, as a job of its own.

    A submission whose answer was lost is completed instead: its job is looked for, and started only
    where it is not there.

    Args:
        record: The job to repeat.
        ui: Shows what happens.
        keep: Take its results along, so that valid benchmarks are not run again.
        prompt: Asks the user for passphrases and codes.
        environ: Where secrets come from; the environment of this process by default.
        connect: Makes the host.
        sleep: Waits for some seconds.

    Returns:
        The record of the job that was started or found.

    Raises:
        ConfigError: The job may still live, or its files were never sent.
        ClusterError: No connection, its files are gone, or the scheduler refused the job.
    """
    if not record.sent:
        raise ConfigError(f"the files of {record.name} were never sent: submit it anew")
    env = record.access
    host = connect(env, prompt=prompt)
    try:
        scheduler = scheduler_of(env, host)
        if record.job_id is None:
            return start(scheduler, host, record, ui, sleep)
        snapshot = scheduler.poll(record.job_id, record.remote_dir, log_offset=-1)
        record = records.seen(record, snapshot)
        _must_have_ended(Standing(record, snapshot), "started again")
        fresh = _copied(record)
        extra = secrets_file(env.secrets, os.environ if environ is None else environ)
        records.save(fresh)
        _copy(host, record, fresh, extra.get(SECRETS), keep, ui, sleep)
        fresh = records.update(fresh, sent=True)
        ui.line(f"copied   {record.remote_dir} to {fresh.remote_dir}")
        return start(scheduler, host, fresh, ui, sleep)
    finally:
        host.close()


def _copied(record: Record) -> Record:
    stem = _STAMP.sub("", record.name)
    name = make_name(stem)
    return dataclasses.replace(
        record,
        name=name,
        remote_dir=str(PurePosixPath(record.remote_dir).with_name(name)),
        job_id=None,
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        results=str(Path(record.results).with_name(name)),
        state="",
        phase="",
        exit_code=None,
        checked=None,
        synced=None,
        requeues=0,
        log=None,
        sent=False,
        resubmit_of=record.name,
    )


def _copy(
    host: Host,
    old: Record,
    new: Record,
    secret: bytes | None,
    keep: bool,
    ui: Ui,
    sleep: Callable[[float], None],
) -> None:
    left = [pattern for pattern in LEFTOVERS if not (keep and pattern == "eval_results")]
    script = _COPY.format(
        old=quote_path(old.remote_dir),
        new=quote_path(new.remote_dir),
        but=" ".join(f"! -name {shlex.quote(pattern)}" for pattern in left),
        secrets=_TAKE.format(file=SECRETS, size=len(secret)) if secret else "",
    )
    try:
        done = persistently(
            lambda failures: host.run(script, timeout=600, input=secret or b""),
            tell=lambda text: ui.line(f"note     {text}"),
            sleep=sleep,
        )
        if done.returncode != 0:
            raise CommandFailed(
                f"cannot copy {old.remote_dir} on {host.name}: "
                f"{one_line(done.stderr) or f'exit status {done.returncode}'}"
            )
    except CommandFailed:
        records.remove(new.name)
        raise


def _must_have_ended(standing: Standing, what: str) -> None:
    if standing.live:
        name = standing.record.name
        why = standing.problem or (standing.snapshot.source if standing.snapshot else "")
        raise ConfigError(
            f"{name} is {standing.state} ({why}) and cannot be {what}",
            hint=f"End it first: slurmeval cancel {name}. Where nobody can tell any more, "
            f"slurmeval rm --force {name} forgets it, and leaves it alone.",
        )


def forget(
    record: Record,
    *,
    remote: bool,
    ui: Ui,
    force: bool = False,
    prompt: Prompt | None = None,
    connect: Connect = connect,
) -> None:
    """Remove a record, and with ``remote`` the job's directory on the cluster; results here stay.

    Args:
        record: The submission.
        remote: Whether its directory goes too.
        ui: Shows what happens.
        force: Whether a job that lives, or may live, is forgotten too; it is left alone.
        prompt: Asks the user for passphrases and codes.
        connect: Returns the host of an access.

    Raises:
        ConfigError: The job lives, or may live.
        ClusterError: The directory could not be removed.
    """
    if force and remote:
        raise ConfigError("--force forgets a job that may live: its directory has to stay")
    if record.state not in _ENDED and record.sent and not force:
        (standing,) = look([record], prompt=prompt, connect=connect)
        _must_have_ended(standing, "removed")
    if remote:
        _remove_directory(record, prompt, connect)
        ui.line(f"removed  {record.remote_dir}")
    records.remove(record.name)
    ui.line(f"forgot   {record.name}; results here stay: {record.results}")


def _remove_directory(record: Record, prompt: Prompt | None, connect: Connect) -> None:
    # A record is a file that anything could have written: remove nothing but a job's directory.
    if PurePosixPath(record.remote_dir).name != record.name:
        raise ConfigError(f"{record.remote_dir} is not the directory of {record.name}")
    env: Access = record.access
    host = connect(env, prompt=prompt)
    try:
        target = quote_path(record.remote_dir)
        done = host.run(f"rm -rf -- {target} {target}.*.part", timeout=600)
    finally:
        host.close()
    if done.returncode != 0:
        raise CommandFailed(f"cannot remove {record.remote_dir}: {one_line(done.stderr)}")
