"""Checks of what lies on the cluster: python, disk space, mounts, image, checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable

from slurmeval.checkpoint import locate, to_be_located
from slurmeval.doctor.finding import Examination, Finding
from slurmeval.errors import ClusterError, ConfigError

#: Free space below which a job directory is doubtful: logs and results, no checkpoints.
_FREE_MIB = 1024
#: How the names of images end that are files.
SQUASH = (".sqsh", ".sqfs", ".squashfs")


def python(subject: Examination) -> Iterable[Finding]:
    """Check python3, which a job without containers needs."""
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


def disk(subject: Examination) -> Iterable[Finding]:
    """Check that the job directory can be written, and the space for it."""
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


def mounts(subject: Examination) -> Iterable[Finding]:
    """Check the sources of the mounts."""
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


def image(subject: Examination) -> Iterable[Finding]:
    """Check the file of the image."""
    image = subject.config.run.env.image
    if image is None or subject.config.run.env.runtime == "none":
        yield Finding("image", "ok", "not needed")
    elif not image.endswith(SQUASH):
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


def checkpoint(subject: Examination) -> Iterable[Finding]:
    """Look the checkpoint up where it lies."""
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
