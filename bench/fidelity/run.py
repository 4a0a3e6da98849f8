#!/usr/bin/env python3
"""Compare the scores of a whole job with those of lm-evaluation-harness's own HuggingFace backend.

Prints a markdown table: each request's answer on both sides. README.md explains its columns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import chain
import direct
import material
from compare import Row, compare, markdown
from replay import Replay

#: The jobs by name: checkpoint, whether deploy.py repairs the endpoint, and the evaluations.
JOBS: dict[str, tuple[str, bool, dict[str, dict[str, Any]]]] = {
    "bos": ("bos", True, {"bos": {}, "client-bos": {"tokenizer_backend": chain.CLIENT_BOS}}),
    "no-bos": ("no-bos", True, {"no-bos": {}}),
    "no-bos-unrepaired": ("no-bos", False, {"no-bos-unrepaired": {}}),
}


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="where to work (default: a fresh directory)")
    parser.add_argument("--limit", type=int, help="questions per task (default: all 64)")
    parser.add_argument("--port", type=int, default=8400, help="of the endpoint (default: 8400)")
    parser.add_argument("--job", action="append", choices=JOBS, help="only this; repeatable")
    arguments = parser.parse_args()
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="slurmeval-fidelity-"))).absolute()
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", file=sys.stderr, flush=True)

    say(f"working in {work}")
    work.mkdir(parents=True, exist_ok=True)
    made = material.make(work)
    jobs = {name: JOBS[name] for name in arguments.job or JOBS}
    models = {model: made.models[model] for model, _, _ in jobs.values()}
    say(f"lm-evaluation-harness {direct.VERSION}, model hf: {', '.join(models)}")
    reference = direct.run(models, made.tasks, work / "direct", limit=arguments.limit)
    rows: list[Row] = []
    for name, (model, repaired, evaluations) in jobs.items():
        say(f"slurmeval's job: {name}")
        runs = chain.run_job(
            work / f"job-{name}",
            models[model],
            made.tasks,
            evaluations,
            limit=arguments.limit,
            port=arguments.port,
            repaired=repaired,
        )
        replay = Replay(models[model], repaired=repaired)
        for variant, run in runs.items():
            bos = variant == "client-bos"
            rows += compare(variant, run, reference[model], replay, client_bos=bos)
    say("done")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(f"bench/fidelity: {error}")
