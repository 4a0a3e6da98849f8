from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slurmeval.cluster.access import Access
from slurmeval.cluster.ssh_config import hops
from slurmeval.errors import ConfigError


def env(**keys: object) -> Access:
    return Access(**{"tunnel": "ssh", "host": "cluster", **keys})


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config"
    path.write_text(text)
    return path


def test_without_a_configuration_the_profile_is_all(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch()
    (hop,) = hops(env(user="me", port=2222, identity=str(key)))
    assert (hop.hostname, hop.port, hop.user) == ("cluster", 2222, "me")
    assert hop.identities == (key,)
    assert hop.host_key_name == "[cluster]:2222"
    assert hop.known_hosts[0] == Path.home() / ".ssh" / "known_hosts"


def test_the_configuration_fills_what_the_profile_leaves_open(tmp_path: Path) -> None:
    config = write(
        tmp_path,
        "Host cluster\n HostName login.example.org\n User them\n Port 2200\n"
        " IdentityFile ~/.ssh/special\n IdentitiesOnly yes\n UserKnownHostsFile ~/known\n",
    )
    (hop,) = hops(env(), config=config)
    assert (hop.hostname, hop.port, hop.user) == ("login.example.org", 2200, "them")
    assert hop.identities == (Path.home() / ".ssh" / "special",)
    assert (hop.agent, hop.default_keys) == (False, ())
    assert hop.known_hosts[0] == Path.home() / "known"
    (hop,) = hops(env(user="me", port=2222), config=config)
    assert (hop.port, hop.user) == (2222, "me")


def test_a_chain_of_jumps(tmp_path: Path) -> None:
    config = write(
        tmp_path,
        "Host cluster\n ProxyJump first,you@second:2022\n"
        "Host first\n User one\n ProxyJump zero\nHost second\n Port 99\n",
    )
    chain = hops(env(user="me"), config=config)
    assert [(hop.alias, hop.port) for hop in chain] == [
        ("zero", 22),
        ("first", 22),
        ("second", 2022),
        ("cluster", 22),
    ]
    assert [hop.user for hop in chain[1:]] == ["one", "you", "me"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Host cluster\n ProxyJump a\nHost a\n ProxyJump cluster\n", "in a circle"),
        ("Host cluster\n ProxyJump a:b:c\n", "cannot read ProxyJump 'a:b:c'"),
        ("Host cluster\n Port many\n", "Port of cluster is not a number: many"),
        ("Nonsense\n", "cannot read"),
    ],
)
def test_faults_of_the_configuration(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hops(env(), config=write(tmp_path, text))


def test_proxy_jump_none_means_none(tmp_path: Path) -> None:
    config = write(tmp_path, "Host cluster\n ProxyJump none\n ProxyCommand none\nHost *\n")
    (hop,) = hops(env(), config=config)
    assert hop.proxy_command is None


def test_included_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "home" / ".ssh" / "conf.d").mkdir()
    (tmp_path / "home" / ".ssh" / "conf.d" / "a").write_text("Host cluster\n User included\n")
    (hop,) = hops(env(), config=write(tmp_path, "Include conf.d/*\nHost *\n User other\n"))
    assert hop.user == "included"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ControlPath ~/.ssh/%C", "controlpath"),
        ("GSSAPIAuthentication yes", "gssapiauthentication yes has no effect"),
        ("IdentityAgent ~/agent.sock", "identityagent"),
        ("PKCS11Provider /lib/p11.so", "pkcs11provider"),
        ("StrictHostKeyChecking accept-new", "run.env.host_key_policy decides"),
        ("Ciphers aes256-ctr", "ciphers"),
    ],
)
def test_what_has_no_effect_is_said(tmp_path: Path, line: str, said: str) -> None:
    (hop,) = hops(env(), config=write(tmp_path, f"Host cluster\n {line}\nHost other\n Macs x\n"))
    assert len(hop.notes) == 1
    assert said in hop.notes[0]


@pytest.mark.parametrize("line", ["GSSAPIAuthentication no", "ControlMaster no", "ForwardX11 yes"])
def test_what_makes_no_difference_is_not(tmp_path: Path, line: str) -> None:
    (hop,) = hops(env(), config=write(tmp_path, f"Host cluster\n {line}\n"))
    assert hop.notes == ()


@pytest.mark.parametrize("criteria", ["tagged home", "host cluster localnetwork 10.0.0.0/8",
                                      "!sessiontype exec", "version OpenSSH_9*"])  # fmt: skip
def test_a_match_that_cannot_be_judged_applies_to_nobody(tmp_path: Path, criteria: str) -> None:
    text = f"Match {criteria}\n User wrong\nMatch host cluster user right\n Port 2200\n"
    (hop,) = hops(env(), config=write(tmp_path, f"Host *\n User right\n{text}"))
    assert (hop.user, hop.port) == ("right", 2200)
    assert len(hop.notes) == 1
    assert f"`Match {criteria}` is left out" in hop.notes[0]


def test_a_match_that_can_be_judged_applies(tmp_path: Path) -> None:
    text = "Match originalhost cluster\n User one\nMatch !host cluster\n User two\n"
    (hop,) = hops(env(), config=write(tmp_path, f"{text}Match all\n Port 9\n"))
    assert (hop.user, hop.port, hop.notes) == ("one", 9, ())


def test_certificates_are_read(tmp_path: Path) -> None:
    (hop,) = hops(env(), config=write(tmp_path, "Host cluster\n CertificateFile ~/c.pub\n"))
    assert hop.certificates == (Path.home() / "c.pub",)


def test_a_command_decides_and_is_the_only_reason_to_load_what_runs_it(tmp_path: Path) -> None:
    pytest.importorskip("invoke")
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from slurmeval.cluster.ssh_config import hops\n"
        "from slurmeval.cluster.access import Access\n"
        "env = Access(tunnel='ssh', host='cluster')\n"
        "for name in sys.argv[1:]:\n"
        "    print(hops(env, config=Path(name))[0].user, 'invoke' in sys.modules)\n"
    )
    plain = write(tmp_path, "Host cluster\n User plain\n")
    asking = tmp_path / "asking"
    asking.write_text('Match exec "false"\n User no\nMatch exec "test %h = cluster"\n User yes\n')
    done = subprocess.run(
        [sys.executable, "-c", script, plain, asking], capture_output=True, text=True, check=True
    )
    assert done.stdout == "plain False\nyes True\n"
