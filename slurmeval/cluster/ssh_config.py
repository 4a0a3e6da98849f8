"""From a profile and ``~/.ssh/config`` to the hops of a connection. Explicit profile values win.

What of that file has no effect here is said, not ignored: each such thing is a note.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slurmeval.cluster.access import Access
from slurmeval.errors import ConfigError

if TYPE_CHECKING:
    from paramiko.config import SSHConfig, SSHConfigDict

_DEFAULT_PORT = 22
_MAX_HOPS = 8
_DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
_JUMP = re.compile(
    r"^(?:ssh://)?(?:(?P<user>[^@]+)@)?(?P<host>\[[^]]+\]|[^:]+)(?::(?P<port>\d+))?$"
)
_MATCH = re.compile(r"^\s*match(?:\s+|\s*=\s*)(?P<words>.+)$", re.IGNORECASE)
#: What a Match line may ask that is understood; paramiko would take any other word for true.
_MATCHES = {"all", "canonical", "final", "host", "originalhost", "user", "localuser"}
_BARE = {"all", "canonical", "final"}
_INCLUDE = re.compile(r"^\s*include(?:\s+|\s*=\s*)(?P<files>.+)$", re.IGNORECASE)

#: Options that change how ssh connects or logs in, and have no effect here -> what helps.
_WITHOUT_EFFECT = {
    "addkeystoagent": "keys are not added to the agent",
    "addressfamily": "the system's order of addresses is used",
    "bindaddress": "the system chooses the local address",
    "bindinterface": "the system chooses the local address",
    "canonicaldomains": "the name is used as it is",
    "ciphers": "paramiko's own list is used",
    "controlmaster": 'run.env.ssh = "openssh" uses an open connection',
    "controlpath": 'run.env.ssh = "openssh" uses an open connection',
    "gssapiauthentication": 'run.env.ssh = "openssh" logs in with it',
    "hostbasedauthentication": 'run.env.ssh = "openssh" logs in with it',
    "hostkeyalgorithms": "the types of the known keys are asked for first",
    "identityagent": "the agent of SSH_AUTH_SOCK is asked",
    "kexalgorithms": "paramiko's own list is used",
    "knownhostscommand": 'run.env.ssh = "openssh" runs it',
    "macs": "paramiko's own list is used",
    "pkcs11provider": 'run.env.ssh = "openssh" uses it',
    "preferredauthentications": "keys come first, then questions",
    "proxyusefdpass": 'run.env.ssh = "openssh" uses it',
    "pubkeyacceptedalgorithms": "paramiko's own list is used",
    "revokedhostkeys": "only @revoked lines of known_hosts are heeded",
    "securitykeyprovider": 'run.env.ssh = "openssh" uses it',
    "stricthostkeychecking": "run.env.host_key_policy decides",
    "verifyhostkeydns": "only known_hosts counts",
}
#: Values with which an option asks for nothing.
_OFF = {"no", "none", "ask", "yes"}

#: Known hosts of the system and of the user, where nothing else is configured.
SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")
USER_KNOWN_HOSTS = Path("~/.ssh/known_hosts")
#: Names a file to check host keys against, instead of the usual ones.
KNOWN_HOSTS_ENV = "SLURMEVAL_KNOWN_HOSTS"
#: Names a file to read instead of ``~/.ssh/config``.
CONFIG_ENV = "SLURMEVAL_SSH_CONFIG"


@dataclass(frozen=True)
class Hop:
    """One machine on the way.

    Attributes:
        alias: The name that was asked for, which is also the name ``ssh`` would be given.
        hostname: Where to connect.
        port: TCP port.
        user: Login name.
        identities: Private keys named by the profile or the configuration, in order.
        certificates: Certificates of those keys, besides the ones that lie next to them.
        default_keys: Keys to try besides those, where they exist.
        agent: Whether the agent's keys are tried.
        proxy_command: A command whose streams are the connection.
        known_hosts: Files with host keys.
        host_key_name: The name under which the host key is known.
        notes: What the configuration says and has no effect, a line each.
    """

    alias: str
    hostname: str
    port: int
    user: str
    identities: tuple[Path, ...]
    default_keys: tuple[Path, ...]
    agent: bool
    proxy_command: str | None
    known_hosts: tuple[Path, ...]
    host_key_name: str
    certificates: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.user}@{self.hostname}:{self.port}"


def hops(env: Access, *, config: Path | None = None, known_hosts: Path | None = None) -> list[Hop]:
    """Return the machines to pass, jump hosts first, the profile's host last.

    Args:
        env: How to get there; ``host`` is needed.
        config: The ssh client configuration; else `CONFIG_ENV`, else ``~/.ssh/config``.
        known_hosts: The file of host keys; else `KNOWN_HOSTS_ENV`, else what ssh would use.

    Raises:
        ConfigError: No host, a file that cannot be read or parsed, or jumps in a circle.
    """
    if not env.host:
        raise ConfigError(
            'run.env.host is not set, and tunnel = "ssh" needs it',
            hint='Name the login node in the profile: host = "login.example.org".',
        )
    known = known_hosts or _env_path(KNOWN_HOSTS_ENV)
    notes: list[str] = []
    resolver = _Resolver(_load(config or _env_path(CONFIG_ENV), notes), known, notes)
    identity = Path(env.identity).expanduser() if env.identity else None
    if identity is not None and not identity.is_file():
        raise ConfigError(
            f"run.env.identity names {env.identity}, which is not a file",
            hint="Give the path of the private key on this machine.",
        )
    return resolver.chain(env.host, env.user, env.port, identity)


def _env_path(name: str) -> Path | None:
    value = os.environ.get(name)
    return Path(value).expanduser() if value else None


class _Resolver:
    def __init__(self, config: SSHConfig, known_hosts: Path | None, notes: list[str]) -> None:
        self._config, self._known_hosts, self._notes = config, known_hosts, notes

    def chain(
        self, alias: str, user: str | None, port: int, identity: Path | None, depth: int = 0
    ) -> list[Hop]:
        if depth >= _MAX_HOPS:
            raise ConfigError(f"ProxyJump leads in a circle, or through {_MAX_HOPS} hosts: {alias}")
        options = self._config.lookup(alias)
        before: list[Hop] = []
        jump = options.get("proxyjump")
        if jump and str(jump).lower() != "none":
            for position, word in enumerate(str(jump).split(",")):
                match = _JUMP.match(word.strip())
                if match is None:
                    raise ConfigError(f"cannot read ProxyJump {word.strip()!r} of {alias}")
                jump_port = int(match["port"] or _DEFAULT_PORT)
                found = self.chain(
                    match["host"].strip("[]"), match["user"], jump_port, None, depth + 1
                )
                before += found if position == 0 else found[-1:]
        return [*before, self._hop(alias, user, port, identity, options, bool(before))]

    def _hop(
        self,
        alias: str,
        user: str | None,
        port: int,
        identity: Path | None,
        options: SSHConfigDict,
        jumped: bool,
    ) -> Hop:
        if port == _DEFAULT_PORT:
            port = _port(options.get("port", _DEFAULT_PORT), alias)
        named = [Path(name).expanduser() for name in options.get("identityfile", [])]
        only = str(options.get("identitiesonly", "no")).lower() == "yes"
        defaults = [Path("~/.ssh", name).expanduser() for name in _DEFAULT_KEYS]
        proxy = None if jumped else options.get("proxycommand")
        hostname = str(options["hostname"])
        return Hop(
            alias=alias,
            hostname=hostname,
            port=port,
            user=str(user or options.get("user") or getpass.getuser()),
            identities=tuple([identity] if identity else []) + tuple(named),
            default_keys=() if only or named else tuple(defaults),
            agent=not only,
            proxy_command=str(proxy) if proxy and str(proxy).lower() != "none" else None,
            known_hosts=self._known_hosts_of(options),
            host_key_name=str(options.get("hostkeyalias") or _host_key_name(hostname, port)),
            certificates=tuple(
                Path(name).expanduser() for name in shlex.split(options.get("certificatefile", ""))
            ),
            notes=(*self._notes, *_without_effect(alias, options)),
        )

    def _known_hosts_of(self, options: SSHConfigDict) -> tuple[Path, ...]:
        if self._known_hosts is not None:
            return (self._known_hosts,)
        configured = str(options.get("userknownhostsfile", USER_KNOWN_HOSTS)).split()
        return (*(Path(name).expanduser() for name in configured), SYSTEM_KNOWN_HOSTS)


def _port(value: object, alias: str) -> int:
    if not str(value).isdecimal():
        raise ConfigError(f"Port of {alias} is not a number: {value}")
    return int(str(value))


def _host_key_name(hostname: str, port: int) -> str:
    return hostname if port == _DEFAULT_PORT else f"[{hostname}]:{port}"


def _without_effect(alias: str, options: SSHConfigDict) -> list[str]:
    """Return a note for each option of a host that would matter to ssh and does not here."""
    found = []
    for key, remedy in _WITHOUT_EFFECT.items():
        value = str(options.get(key, "no"))
        wanted = value.lower() not in _OFF or (value.lower() == "yes" and key.endswith("tication"))
        if wanted:
            found.append(f"ssh configuration of {alias}: {key} {value} has no effect; {remedy}")
    return found


def _load(path: Path | None, notes: list[str]) -> SSHConfig:
    load_paramiko()
    from paramiko.config import SSHConfig
    from paramiko.ssh_exception import ConfigParseError

    file = path or Path("~/.ssh/config").expanduser()
    if not file.is_file():
        return SSHConfig()
    try:
        return SSHConfig.from_text("\n".join(_understood(file, notes)))
    except (ConfigParseError, OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error


def _understood(file: Path, notes: list[str]) -> Iterator[str]:
    """Yield a configuration's lines; a Match block that cannot be judged applies to no host."""
    for line in _lines(file):
        match = _MATCH.match(line)
        strange = _strange(match["words"]) if match else None
        if strange:
            notes.append(
                f"{file}: `{line.strip()}` is left out, because {strange} cannot be judged here; "
                'run.env.ssh = "openssh" knows it'
            )
            yield "Host !*"
        else:
            yield line


def _strange(criteria: str) -> str | None:
    """Return the first criterion of a Match line that is not understood."""
    words = iter(shlex.split(criteria, comments=True))
    for word in words:
        kind = word.lstrip("!").split("=")[0].lower()
        if kind == "exec" and not _load_invoke():
            return "exec"
        if kind not in _MATCHES and kind != "exec":
            return kind
        if kind not in _BARE and "=" not in word:
            next(words, None)
    return None


def load_paramiko() -> None:
    """Import paramiko without invoke: half of the time, and only ``Match exec`` needs it."""
    if "paramiko" in sys.modules or "invoke" in sys.modules:
        return
    sys.modules["invoke"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("paramiko")
    finally:
        del sys.modules["invoke"]


def _load_invoke() -> bool:
    """Give paramiko what runs the command of a ``Match exec``; return whether that is here."""
    config = importlib.import_module("paramiko.config")
    with contextlib.suppress(ImportError):
        config.invoke = importlib.import_module("invoke")  # type: ignore[attr-defined]
    return config.invoke is not None


def _lines(file: Path, depth: int = 0) -> Iterator[str]:
    """Yield a configuration's lines with ``Include`` resolved, which paramiko does not know."""
    for line in file.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        match = _INCLUDE.match(line)
        if match is None:
            yield line
            continue
        for pattern in match["files"].split():
            absolute = Path("~/.ssh").expanduser() / Path(pattern.strip('"')).expanduser()
            for included in sorted(Path("/").glob(str(absolute).lstrip("/"))):
                if depth < _MAX_HOPS and included.is_file():
                    yield from _lines(included, depth + 1)
