"""Clients that ask an endpoint for loglikelihoods and generations, as an evaluator does."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

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
    numbers = iter(range(requests))
    latencies: list[float] = []
    failed = 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal failed
        for number in numbers:
            body = {"prompt": PROMPT.format(number), "temperature": 0, **KINDS[kind]}
            started = time.perf_counter()
            async with session.post(url, json=body) as response:
                await response.read()
            latencies.append(time.perf_counter() - started)
            failed += response.status != 200

    limits = aiohttp.TCPConnector(limit=clients)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=limits, timeout=timeout) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        seconds = time.perf_counter() - started
    return Load(kind, clients, requests, failed, seconds, statistics.median(latencies))


def measure(url: str, clients: Sequence[int], requests: int) -> list[Load]:
    """Measure both kinds of requests with each number of clients; the endpoint is warmed up first.

    Args:
        url: Of the completions endpoint.
        clients: Numbers of requests at a time.
        requests: Requests in all, of each kind with each number of clients.
    """
    for kind in KINDS:
        asyncio.run(ask(url, kind, 4, 16))
    # At least two rounds of all clients, or the start and the end weigh too much.
    return [
        asyncio.run(ask(url, kind, count, max(requests, 2 * count)))
        for kind in KINDS
        for count in clients
    ]
