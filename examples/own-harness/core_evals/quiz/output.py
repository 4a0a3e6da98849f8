"""How nemo-evaluator reads this harness's results."""

import json
import math
import pathlib

from nemo_evaluator.api.api_dataclasses import EvaluationResult


def parse_output(output_dir: str) -> EvaluationResult:
    """Return the results; ``count`` says how many questions a score stands for."""
    scores = json.loads(pathlib.Path(output_dir, "scores.json").read_text())
    count = scores["questions"]
    share = scores["right"] / count
    stats = {"count": count, "stderr": math.sqrt(share * (1 - share) / count)}
    metrics = {"acc": {"scores": {"acc": {"value": share, "stats": stats}}}}
    return EvaluationResult(tasks={"sums": {"metrics": metrics}})
