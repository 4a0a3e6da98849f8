"""``slurmeval doctor``: what could keep a job from running, asked before there is a job.

One round trip asks everything that a login node knows; a second looks at the checkpoint. A check
that could not be made is "unknown", never "failed".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from slurmeval.cluster import scheduler as framing
from slurmeval.cluster.host import Host
from slurmeval.cluster.slurm import setup
from slurmeval.cluster.text import one_line, quote_path
from slurmeval.config.keys import closest
from slurmeval.config.schema import Config
from slurmeval.doctor import files, slurm
from slurmeval.doctor.finding import Check, Examination, Finding
from slurmeval.errors import AccessDenied, ClusterError, ConfigError

__all__ = ["Finding", "checks", "examine", "selected"]

_TIMEOUT = 120.0

_LOOK = """{prelude}
exists() {{ if [ -e "$1" ]; then ls -ld -- "$1"; else return 1; fi; }}
slurm() {{
    answer version sbatch --version
    answer partitions sinfo -h -o '%R|%a|%l|%D|%G'
    answer associations sacctmgr -n -P show assoc "user=$(id -un)" format=Account,Partition,QOS
    answer options sh -c 'srun --help 2>&1 | grep -c -- --container-image'
}}
where() {{
    dir={directory}
    until [ -e "$dir" ]; do dir=$(dirname -- "$dir"); done
    echo "$dir"
    [ -d "$dir" ] || {{ echo "it is not a directory" >&2; return 1; }}
    [ -w "$dir" ] && [ -x "$dir" ] || {{ echo "it cannot be written" >&2; return 1; }}
}}
"""


def checks() -> list[str]:
    """Return the names of all checks, in their order."""
    return ["connection", *_CHECKS]


def selected(only: Sequence[str], skip: Sequence[str]) -> set[str]:
    """Return the checks to make.

    Raises:
        ConfigError: There is no check of that name.
    """
    for name in (*only, *skip):
        if name not in checks():
            near = closest(name, checks())
            hint = f"Did you mean {near}?" if near else f"There are {', '.join(checks())}."
            raise ConfigError(f"no check {name!r}", hint=hint)
    return {name for name in checks() if (not only or name in only) and name not in skip}


def examine(
    config: Config, host: Host, environ: Mapping[str, str], *, wanted: set[str]
) -> list[Finding]:
    """Make the wanted checks and return what they found, in order.

    Args:
        config: The whole configuration.
        host: Where the job would be submitted.
        environ: Where secrets come from.
        wanted: The names of the checks to make.
    """
    try:
        answers = framing.sections(host.run(_script(config), timeout=_TIMEOUT))
    except ClusterError as error:
        return [
            *_without_connection(error, wanted - {"secrets"}),
            *(_secrets(Examination(config, host, environ, {})) if "secrets" in wanted else ()),
        ]
    who = one_line(answers["who"].text) if "who" in answers else ""
    findings = [Finding("connection", "ok", f"{host.name}: {who}")]
    subject = Examination(config, host, environ, answers)
    for name, judge in _CHECKS.items():
        if name in wanted:
            findings += judge(subject)
        else:
            findings.append(Finding(name, "skipped", ""))
    return findings


def _without_connection(error: ClusterError, wanted: set[str]) -> list[Finding]:
    findings = [Finding("connection", "failed", error.message, error.hint or "")]
    for name in _CHECKS:
        if name == "host-key" and isinstance(error, AccessDenied):
            refused = "host key" in error.message.lower()
            findings.append(
                Finding(name, "failed", error.message, error.hint or "")
                if refused
                else Finding(name, "ok", "the host key is known")
            )
        elif name in wanted:
            findings.append(Finding(name, "unknown", "there is no connection"))
    return findings


def _script(config: Config) -> str:
    env = config.run.env
    lines = [
        setup(env.clusters),
        _LOOK.format(
            prelude=framing.PRELUDE, directory=quote_path(env.remote_job_dir or "slurmeval-jobs")
        ),
        "answer who sh -c 'echo \"$(id -un) on $(uname -n)\"'",
        *(["slurm"] if env.executor == "slurm" else []),
        "answer python python3 -c 'import sys; print(\"%d.%d.%d\" % sys.version_info[:3])'",
        'answer directory where; answer space df -Pm -- "$(where 2>/dev/null | head -n 1)"',
        *(
            f"answer mount:{number} exists {quote_path(mount.split(':')[0])}"
            for number, mount in enumerate(env.mounts)
        ),
    ]
    if env.image and env.image.endswith(files.SQUASH):
        lines.append(f"answer image exists {quote_path(env.image)}")
    return "\n".join([*lines, "exit 0\n"])


def _host_key(subject: Examination) -> Iterable[Finding]:
    env = subject.config.run.env
    if env.tunnel == "local":
        yield Finding("host-key", "ok", 'not needed: tunnel = "local"')
    else:
        yield Finding("host-key", "ok", f"the host key is known ({env.host_key_policy})")


def _secrets(subject: Examination) -> Iterable[Finding]:
    config = subject.config
    given = [name for name in config.run.env.secrets if subject.environ.get(name)]
    absent = [name for name in config.run.env.secrets if name not in given]
    export = config.eval.export.wandb
    if export is not None and export.project and "WANDB_API_KEY" not in given:
        yield Finding(
            "secrets",
            "failed",
            "WANDB_API_KEY is not set, and results are to go to Weights & Biases",
            "export WANDB_API_KEY=…, or leave eval.export.wandb.project empty.",
        )
        return
    words = "; ".join(
        f"{label}: {', '.join(names)}"
        for label, names in (("set", given), ("not set", absent))
        if names
    )
    yield Finding("secrets", "ok", words or "none")


_CHECKS: dict[str, Check] = {
    "host-key": _host_key,
    "slurm": slurm.slurm,
    "partition": slurm.partition,
    "account": slurm.account,
    "container": slurm.container,
    "python": files.python,
    "disk": files.disk,
    "mounts": files.mounts,
    "image": files.image,
    "checkpoint": files.checkpoint,
    "secrets": _secrets,
}
