"""Which checkpoint a path means: looked at where it lies, in one round trip.

Training saves iterations side by side, ``DIR/iter_0001000``, and names the last complete one in
``DIR/latest_checkpointed_iteration.txt``. Export-Deploy serves one iteration, a directory with
``run_config.yaml`` (Megatron-Bridge); the HuggingFace backend one with ``config.json`` and weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

import yaml

from slurmeval.cluster.host import Host
from slurmeval.cluster.text import one_line, printable, quote_path
from slurmeval.config.keys import closest
from slurmeval.config.schema import Config
from slurmeval.errors import ClusterError, ConfigError

Kind = Literal["megatron", "hf"]

TRACKER = "latest_checkpointed_iteration.txt"
RUN_CONFIG = "run_config.yaml"
#: Where Megatron-Bridge puts an export to HuggingFace's format beside an iteration's own files.
HF_EXPORT = "hf"
#: Without one of these, HuggingFace's tokenizers cannot read a directory.
TOKENIZER_FILES = frozenset({"tokenizer_config.json", "tokenizer.json"})
_ITERATION = re.compile(r"iter_(\d+)")
_WEIGHTS = re.compile(r"(?:model|pytorch_model)(?:-.*)?\.(?:safetensors|bin)(?:\.index\.json)?")
_SHARDS = frozenset({"metadata.json", ".metadata"})
_NEMO_2 = frozenset({"context", "weights"})
_TIMEOUT = 60

# Prints "word value" lines: of every iteration the names that decide, and those configurations that
# can be the answer's.
_LOOK = r"""
path={path}
printf 'path %s\n' "$path"
if [ ! -e "$path" ]; then
    while [ ! -e "$path" ]; do path=$(dirname -- "$path"); done
    if [ -x "$path" ]; then echo missing; else echo denied; fi
    printf 'there %s\n' "$path"
    ls -1 -- "$path" 2> /dev/null | head -n 200 | sed 's/^/near /'
    exit 0
fi
[ -d "$path" ] || {{ echo file; exit 0; }}
cd -- "$path" 2> /dev/null && ls > /dev/null 2>&1 || {{
    echo denied
    printf 'there %s\n' "$path"
    exit 0
}}
folder() {{
    [ -d "$1" ] || return 0
    printf 'folder %s\n' "$1"
    (
        cd -- "$1" || exit
        for name in {names}; do [ ! -e "$name" ] || printf 'name %s\n' "$name"; done
        ls -1 | grep -E '^(pytorch_)?model' | head -n 3 | sed 's/^/name /'
        [ ! -d tokenizer ] || ls -1 tokenizer | head -n 50 | sed 's/^/tokenizer /'
    )
}}
settings() {{
    [ ! -f "$1/{run_config}" ] || head -c 1000000 -- "$1/{run_config}" | sed 's/^/config /'
}}
folder .
ls -1 | head -n 7 | sed 's/^/name /'
settings .
latest=
if [ -f {tracker} ]; then
    latest=$(head -c 100 {tracker} | tr -cd 'a-z0-9')
    printf 'tracker %s\n' "$latest"
    case $latest in
        *[!0-9]* | '') ;;
        *) latest=$(printf 'iter_%07d' "$(expr "$latest" + 0)") ;;
    esac
fi
last=
for each in iter_* release hf; do
    folder "$each"
    case $each in iter_*) [ ! -f "$each/{run_config}" ] || last=$each ;; esac
    [ ! -d "$each/hf" ] || folder "$each/hf"
done
last=${{latest:-$last}}
[ ! -d "$last" ] || {{ printf 'folder %s\n' "$last"; settings "$last"; }}
"""
_NAMES = (RUN_CONFIG, *sorted(_SHARDS), "config.json", *sorted(TOKENIZER_FILES), *sorted(_NEMO_2))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that can be served.

    Attributes:
        path: Its directory, as the job sees it.
        kind: ``megatron`` or ``hf``.
        iteration: Its training iteration, where its name says so.
        tokenizer: The directory of its tokenizer, or a name on the hub; None where none is known.
        notes: What was decided, for people.
    """

    path: str
    kind: Kind
    iteration: int | None
    tokenizer: str | None
    notes: tuple[str, ...] = ()


@dataclass
class Folder:
    """What is known of a directory.

    Attributes:
        names: Those of its entries that tell what it is, and some others.
        tokenizer: The entries of its ``tokenizer`` directory.
        config: The text of its ``run_config.yaml``, if it was read.
    """

    names: set[str] = field(default_factory=set)
    tokenizer: set[str] = field(default_factory=set)
    config: str = ""

    @property
    def is_megatron(self) -> bool:
        """Whether Export-Deploy can serve it as a Megatron checkpoint."""
        return RUN_CONFIG in self.names

    @property
    def is_hf(self) -> bool:
        """Whether it is a model in HuggingFace's format."""
        return "config.json" in self.names and any(map(_WEIGHTS.fullmatch, self.names))


@dataclass
class Listing:
    """What lies at a path.

    Attributes:
        path: The absolute path.
        state: ``directory``, ``file``, ``missing``, or ``denied`` where nobody can say.
        there: Where it is missing or denied: the innermost directory that exists.
        near: The entries of that directory.
        tracker: The content of ``latest_checkpointed_iteration.txt``.
        folders: The directory itself (``.``) and its iterations.
    """

    path: str
    state: Literal["directory", "file", "missing", "denied"] = "directory"
    there: str = ""
    near: list[str] = field(default_factory=list)
    tracker: str | None = None
    folders: dict[str, Folder] = field(default_factory=dict)


def to_be_located(config: Config) -> str | None:
    """Return the checkpoint's path where it can be looked at before the job runs, else None.

    A name on the hub is no path, and an artifact that the job downloads is not there yet.
    """
    path, artifact = config.model.checkpoint_path, config.run.artifact
    if not path or not path.startswith(("/", "~")):
        return None
    return None if artifact and artifact.download and artifact.path == path else path


def locate(
    host: Host, path: str, *, backend: Kind | None = None, mounts: Sequence[str] = ()
) -> Checkpoint:
    """Look at a checkpoint where it lies.

    Args:
        host: The machine that sees it.
        path: An absolute path, or one below ``~``, as the job sees it.
        backend: ``deploy.backend``, which decides what will do; None: whatever is there.
        mounts: The job's container mounts, ``SRC:DST[:OPTIONS]``, through which the job sees it.

    Raises:
        ConfigError: There is no checkpoint, or none that the backend can serve.
        ClusterError: Nobody could look.
    """
    outside = translate(path, mounts, inwards=False)
    script = _LOOK.format(
        path=quote_path(outside),
        run_config=RUN_CONFIG,
        tracker=TRACKER,
        names=" ".join(_NAMES),
    )
    done = host.run(script, timeout=_TIMEOUT)
    if done.returncode:
        raise ClusterError(
            f"cannot look at {outside} on {host.name}: {one_line(done.stderr) or done.returncode}"
        )
    listing = parse(done.stdout, outside)
    if listing.state == "denied":
        raise ClusterError(
            f"{listing.there} on {host.name} may not be entered: whether the checkpoint {outside} "
            "is there is not known",
        )
    found = choose(listing, backend, host.name)
    return _as_seen_by_the_job(found, mounts)


def applied(config: Config, found: Checkpoint) -> Config:
    """Return the configuration with the checkpoint that was found; a given tokenizer stays."""
    update = {
        "checkpoint_path": found.path,
        "tokenizer": config.model.tokenizer or found.tokenizer,
    }
    return config.model_copy(update={"model": config.model.model_copy(update=update)})


def parse(text: str, path: str) -> Listing:
    """Read what the script has printed."""
    listing, folder = Listing(path), Folder()
    config: dict[int, list[str]] = {}
    for line in text.split("\n"):
        word, _, value = line.partition(" ")
        match word:
            case "missing" | "denied" | "file":
                listing.state = word
            case "path":
                listing.path = value
            case "there":
                listing.there = value
            case "near":
                listing.near.append(value)
            case "tracker":
                listing.tracker = value
            case "folder":
                folder = listing.folders.setdefault(value, Folder())
            case "name":
                folder.names.add(value)
            case "tokenizer":
                folder.tokenizer.add(value)
            case "config":
                config.setdefault(id(folder), []).append(value)
    for each in listing.folders.values():
        each.config = "\n".join(config.get(id(each), []))
    return listing


def choose(listing: Listing, backend: Kind | None = None, host: str = "") -> Checkpoint:
    """Decide which checkpoint a path means.

    Raises:
        ConfigError: None that the backend can serve.
    """
    where = f"{listing.path} on {host}" if host else listing.path
    if listing.state != "directory":
        raise _absent(listing, where)
    here = listing.folders.get(".", Folder())
    name = "."
    notes: list[str] = []
    if not here.is_megatron and not here.is_hf:
        name, notes = _latest(listing, where)
    chosen = listing.folders[name]
    path = listing.path if name == "." else f"{listing.path.rstrip('/')}/{name}"
    if backend == "hf" and not chosen.is_hf:
        export = listing.folders.get(HF_EXPORT if name == "." else f"{name}/{HF_EXPORT}")
        if export and export.is_hf:
            notes.append(f"its export to HuggingFace's format is taken: {path}/{HF_EXPORT}")
            chosen, path = export, f"{path}/{HF_EXPORT}"
    kind: Kind = (
        "hf" if chosen.is_hf and (backend == "hf" or not chosen.is_megatron) else "megatron"
    )
    if backend not in (None, kind):
        words = {"megatron": "a Megatron checkpoint", "hf": "in HuggingFace's format"}
        raise ConfigError(
            f"the checkpoint {where} is {words[kind]}, and deploy.backend is {backend}",
            hint=f"deploy.backend={kind}",
        )
    tokenizer, more = _tokenizer(chosen, path, kind)
    return Checkpoint(path, kind, _iteration(path), tokenizer, (*notes, *more))


def _latest(listing: Listing, where: str) -> tuple[str, list[str]]:
    """Return the iteration that a directory of iterations means, and the note that says so."""
    complete = {
        int(match[1]): name
        for name, folder in listing.folders.items()
        if (match := _ITERATION.fullmatch(name)) and (folder.is_megatron or folder.is_hf)
    }
    if listing.tracker is not None:
        name = listing.tracker
        name = f"iter_{int(name):07d}" if name.isdigit() else name
        folder = listing.folders.get(name)
        if folder and (folder.is_megatron or folder.is_hf):
            return name, [f"{where}: {name}, the latest according to {TRACKER}, is taken"]
        there = (
            ", ".join(complete[number] for number in sorted(complete)) or "no complete iteration"
        )
        what = "holds no " + RUN_CONFIG if folder else "is not there"
        raise ConfigError(
            f"{where}: {TRACKER} names {name or 'nothing'}, which {what}",
            hint=f"there is: {there}; give the one you mean",
        )
    if complete:
        name = complete[max(complete)]
        return name, [f"{where} has no {TRACKER}: {name}, its highest iteration, is taken"]
    raise _unusable(listing, where)


def _unusable(listing: Listing, where: str) -> ConfigError:
    here = listing.folders.get(".", Folder())
    if here.names & _SHARDS or any(f.names & _SHARDS for f in listing.folders.values()):
        return ConfigError(
            f"{where} holds a distributed checkpoint without {RUN_CONFIG}",
            hint="Export-Deploy serves those of Megatron-Bridge, which writes that file",
        )
    if here.names >= _NEMO_2:
        return ConfigError(
            f"{where} is a NeMo 2 checkpoint (context/ and weights/)",
            hint="convert it to HuggingFace's or Megatron-Bridge's format",
        )
    names = sorted(name for name in here.names if name not in (".", ".."))
    holds = ", ".join(map(printable, names[:6])) + (", …" if len(names) > 6 else "")
    return ConfigError(
        f"{where} holds no checkpoint: {holds or 'it is empty'}",
        hint=f"one is a directory with {RUN_CONFIG} (Megatron-Bridge), with iter_* directories of "
        "that kind, or with config.json and weights (HuggingFace)",
    )


def _absent(listing: Listing, where: str) -> ConfigError:
    if listing.state == "file":
        return ConfigError(f"the checkpoint {where} is a file; a directory is expected")
    if listing.state == "denied":
        return ConfigError(f"the checkpoint {where} cannot be looked at")
    hint = None
    if listing.there:
        wanted = PurePosixPath(listing.path).relative_to(listing.there).parts[:1]
        meant = closest(wanted[0], listing.near) if wanted else None
        hint = f"{listing.there} is there, and holds no {wanted[0] if wanted else 'such entry'}"
        hint += f"; did you mean {printable(meant)}?" if meant else ""
    return ConfigError(f"the checkpoint {where} does not exist", hint=hint)


def _iteration(path: str) -> int | None:
    for part in reversed(PurePosixPath(path).parts[-2:]):
        if match := _ITERATION.fullmatch(part):
            return int(match[1])
    return None


def _tokenizer(folder: Folder, path: str, kind: Kind) -> tuple[str | None, list[str]]:
    """Find the tokenizer of a checkpoint in a form that HuggingFace's tokenizers can read."""
    if kind == "hf" and folder.names & TOKENIZER_FILES:
        return path, []
    if folder.tokenizer & TOKENIZER_FILES:
        return f"{path}/tokenizer", []
    named = _named_tokenizer(folder.config)
    if named:
        return named, [f"the checkpoint holds no tokenizer; {RUN_CONFIG} names {named}"]
    what = "none that HuggingFace can read" if folder.tokenizer else "no tokenizer"
    return None, [f"the checkpoint holds {what}: benchmarks that need one need model.tokenizer"]


def _named_tokenizer(config: str) -> str | None:
    """Return ``tokenizer.tokenizer_model`` of a HuggingFace tokenizer; a path may be an object."""
    try:
        section = yaml.safe_load(config)["tokenizer"]
        if section.get("tokenizer_type") != "HuggingFaceTokenizer":
            return None
        model = section["tokenizer_model"]
        if isinstance(model, dict):
            model = "/".join(map(str, model["_args_"])).replace("//", "/")
    except (yaml.YAMLError, LookupError, TypeError, AttributeError):
        return None
    return model if isinstance(model, str) and model not in ("", ".") else None


def translate(path: str, mounts: Sequence[str], *, inwards: bool) -> str:
    """Return a path as the host sees it, or (inwards) as the container does."""
    best: tuple[int, str] | None = None
    for mount in mounts:
        source, _, rest = mount.partition(":")
        target = rest.split(":")[0] or source
        old, new = (source, target) if inwards else (target, source)
        if PurePosixPath(path).is_relative_to(old) and (best is None or len(old) > best[0]):
            relative = PurePosixPath(path).relative_to(old)
            best = len(old), str(PurePosixPath(new) / relative)
    return best[1] if best else path


def _as_seen_by_the_job(found: Checkpoint, mounts: Sequence[str]) -> Checkpoint:
    path = translate(found.path, mounts, inwards=True)
    tokenizer = found.tokenizer
    if tokenizer and tokenizer.startswith(found.path):
        tokenizer = path + tokenizer[len(found.path) :]
    return Checkpoint(path, found.kind, found.iteration, tokenizer, found.notes)
