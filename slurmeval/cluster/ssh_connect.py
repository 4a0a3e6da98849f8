"""One hop of an SSH connection: greet, check the host key, prove who we are. Paramiko, explained.

Every way in which this fails ends in a `ConnectionFailed` that names host, port and remedy.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import paramiko

from slurmeval.cluster.host import Prompt
from slurmeval.cluster.known_hosts import check_host_key, fingerprint, prefer_known_key_types
from slurmeval.cluster.ssh_config import Hop
from slurmeval.cluster.text import one_line, printable
from slurmeval.errors import AccessDenied, Unreachable

if TYPE_CHECKING:
    from paramiko.pkey import PKey

#: Seconds between two keepalive messages on an open connection.
KEEPALIVE = 30
#: Seconds that a person has to answer the questions of one authentication.
_ANSWER_TIMEOUT = 300.0
_MAX_PASSPHRASES = 3

_log = logging.getLogger(__name__)
# Paramiko writes tracebacks of its own to stderr where logging is not configured.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


def connect(
    hop: Hop,
    through: paramiko.Transport | None,
    *,
    prompt: Prompt | None,
    timeout: float,
    accept_new: bool = False,
) -> paramiko.Transport:
    """Return an authenticated transport to one hop.

    Args:
        hop: Where to.
        through: The transport of the hop before, or None for a direct connection.
        prompt: Asks the user; None where nobody can answer.
        timeout: Seconds for each step.
        accept_new: Whether a host without any known key is trusted, and its key written down.

    Raises:
        Unreachable: There was no connection.
        AccessDenied: The host key or the login was refused.
    """
    begin = time.monotonic()
    transport = _greet(hop, _socket(hop, through, timeout), timeout, jumped=through is not None)
    try:
        check_host_key(hop, transport, jumped=through is not None, accept_new=accept_new)
        login = _Login(hop, transport, prompt, timeout)
        login.run()
    except BaseException:
        transport.close()
        raise
    transport.set_keepalive(KEEPALIVE)
    _log.info("connected to %s with %s in %.2f s", hop, login.used, time.monotonic() - begin)
    return transport


def _socket(
    hop: Hop, through: paramiko.Transport | None, timeout: float
) -> socket.socket | paramiko.Channel | paramiko.ProxyCommand:
    if through is not None:
        try:
            return through.open_channel(
                "direct-tcpip", (hop.hostname, hop.port), ("127.0.0.1", 0), timeout=timeout
            )
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise Unreachable(
                f"the jump host before it cannot reach {hop.hostname} port {hop.port}: "
                f"{one_line(str(error)) or type(error).__name__}",
                hint="Check HostName and Port, and that the jump host allows TCP forwarding.",
            ) from error
    if hop.proxy_command:
        try:
            return paramiko.ProxyCommand(hop.proxy_command)
        except OSError as error:
            raise Unreachable(f"cannot run ProxyCommand of {hop.alias}: {error}") from error
    try:
        connection = socket.create_connection((hop.hostname, hop.port), timeout=timeout)
    except socket.gaierror as error:
        raise Unreachable(
            f"cannot find the host {hop.hostname}: {error.strerror}",
            hint="Check run.env.host and ~/.ssh/config; a VPN may be needed.",
        ) from error
    except TimeoutError as error:
        raise Unreachable(
            f"{hop.hostname} did not answer on port {hop.port} within {timeout:g} s",
            hint="Check run.env.host and run.env.port; a VPN or a jump host may be needed.",
        ) from error
    except OSError as error:
        raise Unreachable(
            f"cannot connect to {hop.hostname} port {hop.port}: {error.strerror or error}",
            hint="Check run.env.host and run.env.port, and that sshd runs there.",
        ) from error
    # Else a second small packet waits 40 ms for the first one's acknowledgement.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _greet(
    hop: Hop,
    sock: socket.socket | paramiko.Channel | paramiko.ProxyCommand,
    timeout: float,
    *,
    jumped: bool,
) -> paramiko.Transport:
    transport = paramiko.Transport(sock)
    transport.banner_timeout = transport.handshake_timeout = timeout
    transport.auth_timeout = _ANSWER_TIMEOUT
    prefer_known_key_types(hop, transport)
    _prefer_fast_ciphers(transport)
    begin = time.monotonic()
    try:
        transport.start_client(timeout=2 * timeout)
        transport.get_remote_server_key()
    except (paramiko.SSHException, EOFError, OSError) as error:
        transport.close()
        via = " (through the jump host)" if jumped else ""
        if time.monotonic() - begin >= timeout:
            reason = f"sent no SSH greeting within {timeout:g} s"
        else:
            reason = f"SSH failed: {one_line(str(error)) or 'it was closed at once'}"
        raise Unreachable(
            f"{hop.hostname} port {hop.port}{via} accepted the connection, but {reason}",
            hint="Check that the port is sshd's, and that no firewall stands between.",
        ) from error
    return transport


def _prefer_fast_ciphers(transport: paramiko.Transport) -> None:
    """Put AES-GCM first: one pass in C for secrecy and integrity, and none in Python."""
    options = transport.get_security_options()
    options.ciphers = tuple(sorted(options.ciphers, key=lambda name: "-gcm" not in name))


class _Login:
    """The authentication of one hop: each method that the server takes and we can serve."""

    def __init__(
        self, hop: Hop, transport: paramiko.Transport, prompt: Prompt | None, timeout: float
    ) -> None:
        self._hop, self._transport, self._prompt = hop, transport, prompt
        self._transport.auth_timeout = timeout if prompt is None else _ANSWER_TIMEOUT
        self._tried: list[str] = []
        self.used = "no proof"
        #: What the server takes; None before it has said so.
        self._methods: list[str] | None = None

    def run(self) -> None:
        try:
            self._keys()
            if not self._transport.is_authenticated():
                self._none()
            if not self._transport.is_authenticated() and self._prompt is not None:
                self._questions(self._prompt)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise self._denied(
                one_line(str(error)) or "the server closed the connection"
            ) from error
        if not self._transport.is_authenticated():
            raise self._denied(None)

    @property
    def _allowed(self) -> list[str]:
        return ["publickey"] if self._methods is None else self._methods

    def _none(self) -> None:
        """Ask which methods the server takes, unless it has said so: two round trips."""
        if self._methods is not None:
            return
        try:
            self._transport.auth_none(self._hop.user)
        except paramiko.BadAuthenticationType as error:
            self._methods = list(error.allowed_types)

    def _keys(self) -> None:
        for label, candidate in self._candidates():
            if "publickey" not in self._allowed or self._transport.is_authenticated():
                return
            key = self._load(candidate) if isinstance(candidate, Path) else candidate
            if key is None:
                continue
            if isinstance(candidate, Path):
                label += self._certify(key, candidate)
            self._tried.append(label)
            self.used = label
            try:
                further = self._transport.auth_publickey(self._hop.user, key)
            except paramiko.BadAuthenticationType as error:
                self._methods = list(error.allowed_types)
            except paramiko.AuthenticationException as error:
                if not self._transport.is_active():
                    raise paramiko.SSHException(str(error)) from error
            else:
                # An empty list is success; else the server wants one more method.
                if further:
                    self._methods = list(further)
                    return

    def _candidates(self) -> Iterator[tuple[str, PKey | Path]]:
        for path in self._hop.identities:
            yield str(path), path
        if self._hop.agent:
            for key in paramiko.Agent().get_keys():
                yield f"agent {fingerprint(key)}", key
        for path in self._hop.default_keys:
            if path.is_file():
                yield str(path), path

    def _load(self, path: Path) -> PKey | None:
        passphrase: bytes | None = None
        for _ in range(_MAX_PASSPHRASES + 1):
            try:
                # The annotation says str, but the key library behind it takes bytes only.
                return paramiko.PKey.from_path(path, cast(str, passphrase))
            except (paramiko.PasswordRequiredException, TypeError):
                reason = "has a passphrase, and there is no terminal to ask for it"
            except ValueError as error:
                # The key libraries report a wrong passphrase in this way too.
                reason = f"cannot be read: {one_line(str(error))}"
                if passphrase is None:
                    break
            except (OSError, paramiko.SSHException, paramiko.pkey.UnknownKeyType) as error:
                reason = f"cannot be read: {one_line(str(error)) or type(error).__name__}"
                break
            if self._prompt is None or not self._takes_keys():
                break
            passphrase = self._prompt(f"Passphrase for {path}: ", False).encode()
        self._tried.append(f"{path} ({reason})")
        return None

    def _takes_keys(self) -> bool:
        """Ask before a person is bothered for a key that would be of no use."""
        self._none()
        return "publickey" in self._allowed and not self._transport.is_authenticated()

    def _certify(self, key: PKey, path: Path) -> str:
        """Add the certificate that belongs to a key; return how to call it."""
        beside = path.with_name(f"{path.name}-cert.pub")
        for certificate in (*self._hop.certificates, beside):
            if not certificate.is_file():
                continue
            try:
                key.load_certificate(str(certificate))
            except (OSError, ValueError, paramiko.SSHException) as error:
                _log.info("%s does not belong to %s: %s", certificate, path, error)
            else:
                return f" with {certificate}"
        return ""

    def _questions(self, prompt: Prompt) -> None:
        """Keyboard-interactive with as many prompts as the server sends, else a password."""
        if "keyboard-interactive" in self._allowed:
            self._tried.append("keyboard-interactive")
            self.used = "answers"

            def answer(title: str, text: str, fields: list[tuple[str, bool]]) -> list[str]:
                head = "".join(f"{printable(part)}\n" for part in (title, text) if part.strip())
                answers = []
                for question, echo in fields:
                    answers.append(prompt(head + printable(question), echo))
                    head = ""
                return answers

            try:
                self._transport.auth_interactive(self._hop.user, answer)
            except paramiko.AuthenticationException:
                if "password" not in self._allowed:
                    return
        if not self._transport.is_authenticated() and "password" in self._allowed:
            self._tried.append("password")
            self.used = "a password"
            secret = prompt(f"Password for {self._hop}: ", False)
            try:
                self._transport.auth_password(self._hop.user, secret, fallback=False)
            except paramiko.AuthenticationException:
                return

    def _denied(self, words: str | None) -> AccessDenied:
        methods = ",".join(self._allowed)
        tried = "; ".join(self._tried) or "no key was found"
        reason = f" ({words})" if words else ""
        return AccessDenied(
            f"permission denied ({methods}) for {self._hop}{reason}; tried: {tried}",
            hint="Check run.env.user and run.env.identity, and the public key on the cluster.",
        )
