"""From a job directory to a verdict: upload, start, follow, bring home.

The record is written before anything is sent, and the job carries the record's name: whatever
breaks in between, the job can be found again. Every step may be done twice without doing it twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets as random
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from slurmeval import record as records
from slurmeval.cluster.access import Access
from slurmeval.cluster.connect import connect, scheduler_of
from slurmeval.cluster.host import Host, Prompt
from slurmeval.cluster.scheduler import JobState, Refused, Scheduler, Snapshot
from slurmeval.cluster.text import quote_path
from slurmeval.cluster.transfer import local_files
from slurmeval.errors import ClusterError, ConfigError, ConnectionFailed, ResultsIncomplete
from slurmeval.follow import LOCAL, Ended, Pace, StateChange, Ui, follow
from slurmeval.pull import Outcome, bring_home
from slurmeval.record import Record
from slurmeval.retry import persistently

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
    *("job.log", "slurm-*.out", ".job-id*", ".submitting*", ".log-path*"),
    *(".pid*", ".exit-code*", ".cancelled"),
    SECRETS,
)
_LOCAL_BASE = "slurmeval-jobs"
_VARIABLE = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")


def submit(
    job_dir: Path,
    env: Access,
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
        env: How to get at the cluster.
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
    _must_hold_script(job_dir)
    record_name, config = make_name(name), _config_of(job_dir)
    extra = secrets_file(env.secrets, os.environ if environ is None else environ)
    record = Record(
        name=record_name,
        profile=profile,
        env=asdict(env),
        remote_dir=f"{base_directory(env)}/{record_name}",
        job_id=None,
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        results=str((results / record_name).absolute()),
        config_hash=_config_hash(job_dir),
        sent=False,
        export=_section(config, "eval", "export"),
        model=_model_of(config),
    )
    host = host or connect(env, prompt=prompt)
    try:
        records.save(record)
        record = _send(host, record, job_dir, extra, ui, sleep)
        ui.line(f"sent     {job_dir} to {host.name}:{record.remote_dir}")
        scheduler = scheduler_of(env, host)
        record = start(scheduler, host, record, ui, sleep)
        if detach:
            ui.line(f"follow and bring home its results: slurmeval pull {record.name}")
            return _outcome(record, JobState.PENDING, 0, "submitted")
        pace = pace or (LOCAL if env.tunnel == "local" else Pace())
        return _see_through(scheduler, host, record, ui, pace, sleep)
    finally:
        host.close()


def test_only(
    job_dir: Path,
    env: Access,
    *,
    name: str,
    prompt: Prompt | None = None,
    host: Host | None = None,
) -> str:
    """Ask the scheduler what would become of a job, in one round trip; nothing is sent or queued.

    Raises:
        ConfigError: There is no script.
        Refused: The scheduler would refuse the job, or could never start it.
        ConnectionFailed: There was no connection, or no answer.
    """
    _must_hold_script(job_dir)
    host = host or connect(env, prompt=prompt)
    try:
        script = (job_dir / SCRIPT).read_bytes()
        return scheduler_of(env, host).test_only(script, name=make_name(name))
    finally:
        host.close()


def _must_hold_script(job_dir: Path) -> None:
    if not (job_dir / SCRIPT).is_file():
        raise ConfigError(
            f"{job_dir} holds no {SCRIPT}", hint="`slurmeval render -o DIR` writes a job directory."
        )


def _config_hash(job_dir: Path) -> str:
    config = job_dir / "config.yaml"
    source = config if config.is_file() else job_dir / SCRIPT
    return hashlib.sha256(source.read_bytes()).hexdigest()[:16]


def _config_of(job_dir: Path) -> Any:
    """Return a job directory's configuration as it stands there; None where nobody can read it."""
    try:
        return yaml.safe_load((job_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def _section(config: Any, *keys: str) -> dict[str, Any] | None:
    """Return a section of a configuration, which a person may have edited; None without it."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else None


def _model_of(config: Any) -> dict[str, Any] | None:
    """Return the checkpoint that a job serves, and the artifact that it is, of one version."""
    checkpoint = (_section(config, "model") or {}).get("checkpoint_path")
    artifact = _section(config, "run", "artifact")
    if artifact is None:
        return {"checkpoint": checkpoint} if checkpoint else None
    names = ("name", "version", "requested", "source")
    return {"checkpoint": checkpoint, **{name: artifact.get(name) for name in names}}


def _send(
    host: Host,
    record: Record,
    job_dir: Path,
    extra: Mapping[str, bytes],
    ui: Ui,
    sleep: Callable[[float], None],
) -> Record:
    """Upload; the directory appears whole under its unique name, so that it is looked for first."""
    tries = 0

    def attempt(failures: int) -> str:
        nonlocal tries
        tries = failures
        there = _present(host, record.remote_dir) if failures else None
        if there:
            return there
        try:
            return host.put_tree(job_dir, record.remote_dir, extra=extra, exclude=LEFTOVERS)
        except ConnectionFailed:
            raise
        except ClusterError:
            # The try before may have come to its end meanwhile.
            there = _present(host, record.remote_dir) if failures else None
            if there is None:
                raise
            return there

    try:
        remote = persistently(
            attempt, tell=lambda text: ui.line(f"note     {text}"), sleep=sleep, reached=False
        )
    except ClusterError as error:
        if not tries:
            records.remove(record.name)
            raise
        raise ConnectionFailed(
            f"{error.message}; no job was started",
            hint=f"Submit again later. If files of it are left on the cluster, this removes them: "
            f"slurmeval rm --remote {record.name}",
        ) from error
    # Another process could have removed the record by now; this one goes on with what it has.
    return replace(records.update(record, remote_dir=remote, sent=True), remote_dir=remote)


def _present(host: Host, target: str) -> str | None:
    done = host.run(f"cd -- {quote_path(target)} 2>/dev/null && pwd", timeout=60)
    return done.stdout.strip("\n") if done.returncode == 0 else None


def start(
    scheduler: Scheduler,
    host: Host,
    record: Record,
    ui: Ui,
    sleep: Callable[[float], None] = time.sleep,
) -> Record:
    """Ask the scheduler, and ask again where no answer came: that never makes a second job.

    Raises:
        Refused: There is no job; what was sent is removed.
        ConnectionFailed: It is not known whether there is a job; says how to go on.
    """
    finish = f"slurmeval resubmit {record.name}"
    try:
        started = persistently(
            lambda failures: scheduler.submit(record.remote_dir, name=record.name),
            tell=lambda text: ui.line(f"note     {text}"),
            sleep=sleep,
        )
    except ConnectionFailed as error:
        raise ConnectionFailed(
            f"no answer whether the job {record.name} was started: {error.message}",
            hint=f"This looks for it, and starts it only where it is not: {finish}",
        ) from error
    except Refused:
        _withdraw(host, record, sleep)
        raise
    except KeyboardInterrupt:
        ui.line(f"interrupted; the job {record.name} may have been started. Find out: {finish}")
        raise
    record = records.update(record, job_id=started.job_id, log=started.log)
    if started.words:
        label = "note     it cannot start as things are" if started.doubtful else "slurm   "
        ui.line(f"{label}{': ' if started.doubtful else ' '}{started.words}")
    ui.line(f"job      {record.job_id} is {record.name}")
    return record


def _withdraw(host: Host, record: Record, sleep: Callable[[float], None]) -> None:
    """Remove what was sent for a job that was refused; it may hold secrets."""
    command = f"rm -rf -- {quote_path(record.remote_dir)}"
    # The record stays where the directory may have stayed.
    with contextlib.suppress(ConnectionFailed):
        persistently(
            lambda failures: host.run(command, timeout=60), tell=lambda text: None, sleep=sleep
        )
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
        record = records.seen(record, snapshot)
        if snapshot.state is not JobState.UNKNOWN:
            return persistently(
                lambda failures: bring_home(host, record, snapshot, ui),
                tell=lambda text: ui.line(f"note     {text}"),
                sleep=sleep,
            )
    except KeyboardInterrupt:
        ui.line(f"detached; the job {record.job_id} goes on in {host.name}:{record.remote_dir}")
        ui.line(f"watch it: slurmeval status --watch {record.name}")
        ui.line(f"bring home its results: {back}")
        return _outcome(record, JobState.UNKNOWN, 130, "detached")
    except ConnectionFailed as error:
        raise ConnectionFailed(
            f"{error.message}; the job {record.job_id} is not affected by that",
            hint=f"Bring home its results later: {back}",
        ) from error
    except ResultsIncomplete as error:
        words = f"{error.hint}\n  " if error.hint else ""
        raise ResultsIncomplete(error.message, hint=f"{words}Again: {back}") from error
    ui.line(f"the job's state is not known: {snapshot.source}")
    ui.line(f"ask again later: {back}")
    return _outcome(record, snapshot.state, 3, snapshot.source)


def _watch(
    scheduler: Scheduler, record: Record, ui: Ui, pace: Pace, sleep: Callable[[float], None]
) -> Snapshot:
    events = follow(scheduler, record.job_id or "", record.remote_dir, pace=pace, sleep=sleep)
    try:
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                snapshot: Snapshot = end.value
                return snapshot
            ui.event(event)
            if isinstance(event, StateChange) and event.state is not JobState.UNKNOWN:
                records.update(record, state=str(event.state), checked=records.now())
    finally:
        ui.event(Ended())


def _outcome(record: Record, state: JobState, code: int, reason: str) -> Outcome:
    return Outcome(record.name, record.job_id or "", state, code, reason)


def make_name(name: str) -> str:
    """Return a record's name: what a job is called, when it was made, and four hex digits."""
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "job"
    return f"{word}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{random.token_hex(2)}"


def base_directory(env: Access) -> str:
    """Return the directory of all jobs.

    Raises:
        ConfigError: A Slurm profile without ``remote_job_dir``, or with one that Slurm misreads.
    """
    if env.executor == "slurm" and not set(env.remote_job_dir or "").isdisjoint("\\%"):
        raise ConfigError(
            f"run.env.remote_job_dir is {env.remote_job_dir!r}: Slurm cannot write the log of a "
            "job below a path with '\\' or '%'"
        )
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


def preview(job_dir: Path, env: Access, *, name: str, results: Path) -> list[str]:
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
