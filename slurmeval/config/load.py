"""From layers to one validated ``Config``.

In order, the later wins: the shipped default, the files of ``-c``, the profile of ``env.toml``
(``run.env``) and its ``[wandb]`` (``run.wandb``), the ``KEY=VALUE`` of the command line. Then
interpolations are resolved and the whole is checked against the schema. No side effect, and no
network unless ``run.model`` is an artifact of W&B; every problem names its key and the place where
it was written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurmeval.config.emit import emit
from slurmeval.config.keys import closest, is_secret, sections
from slurmeval.config.layers import (
    COMMAND_LINE,
    KeyPath,
    Layer,
    apply_override,
    concatenate,
    dotted,
    leaves,
    merge,
    parse_override,
)
from slurmeval.config.profiles import (
    expand_home,
    profile_layer,
    read_env_file,
    shorten,
)
from slurmeval.config.resolve import resolve
from slurmeval.config.schema import Config
from slurmeval.config.validate import Problems, cross_checks, validate
from slurmeval.config.yamltext import YamlProblem, parse_yaml
from slurmeval.errors import ConfigError
from slurmeval.resources import config_dir

if TYPE_CHECKING:
    from slurmeval.registry.model import RegistryModel

DEFAULT = "default"
_ENV: KeyPath = ("run", "env")
_ENV_VARS: KeyPath = ("run", "env", "env_vars")
_IMAGE_KEYS = ("container_image", "container")


@dataclass(frozen=True)
class Loaded:
    """A configuration and how it came about.

    Attributes:
        config: The validated whole.
        values: The same as plain data: what the layers gave, resolved and typed.
        origins: For each leaf's dotted key, where its value was written: ``configs/sft.yaml:12``,
            ``env.toml:7 [cluster]``, ``command line``, ``default``.
        notes: What a user should know and is no error.
        profile: The name of the profile, if any.
        secret_values: Secrets that the configuration itself holds, by name. They are in neither
            ``config`` nor ``values`` and travel as those of ``run.env.secrets`` do.
    """

    config: Config
    values: dict[str, Any]
    origins: dict[str, str]
    notes: list[str]
    profile: str | None
    secret_values: dict[str, str] = field(default_factory=dict, repr=False)


def load(
    configs: Sequence[str],
    *,
    profile: str | None,
    overrides: Sequence[str],
    env_file: Path | None = None,
    attached: bool = True,
    cwd: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    resolve_model: bool = True,
) -> Loaded:
    """Load, merge, resolve and check a configuration.

    Args:
        configs: Names of shipped configs, or paths, laid over the default in this order.
        profile: A section of ``env.toml``, or ``local``.
        overrides: ``KEY=VALUE`` texts.
        env_file: The ``env.toml`` to read instead of the one that is found.
        attached: Whether the user waits for the job: ``run_partition`` then, else
            ``batch_partition``.
        cwd: Where relative paths start; the current directory by default.
        environ: The environment.
        resolve_model: Whether ``${art:model,path}`` must have a value, for which a registry may
            have to be asked; if not, a note says that it has none, and its text stays.

    Raises:
        ConfigError: One or more problems, all of them named.
        RegistryUnreachable: ``run.model`` is an artifact, and its registry did not answer.
    """
    cwd = Path.cwd() if cwd is None else cwd
    merged, notes = _merge_layers(
        configs, profile, overrides, read_env_file(cwd, environ, env_file), attached, cwd, environ
    )
    model = _registry_model(env_file, cwd, environ) if resolve_model else None
    resolution = resolve(merged.values, environ, model)
    problems = resolution.problems
    if model:
        _pin(model, resolution.values, notes)
    if not resolve_model:
        for path in resolution.unresolved_model:
            notes.append(f"{dotted(path)} has no value yet: {problems.pop(path)}")
    values = resolution.values
    secret_values = _take_secrets(values, merged, environ, notes)
    problems |= _locate_checkpoint(values, resolution.unresolved_model, cwd, environ)
    for path in problems:
        _remove(values, path)
    config, more = validate(values)
    problems |= {path: what for path, what in more.items() if not _concerns(path, problems)}
    if config is not None:
        problems |= cross_checks(config)
    if config is None or problems:
        raise _config_error(problems, merged)
    plain = _in_order(config.model_dump(mode="json", exclude_unset=True), merged.values)
    origins = {dotted(path): merged.origin(path) or "default" for path, _ in leaves(plain) if path}
    return Loaded(config, plain, origins, notes, profile, secret_values)


def _registry_model(env_file: Path | None, cwd: Path, environ: Mapping[str, str]) -> RegistryModel:
    from slurmeval.registry.model import RegistryModel

    return RegistryModel(env_file, cwd, environ)


def _pin(model: RegistryModel, values: dict[str, Any], notes: list[str]) -> None:
    """Put the version that was found in place of the one that was asked for.

    Raises:
        SlurmevalError: Nothing was found.
    """
    if model.error:
        raise model.error
    if model.artifact:
        values["run"]["model"] = model.pinned()
        values["run"]["artifact"] = model.section()
        notes.append(model.note())


def render_yaml(loaded: Loaded, *, origin: bool = False) -> str:
    """Return the resolved configuration as YAML for people.

    Args:
        loaded: What to show.
        origin: Whether a comment beside each value says where it was written.
    """
    return emit(loaded.values, loaded.origins if origin else None)


def read_config(name: str, cwd: Path, environ: Mapping[str, str]) -> Layer:
    """Read one config: a shipped one by its name, or a file by its path (``/`` or ``.yaml``).

    Raises:
        ConfigError: There is none, or it is not a YAML mapping.
    """
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = cwd / expand_home(name, environ)
        shown = shorten(path, cwd, environ)
        if not path.is_file():
            raise _no_file(name, path)
    else:
        path = config_dir() / f"{name}.yaml"
        shown = f"configs/{name}.yaml"
        if not path.is_file():
            raise _unknown_config(name, cwd)
    return _parse(path, shown)


def _parse(path: Path, shown: str) -> Layer:
    try:
        parsed = parse_yaml(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{shown} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown} is not UTF-8 text (byte {error.start})") from None
    except YamlProblem as problem:
        place = f"{shown}:{problem.line}:{problem.column}" if problem.line else shown
        raise ConfigError(f"{place}: {problem.what}") from None
    values = {} if parsed.value is None else parsed.value
    if not isinstance(values, dict):
        raise ConfigError(f"{shown}: a config is a mapping (key: value), this is not")
    return Layer(values, {key: f"{shown}:{line}" for key, line in parsed.lines.items()})


def shipped_configs() -> list[str]:
    """Return the names of the shipped configs."""
    return sorted(path.stem for path in config_dir().glob("*.yaml"))


def _unknown_config(name: str, cwd: Path) -> ConfigError:
    names = shipped_configs()
    meant = closest(name, names)
    here = next((f for f in (f"{name}.yaml", f"{name}.yml") if (cwd / f).is_file()), None)
    hint = f"your own file is given by its path: -c ./{here}" if here else None
    return ConfigError(
        f'there is no config "{name}"{f"; did you mean {meant}?" if meant and not here else ""}',
        hint=hint or f"shipped configs: {', '.join(names)}; a file is given by its path",
    )


def _no_file(name: str, path: Path) -> ConfigError:
    if path.is_dir():
        return ConfigError(f"-c {name}: this is a directory, not a YAML file")
    beside = [*path.parent.glob("*.yaml"), *path.parent.glob("*.yml")]
    meant = closest(path.name, [file.name for file in beside])
    hint = f"did you mean {Path(name).parent / meant}?" if meant else None
    return ConfigError(f"-c {name}: there is no such file", hint=hint)


def _merge_layers(
    configs: Sequence[str],
    profile: str | None,
    overrides: Sequence[str],
    env: Any,
    attached: bool,
    cwd: Path,
    environ: Mapping[str, str],
) -> tuple[Layer, list[str]]:
    """Return all layers laid over one another, and the notes on them."""
    merged = Layer()
    for name in (DEFAULT, *(name for name in configs if name != DEFAULT)):
        layer = read_config(name, cwd, environ)
        merge(merged, layer, sections=sections())
        _settle(merged, layer, attached)
    own = profile_layer(env, profile, environ)
    concatenate(merged, own.layer, (*_ENV, "mounts"))
    merge(merged, own.layer)
    _settle(merged, own.layer, attached)
    command_line = Layer()
    for override in map(parse_override, overrides):
        apply_override(merged, override)
        if override.path[:2] == _ENV and len(override.path) == 3:
            command_line.put(override.path, override.value, COMMAND_LINE)
        if override.path == _ENV and isinstance(override.value, dict):
            for key, value in override.value.items():
                command_line.put((*_ENV, key), value, COMMAND_LINE)
    _settle(merged, command_line, attached)
    return merged, own.notes


def _settle(merged: Layer, layer: Layer, attached: bool) -> None:
    """Let the layer that was just merged decide between keys that mean the same thing.

    ``run_partition`` (attached) or ``batch_partition`` is the ``partition``; of
    ``container_image`` and its older name ``container`` the one written last counts.
    """
    chosen: KeyPath = (*_ENV, "run_partition" if attached else "batch_partition")
    if layer.get(chosen) is not None:
        merged.put((*_ENV, "partition"), layer.get(chosen), layer.origin(chosen) or "")
    image, container = ((*_ENV, key) for key in _IMAGE_KEYS)
    if layer.get(container) is not None and layer.get(image) is None:
        merged.put(image, None, layer.origin(container) or "")


def _take_secrets(
    values: dict[str, Any], merged: Layer, environ: Mapping[str, str], notes: list[str]
) -> dict[str, str]:
    """Turn the environment of the job into text, and take its secrets out.

    A secret among ``run.env.env_vars`` becomes a name in ``run.env.secrets``; the value is
    returned unless the environment has the same.
    """
    env = values.get("run", {}).get("env") if isinstance(values.get("run"), dict) else None
    variables = env.get("env_vars") if isinstance(env, dict) else None
    if not isinstance(env, dict) or not isinstance(variables, dict):
        return {}
    texts = {name: _text(value) for name, value in variables.items() if value is not None}
    secrets = {name: text for name, text in texts.items() if is_secret(name)}
    env["env_vars"] = {name: text for name, text in texts.items() if name not in secrets}
    named = env.get("secrets") or []
    named = [named] if isinstance(named, str) else named
    own: dict[str, str] = {}
    for name, text in secrets.items():
        if not isinstance(text, str) or not isinstance(named, list):
            env["env_vars"][name] = text
            continue
        if not text:
            continue
        place = merged.origin((*_ENV_VARS, name))
        if name not in named:
            merged.origins[(*_ENV, "secrets", str(len(named)))] = place or ""
            named = env["secrets"] = [*named, name]
        if environ.get(name) != text:
            own[name] = text
            notes.append(
                f"{name} ({place}) is a secret: it is kept out of the script and of config.yaml"
            )
    return own


def _text(value: Any) -> Any:
    """Return an environment variable's value as text, where it is not so already."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


def _locate_checkpoint(
    values: dict[str, Any], unresolved: set[KeyPath], cwd: Path, environ: Mapping[str, str]
) -> Problems:
    """Make a relative checkpoint absolute where the job runs on this machine's file system."""
    model, deploy, run = (values.get(name) for name in ("model", "deploy", "run"))
    env = run.get("env") if isinstance(run, dict) else None
    path: KeyPath = ("model", "checkpoint_path")
    if not isinstance(model, dict) or not isinstance(env, dict) or path in unresolved:
        return {}
    checkpoint = model.get("checkpoint_path")
    if not isinstance(checkpoint, str) or not checkpoint or checkpoint.startswith("/"):
        return {}
    is_hub_id = isinstance(deploy, dict) and deploy.get("backend") == "hf"
    if not checkpoint.startswith((".", "~")) and is_hub_id:
        return {}
    if env.get("tunnel") == "ssh":
        if checkpoint.startswith("~/"):
            return {}
        return {path: f'must be an absolute path on the cluster, got "{checkpoint}"'}
    model["checkpoint_path"] = os.path.normpath(cwd / expand_home(checkpoint, environ))
    return {}


def _in_order(values: dict[str, Any], like: Any) -> dict[str, Any]:
    """Return the values with the keys of every mapping in the order in which they were written."""
    order = [key for key in like if key in values] if isinstance(like, dict) else []
    return {
        key: _in_order(values[key], like[key] if key in order else None)
        if isinstance(values[key], dict)
        else values[key]
        for key in [*order, *(key for key in values if key not in order)]
    }


def _remove(values: dict[str, Any], path: KeyPath) -> None:
    """Take a value that is known to be wrong out of the data."""
    node: Any = values
    for key in path[:-1]:
        node = node[int(key)] if isinstance(node, list) else node[key]
    if isinstance(node, dict):
        node.pop(path[-1], None)
    else:
        node[int(path[-1])] = None


def _concerns(path: KeyPath, problems: Problems) -> bool:
    """Return whether a problem is already told by that of another key, or of one inside it."""
    return any(path[: len(known)] == known or known[: len(path)] == path for known in problems)


def _config_error(problems: Problems, merged: Layer) -> ConfigError:
    """Return one error that names every problem with its key and place."""
    lines = []
    for path, what in problems.items():
        place = merged.origin(path)
        key = dotted(path) or "the configuration"
        lines.append(f"{key} ({place}): {what}" if place else f"{key}: {what}")
    if len(lines) == 1:
        return ConfigError(lines[0])
    listed = "\n".join(f"  {line}" for line in lines)
    return ConfigError(f"{len(lines)} problems in the configuration:\n{listed}")
