"""From a job directory to a verdict: upload, start, follow, bring home.

The record is written before the scheduler is asked, and the job carries the record's name: whatever
breaks in between, the job can be found again.
"""

from __future__ import annotations

import os
import re
import secrets as random
import shlex
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from slurmeval import record as records
from slurmeval.cluster.connect import connect, scheduler_of
from slurmeval.cluster.host import Host, Prompt
from slurmeval.cluster.scheduler import JobState, Refused, Scheduler, Snapshot
from slurmeval.cluster.text import quote_path
from slurmeval.cluster.transfer import local_files
from slurmeval.config.schema import Env
from slurmeval.errors import ConfigError, ConnectionFailed
from slurmeval.follow import LOCAL, Ended, Pace, Ui, follow
from slurmeval.pull import Outcome, bring_home
from slurmeval.record import Record

SCRIPT = "job.sbatch"
SECRETS = ".secrets.env"
#: Traces of an earlier run: results of which would pass for those of the new one.
LEFTOVERS = (
    *(
        "eval_results",
        "logs",
        "status.json",
        ".status.json",
        "endpoint.json",
        "done",
        "failure.txt",
    ),
    *("job.log", "slurm-*.out", ".job-id*", ".submitting", ".pid*", ".exit-code*", ".cancelled"),
    SECRETS,
)
_LOCAL_BASE = "slurmeval-jobs"
_TRIES = 3
_VARIABLE = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")


def submit(
    job_dir: Path,
    env: Env,
    *,
    name: str,
    detach: bool,
    results: Path,
    ui: Ui,
    profile: str | None = None,
    prompt: Prompt | None = None,
    environ: Mapping[str, str] | None = None,
    host: Host | None = None,
    pace: Pace | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Send a job directory as it stands, start it, follow it and bring its results home.

    Args:
        job_dir: A directory with ``job.sbatch``.
        env: ``run.env``.
        name: What the job is called; the record adds the time and four hex digits.
        detach: Return as soon as the scheduler has the job.
        results: The local directory below which results go, ``<results>/<record name>``.
        ui: Shows what happens.
        profile: The name of the profile, for the record.
        prompt: Asks the user for passphrases and codes.
        environ: Where secrets come from; the environment of this process by default.
        host: Another host than ``env`` names.
        pace: How often to look.
        sleep: Waits for some seconds.

    Raises:
        ConfigError: The profile or the directory lacks something.
        ClusterError: No connection, or the scheduler refused the job; nothing is left behind.
        ResultsIncomplete: The job ended, and its results are missing or damaged.
    """
    if not (job_dir / SCRIPT).is_file():
        raise ConfigError(
            f"{job_dir} holds no {SCRIPT}", hint="`slurmeval render -o DIR` writes a job directory."
        )
    record_name = make_name(name)
    target = f"{base_directory(env)}/{record_name}"
    extra = secrets_file(env.secrets, os.environ if environ is None else environ)
    host = host or connect(env, prompt=prompt)
    try:
        remote = host.put_tree(job_dir, target, extra=extra, exclude=LEFTOVERS)
        record = Record(
            name=record_name,
            profile=profile,
            env=records.connection_of(env),
            remote_dir=remote,
            job_id=None,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            results=str((results / record_name).absolute()),
        )
        records.save(record)
        ui.line(f"sent     {job_dir} to {host.name}:{remote}")
        scheduler = scheduler_of(env, host)
        record = record.with_job(_start(scheduler, host, record, ui, sleep))
        records.save(record)
        ui.line(f"job      {record.job_id} is {record.name}")
        if detach:
            ui.line(f"follow and bring home its results: slurmeval pull {record.name}")
            return _outcome(record, JobState.PENDING, 0, "submitted")
        pace = pace or (LOCAL if env.tunnel == "local" else Pace())
        return _see_through(scheduler, host, record, ui, pace, sleep)
    finally:
        host.close()


def _start(
    scheduler: Scheduler,
    host: Host,
    record: Record,
    ui: Ui,
    sleep: Callable[[float], None],
) -> str:
    """Ask the scheduler, and ask again where no answer came: that never makes a second job."""
    for attempt in range(1, _TRIES + 1):
        try:
            return scheduler.submit(record.remote_dir, name=record.name)
        except ConnectionFailed as error:
            if attempt == _TRIES:
                raise ConnectionFailed(
                    f"no answer whether the job {record.name} was started: {error.message}",
                    hint=f"Look on the cluster: squeue --name={record.name}; "
                    f"its directory is {record.remote_dir}",
                ) from error
            ui.line(f"note     {error.message}; asking again")
            sleep(attempt)
        except Refused:
            _withdraw(host, record)
            raise
    raise AssertionError("unreachable")


def _withdraw(host: Host, record: Record) -> None:
    """Remove what was sent for a job that was refused; it may hold secrets."""
    host.run(f"rm -rf -- {quote_path(record.remote_dir)}", timeout=60)
    records.remove(record.name)


def _see_through(
    scheduler: Scheduler,
    host: Host,
    record: Record,
    ui: Ui,
    pace: Pace,
    sleep: Callable[[float], None],
) -> Outcome:
    back = f"slurmeval pull {record.name}"
    try:
        snapshot = _watch(scheduler, record, ui, pace, sleep)
    except KeyboardInterrupt:
        ui.line(f"detached; the job {record.job_id} goes on in {host.name}:{record.remote_dir}")
        ui.line(f"bring home its results: {back}")
        return _outcome(record, JobState.UNKNOWN, 130, "detached")
    except ConnectionFailed as error:
        raise ConnectionFailed(
            f"{error.message}; the job {record.job_id} goes on without us",
            hint=f"Bring home its results later: {back}",
        ) from error
    if snapshot.state is JobState.UNKNOWN:
        ui.line(f"the job's state is not known: {snapshot.source}")
        ui.line(f"ask again later: {back}")
        return _outcome(record, snapshot.state, 3, snapshot.source)
    return bring_home(host, record, snapshot, ui)


def _watch(
    scheduler: Scheduler, record: Record, ui: Ui, pace: Pace, sleep: Callable[[float], None]
) -> Snapshot:
    events = follow(scheduler, record.job_id or "", record.remote_dir, pace=pace, sleep=sleep)
    try:
        while True:
            try:
                ui.event(next(events))
            except StopIteration as end:
                snapshot: Snapshot = end.value
                return snapshot
    finally:
        ui.event(Ended())


def _outcome(record: Record, state: JobState, code: int, reason: str) -> Outcome:
    return Outcome(record.name, record.job_id or "", state, code, reason)


def make_name(name: str) -> str:
    """Return a record's name: what a job is called, when it was made, and four hex digits."""
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "job"
    return f"{word}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{random.token_hex(2)}"


def base_directory(env: Env) -> str:
    """Return the directory of all jobs.

    Raises:
        ConfigError: A Slurm profile without ``remote_job_dir``.
    """
    if env.remote_job_dir:
        return env.remote_job_dir.rstrip("/") or "/"
    if env.executor == "local":
        return _LOCAL_BASE
    raise ConfigError(
        "run.env.remote_job_dir is not set",
        hint='Name a directory that all nodes see: remote_job_dir = "/lustre/me/slurmeval".',
    )


def secrets_file(names: list[str], environ: Mapping[str, str]) -> dict[str, bytes]:
    """Return the secrets that are set, as the one file that carries them; empty without any.

    Raises:
        ConfigError: A name that is no variable's name.
    """
    lines = []
    for name in names:
        if not _VARIABLE.match(name):
            raise ConfigError(f"run.env.secrets: {name!r} is not the name of a variable")
        if environ.get(name):
            value = environ[name].replace("'", "'\\''")
            lines.append(f"export {name}='{value}'\n")
    return {SECRETS: "".join(lines).encode("utf-8", "surrogateescape")} if lines else {}


def preview(job_dir: Path, env: Env, *, name: str, results: Path) -> list[str]:
    """Return what `submit` would send and run, a line each; nothing is contacted.

    Raises:
        ConfigError: The profile lacks something.
    """
    record = make_name(name)
    target = f"{base_directory(env)}/{record}"
    where = f"{env.user + '@' if env.user else ''}{env.host}" if env.tunnel == "ssh" else "here"
    lines = [f"send to {where}: {target}"]
    for path, file in local_files(job_dir, LEFTOVERS):
        if file.is_file():
            lines.append(f"  {path}  {file.stat().st_size} bytes")
    given = [variable for variable in env.secrets if os.environ.get(variable)]
    if given:
        lines.append(f"  {SECRETS}  ({', '.join(given)}; values not shown)")
    if env.executor == "slurm":
        command = f"sbatch --parsable --job-name={record} {SCRIPT}"
    else:
        command = f"bash {SCRIPT}"
    return [*lines, f"run: cd {shlex.quote(target)} && {command}", f"results: {results / record}"]
