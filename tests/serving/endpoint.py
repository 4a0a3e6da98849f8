"""A small endpoint that speaks the completions protocol, and fails as it is told to."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

ERROR = "An error occurred: CUDA error: device-side assert triggered"


class Endpoint:
    """Answers sums rightly and everything else with a word; gives each token its own probability.

    Attributes:
        asked: Requests that arrived.
        dies_after: Requests after which connections are cut, or None.
        error_texts: Whether all answers are error texts with HTTP 200.
        refuses: A function of the request's number: HTTP 500 where it is true.
        constant: Whether all tokens have the probability 1.
        pause: Seconds before an answer.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.dies_after: int | None = None
        self.error_texts = False
        self.refuses: Callable[[int], bool] = lambda number: False
        self.constant = False
        self.pause = 0.0
        self.answer: Callable[[str], str] = sum_of
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.asked += 1
                    number = outer.asked
                time.sleep(outer.pause)
                if outer.dies_after is not None and number > outer.dies_after:
                    self.close_connection = True
                    self.connection.close()
                    return
                status = 500 if outer.refuses(number) else 200
                content = json.dumps(outer.completion(body)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                """Keep quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, address: None  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1/completions/"

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        text = ERROR if self.error_texts else self.answer(prompt)
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "stop"}
        if body.get("logprobs") and not self.error_texts:
            choice["logprobs"] = self.logprobs(prompt)
        return {"id": "1", "object": "text_completion", "choices": [choice], "usage": {}}

    def logprobs(self, prompt: str) -> dict[str, Any]:
        """Return a probability for each character: at least as many as there are tokens."""
        values = [
            0.0 if self.constant else -hashlib.sha256(prompt[: i + 1].encode()).digest()[0] / 64
            for i in range(len(prompt) + 1)
        ]
        return {"token_logprobs": values, "top_logprobs": [{"x": value} for value in values]}

    def __enter__(self) -> Endpoint:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def sum_of(prompt: str) -> str:
    """Return the sum that a prompt asks for, or a word."""
    numbers = re.findall(r"(\d+) \+ (\d+) =$", prompt)
    return f" {int(numbers[0][0]) + int(numbers[0][1])}" if numbers else " Paris"
