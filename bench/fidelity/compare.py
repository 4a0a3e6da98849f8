"""Two runs side by side, request by request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from material import TASKS
from replay import Replay, cut
from samples import Answer, Run, Sample

HEADER = (
    "variant",
    "task",
    "requests",
    "equal to the last digit",
    "largest difference",
    "`is_greedy` equal",
    "replayed: chain",
    "replayed: direct",
    "score: chain",
    "score: direct",
)


@dataclass(frozen=True)
class Row:
    """One task of one variant.

    Attributes:
        variant: What is special.
        task: The task.
        requests: Number of requests.
        equal: How many have the same answer, to the last digit or letter.
        largest: The largest difference of two loglikelihoods; None for generation.
        greedy: How many have the same ``is_greedy``; None for generation.
        chain_replayed: How many of the chain's answers the replay gives, to the last digit; for
            generation, how many are the harness's once they are cut at the stop sequences.
        direct_replayed: The same for the harness's answers; None for generation.
        chain_score: The chain's mean score.
        direct_score: The harness's.
    """

    variant: str
    task: str
    requests: int
    equal: int
    largest: float | None
    greedy: int | None
    chain_replayed: int
    direct_replayed: int | None
    chain_score: float
    direct_score: float

    def cells(self) -> tuple[str, ...]:
        """Return the row as the table shows it."""
        return (
            self.variant,
            f"`{self.task}`",
            str(self.requests),
            str(self.equal),
            "-" if self.largest is None else f"{self.largest:.2g}",
            "-" if self.greedy is None else str(self.greedy),
            str(self.chain_replayed),
            "-" if self.direct_replayed is None else str(self.direct_replayed),
            f"{self.chain_score:.4f}",
            f"{self.direct_score:.4f}",
        )


def pairs(chain: list[Sample], direct: list[Sample]) -> list[tuple[Answer, Answer]]:
    """Return the answers to the same requests.

    Raises:
        ValueError: The two sides were not asked the same.
    """
    found = [
        pair
        for ours, theirs in zip(chain, direct, strict=True)
        for pair in zip(ours.answers, theirs.answers, strict=True)
    ]
    for ours, theirs in found:
        if (ours.context, ours.continuation) != (theirs.context, theirs.continuation):
            raise ValueError(f"not the same request: {ours} and {theirs}")
    return found


def compare(
    variant: str, chain: Run, direct: Run, replay: Replay, *, client_bos: bool = False
) -> list[Row]:
    """Return a row for each task."""
    return [_row(variant, task, chain[task], direct[task], replay, client_bos) for task in TASKS]


def _row(
    variant: str,
    task: str,
    chain: list[Sample],
    direct: list[Sample],
    replay: Replay,
    client_bos: bool,
) -> Row:
    both = pairs(chain, direct)
    scores = mean(sample.score for sample in chain), mean(sample.score for sample in direct)
    if TASKS[task]["output_type"] == "generate_until":
        until = TASKS[task]["generation_kwargs"]["until"]
        equal = sum(ours.text == theirs.text for ours, theirs in both)
        cuts = sum(cut(str(ours.text), until) == theirs.text for ours, theirs in both)
        return Row(variant, task, len(both), equal, None, None, cuts, None, *scores)
    values = [(_value(ours), _value(theirs)) for ours, theirs in both]
    return Row(
        variant,
        task,
        len(both),
        sum(ours[0] == theirs[0] for ours, theirs in values),
        max(abs(ours[0] - theirs[0]) for ours, theirs in values),
        sum(ours[1] == theirs[1] for ours, theirs in values),
        sum(_value(ours) == replay.chain(ours, client_bos=client_bos) for ours, _ in both),
        sum(_value(theirs) == replay.direct(theirs) for _, theirs in both),
        *scores,
    )


def _value(answer: Answer) -> tuple[float, bool]:
    if answer.loglikelihood is None or answer.is_greedy is None:
        raise ValueError(f"no loglikelihood: {answer}")
    return answer.loglikelihood, answer.is_greedy


def mean(values: Iterable[float]) -> float:
    """Return the mean."""
    known = list(values)
    return sum(known) / len(known)


def markdown(rows: Iterable[Row]) -> str:
    """Return the table."""
    lines = [HEADER, ("---",) * 2 + ("---:",) * (len(HEADER) - 2), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
