"""What a model was asked and what it answered, sample by sample, from either side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = ("acc", "exact_match")


@dataclass(frozen=True)
class Answer:
    """One request with its answer: a loglikelihood or a text.

    Attributes:
        context: The prompt.
        continuation: What is scored; None for generation.
        loglikelihood: In nats; None for generation.
        is_greedy: Whether the continuation is what the model would have said.
        text: What was generated; None for loglikelihood.
    """

    context: str
    continuation: str | None
    loglikelihood: float | None
    is_greedy: bool | None
    text: str | None


@dataclass(frozen=True)
class Sample:
    """One question: its answers in the order of its requests, and its score."""

    doc: int
    answers: tuple[Answer, ...]
    score: float


Run = dict[str, list[Sample]]


def of_harness(logged: dict[str, list[dict[str, Any]]]) -> Run:
    """Return the samples that lm-eval logged, in memory or on disk, in the order of the data."""
    return {
        task: sorted(map(_sample, samples), key=lambda sample: sample.doc)
        for task, samples in logged.items()
    }


def of_directory(output: Path) -> Run:
    """Return the samples below an evaluator's output directory.

    Raises:
        FileNotFoundError: There are none.
    """
    logged: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(output.glob("*/samples_*.jsonl")):
        task = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        logged[task] = [json.loads(line) for line in path.read_text().splitlines()]
    if not logged:
        raise FileNotFoundError(f"no samples below {output}")
    return of_harness(logged)


def _sample(logged: dict[str, Any]) -> Sample:
    both = zip(_requests(logged["arguments"]), logged["resps"], strict=True)
    answers = tuple(_answer(request, responses) for request, responses in both)
    score = next(float(logged[metric]) for metric in METRICS if metric in logged)
    return Sample(int(logged["doc_id"]), answers, score)


def _requests(arguments: Any) -> Iterator[Sequence[Any]]:
    """Yield the arguments of each request; lm-eval names them on disk."""
    if isinstance(arguments, dict):
        for request in arguments.values():
            yield list(request.values())
    else:
        yield from arguments


def _answer(request: Sequence[Any], responses: Sequence[Any]) -> Answer:
    (response,) = responses
    if isinstance(response, str):
        return Answer(request[0], None, None, None, response)
    loglikelihood, is_greedy = response
    return Answer(request[0], request[1], float(loglikelihood), str(is_greedy) == "True", text=None)
