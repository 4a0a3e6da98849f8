"""A user's own lm-evaluation-harness tasks: a directory of this machine that travels with the job.

A directory ``my_tasks`` given as ``include_path`` becomes ``tasks/my_tasks`` of the job directory,
and the evaluator runs in ``tasks``: relative paths in a task's YAML mean there what they mean here,
where ``lm_eval --include_path my_tasks`` would run. Data files that lie elsewhere below the current
directory come along.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from slurmeval.errors import ConfigError
from slurmeval.jobfiles import JobFile, JobFiles

FOLDER = "tasks"
#: Bytes of all files; more belongs on the cluster beforehand.
MOST = 32 << 20
_THERE = "put the directory on the cluster, and give its absolute path"


@dataclass
class OwnTasks:
    """What travels.

    Attributes:
        files: Files of the job directory.
        paths: ``include_path`` as the user gave it -> as the evaluator gets it.
        output_types: Task -> lm-eval's ``output_type``, where its YAML says one.
    """

    files: JobFiles = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    output_types: dict[str, str] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """YAML with lm-eval's tags, such as ``!function``, which are not looked into."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def ship(include_paths: Iterable[str | None], here: Path) -> OwnTasks:
    """Gather the files of all relative include paths; absolute ones are the cluster's.

    Args:
        include_paths: As the configuration has them.
        here: What they are relative to.

    Raises:
        ConfigError: A directory or file that is missing, too large, no text, or outside ``here``.
    """
    own = OwnTasks()
    sources: dict[str, Path] = {}
    for given in dict.fromkeys(path for path in include_paths if path):
        if given.startswith(("/", "~")):
            continue
        path = _inside(given, given)
        folder = here / path
        if not folder.is_dir():
            raise ConfigError(
                f"include_path {given}: there is no such directory in {here.resolve()}",
                hint="a relative path is one of this machine; an absolute one, of the cluster",
            )
        own.paths[given] = str(path)
        for file in _tree(folder):
            name = str(path / file.relative_to(folder).as_posix())
            sources[name] = file
            if file.suffix in (".yaml", ".yml"):
                sources.update(_data_files(file, name, here, own))
    _read(sources, own.files)
    return own


def _tree(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.is_file() and not any(p.startswith(".") or p == "__pycache__" for p in parts):
            yield file


def _inside(text: str, given: str) -> PurePosixPath:
    """Return a relative path without ``.`` and ``..``.

    Raises:
        ConfigError: It leads out of the directory that it starts from.
    """
    path = PurePosixPath(text)
    if ".." in path.parts:
        raise ConfigError(
            f"{given}: {text} leads out of the current directory",
            hint="run the command in a directory above it, or give an absolute path of the cluster",
        )
    return path


def _data_files(file: Path, name: str, here: Path, own: OwnTasks) -> dict[str, Path]:
    """Return the data files that a task's YAML names, and note what kind of task it is.

    Raises:
        ConfigError: The YAML is broken, or a relative data file is missing.
    """
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: no valid YAML: {error}") from error
    if not isinstance(values, dict):
        return {}
    if isinstance(values.get("task"), str) and isinstance(values.get("output_type"), str):
        own.output_types[values["task"]] = values["output_type"]
    kwargs = values.get("dataset_kwargs")
    found: dict[str, Path] = {}
    for text in _texts(kwargs.get("data_files") if isinstance(kwargs, dict) else None):
        if text.startswith("/") or "://" in text or values.get("dataset_path") not in _FORMATS:
            continue
        pattern = str(_inside(text, f"{name}: data_files"))
        matches = sorted(path for path in here.glob(pattern) if path.is_file())
        if not matches:
            raise ConfigError(
                f"{file}: data_files names {text}, and there is no such file in {here.resolve()}",
                hint="lm-eval takes the path from the directory it runs in, not from the YAML's; "
                "or give an absolute path of the cluster",
            )
        found.update({match.relative_to(here).as_posix(): match for match in matches})
    return found


#: Builders of ``datasets`` that read files as they lie; others have repositories of their own.
_FORMATS = ("json", "csv", "text", "parquet", "arrow", "xml")


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts of ``data_files``: one, a list, or a mapping of these."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _read(sources: dict[str, Path], files: JobFiles) -> None:
    size = sum(path.stat().st_size for path in sources.values())
    if size > MOST:
        raise ConfigError(
            f"own tasks: {len(sources)} files of {size >> 20} MB are too much to send with a job "
            f"(at most {MOST >> 20} MB)",
            hint=_THERE,
        )
    for name, path in sources.items():
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            raise ConfigError(
                f"{path} is no text, and cannot travel with a job", hint=_THERE
            ) from None
        files[f"{FOLDER}/{name}"] = JobFile(text if text.endswith("\n") else text + "\n")
