"""The embedded demo: real questions, two benchmarks, and a tiny model whose score is known.

``python -m slurmeval.demo [DIR]`` makes a directory that holds

- ``tasks/``: two lm-evaluation-harness tasks over real MMLU development questions, taken from the
  installed ``nvidia-lm-eval`` package and checked by hash;
- ``model/``: a tiny Llama checkpoint that has learned the right answer to a known part of the
  questions and a wrong answer to all others, so that its score is known before it is measured;
- ``untrained/``: the same model with random weights, which scores as chance does;
- ``expected.json``: the scores of ``model``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from slurmeval.config.resolve import demo_dir
from slurmeval.errors import ConfigError, SlurmevalError

#: Raised whenever the directory's content changes, so that older ones are made anew.
VERSION = 1
SOURCE = "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
SOURCE_SHA256 = "081478485b1d4f51e01305e19113f0e3a468f2dc787596386998e229a97b096c"
CHOICE_TASK = "slurmeval_demo_choice"
GENERATE_TASK = "slurmeval_demo_generate"

LETTERS = "ABCD"
#: As many questions for each letter, so that a model that always says the same letter scores 1/4.
QUESTIONS_PER_LETTER = 16
MAX_ANSWER_WORDS = 8
#: The part of the questions to which the model has learned the right answer, for each task.
CHOICE_SCORE = 0.75
GENERATE_SCORE = 0.625

# Jinja, rendered here for the training and by lm-eval for the evaluation.
CHOICE_PROMPT = """\
{{question}}
{% for choice in choices %}{{'ABCD'[loop.index0]}}. {{choice}}
{% endfor %}Answer:"""
GENERATE_PROMPT = """\
Question: {{question}}
Options: {{choices|join('; ')}}
Answer:"""

_QUESTION = re.compile(
    r"Q: ([^\n]+)\n\(A\) (.+?) \(B\) (.+?) \(C\) (.+?) \(D\) ([^\n]+)\n"
    r"A: Let's think step by step\.(?:(?!\nQ: ).)*?The answer is \(([ABCD])\)",
    re.DOTALL,
)
#: Left out so that the demo can be shown to anybody.
_LEFT_OUT = frozenset({"human_sexuality"})

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """One multiple-choice question; ``answer`` is the index of the right choice."""

    subject: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int

    @property
    def length(self) -> int:
        """Length in characters, question and choices together."""
        return len(self.question) + sum(map(len, self.choices))


def directory() -> Path:
    """Return where the demo lives, the place that ``${demo:…}`` of a config means."""
    return demo_dir(os.environ).absolute()


def read_source() -> str:
    """Return the file of questions that the installed ``lm_eval`` package carries.

    Raises:
        ConfigError: The package is not installed, or the file is missing or another one.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the demo takes its questions from the package nvidia-lm-eval, which is not installed",
            hint="install it: pip install 'slurmeval[serve,eval]'",
        )
    path = Path(next(iter(spec.submodule_search_locations))) / SOURCE
    if not path.is_file():
        raise ConfigError(
            f"the installed lm_eval package has no {SOURCE}",
            hint="install the one that has: pip install 'nvidia-lm-eval==26.3'",
        )
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != SOURCE_SHA256:
        raise ConfigError(
            f"{path} is not the file the demo knows: sha256 {found}, expected {SOURCE_SHA256}",
            hint="install the version that has it: pip install 'nvidia-lm-eval==26.3'",
        )
    return data.decode()


def parse(source: str) -> list[Question]:
    """Return the well-formed questions: one line of plain text, four different short choices."""
    found = []
    for subject, text in json.loads(source).items():
        if subject in _LEFT_OUT:
            continue
        for match in _QUESTION.finditer(text):
            words, a, b, c, d = (" ".join(part.split()) for part in match.groups()[:5])
            if _well_formed(words, (a, b, c, d)):
                answer = LETTERS.index(match.group(6))
                found.append(Question(subject, words, (a, b, c, d), answer))
    return found


def _well_formed(question: str, choices: Sequence[str]) -> bool:
    text = question + "".join(choices)
    return (
        all((question, *choices))
        and text.isascii()
        and text.isprintable()
        and len(set(choices)) == len(choices)
        and max(len(choice.split()) for choice in choices) <= MAX_ANSWER_WORDS
    )


def select(questions: Sequence[Question]) -> list[Question]:
    """Return the shortest questions, equally many for each letter, the letters taking turns.

    Raises:
        ConfigError: There are too few questions for a letter.
    """
    ordered = sorted(questions, key=lambda q: (q.length, q.question, q.choices))
    by_letter = [
        [q for q in ordered if q.answer == answer][:QUESTIONS_PER_LETTER]
        for answer in range(len(LETTERS))
    ]
    if any(len(group) < QUESTIONS_PER_LETTER for group in by_letter):
        raise ConfigError(f"too few well-formed questions in {SOURCE}")
    return [question for turn in zip(*by_letter, strict=True) for question in turn]


def learned_answers(questions: Sequence[Question], score: float) -> list[int]:
    """Return the answer the model is to learn for each question.

    The first ``score`` of them are right; each of the others is the letter after the right one.

    Raises:
        ValueError: ``score`` is not a whole number of questions.
    """
    known = score * len(questions)
    if known != int(known):
        raise ValueError(f"{score} of {len(questions)} questions is not a whole number")
    return [
        q.answer if i < known else (q.answer + 1) % len(LETTERS) for i, q in enumerate(questions)
    ]


def expected(questions: Sequence[Question]) -> dict[str, dict[str, float | int]]:
    """Return what the trained model must score, by task."""
    samples = len(questions)
    return {
        CHOICE_TASK: {"acc": CHOICE_SCORE, "samples": samples},
        GENERATE_TASK: {"exact_match": GENERATE_SCORE, "samples": samples},
    }


def prompts(questions: Sequence[Question], template: str) -> list[str]:
    """Return each question as lm-eval shows it to the model."""
    from jinja2 import Environment, StrictUndefined

    compiled = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        template
    )
    return [compiled.render(asdict(question)) for question in questions]


def lessons(questions: Sequence[Question]) -> list[tuple[str, str]]:
    """Return all (prompt, answer) pairs that the model learns."""
    letters = learned_answers(questions, CHOICE_SCORE)
    texts = learned_answers(questions, GENERATE_SCORE)
    return [
        *zip(prompts(questions, CHOICE_PROMPT), (f" {LETTERS[i]}" for i in letters), strict=True),
        *zip(
            prompts(questions, GENERATE_PROMPT),
            (f" {q.choices[i]}" for q, i in zip(questions, texts, strict=True)),
            strict=True,
        ),
    ]


def task_files(questions: Sequence[Question], tasks_dir: Path) -> dict[str, str]:
    """Return the files of the two tasks, as they are when ``tasks_dir`` is where they lie."""
    data = "questions.jsonl"
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks_dir / data)}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": VERSION},
    }
    choice = common | {
        "task": CHOICE_TASK,
        "output_type": "multiple_choice",
        "doc_to_text": CHOICE_PROMPT,
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    generate = common | {
        "task": GENERATE_TASK,
        "output_type": "generate_until",
        "doc_to_text": GENERATE_PROMPT,
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {
            "until": ["\n"],
            "do_sample": False,
            "max_gen_toks": 2 * MAX_ANSWER_WORDS,
        },
        "filter_list": [
            {
                "name": "none",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    return {
        data: "".join(json.dumps(asdict(question)) + "\n" for question in questions),
        f"{CHOICE_TASK}.yaml": _yaml(choice),
        f"{GENERATE_TASK}.yaml": _yaml(generate),
    }


def _yaml(value: dict[str, Any]) -> str:
    """Return YAML for people: text of several lines stands as such."""

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if len(value.splitlines()) > 1 else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump(value, Dumper=Dumper, sort_keys=False)


def stamp(target: Path) -> dict[str, Any]:
    """Return what must be equal for a directory to be used again."""
    return {"version": VERSION, "source_sha256": SOURCE_SHA256, "directory": str(target)}


def is_made(target: Path) -> bool:
    """Tell whether ``target`` holds a complete demo of this version, made at this place."""
    try:
        return bool(json.loads((target / "stamp.json").read_text()) == stamp(target))
    except (OSError, ValueError):
        return False


def make(target: Path | None = None, progress: Progress = print) -> Path:
    """Make the demo directory, or leave it as it is when it is there already.

    Args:
        target: Where; ``directory()`` by default.
        progress: Called with one line for each step.

    Returns:
        The absolute path of the directory.

    Raises:
        ConfigError: A package is missing, or ``target`` holds something else.
        SlurmevalError: The model did not learn the questions.
    """
    target = (target or directory()).expanduser().absolute()
    if is_made(target):
        progress(f"demo: {target} is there already")
        return target
    _check_replaceable(target)
    questions = select(parse(read_source()))
    progress(f"demo: {len(questions)} MMLU questions from nvidia-lm-eval")
    from slurmeval import demo_model

    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write_tasks(questions, building / "tasks", target / "tasks")
        demo_model.build(lessons(questions), building, progress)
        _write_json(building / "expected.json", expected(questions))
        _write_json(building / "stamp.json", stamp(target))
        building.chmod(0o755)
        _replace(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    progress(f"demo: ready in {target}")
    return target


def _check_replaceable(target: Path) -> None:
    """Refuse to replace what this module has not made."""
    if not target.exists() or (target / "stamp.json").is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise ConfigError(
            f"{target} exists and is not a demo directory",
            hint="name another directory, or move this one away",
        )


def _write_tasks(questions: Sequence[Question], folder: Path, final: Path) -> None:
    folder.mkdir()
    for name, text in task_files(questions, final).items():
        (folder / name).write_text(text)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _replace(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``, which is never there by half."""
    old = new.with_name(new.name + "-old")
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def main(arguments: Sequence[str]) -> int:
    """Run ``python -m slurmeval.demo [DIR]`` and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m slurmeval.demo", description="Make the demo's model and benchmarks."
    )
    parser.add_argument(
        "dir",
        nargs="?",
        type=Path,
        help="where (default: $SLURMEVAL_DEMO, or ~/.cache/slurmeval/demo)",
    )
    target = parser.parse_args(arguments).dir
    started = time.monotonic()

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - started:5.1f}s] {line}", flush=True)

    try:
        make(target, progress)
    except SlurmevalError as error:
        print(f"Error: {error.format_message()}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
