"""Stands in for deploy.py: an endpoint that answers at once, with the same files and signals."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Answers(BaseHTTPRequestHandler):
    """Answers each completion with the same word."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        content = json.dumps({"choices": [{"index": 0, "text": " 42"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


def main() -> int:
    """Serve until the completion file appears."""
    parser = argparse.ArgumentParser()
    for name in ("--config", "--address", "--host"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    parser.add_argument("--endpoint-file", type=Path)
    parser.add_argument("--completion-file", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    server = ThreadingHTTPServer((arguments.host, arguments.port), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    part = arguments.endpoint_file.with_suffix(".part")
    part.write_text(json.dumps({"port": arguments.port}))
    part.replace(arguments.endpoint_file)
    while not arguments.completion_file.exists():
        time.sleep(0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
