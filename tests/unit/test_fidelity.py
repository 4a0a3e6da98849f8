"""The rules about known faults of the endpoint, on files and answers written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from slurmeval import fidelity
from slurmeval.fidelity import Fault, expected_faults, logprob_faults, probe, special_tokens

BOS = {"SpecialToken": {"id": "<s>", "type_id": 0}}
EOS = {"SpecialToken": {"id": "</s>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def template(*single: dict[str, Any]) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": list(single), "pair": [], "special_tokens": {}}


def names(faults: list[Fault]) -> list[str]:
    return [fault.name for fault in faults]


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (None, (0, 0)),
        ({"type": "ByteLevel"}, (0, 0)),
        (template(BOS, TEXT), (1, 0)),
        (template(TEXT), (0, 0)),
        (template(BOS, TEXT, EOS), (1, 1)),
        (template(BOS), None),
        ({"type": "BertProcessing"}, (1, 1)),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template(BOS, TEXT)]}, (1, 0)),
        ({"type": "Sequence", "processors": [{"type": "New"}, template(BOS, TEXT)]}, None),
        ({"type": "New"}, None),
    ],
)
def test_special_tokens_of_each_kind_of_tokenizer(
    tmp_path: Path, processor: dict[str, Any] | None, expected: tuple[int, int] | None
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"post_processor": processor}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert special_tokens(tmp_path) == expected


@pytest.mark.parametrize(
    ("processor", "wanted", "expected"),
    [
        (template(BOS, TEXT), True, (1, 0)),
        (template(BOS, TEXT), False, None),
        (None, True, None),
        (None, None, (0, 0)),
    ],
)
def test_a_contradiction_of_the_two_files_is_unknown(
    tmp_path: Path, processor: dict[str, Any] | None, wanted: bool | None, expected: object
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"post_processor": processor}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": wanted}))
    assert special_tokens(tmp_path) == expected


@pytest.mark.parametrize("text", [None, "not JSON", "[]"])
def test_files_that_cannot_be_read_are_unknown(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    assert special_tokens(tmp_path) is None


@pytest.mark.parametrize(
    ("backend", "special", "vllm", "expected"),
    [
        ("hf", (1, 0), False, []),
        ("hf", (0, 0), False, []),
        ("hf", None, False, []),
        ("hf", (1, 1), False, ["shifted-loglikelihood"]),
        ("hf", (2, 0), False, ["shifted-loglikelihood"]),
        ("hf", (1, 0), True, []),
        ("hf", (0, 0), True, ["shifted-loglikelihood"]),
        ("megatron", (0, 0), False, []),
    ],
)
def test_faults_that_are_known_before_the_job(
    backend: str, special: tuple[int, int] | None, vllm: bool, expected: list[str]
) -> None:
    assert names(expected_faults(backend, special, vllm=vllm)) == expected


def test_the_message_says_what_is_lost() -> None:
    (fault,) = expected_faults("hf", (0, 0), vllm=True)
    assert fault.spoils == "loglikelihood"
    assert "the first 1 token(s) of each answer" in fault.message
    (fault,) = expected_faults("hf", (1, 1))
    assert "scores other tokens" in fault.message
    assert "docs/fidelity.md" in fault.message


@pytest.mark.parametrize(
    ("entries", "tops", "tokens", "expected"),
    [
        ([None, -1.0], [None, {"b": -1.0}], 1, []),
        ([-2.0, -1.0], [{"a": -2.0}, {"b": -1.0}], 1, []),
        ([-2.0, -1.0], None, 1, []),
        ([-1.0], [{"b": -1.0}], 1, ["shifted-loglikelihood"]),
        ([None, -2.0, -1.0], [None, {}, {}], 1, ["shifted-loglikelihood"]),
        ([None, -2.0, -1.0], [None, {}, {}], 2, []),
        ([None, -1.0], [{"b": -1.0}], 1, ["shifted-is-greedy"]),
        ([], [], 1, ["no-logprobs"]),
    ],
)
def test_faults_that_the_logprobs_show(
    entries: list[float | None], tops: list[Any] | None, tokens: int, expected: list[str]
) -> None:
    found = logprob_faults({"token_logprobs": entries, "top_logprobs": tops}, tokens)
    assert names(found) == expected


@pytest.mark.parametrize("logprobs", [None, {}, {"token_logprobs": None}])
def test_an_endpoint_without_logprobs(logprobs: Mapping[str, Any] | None) -> None:
    (fault,) = logprob_faults(logprobs, 1)
    assert (fault.name, fault.spoils) == ("no-logprobs", "loglikelihood")


class Endpoint:
    """An endpoint that says the same sentence always, and may heed stop sequences."""

    def __init__(self, *, heeds_stop: bool, entries: int, text: str = " one two") -> None:
        self.heeds_stop, self.entries, self.text = heeds_stop, entries, text

    def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        text = self.text
        for stop in body.get("stop", ()) if self.heeds_stop else ():
            text = text.split(stop)[0]
        logprobs = [-1.0] * self.entries if body.get("echo") and body.get("logprobs") else None
        return {"text": text, "logprobs": logprobs and {"token_logprobs": logprobs}}


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        (Endpoint(heeds_stop=True, entries=2), []),
        (Endpoint(heeds_stop=False, entries=2), ["stop-ignored"]),
        (Endpoint(heeds_stop=False, entries=2, text="  "), []),
        (Endpoint(heeds_stop=True, entries=1), ["shifted-loglikelihood"]),
        (Endpoint(heeds_stop=False, entries=1), ["shifted-loglikelihood", "stop-ignored"]),
    ],
)
def test_a_probe_of_an_endpoint(endpoint: Endpoint, expected: list[str]) -> None:
    assert names(probe(endpoint)) == expected


def test_without_a_tokenizer_a_shift_is_only_likely() -> None:
    shifted = Endpoint(heeds_stop=True, entries=1)
    assert [fault.sure for fault in probe(shifted)] == [False]
    assert [fault.sure for fault in probe(shifted, lambda _: 1)] == [True]


def test_no_counter_without_the_tokenizers_files(tmp_path: Path) -> None:
    assert fidelity.token_counter(str(tmp_path), None) is None


def test_the_evaluators_tokenizer_says_how_long_the_prompt_is() -> None:
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return 2

    assert names(probe(Endpoint(heeds_stop=True, entries=3), count)) == []
    assert counted == [fidelity.PROMPT]
