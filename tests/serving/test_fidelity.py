"""Scores of a whole job are those of lm-evaluation-harness's own HuggingFace backend, one by one.

The checkpoint's tokenizer adds no BOS: the harder case, which upstream's endpoint gets wrong.
"""

from __future__ import annotations

import asyncio
import importlib.abc
import importlib.machinery
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

from slurmeval import deploy, fidelity

sys.path.insert(0, str(Path(__file__).parents[2] / "bench/fidelity"))

import chain
import direct
import material
from compare import pairs
from replay import Replay
from samples import Answer, Run

pytestmark = [pytest.mark.serving, pytest.mark.timeout(900)]

LIMIT = 16
CHOICE = ("fidelity_letters", "fidelity_texts")
GENERATED = ("fidelity_generate", "fidelity_short", "fidelity_stop")
#: Nats that a token may differ by; a few units in the last place of single precision.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> material.Material:
    return material.make(tmp_path_factory.mktemp("fidelity"))


@pytest.fixture(scope="module")
def reference(made: material.Material) -> Run:
    """What the harness's own backend answers."""
    try:
        direct.harness()
    except subprocess.CalledProcessError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"lm-evaluation-harness cannot be installed: {error}")
    models = {"no-bos": made.models["no-bos"]}
    return direct.run(models, made.tasks, made.tasks.parent / "direct", limit=LIMIT)["no-bos"]


@pytest.fixture(scope="module")
def job(made: material.Material) -> Run:
    """What a whole job answers."""
    folder = made.tasks.parent / "job"
    model = made.models["no-bos"]
    return chain.run_job(folder, model, made.tasks, {"plain": {}}, limit=LIMIT, port=8431)["plain"]


def scored(answer: Answer) -> tuple[float, bool]:
    assert answer.loglikelihood is not None
    assert answer.is_greedy is not None
    return answer.loglikelihood, answer.is_greedy


@pytest.mark.parametrize("task", CHOICE)
def test_each_loglikelihood_differs_by_known_rounding_alone(
    job: Run, reference: Run, made: material.Material, task: str
) -> None:
    replay = Replay(made.models["no-bos"])
    answers = pairs(job[task], reference[task])
    assert len(answers) == 4 * LIMIT
    for ours, theirs in answers:
        assert scored(ours) == replay.chain(ours)
        assert scored(theirs) == replay.direct(theirs)
        assert ours.is_greedy == theirs.is_greedy
        tokens = len(replay.ids(str(ours.continuation), special=False))
        assert math.isclose(
            scored(ours)[0], scored(theirs)[0], rel_tol=0, abs_tol=tokens * ROUNDING
        )
    assert {answer.is_greedy for answer, _ in answers} == {True, False}


@pytest.mark.parametrize("task", GENERATED)
def test_each_generated_text_is_the_same(job: Run, reference: Run, task: str) -> None:
    answers = pairs(job[task], reference[task])
    assert len(answers) == LIMIT
    assert [ours.text for ours, _ in answers] == [theirs.text for _, theirs in answers]


@pytest.mark.parametrize("task", [*CHOICE, *GENERATED])
def test_each_score_is_the_same(job: Run, reference: Run, task: str) -> None:
    ours = [sample.score for sample in job[task]]
    assert ours == [sample.score for sample in reference[task]]
    assert 0 < sum(ours) <= len(ours)


# -------------------------------------------------------- upstream's endpoints, without a cluster


def completions(deployable: Any) -> Any:
    """Return Export-Deploy's class behind a Serve deployment."""
    return next(c for c in deployable.func_or_class.__mro__ if "completions" in vars(c))


def asker(replica: Any) -> fidelity.Ask:
    def ask(body: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = asyncio.run(replica.completions(dict(body)))["choices"][0]
        return choice

    return ask


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo, after the test, what ``allow_missing_parts`` does."""
    import torch
    from nemo_deploy.llm import hf_deployable

    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.cuda)
    monkeypatch.setattr(hf_deployable, "HAVE_TRITON", hf_deployable.HAVE_TRITON)
    deploy.allow_missing_parts()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("model", "upstream"), [("bos", []), ("no-bos", ["shifted-loglikelihood"])]
)
def test_the_rule_tells_which_huggingface_endpoint_is_wrong(
    made: material.Material, model: str, upstream: list[str]
) -> None:
    from nemo_deploy.llm.hf_deployable_ray import HFRayDeployable

    replica = completions(HFRayDeployable)(
        hf_model_id_path=str(made.models[model]), device_map=None, trust_remote_code=False
    )
    served = replica.model
    tokenizer = served.tokenizer

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    for counted in (None, count):
        found = fidelity.probe(asker(replica), counted)
        assert [fault.name for fault in found] == [*upstream, "stop-ignored"]
    served.ray_infer_fn = deploy.repaired_hf(served.ray_infer_fn, tokenizer)
    assert [fault.name for fault in fidelity.probe(asker(replica), count)] == ["stop-ignored"]


ABSENT = ("megatron", "transformer_engine")


class Stand(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that need a GPU even to be imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return MagicMock(__path__=[], __name__=spec.name, __spec__=spec)

    def exec_module(self, module: ModuleType) -> None:
        """Leave it as it was made."""


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A replica of the Megatron deployable; each token that its ranks answer is the likeliest."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "meta_path", [Stand(), *sys.meta_path])
    import numpy
    from nemo_deploy.llm import megatronllm_deployable_ray as module

    def infer(inputs: dict[str, Any]) -> dict[str, Any]:
        known = [-0.25 * (place + 1) for place in range(len(inputs["prompts"][0].split()))]
        tops = json.dumps([{"word": value} for value in known])
        return {"sentences": ["word"], "log_probs": numpy.array([known]), "top_logprobs": [tops]}

    monkeypatch.setattr(module.ray, "get", lambda answer: answer)
    base = completions(module.MegatronRayDeployable)
    replica = base.__new__(base)
    replica.model_id = "model"
    replica.primary_worker = MagicMock()
    replica.primary_worker.infer.remote = infer
    yield replica
    for name in set(sys.modules) - before:
        if name.split(".")[0] in (*ABSENT, "nemo_deploy"):
            del sys.modules[name]


def test_the_rule_tells_what_megatrons_endpoint_does_to_is_greedy(megatron: Any) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    body = {"prompt": "a b c", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    answer = asyncio.run(megatron.completions(body))
    (fault,) = fidelity.logprob_faults(answer["choices"][0]["logprobs"], 3)
    assert fault.name == "shifted-is-greedy"
    # Right: (-0.75, True). Each token of the answer is compared with the likeliest next one.
    ((loglikelihood, is_greedy),) = LocalCompletionsAPI.parse_logprobs(answer, ctxlens=[1])
    assert (loglikelihood, is_greedy) == (-0.75, False)
    deploy.mend(answer["choices"][0], body)
    assert fidelity.logprob_faults(answer["choices"][0]["logprobs"], 3) == []
    assert LocalCompletionsAPI.parse_logprobs(answer, ctxlens=[1]) == [(-0.75, True)]
