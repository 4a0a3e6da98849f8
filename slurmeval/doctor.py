"""``slurmeval doctor``: what could keep a job from running, asked before there is a job.

One round trip asks everything that a login node knows; a second looks at the checkpoint. A check
that could not be made is "unknown", never "failed".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from slurmeval.checkpoint import locate, to_be_located
from slurmeval.cluster import scheduler as framing
from slurmeval.cluster.host import Host
from slurmeval.cluster.scheduler import Section
from slurmeval.cluster.slurm import SETUP
from slurmeval.cluster.text import one_line, printable, quote_path
from slurmeval.config.keys import closest
from slurmeval.config.schema import Config
from slurmeval.errors import AccessDenied, ClusterError, ConfigError

State = Literal["ok", "failed", "unknown", "skipped"]
#: Free space below which a job directory is doubtful: logs and results, no checkpoints.
_FREE_MIB = 1024
_TIMEOUT = 120.0
_SQUASH = (".sqsh", ".sqfs", ".squashfs")

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


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: Its name.
        state: Whether all is well; "unknown" where that could not be found out.
        words: What was found.
        remedy: What to do about a failure.
    """

    check: str
    state: State
    words: str
    remedy: str = ""


@dataclass
class _Examination:
    """What the checks work on."""

    config: Config
    host: Host
    environ: Mapping[str, str]
    answers: dict[str, Section]

    def text(self, name: str) -> str | None:
        """Return the answer to a question, or None where it was not answered."""
        section = self.answers.get(name)
        return printable(section.text) if section and section.returncode == 0 else None

    def words(self, name: str) -> str:
        section = self.answers.get(name)
        return one_line(section.text) if section else "it was not asked"


_Judge = Callable[[_Examination], Iterable[Finding]]


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
            *(_secrets(_Examination(config, host, environ, {})) if "secrets" in wanted else ()),
        ]
    who = one_line(answers["who"].text) if "who" in answers else ""
    findings = [Finding("connection", "ok", f"{host.name}: {who}")]
    subject = _Examination(config, host, environ, answers)
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
        SETUP,
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
    if env.image and env.image.endswith(_SQUASH):
        lines.append(f"answer image exists {quote_path(env.image)}")
    return "\n".join([*lines, "exit 0\n"])


def _host_key(subject: _Examination) -> Iterable[Finding]:
    env = subject.config.run.env
    if env.tunnel == "local":
        yield Finding("host-key", "ok", 'not needed: tunnel = "local"')
    else:
        yield Finding("host-key", "ok", f"the host key is known ({env.host_key_policy})")


def _slurm(subject: _Examination) -> Iterable[Finding]:
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


def _partition(subject: _Examination) -> Iterable[Finding]:
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


def _account(subject: _Examination) -> Iterable[Finding]:
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


def _container(subject: _Examination) -> Iterable[Finding]:
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


def _python(subject: _Examination) -> Iterable[Finding]:
    version = subject.text("python")
    needed = subject.config.run.env.runtime == "none"
    if version:
        yield Finding("python", "ok", f"python3 is {version}")
    elif needed:
        yield Finding(
            "python",
            "failed",
            f"no python3: {subject.words('python')}",
            "Load it in run.env.setup_lines, or use a container.",
        )
    else:
        yield Finding("python", "ok", "no python3 there, and none needed: the containers have it")


def _disk(subject: _Examination) -> Iterable[Finding]:
    env = subject.config.run.env
    where = subject.words("directory").split(" · ")[0]
    if subject.text("directory") is None:
        yield Finding(
            "disk",
            "failed",
            f"{env.remote_job_dir or where} cannot be made or written: "
            f"{subject.words('directory')}",
            "Set run.env.remote_job_dir to a directory that you can write.",
        )
        return
    numbers = re.findall(r"\s(\d+)\s+(\d+)\s+(\d+)\s+\d+%", subject.text("space") or "")
    if not numbers:
        yield Finding("disk", "unknown", f"df does not tell: {subject.words('space')}")
        return
    free = int(numbers[-1][2])
    words = f"{free / 1024:.1f} GiB free in {where}"
    if free < _FREE_MIB:
        yield Finding("disk", "failed", words, "Make room, or choose another remote_job_dir.")
    else:
        yield Finding("disk", "ok", words)


def _mounts(subject: _Examination) -> Iterable[Finding]:
    mounts = subject.config.run.env.mounts
    missing = [
        mount.split(":")[0]
        for number, mount in enumerate(mounts)
        if subject.text(f"mount:{number}") is None
    ]
    if missing:
        yield Finding(
            "mounts",
            "unknown",
            f"not on the login node: {', '.join(missing)}",
            "Fine where compute nodes have them; else correct run.env.mounts.",
        )
    else:
        yield Finding("mounts", "ok", f"{len(mounts)} of {len(mounts)} are there")


def _image(subject: _Examination) -> Iterable[Finding]:
    image = subject.config.run.env.image
    if image is None or subject.config.run.env.runtime == "none":
        yield Finding("image", "ok", "not needed")
    elif not image.endswith(_SQUASH):
        words = f"{image} comes from a registry, which the compute nodes ask"
        yield Finding("image", "unknown", words, "A .sqsh file on a shared file system is surer.")
    elif subject.text("image"):
        yield Finding("image", "ok", image)
    else:
        yield Finding(
            "image",
            "failed",
            f"no file {image} on the login node",
            "Correct run.env.container_image, or import it: enroot import -o FILE docker://IMAGE",
        )


def _checkpoint(subject: _Examination) -> Iterable[Finding]:
    config = subject.config
    path = to_be_located(config)
    if path is None:
        what = config.model.checkpoint_path or config.run.model or ""
        # An interpolation that has no value yet names nothing.
        what = "" if what.startswith("${") else what
        words = f"{what} is not looked up before the job" if what else "none is named"
        yield Finding("checkpoint", "unknown", words, "" if what else "Give run.model=PATH.")
        return
    mounts = config.run.env.mounts if config.run.env.runtime != "none" else ()
    try:
        found = locate(subject.host, path, backend=config.deploy.backend, mounts=mounts)
    except ConfigError as error:
        yield Finding("checkpoint", "failed", error.message, error.hint or "Correct run.model.")
    except ClusterError as error:
        yield Finding("checkpoint", "unknown", error.message, error.hint or "")
    else:
        yield Finding("checkpoint", "ok", found.path)


def _secrets(subject: _Examination) -> Iterable[Finding]:
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


_CHECKS: dict[str, _Judge] = {
    "host-key": _host_key,
    "slurm": _slurm,
    "partition": _partition,
    "account": _account,
    "container": _container,
    "python": _python,
    "disk": _disk,
    "mounts": _mounts,
    "image": _image,
    "checkpoint": _checkpoint,
    "secrets": _secrets,
}
