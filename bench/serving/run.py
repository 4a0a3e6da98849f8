#!/usr/bin/env python3
"""Requests a second through deploy.py and through upstream's own way, with its defaults.

Both serve the same HuggingFace checkpoint at the same time, each on a Ray cluster of its own on
this machine, and are asked in turn: upstream, ours, ours, upstream, and again, for each kind of
request and number of clients. A machine that slows down or speeds up favours neither::

    python bench/serving/run.py CHECKPOINT [--clients 8 32 128] [--requests 100] [--json FILE]

Upstream's way is ``DeployRay(...).deploy_huggingface_model(CHECKPOINT)``, which its script
``deploy_ray_hf.py`` calls with the same defaults. On a machine without GPUs, Ray is told of one all
the same, because those defaults ask for it.
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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from serving_load import KINDS, Load, measure

ROOT = Path(__file__).resolve().parents[2]
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
ORDER = ("upstream", "ours", "ours", "upstream")


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def process(command: list[Any], log: Path, cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in the background and end it with SIGTERM."""
    # The tests' stand-in makes upstream's module importable where Megatron is missing.
    paths = [str(ROOT / "tests" / "serving" / "standin"), os.environ.get("PYTHONPATH")]
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    env["PYTHONPATH"] = ":".join(filter(None, paths))
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


@contextmanager
def endpoint(way: str, args: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Serve in one way on a Ray cluster of its own, and yield the address of completions."""
    folder.mkdir()
    port, head = free_port(), f"127.0.0.1:{free_port()}"
    ray = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--num-cpus=9"]
    ray += ["--include-dashboard=false", "--node-ip-address=127.0.0.1", "--num-gpus=1"]
    ray += [f"--port={head.split(':')[1]}", f"--temp-dir={folder / 'r'}"]
    if way == "upstream":
        command = [sys.executable, "-c", UPSTREAM, head, port, args.checkpoint]
        text = "is ready at"
    else:
        config = folder / "config.yaml"
        deploy = {"backend": "hf", "num_gpus": 1, "port": port}
        load = {"parallelism": max(args.clients)}
        model = {"checkpoint_path": str(args.checkpoint)}
        config.write_text(yaml.safe_dump({"deploy": deploy, "model": model, "eval": load}))
        script = ROOT / "slurmeval" / "deploy.py"
        command = [sys.executable, script, "--address", head, "--config", config]
        text = "serving "
    with process(ray, folder / "ray.log", folder) as cluster:
        wait(cluster, folder / "ray.log", "started")
        with process(command, folder / "serve.log", folder) as serving:
            wait(serving, folder / "serve.log", text)
            yield f"http://127.0.0.1:{port}/v1/completions/"


def row_of(kind: str, clients: int, loads: dict[str, list[Load]]) -> dict[str, Any]:
    """Return what is told of one kind of request with one number of clients."""
    rate = {
        way: sum(load.requests - load.failed for load in each) / sum(load.seconds for load in each)
        for way, each in loads.items()
    }
    return {
        "kind": kind,
        "clients": clients,
        "rate": rate,
        "ratio": rate["ours"] / rate["upstream"],
        "latency": {way: statistics.mean(load.latency for load in loads[way]) for way in loads},
        "failed": {way: sum(load.failed for load in loads[way]) for way in loads},
        "rounds": {way: [round(load.rate, 1) for load in loads[way]] for way in loads},
    }


def line_of(row: dict[str, Any]) -> str:
    """Return a row as Markdown."""
    rate, wait_s = row["rate"], row["latency"]
    return (
        f"| {row['kind']} | {row['clients']} | {rate['upstream']:.1f} | {rate['ours']:.1f} "
        f"| {row['ratio']:.1f} | {wait_s['upstream']:.2f} | {wait_s['ours']:.2f} |"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--requests", type=int, default=100, help="a round, but two a client")
    parser.add_argument("--seconds", type=int, default=30, help="at least so long for each line")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    args.checkpoint = args.checkpoint.resolve()
    rows = []
    with tempfile.TemporaryDirectory(prefix="b", dir="/tmp") as name, ExitStack() as stack:
        ways = {
            way: stack.enter_context(endpoint(way, args, Path(name, way))) for way in set(ORDER)
        }
        print("| requests | clients | upstream, req/s | deploy.py, req/s | ratio ", end="")
        print("| upstream, median s | deploy.py, median s |\n|---|---|---|---|---|---|---|")
        for kind in args.kinds:
            for url in ways.values():
                measure(url, kind, 4, 16)  # warms up
            for clients in args.clients:
                loads: dict[str, list[Load]] = {way: [] for way in ways}
                started = time.monotonic()
                while time.monotonic() < started + args.seconds:
                    for way in ORDER:
                        loads[way].append(measure(ways[way], kind, clients, args.requests))
                rows.append(row_of(kind, clients, loads))
                print(line_of(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    if any(row["failed"]["ours"] for row in rows):
        sys.exit("deploy.py did not answer all requests")


if __name__ == "__main__":
    main()
