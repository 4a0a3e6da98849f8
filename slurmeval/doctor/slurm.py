"""Checks of what Slurm says: its version, partition, account and QOS, containers."""

from __future__ import annotations

from collections.abc import Iterable

from slurmeval.cluster.text import one_line
from slurmeval.config.keys import closest
from slurmeval.doctor.finding import Examination, Finding


def slurm(subject: Examination) -> Iterable[Finding]:
    """Check that Slurm answers."""
    if subject.config.run.env.executor != "slurm":
        yield Finding("slurm", "ok", 'not needed: executor = "local"')
        return
    version = subject.text("version")
    if version is None:
        yield Finding(
            "slurm",
            "failed",
            f"no answer of sbatch: {subject.words('version')}",
            "Slurm's commands must be on the PATH of a non-interactive shell there.",
        )
    else:
        yield Finding("slurm", "ok", one_line(version))


def partition(subject: Examination) -> Iterable[Finding]:
    """Check the partitions that the job asks for, and their size."""
    env = subject.config.run.env
    listing = subject.text("partitions")
    if env.executor != "slurm":
        return
    if listing is None:
        words = subject.words("partitions")
        yield Finding("partition", "unknown", f"sinfo does not answer: {words}")
        return
    rows = [line.split("|") for line in listing.splitlines() if line.count("|") == 4]
    names = list(dict.fromkeys(row[0] for row in rows))
    wanted = {p for p in (env.partition, env.run_partition, env.batch_partition) if p}
    for missing in sorted(wanted - set(names)):
        near = closest(missing, names)
        yield Finding(
            "partition",
            "failed",
            f"there is no partition {missing}; there are {', '.join(names)}",
            f"Did you mean {near}?" if near else "Set run.env.partition to one of them.",
        )
    for name in sorted(wanted & set(names)):
        mine = [row for row in rows if row[0] == name]
        nodes = sum(int(row[3]) for row in mine if row[3].isdecimal())
        down = all(row[1] != "up" for row in mine)
        words = f"{name}: {nodes} nodes, time limit {mine[0][2]}, {mine[0][4]}"
        if down or nodes < env.nodes:
            why = "it is down" if down else f"the job needs {env.nodes} nodes"
            yield Finding("partition", "failed", f"{words}; {why}", "Choose another one.")
        else:
            yield Finding("partition", "ok", words)
    if not wanted:
        yield Finding("partition", "ok", f"Slurm's default of {', '.join(names)}")


def account(subject: Examination) -> Iterable[Finding]:
    """Check account and QOS against what accounting lists."""
    env = subject.config.run.env
    listing = subject.text("associations")
    if env.executor != "slurm" or not (env.account or env.qos):
        yield Finding("account", "ok", "Slurm's defaults")
        return
    rows = [line.split("|") for line in (listing or "").splitlines() if line.count("|") == 2]
    if not rows:
        words = "accounting lists nothing" if listing == "" else subject.words("associations")
        yield Finding("account", "unknown", f"sacctmgr does not tell: {words}")
        return
    accounts = sorted({row[0] for row in rows})
    if env.account and env.account not in accounts:
        yield Finding(
            "account",
            "failed",
            f"you are not in the account {env.account}, but in {', '.join(accounts)}",
            "Set run.env.account to one of them.",
        )
        return
    mine = [row for row in rows if not env.account or row[0] == env.account]
    allowed = sorted({name for row in mine for name in row[2].split(",") if name})
    if env.qos and allowed and env.qos not in allowed:
        yield Finding(
            "account",
            "failed",
            f"the QOS {env.qos} is not yours; yours are {', '.join(allowed)}",
            "Set run.env.qos to one of them.",
        )
        return
    yield Finding("account", "ok", ", ".join(filter(None, (env.account, env.qos))))


def container(subject: Examination) -> Iterable[Finding]:
    """Check that srun can start containers."""
    env = subject.config.run.env
    if env.runtime == "none":
        yield Finding("container", "ok", "not needed")
        return
    found = subject.answers.get("options")
    count = found.text if found else ""
    if count.isdecimal() and int(count) > 0:
        yield Finding("container", "ok", "srun knows --container-image")
    elif count == "0":
        yield Finding(
            "container",
            "failed",
            f"srun does not know --container-image: {env.runtime} is not installed there",
            "Ask the site for pyxis, or set run.env.container_runtime to none.",
        )
    else:
        yield Finding("container", "unknown", f"srun does not tell: {subject.words('options')}")
