"""deploy.py with Export-Deploy's real Megatron classes on logical GPUs; the engine is a stand-in.

The release with batches is fetched: the installed one may be older.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import published
import pytest
from serving import Deployment, LocalRay

pytest.importorskip("ray")
pytestmark = pytest.mark.serving
STANDIN = Path(__file__).with_name("standin")
RELEASE = "0.7.1"
LAYOUT = ("--num_gpus=4", "--num_replicas=2", "--tensor_model_parallel_size=2")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("record")


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory, record: Path) -> Iterator[LocalRay]:
    packages = published.fetch(RELEASE, tmp_path_factory.mktemp("published"))
    folder = Path(tempfile.mkdtemp(prefix="mg-", dir="/tmp"))
    env = {"ENGINE_RECORD": str(record), "ENGINE_GPUS_OF_A_NODE": "4"}
    cluster = LocalRay(folder, cpus=8, gpus=4, PYTHONPATH=f"{STANDIN}:{packages}", **env)
    yield cluster
    cluster.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def deployment(
    ray: LocalRay, tmp_path_factory: pytest.TempPathFactory, demo_dir: Path
) -> Iterator[Deployment]:
    run = Deployment(ray, tmp_path_factory.mktemp("two"), demo_dir / "model", *LAYOUT)
    yield run
    run.kill(signal.SIGTERM)


def ranks(record: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what the ranks of each replica wrote down."""
    return {
        folder.name: [json.loads(path.read_text()) for path in sorted(folder.iterdir())]
        for folder in record.iterdir()
    }


def test_two_replicas_of_two_ranks_each(deployment: Deployment, record: Path) -> None:
    endpoint = deployment.endpoint()
    assert endpoint["replicas"] == 2 and endpoint["backend"] == "megatron"
    assert endpoint["versions"]["nemo-export-deploy"] == RELEASE
    assert [proof["ranks"] for proof in endpoint["proven"].values()] == [2, 2]
    groups = ranks(record)
    assert len(groups) == 2
    for group in groups.values():
        assert [rank["rank"] for rank in group] == [0, 1]
        assert all((rank["world"], rank["tensor"], rank["pipeline"]) == (2, 2, 1) for rank in group)
    assert len({rank["pid"] for group in groups.values() for rank in group}) == 4


def test_mixed_traffic_gets_the_answers_that_it_gets_alone(deployment: Deployment) -> None:
    deployment.endpoint()
    words = ["The", "answer", "is", "a", "question", "of", "many", "long", "and", "short", "words"]
    requests = [{"prompt": " ".join(words[:count]), "temperature": 0} for count in (2, 3, 5, 8)]
    kinds: list[dict[str, Any]] = [
        {"max_tokens": 1, "logprobs": 1, "echo": True},
        {"max_tokens": 2},
        {"max_tokens": 6},
        {"max_tokens": 6, "stop": [" "]},
        {"max_tokens": 3, "logprobs": 1},
    ]
    bodies = [{**request, **kind} for kind in kinds for request in requests]
    alone = [deployment.ask(**body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as clients:
        together = list(clients.map(lambda body: deployment.ask(**body), bodies))
    for body, expected, got in zip(bodies, alone, together, strict=True):
        assert got["text"] == expected["text"], body
        for name, values in (got["logprobs"] or {}).items():
            assert flat(values) == pytest.approx(flat(expected["logprobs"][name]), abs=1e-5), body
    echoed = alone[0]["logprobs"]
    for value, top in zip(echoed["token_logprobs"], echoed["top_logprobs"], strict=True):
        assert (value is None and top is None) or value <= max(top.values()) + 1e-6


def flat(values: list[Any] | None) -> list[float]:
    """Return numbers of logprobs and of top_logprobs alike, 1.0 for what is empty."""
    numbers = [max(v.values()) if isinstance(v, dict) else v for v in values or []]
    return [1.0 if number is None else number for number in numbers]


def test_the_death_of_a_rank_is_noticed_and_healed(deployment: Deployment, record: Path) -> None:
    names = set(deployment.endpoint()["proven"])
    (victim, *_) = ranks(record).values()
    os.kill(victim[1]["pid"], signal.SIGKILL)
    name = deployment.wait_said(r"replica (\w+): rank 1 is dead")[1]
    assert name in names
    deployment.wait_said("all replicas are well again")
    assert deployment.wait_said(rf"replica {name} on \S+ is gone; 1 left")
    assert len(ranks(record)) == 3
    assert deployment.ask()["text"]
    assert deployment.stop() == 0


def test_ranks_that_have_no_place_are_never_started(
    ray: LocalRay, tmp_path: Path, demo_dir: Path
) -> None:
    layout = ("--num_gpus=8", "--tensor_model_parallel_size=8")
    deployment = Deployment(ray, tmp_path, demo_dir / "model", *layout)
    assert deployment.end() == 3
    assert "room for 4 of 8 ranks" in deployment.log
