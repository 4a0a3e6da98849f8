"""Host keys: what known_hosts says of a machine, and whether its key is the right one."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import paramiko
from paramiko.hostkeys import HostKeyEntry, InvalidHostKey

from slurmeval.cluster.ssh_config import Hop
from slurmeval.errors import AccessDenied

if TYPE_CHECKING:
    from paramiko.pkey import PKey

_log = logging.getLogger(__name__)


def fingerprint(key: PKey) -> str:
    """Return a public key's fingerprint as OpenSSH prints it."""
    digest = hashlib.sha256(key.asbytes()).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _known_keys(hop: Hop) -> dict[str, tuple[PKey, Path]]:
    """Return the host's known keys by type; what comes first wins."""
    found: dict[str, tuple[PKey, Path]] = {}
    for file, number, line in _lines(hop):
        if line.startswith("@"):
            continue
        try:
            entry = HostKeyEntry.from_line(line, number)
        except (paramiko.SSHException, ValueError, InvalidHostKey):
            entry = None
        if entry is None or entry.key is None:
            _log.info("line %d of %s is not understood", number, file)
        elif _named(hop.host_key_name, entry.hostnames or []):
            found.setdefault(entry.key.get_name(), (entry.key, file))
    return found


def _lines(hop: Hop) -> Iterator[tuple[Path, int, str]]:
    """Yield (file, number, text) of what the known_hosts files hold."""
    for file in hop.known_hosts:
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise AccessDenied(f"cannot read the host keys in {file}: {error}") from error
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                yield file, number, line.strip()


def _named(name: str, patterns: Sequence[str]) -> bool:
    """Whether a host is meant by names, ``*`` and ``?`` patterns, ``!`` or hashes."""
    named = False
    for pattern in patterns:
        if pattern.startswith("|1|"):
            with contextlib.suppress(AssertionError, ValueError):  # a line that was cut short
                named |= paramiko.HostKeys.hash_host(name, pattern) == pattern
            continue
        wanted = re.escape(pattern.lstrip("!")).replace(r"\*", ".*").replace(r"\?", ".")
        if re.fullmatch(wanted, name, re.IGNORECASE):
            if pattern.startswith("!"):
                return False
            named = True
    return named


def prefer_known_key_types(hop: Hop, transport: paramiko.Transport) -> None:
    """Ask first for the types we know, or a host with several keys would seem unknown."""
    known = _known_keys(hop)
    rsa = {"rsa-sha2-512", "rsa-sha2-256", "ssh-rsa"} if "ssh-rsa" in known else set()
    options = transport.get_security_options()
    offered = list(options.key_types)
    options.key_types = sorted(offered, key=lambda kind: kind not in known and kind not in rsa)


def check_host_key(
    hop: Hop, transport: paramiko.Transport, *, jumped: bool, accept_new: bool
) -> None:
    """Compare a machine's key with known_hosts.

    Args:
        hop: The machine.
        transport: A connection to it that has greeted.
        jumped: Whether it goes through another machine.
        accept_new: Whether a machine without any known key is trusted, and its key written down.

    Raises:
        AccessDenied: The key is not known, has changed or is revoked; says what to do.
    """
    key = transport.get_remote_server_key()
    known = _known_keys(hop)
    kind, print_ = key.get_name(), fingerprint(key)
    marked = _marked(hop, key)
    if "@revoked" in marked:
        raise AccessDenied(f"the host key of {hop.host_key_name} is revoked: {kind} {print_}")
    if kind in known and known[kind][0] == key:
        return
    file = hop.known_hosts[0]
    if known:
        where = known[kind][1] if kind in known else next(iter(known.values()))[1]
        raise AccessDenied(
            f"THE HOST KEY OF {hop.host_key_name} HAS CHANGED: it now shows {kind} {print_}, and "
            f"{where} knows another. Somebody may be listening, or the machine was set up anew.",
            hint="Ask its administrators. Only if they confirm this fingerprint: "
            f"ssh-keygen -R {shlex.quote(hop.host_key_name)} -f {shlex.quote(str(where))}",
        )
    if accept_new:
        _remember(file, hop.host_key_name, key)
        _log.warning("trusted %s the first time: %s %s", hop.host_key_name, kind, print_)
        return
    if "@cert-authority" in marked:
        raise AccessDenied(
            f"the host key of {hop.host_key_name} is not known: {kind} {print_}",
            hint="known_hosts has @cert-authority lines, which are not understood here: "
            'set run.env.ssh = "openssh".',
        )
    if jumped or hop.proxy_command:
        command = f"ssh -p {hop.port} {shlex.quote(f'{hop.user}@{hop.alias}')}"
    else:
        port = f"-p {hop.port} " if hop.port != 22 else ""
        command = f"ssh-keyscan {port}{shlex.quote(hop.hostname)} >> {shlex.quote(str(file))}"
    raise AccessDenied(
        f"the host key of {hop.host_key_name} is not known: {kind} {print_}",
        hint=f"Compare that fingerprint with the site's own, then accept it with: {command}",
    )


def _marked(hop: Hop, key: PKey) -> set[str]:
    """Return the markers of known_hosts for this key, and of authorities that certify hosts."""
    found = set()
    for _, _, line in _lines(hop):
        marker, *words = line.split()
        if marker == "@cert-authority" or (marker == "@revoked" and key.get_base64() in words):
            found.add(marker)
    return found


def _remember(file: Path, name: str, key: PKey) -> None:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as stream:
        whole = not file.stat().st_size or file.read_bytes().endswith(b"\n")
        stream.write(f"{'' if whole else chr(10)}{name} {key.get_name()} {key.get_base64()}\n")
