"""The harness: asks for sums over HTTP, and writes how many were right to scores.json.

A question that gets no answer counts as wrong, as in many a harness; slurmeval's verdict finds that
it was never answered.
"""

import argparse
import json
import pathlib
import random
import urllib.request
from concurrent.futures import ThreadPoolExecutor


def ask(arguments: argparse.Namespace, first: int, second: int) -> bool:
    """Say whether the endpoint knows a sum."""
    question = {
        "model": arguments.model,
        "prompt": f"{first} + {second} =",
        "max_tokens": 4,
        "temperature": 0,
    }
    request = urllib.request.Request(
        arguments.url, json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=arguments.timeout) as response:
            text = json.load(response)["choices"][0]["text"]
    except OSError as error:
        print(f"{first} + {second}: {error}", flush=True)
        return False
    return text.strip().startswith(str(first + second))


def main() -> None:
    """Ask all questions."""
    parser = argparse.ArgumentParser()
    for name in ("url", "model", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("questions", "clients", "timeout", "largest"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    pairs = [(a, b) for a in range(arguments.largest + 1) for b in range(arguments.largest + 1)]
    pairs = random.Random(1).sample(pairs, min(arguments.questions, len(pairs)))
    with ThreadPoolExecutor(arguments.clients) as pool:
        right = list(pool.map(lambda pair: ask(arguments, *pair), pairs))
    scores = {"right": sum(right), "questions": len(right)}
    pathlib.Path(arguments.out, "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
