#!/usr/bin/env python3
"""Download a model artifact of Weights & Biases once, into a directory that appears whole.

Stands alone: the standard library and wandb. The job script runs it before Ray starts, where
``run.model`` names an artifact whose files W&B stores; it runs by hand just as well::

    python fetch_model.py --artifact team/project/sft:v5 --target /scratch/me/cache/models/sft-v5

The files are downloaded beside the target, checked against the artifact's checksums, and renamed. A
target that is there is complete and is left as it is. Jobs that want the same model at the same
time wait for the one that downloads it.

Exit codes: 0 the model is there; 1 it could not be downloaded; 2 it cannot be downloaded like this.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class FetchError(Exception):
    """The model cannot be had; the exit code says which kind."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def say(message: str) -> None:
    """Print one line of the log, with the time."""
    print(time.strftime("%F %T "), message, flush=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", required=True, help="ENTITY/PROJECT/NAME:VERSION")
    parser.add_argument("--target", type=Path, required=True, help="the directory to make")
    parser.add_argument(
        "--base-url",
        default=os.environ.get("WANDB_BASE_URL"),
        help="W&B's server (default: $WANDB_BASE_URL, else the client's own)",
    )
    return parser.parse_args(argv)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock for the time of a download.

    Yields:
        Whether it is held; some file systems know no locks, and then two jobs may download the same
        model, each for itself.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another job is downloading this model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            say(f"no lock on this file system: {error.strerror}")
            yield False
            return
        yield True


def connect(base_url: str | None) -> Any:
    """Return W&B's client.

    Raises:
        FetchError: It is not installed, or W&B accepts no key.
    """
    try:
        import wandb
    except ImportError:
        raise FetchError(
            "this environment has no wandb: install it in the serving container, or give the path"
            " of the checkpoint (run.model=/path)",
            2,
        ) from None
    try:
        return wandb.Api(overrides={"base_url": base_url} if base_url else None, timeout=60)
    except Exception as error:
        raise FetchError(f"W&B: {error} (is WANDB_API_KEY set where you submit?)") from error


def download(artifact: str, part: Path, base_url: str | None) -> None:
    """Download an artifact's files and check them.

    Raises:
        FetchError: It could not be downloaded whole.
    """
    started = time.monotonic()
    api = connect(base_url)
    try:
        found = api.artifact(artifact)
        say(f"{artifact}: {len(found.manifest.entries)} files, {found.size / 1e9:.3f} GB")
        found.download(root=str(part), skip_cache=True)
        found.verify(str(part))
    except Exception as error:
        raise FetchError(f"{artifact}: {type(error).__name__}: {error}") from error
    seconds = max(time.monotonic() - started, 0.001)
    say(f"downloaded and verified in {seconds:.0f} s, {found.size / 1e6 / seconds:.0f} MB/s")


def fetch(artifact: str, target: Path, base_url: str | None) -> None:
    """Make the target, unless it is there.

    Raises:
        FetchError: It could not be made; nothing is left under its name.
    """
    if target.is_dir():
        say(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}.lock")) as alone:
        if target.is_dir():
            say(f"{target} is there now")
            return
        if alone:  # what a killed job has left
            for stale in target.parent.glob(f".{target.name}.part-*"):
                shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{target.name}.part-", dir=target.parent, ignore_cleanup_errors=True
        ) as scratch:
            # The client's own cache and logs would otherwise fill the user's home.
            for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_DIR"):
                folder = Path(scratch, name.lower())
                folder.mkdir()
                os.environ[name] = str(folder)
            part = Path(scratch, "files")
            download(artifact, part, base_url)
            try:
                part.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
                say(f"{target} came from another job meanwhile")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = parse_arguments(argv)
    try:
        fetch(arguments.artifact, arguments.target, arguments.base_url)
    except FetchError as error:
        say(f"ERROR: {error}")
        return error.exit_code
    except OSError as error:
        say(f"ERROR: {arguments.target}: {error.strerror}")
        return 1
    say(f"the model is at {arguments.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
