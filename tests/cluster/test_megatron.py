"""Megatron's deployable on two nodes of Slurm with logical GPUs; only the engine is a stand-in.

DeployRay's deployable, its ModelWorkers, their process groups over the network, Ray Serve and the
job script are real. No rank of the stand-in can answer alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import LONG, Ended, Job, Lab
from slurmcluster import REPO, SlurmCluster

from slurmeval.config.schema import Config
from slurmeval.parallelism import layout_of, placement

pytestmark = [pytest.mark.slurm, pytest.mark.serving]
SERVING = REPO / "tests" / "serving"
sys.path.insert(0, str(SERVING))

import published  # noqa: E402

BATCHES = "0.7.1"
WORDS = ["The", "answer", "is", "a", "question", "of", "many", "long", "and", "short", "words"]
PROMPTS = [" ".join(WORDS[:count]) for count in (2, 3, 5, 8)]
ECHO = {"max_tokens": 1, "logprobs": 1, "echo": True}
KINDS: list[dict[str, Any]] = [ECHO, {"max_tokens": 2}, {"max_tokens": 6}]
BODIES = [{"prompt": prompt, "temperature": 0, **kind} for kind in KINDS for prompt in PROMPTS]
#: Runs on the head node: the endpoint listens there only.
CLIENTS = """
import json, sys, urllib.request
from concurrent.futures import ThreadPoolExecutor

def ask(body):
    header = {"Content-Type": "application/json"}
    request = urllib.request.Request(sys.argv[1], json.dumps(body).encode(), header)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]

bodies = json.loads(sys.argv[2])
with ThreadPoolExecutor(len(bodies)) as clients:
    print(json.dumps(list(clients.map(ask, bodies))))
"""


class Served:
    """What a deployment was asked, and how its job ended.

    Attributes:
        ranks: Of each replica, what its ranks wrote down.
        endpoint: The content of endpoint.json.
        answers: Those to ``BODIES``, all sent at once.
        open_to_others: Whether another node of the job reaches the endpoint.
        ended: The job's end.
        placement: How many ranks the plan puts on each node.
    """

    def __init__(self, job: Job, config: Config) -> None:
        job.submit().wait_phase("evaluate")
        record = job.path("record")
        self.ranks = [
            [json.loads(path.read_text()) for path in sorted(folder.iterdir())]
            for folder in record.iterdir()
        ]
        self.endpoint = json.loads(job.path("endpoint.json").read_text())
        url, bodies = self.endpoint["completions"], json.dumps(BODIES)
        asking = (sys.executable, "-c", CLIENTS, url, bodies)
        head, other = job.machines()
        said = job.cluster.exec(head, *asking, as_user=True)
        self.answers: list[dict[str, Any]] = json.loads(said.stdout)
        knock = f": < /dev/tcp/{head}/{url.split(':')[2].split('/')[0]}"
        knocked = job.cluster.exec(other, "bash", "-c", knock, check=False)
        self.open_to_others = knocked.returncode == 0
        assert "refused" in knocked.stderr or self.open_to_others, knocked.stderr
        job.enough()
        self.ended: Ended = job.end(nodes=job.nodes)
        nodes = placement(layout_of(config))
        self.placement = [sum(part.last - part.first + 1 for part in node) for node in nodes]

    @property
    def hosts(self) -> list[str]:
        """The node of each rank."""
        return [rank["host"] for ranks in self.ranks for rank in ranks]


Serve = Callable[..., Served]


@pytest.fixture
def serve(slurm_cluster: SlurmCluster, user_dir: Path, demo_dir: Path) -> Serve:
    """Runs a job on two nodes of two GPUs each."""
    checkpoint = user_dir / "checkpoints"  # of them the latest iteration is taken
    shutil.copytree(demo_dir / "model", checkpoint / "iter_0000010")
    (checkpoint / "iter_0000010" / "run_config.yaml").write_text("model: {}\n")
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("10")
    slurm_cluster.give(checkpoint)

    def serve(*packages: Path, **layout: int) -> Served:
        directory = slurm_cluster.fresh_dir()
        env = {
            "gpus_per_node": 2,
            "env_vars": {
                "PYTHONPATH": ":".join(map(str, (SERVING / "standin", *packages))),
                "ENGINE_RECORD": str(directory / "record"),
                "ENGINE_GPUS_OF_A_NODE": "2",
            },
        }
        deploy = {"backend": "megatron", "num_gpus": 4, "tensor_model_parallel_size": 2, **layout}
        model = {"checkpoint_path": str(checkpoint), "tokenizer": str(demo_dir / "model")}
        job = Lab(slurm_cluster).job(
            ("node1", "node2"),
            [LONG],
            directory=directory,
            env=env,
            deploy=deploy,
            model=model,
            eval={"parallelism": len(BODIES)},
        )
        shutil.copy(REPO / "slurmeval" / "deploy.py", directory)
        config = Config.model_validate({"run": {"env": {"nodes": 2, **env}}, "deploy": deploy})
        return Served(job, config)

    return serve


@pytest.fixture(scope="module")
def model(demo_dir: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(demo_dir / "model").eval()


@pytest.fixture(scope="module")
def tokenizer(demo_dir: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(demo_dir / "model")


def assert_right(answers: list[dict[str, Any]], model: Any, tokenizer: Any) -> None:
    """Compare answers with the whole model's own."""
    for body, answer in zip(BODIES, answers, strict=True):
        ids = tokenizer(body["prompt"], return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=body["max_tokens"], do_sample=False)
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer["text"].endswith(text), body
        if not body.get("logprobs"):
            continue
        rows = model(made).logits[0].log_softmax(-1)
        # Neither the BOS nor the first word has a logprob.
        wanted = [rows[at - 1, made[0, at]].item() for at in range(2, made.shape[1])]
        first, *rest = answer["logprobs"]["token_logprobs"]
        assert first is None and rest == pytest.approx(wanted, abs=1e-4), body


def assert_ended_well(ended: Ended) -> None:
    assert (ended.state, ended.exit_code, ended.left) == ("COMPLETED", "0:0", []), ended.log


def test_one_replica_across_both_nodes(serve: Serve, model: Any, tokenizer: Any) -> None:
    """TP2 x PP2 with the installed Export-Deploy."""
    one = serve(pipeline_model_parallel_size=2)
    (ranks,) = one.ranks
    assert [rank["rank"] for rank in ranks] == [0, 1, 2, 3]
    assert all((rank["tensor"], rank["pipeline"]) == (2, 2) for rank in ranks)
    assert all(rank["path"].endswith("/checkpoints/iter_0000010") for rank in ranks)
    assert sorted(Counter(one.hosts).values()) == one.placement == [2, 2]
    (proof,) = one.endpoint["proven"].values()
    assert (proof["ranks"], proof["node"]) == (4, ranks[0]["host"])
    assert not one.open_to_others
    assert_right(one.answers, model, tokenizer)
    assert_ended_well(one.ended)


def test_two_replicas_answer_mixed_requests(
    serve: Serve, user_dir: Path, slurm_cluster: SlurmCluster, model: Any, tokenizer: Any
) -> None:
    """With the release that would mix the requests of a batch up."""
    packages = slurm_cluster.give(published.fetch(BATCHES, user_dir))
    two = serve(packages, num_replicas=2)
    assert two.endpoint["versions"]["nemo-export-deploy"] == BATCHES
    assert [[rank["rank"] for rank in ranks] for ranks in two.ranks] == [[0, 1], [0, 1]]
    assert [proof["ranks"] for proof in two.endpoint["proven"].values()] == [2, 2]
    assert sorted(Counter(two.hosts).values()) == two.placement == [2, 2]
    assert_right(two.answers, model, tokenizer)
    assert_ended_well(two.ended)
