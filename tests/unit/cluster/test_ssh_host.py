"""SshHost against a real server on loopback: what works, and what each failure says."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from pathlib import Path

import paramiko
import pytest
from sshserver import Connect, SshServer

from slurmeval.cluster.known_hosts import fingerprint
from slurmeval.errors import AccessDenied, ConfigError, ConnectionFailed


def test_runs_words_and_scripts_and_gives_all_three_answers(connect: Connect) -> None:
    host = connect()
    done = host.run("cat; echo problem >&2; exit 7", timeout=20, input=b"given\xff")
    assert (done.returncode, done.stderr) == (7, "problem\n")
    assert done.stdout.encode("utf-8", "surrogateescape") == b"given\xff"
    assert host.run(["printf", "%s", "a b;$(id)`id`"], timeout=20).stdout == "a b;$(id)`id`"


def test_one_connection_serves_many_commands(connect: Connect, server: SshServer) -> None:
    host = connect()
    for _ in range(3):
        host.run("true", timeout=20)
    assert server.connections == 1


def test_what_a_login_shell_prints_is_no_part_of_the_answer(
    connect: Connect, server: SshServer
) -> None:
    server.noise = b"Welcome!\nslurmeval:\n" * 1000
    assert connect().run("echo answer", timeout=20).stdout == "answer\n"


def test_a_command_that_does_not_end_is_given_up(connect: Connect) -> None:
    with pytest.raises(ConnectionFailed, match=r"me@127\.0\.0\.1 gave no answer within 0\.5 s"):
        connect().run("sleep 60", timeout=0.5)


def test_a_lost_connection_is_an_error_and_the_next_command_connects_anew(
    connect: Connect, server: SshServer
) -> None:
    host = connect()
    server.cut_after = 1000
    with pytest.raises(ConnectionFailed, match="was lost"):
        host.run("head -c 100000 /dev/zero", timeout=20)
    assert host.run("echo back", timeout=20).stdout == "back\n"
    assert server.connections == 2


def test_wrong_key_names_user_host_port_and_what_was_tried(
    connect: Connect, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    paramiko.ECDSAKey.generate().write_private_key_file(str(wrong))
    with pytest.raises(ConnectionFailed) as caught:
        connect(identity=str(wrong)).run("true", timeout=20)
    message = caught.value.message
    assert "permission denied (publickey) for me@127.0.0.1:" in message
    assert message.endswith(f"tried: {wrong}")
    assert caught.value.exit_code == 3


def test_a_missing_key_file_is_an_error_of_the_profile(connect: Connect) -> None:
    with pytest.raises(ConfigError, match="/no/such/key, which is not a file"):
        connect(identity="/no/such/key")


def test_no_host_is_an_error_of_the_profile(connect: Connect) -> None:
    with pytest.raises(ConfigError, match=r"run\.env\.host is not set"):
        connect(host=None)


def test_a_passphrase_is_asked_for(connect: Connect, server: SshServer, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "open sesame", "-f", locked], check=True
    )
    server.accepted.append(paramiko.Ed25519Key.from_private_key_file(str(locked), "open sesame"))
    answers = iter(["wrong", "open sesame"])
    asked: list[str] = []

    def prompt(question: str, echo: bool) -> str:
        assert not echo
        asked.append(question)
        return next(answers)

    host = connect(identity=str(locked), prompt=prompt)
    assert host.run("echo in", timeout=20).stdout == "in\n"
    assert asked == [f"Passphrase for {locked}: "] * 2
    with pytest.raises(ConnectionFailed, match="has a passphrase, and there is no terminal"):
        connect(identity=str(locked)).run("true", timeout=20)


@pytest.mark.parametrize("both", [False, True])
def test_any_number_of_codes_is_asked_for(connect: Connect, server: SshServer, both: bool) -> None:
    server.codes = {"Token: ": "123", "Second: ": "456", "Third: ": "789"}
    server.both = both
    if not both:
        server.accepted.clear()
    asked: list[str] = []

    def prompt(question: str, echo: bool) -> str:
        asked.append(question.splitlines()[-1])
        return server.codes[asked[-1]]

    assert connect(prompt=prompt).run("echo in", timeout=20).stdout == "in\n"
    assert asked == list(server.codes)


def test_wrong_code_is_refused(connect: Connect, server: SshServer) -> None:
    server.codes, server.both = {"Token: ": "123"}, True
    with pytest.raises(
        ConnectionFailed, match=r"permission denied .*tried: .*keyboard-interactive"
    ):
        connect(prompt=lambda question, echo: "000").run("true", timeout=20)


def test_unknown_host_key_is_refused_with_fingerprint_and_command(
    connect: Connect, server: SshServer, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(ConnectionFailed, match="is not known") as caught:
        connect(known_hosts=empty).run("true", timeout=20)
    assert fingerprint(server.host_key) in caught.value.message
    assert caught.value.hint is not None
    assert f"ssh-keyscan -p {server.port} 127.0.0.1 >> {empty}" in caught.value.hint


def test_fingerprint_is_the_one_openssh_prints(server: SshServer, tmp_path: Path) -> None:
    public = tmp_path / "host.pub"
    public.write_text(f"{server.host_key.get_name()} {server.host_key.get_base64()}\n")
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", public], check=True, capture_output=True, text=True
    ).stdout
    assert fingerprint(server.host_key) in shown


def test_changed_host_key_is_an_error_of_its_own(
    connect: Connect, server: SshServer, tmp_path: Path
) -> None:
    other = paramiko.ECDSAKey.generate()
    changed = tmp_path / "changed"
    changed.write_text(f"[127.0.0.1]:{server.port} {other.get_name()} {other.get_base64()}\n")
    with pytest.raises(ConnectionFailed, match="HAS CHANGED") as caught:
        connect(known_hosts=changed).run("true", timeout=20)
    assert fingerprint(server.host_key) in caught.value.message
    assert caught.value.hint is not None
    assert f"ssh-keygen -R '[127.0.0.1]:{server.port}' -f {changed}" in caught.value.hint
    assert not server.users


def test_unknown_host(connect: Connect) -> None:
    with pytest.raises(ConnectionFailed, match=r"cannot find the host nowhere\.invalid"):
        connect(host="nowhere.invalid").run("true", timeout=20)


def test_refused_port(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectionFailed, match=rf"127\.0\.0\.1 port {port}: Connection refused"):
        connect(port=port).run("true", timeout=20)


def test_a_port_that_never_speaks(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        with pytest.raises(
            ConnectionFailed, match=rf"port {port} accepted .* no SSH greeting within 1 s"
        ):
            connect(port=port, timeout=1).run("true", timeout=20)


def test_a_port_that_is_not_ssh(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        other.settimeout(20)

        import threading

        def answer() -> None:
            client, _ = other.accept()
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            client.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ConnectionFailed, match=rf"port {port} accepted .* SSH failed"):
            connect(port=port).run("true", timeout=20)


def test_jump_hosts_are_passed(
    connect: Connect, server: SshServer, key: Path, tmp_path: Path
) -> None:
    accepted = paramiko.ECDSAKey.from_private_key_file(str(key))
    with SshServer(paramiko.ECDSAKey.generate(), [accepted]).running() as jump:
        known = tmp_path / "both"
        known.write_text(
            server.known_hosts(tmp_path / "a").read_text()
            + jump.known_hosts(tmp_path / "b").read_text()
        )
        config = tmp_path / "config"
        config.write_text(
            f"Host gate\n HostName 127.0.0.1\n Port {jump.port}\n User gatekeeper\n"
            f" IdentityFile {key}\nHost cluster\n HostName 127.0.0.1\n Port {server.port}\n"
            " ProxyJump gate\n"
        )
        host = connect(host="cluster", port=22, known_hosts=known, config=config)
        assert host.run("echo behind", timeout=20).stdout == "behind\n"
        assert (jump.users, server.users) == (["gatekeeper"], ["me"])

        known.write_text((tmp_path / "b").read_text())
        host = connect(host="cluster", port=22, known_hosts=known, config=config)
        with pytest.raises(ConnectionFailed, match="is not known") as caught:
            host.run("true", timeout=20)
        assert caught.value.hint is not None
        assert "ssh -p" in caught.value.hint
        assert "me@cluster" in caught.value.hint


def test_a_proxy_command_is_used(connect: Connect, server: SshServer, tmp_path: Path) -> None:
    relay = tmp_path / "relay.py"
    relay.write_text(
        "import os, socket, sys, threading\n"
        "s = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "def out():\n"
        "    while d := s.recv(65536): os.write(1, d)\n"
        "    os._exit(0)\n"
        "threading.Thread(target=out, daemon=True).start()\n"
        "while d := os.read(0, 65536): s.sendall(d)\n"
    )
    config = tmp_path / "config"
    config.write_text(f"Host cluster\n ProxyCommand python3 {relay} 127.0.0.1 {server.port}\n")
    known = tmp_path / "known"
    known.write_text(f"cluster {server.host_key.get_name()} {server.host_key.get_base64()}\n")
    host = connect(host="cluster", port=22, known_hosts=known, config=config)
    assert host.run("echo relayed", timeout=20).stdout == "relayed\n"


def test_a_new_host_is_trusted_once_on_request(
    connect: Connect, server: SshServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = tmp_path / "new" / "known_hosts"
    host = connect(known_hosts=known, host_key_policy="accept-new")
    assert host.run("echo in", timeout=20).stdout == "in\n"
    assert fingerprint(server.host_key) in caplog.text
    assert known.stat().st_mode & 0o777 == 0o600
    assert known.read_text() == server.known_hosts(tmp_path / "same").read_text()
    assert connect(known_hosts=known).run("echo strict", timeout=20).stdout == "strict\n"
    assert len(known.read_text().splitlines()) == 1


def test_a_changed_key_is_refused_in_spite_of_accept_new(
    connect: Connect, server: SshServer, tmp_path: Path
) -> None:
    other = paramiko.ECDSAKey.generate()
    changed = tmp_path / "changed"
    # Without a newline at its end, as editors leave files.
    changed.write_text(f"[127.0.0.1]:{server.port} {other.get_name()} {other.get_base64()}")
    with pytest.raises(AccessDenied, match="HAS CHANGED"):
        connect(known_hosts=changed, host_key_policy="accept-new").run("true", timeout=20)
    unrelated = tmp_path / "unrelated"
    unrelated.write_text(f"elsewhere {other.get_name()} {other.get_base64()}")
    connect(known_hosts=unrelated, host_key_policy="accept-new").run("true", timeout=20)
    assert len(unrelated.read_text().splitlines()) == 2


def test_a_revoked_key_is_refused(connect: Connect, server: SshServer, tmp_path: Path) -> None:
    known = server.known_hosts(tmp_path / "revoked")
    key = server.host_key
    known.write_text(f"{known.read_text()}@revoked * {key.get_name()} {key.get_base64()}\n")
    for policy in ("strict", "accept-new"):
        with pytest.raises(AccessDenied, match="is revoked"):
            connect(known_hosts=known, host_key_policy=policy).run("true", timeout=20)


def test_certified_hosts_need_the_ssh_command(connect: Connect, tmp_path: Path) -> None:
    authority = paramiko.ECDSAKey.generate()
    known = tmp_path / "authority"
    known.write_text(f"@cert-authority * {authority.get_name()} {authority.get_base64()}\n")
    with pytest.raises(AccessDenied, match="is not known") as caught:
        connect(known_hosts=known).run("true", timeout=20)
    assert "openssh" in str(caught.value.hint)


def test_codes_are_asked_for_at_each_hop(
    connect: Connect, server: SshServer, key: Path, tmp_path: Path
) -> None:
    accepted = paramiko.ECDSAKey.from_private_key_file(str(key))
    server.codes, server.both = {"Inner 1: ": "1", "Inner 2: ": "2"}, True
    gate = SshServer(paramiko.ECDSAKey.generate(), [accepted], {"Gate: ": "3"}, both=True)
    with gate.running() as jump:
        known = tmp_path / "both"
        known.write_text(
            server.known_hosts(tmp_path / "a").read_text()
            + jump.known_hosts(tmp_path / "b").read_text()
        )
        config = tmp_path / "config"
        config.write_text(
            f"Host gate\n HostName 127.0.0.1\n Port {jump.port}\n IdentityFile {key}\n"
            f"Host cluster\n HostName 127.0.0.1\n Port {server.port}\n ProxyJump gate\n"
        )
        asked: list[str] = []

        def prompt(question: str, visible: bool) -> str:
            asked.append(question.splitlines()[-1])
            return {**jump.codes, **server.codes}[asked[-1]]

        host = connect(host="cluster", port=22, known_hosts=known, config=config, prompt=prompt)
        assert host.run("echo in", timeout=20).stdout == "in\n"
        assert asked == ["Gate: ", "Inner 1: ", "Inner 2: "]


def test_logging_tells_commands_and_no_answers(
    connect: Connect, server: SshServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.codes, server.both = {"Token: ": "one-time-4711"}, True
    caplog.set_level("DEBUG", logger="slurmeval")
    host = connect(prompt=lambda question, visible: "one-time-4711")
    host.run("cd -- /; cat", timeout=20, input=b"hf_secret")
    ours = [record for record in caplog.records if record.name.startswith("slurmeval")]
    text = "\n".join(record.getMessage() for record in ours)
    assert "connected to me@127.0.0.1" in text
    assert "cd -- /; cat -> 0 in" in text
    assert "4711" not in text
    assert "hf_secret" not in text


def test_of_a_script_that_arrives_in_part_nothing_runs(
    connect: Connect, server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = connect()
    real = paramiko.Channel.sendall
    script = f"touch {tmp_path}/first\ntouch {tmp_path}/last"

    def cut(channel: paramiko.Channel, data: bytes) -> None:
        if script.encode() in data:
            real(channel, data[: data.index(b"/last")])
            channel.shutdown_write()
            raise OSError("cut")
        real(channel, data)

    monkeypatch.setattr(paramiko.Channel, "sendall", cut)
    host.run(script, timeout=20)
    assert not (tmp_path / "first").exists()


@pytest.mark.parametrize(
    ("names", "known"),
    [
        ("[127.0.0.1]:{port}", True),
        ("other,[127.0.0.*]:{port}", True),
        ("[127.0.0.?]:*", True),
        ("hashed", True),
        ("[127.0.0.*]:*,![127.0.0.1]:{port}", False),
        ("127.0.0.1", False),
        ("[127.0.0.12]:{port}", False),
    ],
)
def test_hosts_are_known_by_names_patterns_and_hashes(
    connect: Connect, server: SshServer, tmp_path: Path, names: str, known: bool
) -> None:
    name = names.format(port=server.port)
    if names == "hashed":
        name = paramiko.HostKeys.hash_host(f"[127.0.0.1]:{server.port}")
    file = tmp_path / "known"
    key = server.host_key
    file.write_text(
        f"# a comment\n\nhalf a line\nx ssh-unheard-of AAAA\n"
        f"{name} {key.get_name()} {key.get_base64()} me@home\n"
    )
    host = connect(known_hosts=file)
    if known:
        assert host.run("echo in", timeout=20).stdout == "in\n"
    else:
        with pytest.raises(AccessDenied, match="is not known"):
            host.run("true", timeout=20)


class Relay:
    """Forwards connections to a port; those that are there can fall silent."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.silent: set[socket.socket] = set()
        self.sockets: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                pair = (self._listener.accept()[0], socket.create_connection(self._target))
                self.sockets.update(pair)
                for ends in (pair, pair[::-1]):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source not in self.silent:
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for each in (self._listener, *self.sockets):
            each.close()


def test_a_connection_that_fell_silent_is_made_anew(
    connect: Connect, server: SshServer, tmp_path: Path
) -> None:
    with contextlib.closing(Relay(server.port)) as relay:
        known, key = tmp_path / "known", server.host_key
        known.write_text(f"[127.0.0.1]:{relay.port} {key.get_name()} {key.get_base64()}\n")
        host = connect(port=relay.port, known_hosts=known, timeout=1)
        host.run("true", timeout=20)
        relay.silent |= relay.sockets
        with pytest.raises(ConnectionFailed):
            host.run("true", timeout=20)
        assert host.run("echo back", timeout=20).stdout == "back\n"


def test_a_lost_connection_is_never_an_exit_status(
    connect: Connect, server: SshServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = paramiko.Channel._unlink  # type: ignore[attr-defined]

    def slowly(channel: paramiko.Channel) -> None:
        unlink(channel)
        time.sleep(0.2)

    monkeypatch.setattr(paramiko.Channel, "_unlink", slowly)
    server.cut_after = 1000
    with pytest.raises(ConnectionFailed, match="was lost"):
        connect().run("head -c 100000 /dev/zero", timeout=20)


def test_a_damaged_hash_in_known_hosts_says_nothing(
    connect: Connect, server: SshServer, tmp_path: Path
) -> None:
    known = server.known_hosts(tmp_path / "known")
    line = known.read_text().partition(" ")[2]
    known.write_text(f"|1|AAAA|BBBB {line}|1|abc {line}{known.read_text()}")
    assert connect(known_hosts=known).run("echo hi", timeout=20).stdout == "hi\n"


def test_a_configuration_in_another_encoding_is_read(connect: Connect, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_bytes("# Müller\nHost x\n  User me\n".encode("latin-1"))
    assert connect(config=config).run("echo hi", timeout=20).stdout == "hi\n"
