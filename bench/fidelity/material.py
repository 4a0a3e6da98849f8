"""What is compared: five tasks over the demo's questions, and models that differ in one thing."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slurmeval import demo

GROUP = "slurmeval_fidelity"
MAX_TOKENS = 2 * demo.MAX_ANSWER_WORDS


def _choice(prompt: str, choices: str | list[str]) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": prompt,
        "doc_to_choice": choices,
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _generate(until: str, max_tokens: int) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_text": demo.GENERATE_PROMPT,
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": [until], "do_sample": False, "max_gen_toks": max_tokens},
        "filter_list": [
            {
                "name": "none",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


#: Choices of one token; choices of one to eight; generation that ends by itself; after two tokens;
#: at a stop sequence that many answers hold.
TASKS: dict[str, dict[str, Any]] = {
    "fidelity_letters": _choice(demo.CHOICE_PROMPT, list(demo.LETTERS)),
    "fidelity_texts": _choice(demo.GENERATE_PROMPT, "choices"),
    "fidelity_generate": _generate("\n", MAX_TOKENS),
    "fidelity_short": _generate("\n", 2),
    "fidelity_stop": _generate("e", MAX_TOKENS),
}


@dataclass(frozen=True)
class Material:
    """The directory of the tasks, and the checkpoints by name."""

    tasks: Path
    models: dict[str, Path]


def make(work: Path) -> Material:
    """Make the demo in ``work``, the tasks, and the twin whose tokenizer adds no BOS."""
    folder = demo.make(work / "demo")
    tasks = work / "tasks"
    tasks.mkdir(exist_ok=True)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "tasks/questions.jsonl")}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
    for name, task in TASKS.items():
        _write_yaml(tasks / f"{name}.yaml", {"task": name, **common, **task})
    _write_yaml(tasks / "group.yaml", {"group": GROUP, "task": list(TASKS)})
    models = {"bos": folder / "model", "no-bos": without_bos(folder / "model", work / "no-bos")}
    return Material(tasks, models)


def without_bos(model: Path, target: Path) -> Path:
    """Copy a checkpoint with a tokenizer that adds no special token, as those of Qwen and GPT-2."""
    shutil.copytree(model, target, dirs_exist_ok=True)
    path = target / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["post_processor"] = None
    path.write_text(json.dumps(tokenizer))
    return target


def _write_yaml(path: Path, value: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(value, sort_keys=False))
