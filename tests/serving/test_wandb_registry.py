"""The real W&B client against a server that answers as W&B does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("wandb", reason="the W&B client is not installed")
pytest.importorskip("graphql", reason="graphql-core is not installed")

from wandb_standin import StandIn, Version

from slurmeval import fetch_model
from slurmeval.config.load import load
from slurmeval.errors import ConfigError
from slurmeval.registry.artifact import NotInRegistry, RegistryUnreachable
from slurmeval.registry.weights_and_biases import WandbRegistry

pytestmark = pytest.mark.serving

FILES = {
    "run_config.yaml": b"model: {}\n",
    "tokenizer/tokenizer.json": b"{}",
    "a b.distcp": b"\0" * 9,
}


def references(root: str) -> dict[str, str]:
    return {name: f"file://{root}/{name}" for name in ("common.pt", "deep/__0_0.distcp")}


ARTIFACTS = {
    "sft": [
        Version(references=references("/lustre/sft/iter_0000100")),
        Version(
            references=references("/nemo_run/sft/iter_0000200"),
            metadata={"absolute_path": "/lustre/sft", "iteration": 200},
            aliases=("best",),
        ),
        Version(
            references=references("/nemo_run/sft/iter_0000300"),
            metadata={"absolute_path": "/lustre/sft"},
        ),
    ],
    "stored": [Version(files={"old": b"1"}), Version(files=FILES, metadata={"iteration": 7})],
}


@pytest.fixture(scope="module")
def server():
    with StandIn(ARTIFACTS) as standin:
        yield standin


@pytest.fixture(autouse=True)
def client(server, tmp_path, monkeypatch):
    """A user who has nothing but the key."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", server.key)
    monkeypatch.setenv("HOME", str(tmp_path))
    server.asked.clear()
    server.spoil.clear()


@pytest.mark.parametrize(
    ("version", "concrete", "path"),
    [
        ("v0", "v0", "/lustre/sft/iter_0000100"),
        ("best", "v1", "/lustre/sft/iter_0000200"),
        ("latest", "v2", "/lustre/sft/iter_0000300"),
    ],
)
def test_a_reference_artifact_is_its_path_on_the_cluster(version, concrete, path):
    artifact = WandbRegistry("team", "evals").resolve("sft", version)
    assert (artifact.name, artifact.version, artifact.path) == ("sft", concrete, path)
    assert artifact.download is None and artifact.source == "W&B team/evals"


def test_a_stored_artifact_is_downloaded_by_the_job(server):
    artifact = WandbRegistry("team", "evals").resolve("stored", "latest")
    assert artifact.path is None and artifact.download == "team/evals/stored:v1"
    assert artifact.base_url == server.url and artifact.size == sum(map(len, FILES.values()))
    assert artifact.metadata == {"iteration": 7}


def test_the_entity_may_be_the_keys_own():
    assert WandbRegistry(None, "evals").resolve("sft", "v0").source == "W&B team/evals"


@pytest.mark.parametrize(
    ("entity", "project", "name", "version"),
    [
        ("team", "evals", "sft", "v9"),
        ("team", "evals", "nosuch", "latest"),
        ("team", "nosuch", "sft", "v0"),
        ("nosuch", "evals", "sft", "v0"),
    ],
)
def test_what_is_not_there_is_said_with_its_whole_name(entity, project, name, version):
    with pytest.raises(NotInRegistry) as caught:
        WandbRegistry(entity, project).resolve(name, version)
    assert f"W&B {entity}/{project} has no artifact {name}:{version}" in caught.value.message


def test_a_wrong_key_is_a_matter_of_the_user(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    with pytest.raises(ConfigError, match="accepts no key") as caught:
        WandbRegistry("team", "evals").resolve("sft", "v0")
    assert "WANDB_API_KEY" in caught.value.hint and "x" * 40 not in caught.value.format_message()


def test_no_answer_is_not_no_artifact(monkeypatch, server):
    monkeypatch.setattr(server, "execute", lambda request: {"errors": [{"message": "overloaded"}]})
    with pytest.raises(RegistryUnreachable, match="overloaded") as caught:
        WandbRegistry("team", "evals").resolve("sft", "v0")
    assert caught.value.exit_code == 3


# In a configuration


def resolved(folder: Path, model: str, *overrides: str):
    (folder / "env.toml").write_text('[wandb]\nentity = "team"\nproject = "evals"\n')
    return load((), profile=None, overrides=(f"run.model={model}", *overrides), cwd=folder)


def test_latest_is_pinned(tmp_path):
    loaded = resolved(tmp_path, "sft")
    assert loaded.config.run.model == "sft:v2"
    assert loaded.config.model.checkpoint_path == "/lustre/sft/iter_0000300"
    assert loaded.config.run.artifact.requested == "sft:latest"


def test_a_reference_may_name_its_project(tmp_path):
    override = "run.wandb.project=another"
    loaded = resolved(tmp_path, "team/evals/sft:v0", override)
    assert loaded.config.run.model == "team/evals/sft:v0"


def test_a_file_registry_has_precedence_and_w_and_b_the_rest(tmp_path, server):
    (tmp_path / "artifacts.yaml").write_text("sft: {v0: /mine}")
    assert resolved(tmp_path, "sft:v0").config.model.checkpoint_path == "/mine"
    assert server.asked == []
    wandb = resolved(tmp_path, "sft:v0", "run.registry=wandb")
    assert wandb.config.model.checkpoint_path == "/lustre/sft/iter_0000100"
    assert resolved(tmp_path, "stored:v1", "run.env.remote_job_dir=/r").config.run.artifact.download


def test_a_stored_artifact_has_its_place_below_remote_job_dir(tmp_path):
    config = resolved(tmp_path, "stored", "run.env.remote_job_dir=/lustre/me").config
    assert config.model.checkpoint_path.startswith("/lustre/me/cache/models/stored-v1-")
    assert config.run.artifact.path == config.model.checkpoint_path
    old = resolved(tmp_path, "stored:v0", "run.env.remote_job_dir=/lustre/me").config
    assert old.model.checkpoint_path != config.model.checkpoint_path


@pytest.mark.parametrize("base", ["null", "relative/dir"])
def test_a_stored_artifact_needs_a_place(tmp_path, base):
    with pytest.raises(ConfigError, match=r"run\.env\.remote_job_dir"):
        resolved(tmp_path, "stored", f"run.env.remote_job_dir={base}")


def test_the_key_is_in_no_value(tmp_path, server):
    loaded = resolved(tmp_path, "stored", "run.env.remote_job_dir=/r")
    assert server.key not in repr((loaded.values, loaded.notes, loaded.origins))


# The job's download


def fetch(target: Path, artifact: str = "team/evals/stored:v1") -> subprocess.CompletedProcess[str]:
    script = Path(fetch_model.__file__)
    command = [sys.executable, str(script), "--artifact", artifact, "--target", str(target)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_model_is_downloaded_whole_and_once(tmp_path, server):
    target = tmp_path / "cache/models/stored-v1"
    first = fetch(target)
    assert first.returncode == 0, first.stdout + first.stderr
    assert files_below(target) == FILES
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == ["stored-v1"]
    server.asked.clear()
    again = fetch(target)
    assert again.returncode == 0 and "is there already" in again.stdout
    assert server.asked == []


def test_two_jobs_share_one_download(tmp_path, server):
    target = tmp_path / "stored-v1"
    ended: list[subprocess.CompletedProcess[str]] = []
    threads = [threading.Thread(target=lambda: ended.append(fetch(target))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [job.returncode for job in ended] == [0, 0], ended
    assert files_below(target) == FILES
    assert sum("run_config.yaml" in path for path in server.asked) == 1


def test_a_spoilt_download_leaves_nothing(tmp_path, server):
    server.spoil.add("tokenizer/tokenizer.json")
    target = tmp_path / "stored-v1"
    result = fetch(target)
    assert result.returncode == 1 and "ERROR" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    assert not target.exists()
    assert not list(tmp_path.glob(".stored-v1.part-*"))


def test_what_a_killed_job_left_is_removed(tmp_path):
    stale = tmp_path / ".stored-v1.part-dead"
    stale.mkdir()
    (stale / "half").write_text("x")
    assert fetch(tmp_path / "stored-v1").returncode == 0
    assert not stale.exists()


def test_an_unknown_artifact_fails_with_its_name(tmp_path):
    result = fetch(tmp_path / "x", "team/evals/stored:v8")
    assert result.returncode == 1 and "team/evals/stored:v8" in result.stdout
    assert not (tmp_path / "x").exists()
