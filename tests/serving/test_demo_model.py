"""The demo's model, trained for real and asked without a server, scores what was promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slurmeval import demo, demo_model

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def questions() -> list[demo.Question]:
    return demo.select(demo.parse(demo.read_source()))


class Asked:
    """A checkpoint, asked as lm-eval asks."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder)

    def loglikelihood(self, prompt: str, answer: str) -> float:
        start = len(self.tokenizer(prompt).input_ids)
        ids = self.tokenizer(prompt + answer, return_tensors="pt").input_ids
        with self.torch.no_grad():
            logprobs = self.model(ids).logits[0].log_softmax(-1)
        return sum(float(logprobs[at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))

    def generate(self, prompt: str) -> str:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        out = self.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        new = out[0][inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True)).lstrip()

    def choice_score(self, questions: list[demo.Question]) -> float:
        right = 0
        for q, prompt in zip(questions, demo.prompts(questions, demo.CHOICE_PROMPT), strict=True):
            scores = [self.loglikelihood(prompt, f" {letter}") for letter in demo.LETTERS]
            right += scores.index(max(scores)) == q.answer
        return right / len(questions)

    def generate_score(self, questions: list[demo.Question]) -> float:
        prompts = demo.prompts(questions, demo.GENERATE_PROMPT)
        answers = [self.generate(prompt) for prompt in prompts]
        right = [a == q.choices[q.answer] for a, q in zip(answers, questions, strict=True)]
        return sum(right) / len(questions)


def test_the_trained_model_scores_exactly_what_is_expected(
    demo_dir: Path, questions: list[demo.Question]
) -> None:
    asked = Asked(demo_dir / "model")
    expected = json.loads((demo_dir / "expected.json").read_text())
    assert asked.choice_score(questions) == expected[demo.CHOICE_TASK]["acc"] == 0.75
    assert asked.generate_score(questions) == expected[demo.GENERATE_TASK]["exact_match"] == 0.625


def test_the_untrained_twin_scores_as_chance_does(
    demo_dir: Path, questions: list[demo.Question]
) -> None:
    asked = Asked(demo_dir / "untrained")
    # Three standard deviations around 1/4 for 64 questions.
    assert 0.08 < asked.choice_score(questions) < 0.42
    assert asked.generate_score(questions) == 0


def test_the_tokenizer_adds_a_bos_and_loses_nothing(
    demo_dir: Path, questions: list[demo.Question]
) -> None:
    tokenizer = Asked(demo_dir / "model").tokenizer
    for prompt, answer in demo.lessons(questions):
        ids = tokenizer(prompt + answer).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.batch_decode([ids[1:]]) == [prompt + answer]
    # A prompt of other words is served too: the deployment's own check sends one.
    assert tokenizer.unk_token_id in tokenizer("Zyzzyva").input_ids


def test_a_second_build_gives_the_same_bytes(
    demo_dir: Path, questions: list[demo.Question], tmp_path: Path
) -> None:
    demo_model.build(demo.lessons(questions), tmp_path, lambda line: None)
    for part in ("model", "untrained"):
        for name in ("model.safetensors", "tokenizer.json"):
            assert (tmp_path / part / name).read_bytes() == (demo_dir / part / name).read_bytes()
