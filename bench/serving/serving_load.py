"""Clients that ask an endpoint for loglikelihoods and generations, as an evaluator does."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import Any

GENERATED_TOKENS = 16
KINDS: dict[str, dict[str, Any]] = {
    "loglikelihood": {"max_tokens": 1, "logprobs": 1, "echo": True},
    "generation": {"max_tokens": GENERATED_TOKENS},
}
PROMPT = "Question {}: which of the following is the answer, and why is it the right one?\nAnswer:"


@dataclass(frozen=True)
class Load:
    """What a number of clients got from an endpoint.

    Attributes:
        kind: ``loglikelihood`` or ``generation``.
        clients: Requests at a time.
        requests: Requests in all.
        failed: How many of them were not answered with HTTP 200.
        seconds: From the first request to the last answer.
        latency: Median seconds of a request.
    """

    kind: str
    clients: int
    requests: int
    failed: int
    seconds: float
    latency: float

    @property
    def rate(self) -> float:
        """Answered requests a second."""
        return (self.requests - self.failed) / self.seconds

    @property
    def tokens(self) -> float:
        """Generated tokens a second, at most: an answer may end early."""
        return self.rate * KINDS[self.kind]["max_tokens"]


async def ask(url: str, kind: str, clients: int, requests: int) -> Load:
    """Send requests, so many at a time, and measure."""
    import aiohttp  # an environment without it can still say how the benchmark is run

    numbers = iter(range(requests))
    latencies: list[float] = []
    failed = 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal failed
        for number in numbers:
            body = {"prompt": PROMPT.format(number), "temperature": 0, **KINDS[kind]}
            started = time.perf_counter()
            try:
                async with session.post(url, json=body) as response:
                    await response.read()
                failed += response.status != 200
            except aiohttp.ClientError:
                failed += 1
            latencies.append(time.perf_counter() - started)

    limits = aiohttp.TCPConnector(limit=clients)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=limits, timeout=timeout) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        seconds = time.perf_counter() - started
    return Load(kind, clients, requests, failed, seconds, statistics.median(latencies))


def measure(url: str, kind: str, clients: int, requests: int) -> Load:
    """Measure one kind of requests, so many at a time.

    Args:
        url: Of the completions endpoint.
        kind: One of ``KINDS``.
        clients: Requests at a time.
        requests: Requests in all; at least two of each client, or start and end weigh too much.
    """
    return asyncio.run(ask(url, kind, clients, max(requests, 2 * clients)))
