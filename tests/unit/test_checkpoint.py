"""Which checkpoint a path means, looked at by the real script in real directories."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml

from slurmeval.checkpoint import (
    Folder,
    Listing,
    applied,
    choose,
    locate,
    to_be_located,
    translate,
)
from slurmeval.cluster.host import Completed
from slurmeval.cluster.local import LocalHost
from slurmeval.config.schema import Config, ModelArtifact
from slurmeval.errors import ClusterError, ConfigError

HF_TOKENIZER = {"tokenizer": {"tokenizer_type": "HuggingFaceTokenizer"}}


class Host(LocalHost):
    """This machine; counts round trips."""

    def __init__(self):
        self.trips = 0

    def run(self, command, *, timeout, input=b""):
        self.trips += 1
        return super().run(command, timeout=timeout, input=input)


@pytest.fixture
def host():
    return Host()


def iteration(folder: Path, number: int, *, config=None, tokenizer=("tokenizer.json",)) -> Path:
    path = folder / f"iter_{number:07d}"
    (path / "tokenizer").mkdir(parents=True)
    for name in ("metadata.json", "common.pt", "__0_0.distcp"):
        (path / name).touch()
    (path / "run_config.yaml").write_text(yaml.safe_dump(config or HF_TOKENIZER))
    for name in tokenizer:
        (path / "tokenizer" / name).touch()
    return path


def hf_model(path: Path, weights="model.safetensors") -> Path:
    path.mkdir(parents=True)
    for name in ("config.json", weights, "tokenizer_config.json"):
        (path / name).touch()
    return path


def track(folder: Path, text: str) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text(text)


# What is there


def test_an_iteration_is_itself(host, tmp_path):
    path = iteration(tmp_path / "with space", 300)
    found = locate(host, str(path))
    assert (found.path, found.kind, found.iteration) == (str(path), "megatron", 300)
    assert found.tokenizer == f"{path}/tokenizer" and found.notes == ()
    assert host.trips == 1


@pytest.mark.parametrize("text", ["200", "200\n", " 0000200 \n"])
def test_of_a_parent_the_tracker_decides(host, tmp_path, text):
    for number in (100, 200, 300):
        iteration(tmp_path, number)
    track(tmp_path, text)
    found = locate(host, f"{tmp_path}/")
    assert found.path == f"{tmp_path}/iter_0000200" and found.iteration == 200
    assert "iter_0000200, the latest according to latest_checkpointed" in found.notes[0]
    assert host.trips == 1


def test_a_release(host, tmp_path):
    iteration(tmp_path, 1).rename(tmp_path / "release")
    track(tmp_path, "release\n")
    found = locate(host, str(tmp_path))
    assert found.path == f"{tmp_path}/release" and found.iteration is None


def test_without_a_tracker_the_highest_complete_iteration_counts(host, tmp_path):
    for number in (9, 100, 200):
        iteration(tmp_path, number)
    (tmp_path / "iter_0000300").mkdir()
    found = locate(host, str(tmp_path))
    assert found.iteration == 200 and "its highest iteration" in found.notes[0]


@pytest.mark.parametrize("weights", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_huggingface_model(host, tmp_path, weights):
    path = hf_model(tmp_path / "m", weights)
    found = locate(host, str(path))
    assert (found.path, found.kind, found.tokenizer) == (str(path), "hf", str(path))


def test_the_export_beside_an_iteration_serves_the_hf_backend(host, tmp_path):
    path = iteration(tmp_path, 100)
    hf_model(path / "hf")
    track(tmp_path, "100")
    for given in (path, tmp_path):
        found = locate(host, str(given), backend="hf")
        assert (found.path, found.kind, found.iteration) == (f"{path}/hf", "hf", 100)
        assert found.tokenizer == f"{path}/hf"
    assert locate(host, str(tmp_path), backend="megatron").path == str(path)


def test_the_home_of_the_remote_user(host, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = iteration(tmp_path / "ckpt", 5)
    assert locate(host, "~/ckpt").path == str(path)


# What is wrong


def refused(host, path, **options):
    with pytest.raises(ConfigError) as caught:
        locate(host, str(path), **options)
    assert caught.value.exit_code == 2
    return caught.value.format_message()


@pytest.mark.parametrize("base", ["{}", "~"])
def test_a_missing_checkpoint_names_what_is_there(host, tmp_path, monkeypatch, base):
    monkeypatch.setenv("HOME", str(tmp_path))
    iteration(tmp_path / "sft", 1000)
    message = refused(host, f"{base.format(tmp_path)}/sft/iter_0010000/x")
    assert f"{tmp_path}/sft/iter_0010000/x on this machine does not exist" in message
    assert f"{tmp_path}/sft is there, and holds no iter_0010000" in message
    assert "did you mean iter_0001000?" in message


def test_a_file_is_no_checkpoint(host, tmp_path):
    (tmp_path / "model.nemo").touch()
    assert "is a file" in refused(host, tmp_path / "model.nemo")


def test_an_empty_directory_and_one_of_other_things(host, tmp_path):
    assert "it is empty" in refused(host, tmp_path)
    (tmp_path / "notes.txt").touch()
    assert "holds no checkpoint: notes.txt" in refused(host, tmp_path)


def test_a_tracker_that_names_what_is_gone(host, tmp_path):
    iteration(tmp_path, 100)
    track(tmp_path, "200")
    message = refused(host, tmp_path)
    assert "names iter_0000200, which is not there" in message and "iter_0000100" in message


def test_an_iteration_that_was_cut_short(host, tmp_path):
    iteration(tmp_path, 100)
    (iteration(tmp_path, 200) / "run_config.yaml").unlink()
    track(tmp_path, "200")
    message = refused(host, tmp_path)
    assert "names iter_0000200, which holds no run_config.yaml" in message
    assert "there is: iter_0000100;" in message


def test_checkpoints_of_other_kinds_are_named(host, tmp_path):
    path = iteration(tmp_path, 100)
    (path / "run_config.yaml").unlink()
    for given in (path, tmp_path):
        assert "distributed checkpoint without run_config.yaml" in refused(host, given)
    nemo = tmp_path / "nemo"
    (nemo / "context").mkdir(parents=True)
    (nemo / "weights").mkdir()
    assert "NeMo 2 checkpoint" in refused(host, nemo)


def test_the_other_backend_is_named(host, tmp_path):
    model, path = hf_model(tmp_path / "m"), iteration(tmp_path, 1)
    assert "deploy.backend=hf" in refused(host, model, backend="megatron")
    assert "deploy.backend=megatron" in refused(host, path, backend="hf")


class Asked(LocalHost):
    """A machine that answers this."""

    def __init__(self, completed):
        self.completed = completed

    def run(self, command, *, timeout, input=b""):
        return self.completed


@pytest.mark.parametrize(
    "answer",
    [
        Completed(1, "", "sh: fork: Resource temporarily unavailable"),
        Completed(0, "path /secret/x\ndenied\nthere /secret\n", ""),
    ],
)
def test_who_may_not_look_does_not_say_missing(answer):
    with pytest.raises(ClusterError) as caught:
        locate(Asked(answer), "/secret/x")
    assert caught.value.exit_code == 3 and "does not exist" not in caught.value.message


@pytest.fixture
def public():
    """A directory that every user may enter, unlike those that pytest makes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can play another user")
def test_a_directory_of_someone_else_is_unknown_not_missing(public):
    closed = public / "closed"
    iteration(closed, 1)
    closed.chmod(0o700)

    class Other(LocalHost):
        def run(self, command, *, timeout, input=b""):
            words = ["setpriv", "--reuid=65534", "--clear-groups", "sh", "-c", command]
            return super().run(words, timeout=timeout, input=input)

    with pytest.raises(ClusterError, match="may not be entered"):
        locate(Other(), f"{closed}/iter_0000001")
    with pytest.raises(ClusterError, match="may not be entered"):
        locate(Other(), str(closed))


# The tokenizer


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "org/name"}, "org/name"),
        (
            {
                "tokenizer_type": "HuggingFaceTokenizer",
                "tokenizer_model": {"_target_": "pathlib.PosixPath", "_args_": ["/", "tok", "a"]},
            },
            "/tok/a",
        ),
        ({"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "/t/x.model"}, None),
        ({"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "."}, None),
        (None, None),
    ],
)
def test_without_tokenizer_files_run_config_may_name_one(host, tmp_path, config, expected):
    iteration(tmp_path, 1, config={"tokenizer": config}, tokenizer=())
    track(tmp_path, "1")
    found = locate(host, str(tmp_path))
    assert found.tokenizer == expected
    assert "tokenizer" in found.notes[-1]


def test_a_sentencepiece_file_alone_is_said_not_to_do(host, tmp_path):
    path = iteration(tmp_path, 1, tokenizer=("tokenizer.model",))
    found = locate(host, str(path))
    assert found.tokenizer is None and "none that HuggingFace can read" in found.notes[0]


def test_a_run_config_that_is_no_yaml_names_none():
    names = {"run_config.yaml"}
    folder = Folder(names=names, config="tokenizer: [")
    assert choose(Listing("/x", folders={".": folder})).tokenizer is None


# Paths of the container


@pytest.mark.parametrize(
    ("path", "outside"),
    [
        ("/ckpt/sft", "/lustre/me/ckpt/sft"),
        ("/ckpt/rl/x", "/other/x"),
        ("/ckptx", "/ckptx"),
        ("/data/y", "/data/y"),
        ("/ckpt", "/lustre/me/ckpt"),
    ],
)
def test_mounts_translate_the_longest_first(path, outside):
    mounts = ["/lustre/me/ckpt:/ckpt", "/other:/ckpt/rl:ro", "/data"]
    assert translate(path, mounts, inwards=False) == outside
    assert translate(outside, mounts, inwards=True) == path


def test_a_checkpoint_is_looked_for_outside_and_named_as_inside(host, tmp_path):
    iteration(tmp_path / "sft", 7)
    track(tmp_path / "sft", "7")
    found = locate(host, "/ckpt/sft", mounts=[f"{tmp_path}:/ckpt:ro"])
    assert found.path == "/ckpt/sft/iter_0000007"
    assert found.tokenizer == "/ckpt/sft/iter_0000007/tokenizer"


# In a configuration


def test_what_was_found_goes_into_the_configuration(host, tmp_path):
    path = iteration(tmp_path, 7)
    config = Config.model_validate({"model": {"checkpoint_path": str(tmp_path)}})
    found = locate(host, str(tmp_path))
    assert applied(config, found).model.checkpoint_path == str(path)
    assert applied(config, found).model.tokenizer == f"{path}/tokenizer"
    config.model.tokenizer = "mine"
    assert applied(config, found).model.tokenizer == "mine"


@pytest.mark.parametrize(
    ("path", "answer"),
    [("/x", "/x"), ("~/x", "~/x"), ("org/name", None), (None, None), ("/stored", None)],
)
def test_what_can_be_looked_at_before_the_job(path, answer):
    config = Config.model_validate({"model": {"checkpoint_path": path}})
    config.run.artifact = ModelArtifact(
        name="a",
        version="v1",
        requested="a",
        source="W&B",
        path="/stored",
        download="t/p/a:v1",
    )
    assert to_be_located(config) == answer
