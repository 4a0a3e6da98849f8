"""A real SSH server on loopback that runs commands as this user, and can be told to misbehave."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import paramiko

from slurmeval.cluster.ssh import SshHost

#: Makes a host of the server; keyword arguments replace keys of the profile.
Connect = Callable[..., SshHost]


@dataclass
class SshServer:
    """The server and what it accepts.

    Attributes:
        accepted: Public keys that may log in.
        codes: Question -> answer of keyboard-interactive, asked one after the other.
        both: Whether a key alone is not enough.
        noise: What the login shell prints before every command.
        cut_after: Bytes of output after which every connection is cut once.
    """

    host_key: paramiko.PKey
    accepted: list[paramiko.PKey] = field(default_factory=list)
    codes: dict[str, str] = field(default_factory=dict)
    both: bool = False
    noise: bytes = b""
    cut_after: int | None = None
    connections: int = 0
    users: list[str] = field(default_factory=list)
    port: int = 0
    transports: list[paramiko.Transport] = field(default_factory=list)

    def known_hosts(self, path: Path) -> Path:
        """Writes a file that knows this server."""
        key = self.host_key
        path.write_text(f"[127.0.0.1]:{self.port} {key.get_name()} {key.get_base64()}\n")
        return path

    @contextlib.contextmanager
    def running(self) -> Iterator[SshServer]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
            try:
                yield self
            finally:
                # close() alone leaves a thread in accept() with the port open.
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)
                for transport in self.transports:
                    transport.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            transport = paramiko.Transport(client)
            transport.add_server_key(self.host_key)
            self.transports.append(transport)
            with contextlib.suppress(paramiko.SSHException, EOFError, OSError):
                transport.start_server(event=threading.Event(), server=_Session(self, transport))


class _Session(paramiko.ServerInterface):
    def __init__(self, server: SshServer, transport: paramiko.Transport) -> None:
        self._server, self._transport = server, transport
        self._key_done = False
        self._questions: list[str] = []

    def get_allowed_auths(self, username: str) -> str:
        if self._server.both:
            return "keyboard-interactive" if self._key_done else "publickey"
        return "publickey,keyboard-interactive" if self._server.codes else "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        if key not in self._server.accepted:
            return paramiko.AUTH_FAILED
        self._server.users.append(username)
        self._key_done = True
        return paramiko.AUTH_PARTIALLY_SUCCESSFUL if self._server.both else paramiko.AUTH_SUCCESSFUL

    def check_auth_interactive(
        self, username: str, submethods: str
    ) -> int | paramiko.server.InteractiveQuery:
        self._questions = list(self._server.codes)
        return self._ask()

    def _ask(self) -> paramiko.server.InteractiveQuery:
        return paramiko.server.InteractiveQuery("Site", "Codes please", (self._questions[0], False))

    def check_auth_interactive_response(
        self, responses: Sequence[str]
    ) -> int | paramiko.server.InteractiveQuery:
        if list(responses) != [self._server.codes[self._questions.pop(0)]]:
            return paramiko.AUTH_FAILED
        return self._ask() if self._questions else paramiko.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self._run, args=(channel, command), daemon=True).start()
        return True

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        threading.Thread(target=self._forward, args=(chanid, destination), daemon=True).start()
        return paramiko.OPEN_SUCCEEDED

    def _forward(self, chanid: int, destination: tuple[str, int]) -> None:
        channel = self._transport.accept(10)
        assert channel is not None
        upstream = socket.create_connection(destination)

        def pump(read: object, write: object) -> None:
            with contextlib.suppress(OSError, EOFError):
                while data := read(65536):  # type: ignore[operator]
                    write(data)  # type: ignore[operator]
            upstream.close()
            channel.close()

        threading.Thread(target=pump, args=(channel.recv, upstream.sendall), daemon=True).start()
        pump(upstream.recv, channel.sendall)

    def _run(self, channel: paramiko.Channel, command: bytes) -> None:
        child = subprocess.Popen(
            ["/bin/sh", "-c", command.decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert child.stdin and child.stdout and child.stderr

        def feed() -> None:
            assert child.stdin
            with contextlib.suppress(OSError, EOFError):
                while data := channel.recv(65536):
                    child.stdin.write(data)
                    child.stdin.flush()
                child.stdin.close()

        def errors() -> None:
            assert child.stderr
            with contextlib.suppress(OSError, EOFError):
                while data := child.stderr.read1():  # type: ignore[attr-defined]
                    channel.sendall_stderr(data)

        workers = [threading.Thread(target=work, daemon=True) for work in (feed, errors)]
        for worker in workers:
            worker.start()
        with contextlib.suppress(OSError, EOFError):
            if self._server.noise:
                channel.sendall(self._server.noise)
            sent = 0
            while data := child.stdout.read1():  # type: ignore[attr-defined]
                limit = self._server.cut_after
                if limit is not None and sent + len(data) > limit:
                    channel.sendall(data[: limit - sent])
                    self._server.cut_after = None
                    self._transport.close()
                    child.kill()
                    child.wait()
                    return
                channel.sendall(data)
                sent += len(data)
            workers[1].join()
            channel.send_exit_status(child.wait())
            channel.close()
