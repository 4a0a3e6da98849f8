"""deploy.py with real Ray Serve and Export-Deploy's real HuggingFace deployable, on CPUs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import Deployment, LocalRay, free_port

from slurmeval.deploy import whole_prompt_logprobs

pytest.importorskip("ray")
pytestmark = pytest.mark.serving
Start = Callable[..., Deployment]


@pytest.fixture(scope="module")
def ray() -> Iterator[LocalRay]:
    folder = Path(tempfile.mkdtemp(prefix="hf-", dir="/tmp"))
    cluster = LocalRay(folder, cpus=4)
    yield cluster
    cluster.stop()
    shutil.rmtree(folder)


@pytest.fixture
def start(ray: LocalRay, tmp_path: Path, demo_dir: Path) -> Iterator[Start]:
    started: list[Deployment] = []

    def start(*flags: str, checkpoint: Path = demo_dir / "model") -> Deployment:
        flags = ("--backend=hf", "--num_gpus=0", *flags)
        started.append(Deployment(ray, tmp_path / str(len(started)), checkpoint, *flags))
        return started[-1]

    yield start
    for deployment in started:
        deployment.kill(signal.SIGTERM)


def test_one_replica(start: Start, demo_dir: Path) -> None:
    deployment = start("--model_id=demo", "--num_cpus=3")
    endpoint = deployment.endpoint()
    base = f"http://127.0.0.1:{deployment.port}/v1"
    assert endpoint["completions"] == f"{base}/completions/"
    assert endpoint["chat"] == f"{base}/chat/completions/"
    assert (endpoint["model_id"], endpoint["backend"], endpoint["replicas"]) == ("demo", "hf", 1)
    assert len(endpoint["proven"]) == 1 and endpoint["node"] == os.uname().nodename
    assert endpoint["versions"]["ray"] == importlib.metadata.version("ray")
    assert set(endpoint["seconds"]) == {"connect", "import", "deploy", "first completion"}
    assert endpoint["warnings"] == ["num_cpus=3 is not used: deploy.py starts no Ray"]

    # The demo's tokenizer adds a BOS; each prompt of n words has n places and one for the answer.
    logprobs = deployment.ask(logprobs=1, echo=True, temperature=0)["logprobs"]
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 4
    # Upstream ignores stop sequences.
    text = deployment.ask(max_tokens=8)["text"]
    _, second = text.split()[:2]
    assert deployment.ask(max_tokens=8, stop=[second])["text"] == text.partition(second)[0]
    assert endpoint["faults"] == []
    # Upstream answers this with HTTP 200 and an error for a text.
    assert deployment.status_of(max_tokens=0) == 500
    assert deployment.ask()["text"]

    assert deployment.stop() == 0
    assert "told to stop" in deployment.log
    assert "The answer is" not in deployment.log  # upstream logs every prompt
    with pytest.raises(OSError):
        deployment.ask()


def test_a_tokenizer_without_bos_loses_no_token(
    start: Start, demo_dir: Path, tmp_path: Path
) -> None:
    plain = shutil.copytree(demo_dir / "model", tmp_path / "plain")
    tokenizer = json.loads((plain / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (plain / "tokenizer.json").write_text(json.dumps(tokenizer))
    deployment = start(checkpoint=plain)
    assert deployment.endpoint()["faults"] == []
    logprobs = deployment.ask(logprobs=1, echo=True, temperature=0)["logprobs"]
    assert [value is None for value in logprobs["token_logprobs"]] == [True, False, False, False]
    assert logprobs["top_logprobs"][0] is None and len(logprobs["top_logprobs"]) == 4


@pytest.mark.parametrize("echo", [True, False])
def test_logprobs_of_a_whole_prompt_are_upstreams(
    demo_dir: Path, monkeypatch: pytest.MonkeyPatch, echo: bool
) -> None:
    import torch
    from nemo_deploy.llm import hf_deployable

    monkeypatch.setattr(hf_deployable, "HAVE_TRITON", True)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    model = hf_deployable.HuggingFaceLLMDeploy(
        hf_model_id_path=str(demo_dir / "model"), task="text-generation", device_map=None
    )
    prompt = "The answer is a question of many words. " * 40  # more than one part of 256 tokens
    asked = {"prompts": [prompt], "compute_logprob": True, "echo": echo, "top_k": 0, "top_p": 1.0}
    requests = [
        {**asked, "max_tokens": tokens, "n_top_logprobs": count}
        for tokens in (1, 4)
        for count in (0, 1, 3)
    ]
    expected = [model.ray_infer_fn(dict(request)) for request in requests]
    model._compute_logprobs = whole_prompt_logprobs(model)
    for request, wanted in zip(requests, expected, strict=True):
        got = model.ray_infer_fn(dict(request))
        assert len(got["log_probs"][0]) > 256 * echo
        assert got == wanted


def test_two_replicas_and_the_death_of_one(start: Start) -> None:
    deployment = start("--num_replicas=2")
    endpoint = deployment.endpoint()
    names = set(endpoint["proven"])
    assert len(names) == 2
    victim = int(deployment.wait_said(r"ServeReplica:slurmeval:HFRayDeployable pid=(\d+)")[1])
    os.kill(victim, signal.SIGKILL)
    gone = deployment.wait_said(r"replica (\w+) on \S+ is gone; 1 left")[1]
    assert gone in names
    deployment.wait_said("all replicas are well again")
    proven = [line.split()[3] for line in deployment.log.splitlines() if " answered in " in line]
    assert len(set(proven)) == 3 and names <= set(proven)
    assert deployment.ask()["text"]
    deployment.process.terminate()
    assert deployment.end() == 0


def test_a_signal_before_the_endpoint_is_up(start: Start) -> None:
    deployment = start()
    deployment.wait_said("Adding 1 replica")
    deployment.process.terminate()
    assert deployment.end() == 128 + signal.SIGTERM
    assert "SIGTERM before the endpoint was up" in deployment.log
    assert not deployment.endpoint_file.exists()


def test_a_checkpoint_that_does_not_load(start: Start, tmp_path: Path) -> None:
    empty = tmp_path / "no-checkpoint"
    empty.mkdir()
    deployment = start(checkpoint=empty)
    assert deployment.end(timeout=240) == 1
    assert re.search(rf"replica \w+: .*{empty}", deployment.log)
    assert "ERROR: " in deployment.log
    assert not deployment.endpoint_file.exists()


def test_what_the_cluster_cannot_hold_is_never_bound(start: Start) -> None:
    deployment = start("--num_replicas=5")
    assert deployment.end() == 3
    assert "room for 4 of 5 replicas" in deployment.log and "4 CPUs" in deployment.log
    assert "Adding" not in deployment.log


def test_nobody_at_the_address(ray: LocalRay, tmp_path: Path, demo_dir: Path) -> None:
    elsewhere = f"--address=127.0.0.1:{free_port()}"
    deployment = Deployment(ray, tmp_path, demo_dir / "model", elsewhere)
    assert deployment.end(timeout=240) == 3
    assert f"no Ray cluster at {elsewhere.split('=')[1]}" in deployment.log
