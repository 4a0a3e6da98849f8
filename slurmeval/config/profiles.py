"""Profiles: the sections of ``env.toml`` that say where and how a job runs.

The file and its keys are those of NVIDIA Nemotron's recipes, so that one file serves both.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurmeval.config.keys import did_you_mean
from slurmeval.config.layers import KeyPath, Layer, merge
from slurmeval.config.resolve import home, resolve_own
from slurmeval.config.schema import Env, Wandb
from slurmeval.config.tomllines import key_lines
from slurmeval.errors import ConfigError

FILE_NAME = "env.toml"
#: Sections of ``env.toml`` that are no profiles.
RESERVED = ("wandb", "cli", "cache", "artifacts")
#: Profiles that are there without any file.
BUILT_IN: dict[str, dict[str, Any]] = {"local": {"executor": "local", "tunnel": "local"}}

EXECUTORS = ("slurm", "local")
_FOREIGN_EXECUTORS = ("docker", "dgxcloud", "lepton", "skypilot", "kubeflow", "kubernetes")
#: Keys that other tools read from the same file, and the beginnings of such keys.
_FOREIGN_KEYS = frozenset(
    (
        "app_id",
        "app_secret",
        "base_url",
        "can_be_preempted",
        "client_id",
        "client_secret",
        "code_src_dir",
        "custom_spec",
        "distributed_framework",
        "existing_ray_cluster",
        "image_pull_secrets",
        "ipc_mode",
        "job_name",
        "kube_apiserver_url",
        "launcher",
        "nemo_run_dir",
        "node_group",
        "node_reservation",
        "nproc_per_node",
        "nprocs_per_node",
        "persistent_cache",
        "pip_extras",
        "pre_launch_commands",
        "project_name",
        "queue_priority",
        "recommended_min_nodes",
        "repo_root",
        "resource_shape",
        "run_command",
        "runtime",
        "sandbox",
        "shared_memory_size",
        "shm_size",
        "sif_dir",
        "startup_commands",
        "workdir",
        "workspace",
    )
)
_FOREIGN_PREFIXES = ("build_", "packager", "pvc", "ray_", "dgxcloud_", "sdg_")
#: Mounts of git repositories that Nemotron makes at submit time.
_AUTO_MOUNTS = ("${auto_mount:", "__auto_mount__:")


@dataclass(frozen=True)
class EnvFile:
    """An ``env.toml`` that was read, or its absence.

    Attributes:
        shown: Its path for messages; empty where there is no file.
        sections: Its tables.
        lines: The line of each key.
        looked: Where it was looked for.
    """

    shown: str = ""
    sections: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    looked: tuple[str, ...] = ()

    def at(self, path: KeyPath) -> str:
        """Return ``env.toml:7 [cluster]`` for a key of the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.shown}:{self.lines[path[:length]]} [{path[0]}]"
        return f"{self.shown} [{path[0]}]"


@dataclass(frozen=True)
class ProfileLayer:
    """What ``env.toml`` adds to a configuration, and what a user should know about it."""

    layer: Layer
    notes: list[str]


def read_env_file(cwd: Path, environ: Mapping[str, str], env_file: Path | None = None) -> EnvFile:
    """Find and read the ``env.toml`` that counts.

    The first of: ``env_file``, ``NEMOTRON_ENV_FILE``, ``env.toml`` in ``cwd`` or above up to the
    project's root (the first directory with a ``pyproject.toml``), the user's own.

    Raises:
        ConfigError: A named file is missing, or the file is not readable TOML.
    """
    named = env_file or environ.get("NEMOTRON_ENV_FILE")
    if named:
        path = cwd / expand_home(str(named), environ)
        if not path.is_file():
            source = "--env-file" if env_file else "NEMOTRON_ENV_FILE"
            raise ConfigError(f"{source}: there is no file {named}")
        return _read(path, cwd, environ, ())
    looked: list[str] = []
    for path in candidates(FILE_NAME, cwd, environ):
        if path.is_file():
            return _read(path, cwd, environ, tuple(looked))
        looked.append(shorten(path, cwd, environ))
    return EnvFile(looked=tuple(looked))


def candidates(name: str, cwd: Path, environ: Mapping[str, str]) -> list[Path]:
    """Return where a file of the project is looked for: here, above up to its root, the user's."""
    found = []
    for directory in (cwd, *cwd.parents):
        found.append(directory / name)
        if (directory / "pyproject.toml").exists():
            break
    config = environ.get("XDG_CONFIG_HOME", "")
    base = Path(config) if config.startswith("/") else home(environ) / ".config"
    return [*found, base / "slurmeval" / name]


def _read(path: Path, cwd: Path, environ: Mapping[str, str], looked: tuple[str, ...]) -> EnvFile:
    shown = shorten(path, cwd, environ)
    try:
        text = path.read_bytes().decode("utf-8")
        sections = tomllib.loads(text, parse_float=str)  # 3.10 in env_vars is not 3.1
    except OSError as error:
        raise ConfigError(f"{shown} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown} is not UTF-8 text (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{shown} is not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{shown} is nested too deeply") from None
    return EnvFile(shown, sections, key_lines(text), looked)


def expand_home(path: str, environ: Mapping[str, str]) -> Path:
    """Return a path with a leading ``~`` replaced by the user's home directory."""
    if path == "~" or path.startswith("~/"):
        return home(environ) / path[2:]
    return Path(path)


def shorten(path: Path, cwd: Path, environ: Mapping[str, str]) -> str:
    """Return a path as a person would write it: relative to here, below ``~``, or absolute."""
    if path.is_relative_to(cwd):
        return str(path.relative_to(cwd))
    own = home(environ)
    return f"~/{path.relative_to(own)}" if path.is_relative_to(own) else str(path)


def profile_layer(file: EnvFile, profile: str | None, environ: Mapping[str, str]) -> ProfileLayer:
    """Return what a profile puts into ``run.env`` and ``[wandb]`` into ``run.wandb``.

    Args:
        file: The ``env.toml`` that was found, or its absence.
        profile: The name of a section; ``None`` for none.
        environ: For ``${oc.env:…}`` in the file.

    Raises:
        ConfigError: The profile, or one it extends, does not exist or cannot be run here.
    """
    layer, notes = Layer(), _stray(file)
    wandb = file.sections.get("wandb")
    if isinstance(wandb, dict):
        section, ignored = _split(_section(file, "wandb"), set(Wandb.model_fields))
        notes += [_ignored(file, "wandb", ignored)] if ignored else []
        merge(layer, _below(section, ("run", "wandb"), wandb, environ))
    if profile is not None:
        own = _inherit(file, profile, ())
        everything = own.values
        _check_executor(own, everything, environ)
        foreign = {key for key in everything if _is_foreign(key)}
        section, ignored = _split(own, set(everything) - foreign)
        notes += [_ignored(file, profile, ignored)] if ignored else []
        notes += _adopt_mounts(section)
        notes += _one_task_per_node(section)
        merge(layer, _below(section, ("run", "env"), everything, environ))
    return ProfileLayer(layer, notes)


def _stray(file: EnvFile) -> list[str]:
    """Name keys that stand before the first section, where they belong to no profile."""
    return [
        f"{file.shown}:{file.lines.get((key,), 1)}: {key} stands in no section and is ignored"
        for key, value in file.sections.items()
        if not isinstance(value, dict)
    ]


def _section(file: EnvFile, name: str) -> Layer:
    """Return one section with the line of each key; a built-in profile lies below its section."""
    layer = Layer()
    for key, value in BUILT_IN.get(name, {}).items():
        layer.put((key,), value, f"built-in profile {name}")
    section = file.sections.get(name)
    if isinstance(section, dict):
        values = _toml_plain(section)
        places: dict[KeyPath, str] = {(key,): file.at((name, key)) for key in values}
        for path in file.lines:
            if path[0] == name and len(path) > 1:
                places[path[1:]] = file.at(path)
        merge(layer, Layer(values, places))
    return layer


def _toml_plain(value: Any) -> Any:
    """Return TOML data with dates and times as text."""
    if isinstance(value, dict):
        return {key: _toml_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_toml_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) else str(value)


def _inherit(file: EnvFile, name: str, heirs: tuple[str, ...]) -> Layer:
    """Return a profile on top of the ones it extends."""
    if name in heirs:
        cycle = " → ".join([*heirs[heirs.index(name) :], name])
        raise ConfigError(f"profiles of {file.shown} extend each other in a circle: {cycle}")
    if name not in available(file):
        raise _unknown_profile(file, name, heirs)
    own = _section(file, name)
    parent = own.values.pop("extends", None)
    own.forget(("extends",))
    if parent is None:
        return own
    if not isinstance(parent, str):
        raise ConfigError(f"extends ({file.at((name, 'extends'))}) must be the name of one profile")
    merged = _inherit(file, parent, (*heirs, name))
    if own.values.get("container") is not None:  # the older name of the image; the heir's counts
        merged.values.pop("container_image", None)
        merged.forget(("container_image",))
    merge(merged, own)
    return merged


def available(file: EnvFile) -> list[str]:
    """Return the names of all profiles, built-in ones last."""
    named = [
        name
        for name, value in file.sections.items()
        if isinstance(value, dict) and name not in RESERVED
    ]
    return named + [name for name in BUILT_IN if name not in named]


def _unknown_profile(file: EnvFile, name: str, heirs: tuple[str, ...]) -> ConfigError:
    names = available(file)
    meant = did_you_mean(name, names)
    if heirs:
        place = file.at((heirs[-1], "extends"))
        return ConfigError(
            f'profile "{heirs[-1]}" ({place}) extends "{name}", which does not exist{meant}',
            hint=f"profiles: {', '.join(names)}",
        )
    if not file.shown:
        return ConfigError(
            f'there is no profile "{name}": no {FILE_NAME} was found'
            f" (looked for {', '.join(file.looked)})",
            hint="write one (docs/configuration.md), name one with --env-file,"
            " or use the profile local",
        )
    return ConfigError(
        f'there is no profile "{name}" in {file.shown}{meant}',
        hint=f"profiles: {', '.join(names)}",
    )


def _check_executor(own: Layer, everything: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Refuse what runs neither on Slurm nor on this machine."""
    executor = resolve_own(everything, environ).get("executor", EXECUTORS[0])
    if executor in EXECUTORS:
        return
    place = own.origin(("executor",))
    if executor in _FOREIGN_EXECUTORS:
        raise ConfigError(
            f'executor "{executor}" ({place}): slurmeval runs on slurm and local only',
            hint="choose another profile with --profile",
        )
    meant = did_you_mean(str(executor), EXECUTORS)
    raise ConfigError(f'executor ({place}) must be slurm or local, got "{executor}"{meant}')


def _is_foreign(key: str) -> bool:
    """Return whether a key is another tool's, and not one of ours mistyped."""
    if key in Env.model_fields:
        return False
    return key in _FOREIGN_KEYS or key.startswith(_FOREIGN_PREFIXES)


def _split(own: Layer, wanted: set[str]) -> tuple[Layer, list[str]]:
    """Return the wanted keys of a section, and the places of the others."""
    kept = Layer({k: v for k, v in own.values.items() if k in wanted})
    kept.origins = {path: place for path, place in own.origins.items() if path[0] in wanted}
    ignored = [
        f"{key} (line {_line(own.origin((key,)))})" for key in own.values if key not in wanted
    ]
    return kept, ignored


def _line(origin: str | None) -> str:
    return (origin or "").partition(" ")[0].rpartition(":")[2]


def _ignored(file: EnvFile, name: str, ignored: list[str]) -> str:
    return f"{file.shown} [{name}]: ignored, other tools' keys: {', '.join(ignored)}"


def _adopt_mounts(section: Layer) -> list[str]:
    """Add Nemotron's ``lustre_mount`` to the mounts and take its git mounts out."""
    notes = []
    mounts = section.values.get("mounts")
    if isinstance(mounts, list):
        kept = [
            mount
            for mount in mounts
            if not (isinstance(mount, str) and mount.startswith(_AUTO_MOUNTS))
        ]
        if len(kept) < len(mounts):
            place = section.origin(("mounts",))
            notes.append(f"mounts ({place}): git repositories of other tools are not mounted")
            section.values["mounts"] = kept
    lustre, place = section.values.pop("lustre_mount", None), section.origin(("lustre_mount",))
    section.forget(("lustre_mount",))
    if lustre:
        listed = section.values.get("mounts") or []
        listed = [listed] if isinstance(listed, str) else listed
        if lustre not in listed:
            section.origins[("mounts", str(len(listed)))] = place or ""
            section.origins.setdefault(("mounts",), place or "")
            section.values["mounts"] = [*listed, lustre]
    return notes


def _one_task_per_node(section: Layer) -> list[str]:
    tasks = section.values.get("ntasks_per_node")
    if not isinstance(tasks, int) or tasks <= 1:
        return []
    place = section.origin(("ntasks_per_node",))
    return [f"ntasks_per_node = {tasks} ({place}) is not used: a job has one task on each node"]


def _below(
    section: Layer, prefix: KeyPath, everything: dict[str, Any], environ: Mapping[str, str]
) -> Layer:
    """Return a section's layer at its place in the configuration.

    References to the profile's own keys resolve here, as the profile is their root; all others
    stay for the whole configuration.
    """
    own = resolve_own({**everything, **section.values}, environ)
    values: Any = {key: own[key] for key in section.values}
    for key in reversed(prefix):
        values = {key: values}
    return Layer(values, {(*prefix, *path): place for path, place in section.origins.items()})
