"""From an access to a host (where commands run) and a scheduler (how a job starts)."""

from __future__ import annotations

from slurmeval.cluster.access import Access
from slurmeval.cluster.host import Host, Prompt
from slurmeval.cluster.local import LocalHost
from slurmeval.cluster.plain import Plain
from slurmeval.cluster.scheduler import Scheduler
from slurmeval.cluster.slurm import Slurm


def connect(env: Access, *, prompt: Prompt | None = None) -> Host:
    """Return the host that ``tunnel`` names; the connection is made when it is used.

    Raises:
        ConfigError: The profile lacks what a connection needs.
    """
    if env.tunnel == "local":
        return LocalHost()
    if env.ssh == "openssh":
        from slurmeval.cluster.openssh import OpenSshHost

        return OpenSshHost(env)
    from slurmeval.cluster.ssh import SshHost

    return SshHost(env, prompt=prompt)


def scheduler_of(env: Access, host: Host) -> Scheduler:
    """Return the scheduler that ``executor`` names."""
    return Slurm(host, env.clusters) if env.executor == "slurm" else Plain(host)
