"""Requests a second through deploy.py and through upstream's own way, with its defaults.

Both serve the same HuggingFace checkpoint, one after the other on one Ray cluster of this machine,
and again in the other order, so that a machine that slows down or speeds up favours neither::

    python bench/serving.py CHECKPOINT [--clients 8 32 128] [--requests 200] [--json FILE]

Upstream's way is ``DeployRay(...).deploy_huggingface_model(CHECKPOINT)``. On a machine without
GPUs, Ray is told of one all the same, because upstream's defaults ask for it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from serving_load import KINDS, Load, measure

ROOT = Path(__file__).resolve().parents[1]
UPSTREAM = """
import sys

def without_gpu():
    import torch
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *args, **kwargs: self
    import nemo_deploy.llm.hf_deployable as module
    module.HAVE_TRITON = True

from nemo_deploy.deploy_ray import DeployRay
address, port, checkpoint = sys.argv[1:]
hook = {"worker_process_setup_hook": without_gpu}
ray = DeployRay(address=address, host="127.0.0.1", port=int(port), runtime_env=hook)
ray.deploy_huggingface_model(hf_model_id_path=checkpoint)
"""


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def process(command: list[Any], log: Path, cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in the background and end it with SIGTERM."""
    # The stand-in makes upstream's module importable where Megatron is missing.
    paths = [str(ROOT / "tests" / "serving" / "standin")]
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    env["PYTHONPATH"] = ":".join(filter(None, [*paths, env.get("PYTHONPATH")]))
    with log.open("w") as out:
        running = subprocess.Popen(
            list(map(str, command)), cwd=cwd, env=env, stdout=out, stderr=out
        )
        try:
            yield running
        finally:
            running.send_signal(signal.SIGTERM)
            running.wait(120)


def wait(what: subprocess.Popen[bytes], log: Path, text: str) -> None:
    """Wait until a log holds a text."""
    while text not in log.read_text():
        if what.poll() is not None:
            sys.exit(f"ended early:\n{log.read_text()}")
        time.sleep(0.2)


def one_round(way: str, address: str, args: argparse.Namespace, folder: Path) -> list[Load]:
    """Serve in one way, and measure."""
    port = free_port()
    log = folder / f"{way}.log"
    if way == "upstream":
        command = [sys.executable, "-c", UPSTREAM, address, port, args.checkpoint]
        text = "is ready at"
    else:
        config = folder / "config.yaml"
        (folder / "endpoint.json").unlink(missing_ok=True)
        deploy = {"backend": "hf", "num_gpus": 1, "port": port}
        load = {"parallelism": max(args.clients)}
        model = {"checkpoint_path": str(args.checkpoint)}
        config.write_text(yaml.safe_dump({"deploy": deploy, "model": model, "eval": load}))
        script = ROOT / "slurmeval" / "deploy.py"
        command = [sys.executable, script, "--address", address, "--config", config]
        text = "serving "
    with process(command, log, folder) as running:
        wait(running, log, text)
        return measure(f"http://127.0.0.1:{port}/v1/completions/", args.clients, args.requests)


def table(rounds: dict[str, list[list[Load]]]) -> tuple[str, list[dict[str, Any]]]:
    """Return the comparison as Markdown and as rows."""
    lines = [
        "| requests | clients | upstream, req/s | deploy.py, req/s | ratio | upstream, median s "
        "| deploy.py, median s |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = []
    for at, first in enumerate(rounds["ours"][0]):
        pairs = {way: [loads[at] for loads in rounds[way]] for way in rounds}
        rate = {way: statistics.mean(load.rate for load in pairs[way]) for way in pairs}
        wait_s = {way: statistics.mean(load.latency for load in pairs[way]) for way in pairs}
        failed = {way: sum(load.failed for load in pairs[way]) for way in pairs}
        ratio = rate["ours"] / rate["upstream"]
        lines.append(
            f"| {first.kind} | {first.clients} | {rate['upstream']:.1f} | {rate['ours']:.1f} "
            f"| {ratio:.1f} | {wait_s['upstream']:.2f} | {wait_s['ours']:.2f} |"
        )
        rows.append(
            {"kind": first.kind, "clients": first.clients, "rate": rate, "ratio": ratio,
             "latency": wait_s, "failed": failed}
        )  # fmt: skip
    return "\n".join(lines), rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help=f"measured with {' and '.join(KINDS)}")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    args.checkpoint = args.checkpoint.resolve()
    rounds: dict[str, list[list[Load]]] = {"upstream": [], "ours": []}
    with tempfile.TemporaryDirectory(prefix="b", dir="/tmp") as name:
        folder = Path(name)
        address = f"127.0.0.1:{free_port()}"
        command = [Path(sys.executable).parent / "ray", "start", "--head", "--block"]
        command += ["--include-dashboard=false", "--node-ip-address=127.0.0.1", "--num-gpus=1"]
        command += [f"--port={address.split(':')[1]}", "--num-cpus=9", f"--temp-dir={folder / 'r'}"]
        with process(command, folder / "ray.log", folder) as ray:
            wait(ray, folder / "ray.log", "started")
            for way in ("upstream", "ours", "ours", "upstream"):
                print(f"measuring {way} …", file=sys.stderr, flush=True)
                rounds[way].append(one_round(way, address, args, folder))
    text, rows = table(rounds)
    print(text)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    if any(row["failed"]["ours"] for row in rows):
        sys.exit("deploy.py did not answer all requests")


if __name__ == "__main__":
    main()
