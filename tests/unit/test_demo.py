"""The demo's questions, lessons, tasks and directory; nothing here needs torch or lm_eval."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from slurmeval import demo, demo_model
from slurmeval.errors import ConfigError

SOURCE = {
    "gardening": (
        "The following are multiple choice questions (with answers) about gardening.\n"
        "\n"
        "Q: Which of these  is a tool?\n"
        "(A) tulip (B) spade (C) rain (D) soil\n"
        "A: Let's think step by step. A spade is made to dig.\n"
        "So it is one. The answer is (B).\n"
        "\n"
        "Q: What do roots take up?\n"
        "(A) light (B) sound (C) wind (D) water\n"
        "A: Let's think step by step. Roots drink. The answer is (D).\n"
        "\n"
        "Q: A question without an answer\n"
        "(A) a (B) b (C) c (D) d\n"
        "A: Let's think step by step. Who knows.\n"
        "\n"
        "Q: Two equal choices\n"
        "(A) a (B) a (C) c (D) d\n"
        "A: Let's think step by step. Either. The answer is (A).\n"
        "\n"
        "Q: A choice with far too many words\n"
        "(A) one two three four five six seven eight nine (B) b (C) c (D) d\n"
        "A: Let's think step by step. The long one. The answer is (A).\n"
        "\n"
        "Q: Not plain: \u03c0\n"
        "(A) a (B) b (C) c (D) d\n"
        "A: Let's think step by step. Greek. The answer is (C).\n"
        "\n"
        "Q: What comes after all these?\n"
        "(A) the end (B) b (C) c (D) d\n"
        "A: Let's think step by step. The end. The answer is (A)."
    )
}


def questions(per_letter: int = demo.QUESTIONS_PER_LETTER) -> list[demo.Question]:
    """Return made-up questions, the answers taking turns."""
    return [
        demo.Question("made", f"Question {i}?", (f"w{i}", f"x{i}", f"y{i}", f"z{i}"), i % 4)
        for i in range(4 * per_letter)
    ]


def fake_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    package = tmp_path / "site" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    if content is not None:
        source = package / demo.SOURCE
        source.parent.mkdir(parents=True)
        source.write_bytes(content)
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


def test_parse_keeps_what_is_well_formed_and_nothing_else() -> None:
    assert demo.parse(json.dumps(SOURCE)) == [
        demo.Question(
            "gardening", "Which of these is a tool?", ("tulip", "spade", "rain", "soil"), 1
        ),
        demo.Question(
            "gardening", "What do roots take up?", ("light", "sound", "wind", "water"), 3
        ),
        demo.Question("gardening", "What comes after all these?", ("the end", "b", "c", "d"), 0),
    ]


def test_select_takes_the_shortest_of_each_letter_in_turn() -> None:
    many = questions(per_letter=demo.QUESTIONS_PER_LETTER + 3)
    long = demo.Question("made", "A very long question " * 9, ("a", "b", "c", "d"), 0)
    chosen = demo.select([long, *reversed(many)])
    assert len(chosen) == 64
    assert [q.answer for q in chosen] == [0, 1, 2, 3] * 16
    assert long not in chosen
    assert chosen == demo.select([*many, long]), "the order of the source does not matter"


def test_select_says_when_there_are_too_few() -> None:
    with pytest.raises(ConfigError, match="too few"):
        demo.select(questions(per_letter=3))


@pytest.mark.parametrize("score", [demo.CHOICE_SCORE, demo.GENERATE_SCORE, 0.0, 1.0])
def test_learned_answers_are_right_for_exactly_the_known_part(score: float) -> None:
    asked = questions()
    learned = demo.learned_answers(asked, score)
    right = [answer == q.answer for answer, q in zip(learned, asked, strict=True)]
    assert sum(right) / len(asked) == score
    assert right == sorted(right, reverse=True)
    assert Counter(learned) == dict.fromkeys(range(4), 16), "no letter is favoured"


def test_a_score_between_two_questions_is_refused() -> None:
    with pytest.raises(ValueError, match="whole number"):
        demo.learned_answers(questions(), 0.7)


def test_the_two_expected_scores_are_known_and_differ() -> None:
    assert demo.expected(questions()) == {
        "slurmeval_demo_choice": {"acc": 0.75, "samples": 64},
        "slurmeval_demo_generate": {"exact_match": 0.625, "samples": 64},
    }


def test_lessons_are_the_prompts_that_the_tasks_show(tmp_path: Path) -> None:
    asked = questions()
    lessons = demo.lessons(asked)
    assert len(lessons) == 128
    assert lessons[1] == (
        "Question 1?\nA. w1\nB. x1\nC. y1\nD. z1\nAnswer:",
        " B",
    )
    assert lessons[63][1] == " A", "the last of the choices is deliberately wrong: D is right"
    assert lessons[65] == ("Question: Question 1?\nOptions: w1; x1; y1; z1\nAnswer:", " x1")
    assert lessons[127][1] == " w63"
    assert len({prompt for prompt, _ in lessons}) == 128
    files = demo.task_files(asked, tmp_path)
    assert yaml.safe_load(files["slurmeval_demo_choice.yaml"])["doc_to_text"] == demo.CHOICE_PROMPT
    assert (
        yaml.safe_load(files["slurmeval_demo_generate.yaml"])["doc_to_text"] == demo.GENERATE_PROMPT
    )


def test_task_files_name_local_data_and_run_no_code(tmp_path: Path) -> None:
    asked = questions()
    files = demo.task_files(asked, tmp_path / "tasks")
    rows = [json.loads(line) for line in files["questions.jsonl"].splitlines()]
    assert len(rows) == 64
    assert rows[5]["answer"] == asked[5].answer
    assert rows[5]["choices"] == list(asked[5].choices)
    for name in (demo.CHOICE_TASK, demo.GENERATE_TASK):
        task = yaml.safe_load(files[f"{name}.yaml"])
        assert task["task"] == name
        assert task["dataset_path"] == "json"
        assert task["dataset_kwargs"] == {
            "data_files": {"test": str(tmp_path / "tasks" / "questions.jsonl")}
        }
        assert "!function" not in files[f"{name}.yaml"]


def test_words_give_back_the_text() -> None:
    text = "Two  spaces\nand (brackets), end."
    assert demo_model.words([text]) == sorted(
        {"\n", " ", "Two", " spaces", "and", " (brackets),", " end."}
    )


def test_the_source_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="nvidia-lm-eval, which is not installed"):
        demo.read_source()


def test_another_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_lm_eval(tmp_path, monkeypatch, b"{}")
    with pytest.raises(ConfigError, match="is not the file the demo knows: sha256 44136fa3"):
        demo.read_source()


def test_a_package_without_the_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_lm_eval(tmp_path, monkeypatch, None)
    with pytest.raises(ConfigError, match="has no tasks/mmlu"):
        demo.read_source()


class Builder(ModuleType):
    """Stands for ``demo_model``, whose build takes torch and seconds."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("demo_model")
        self.error = error
        self.calls = 0

    def build(self, lessons: list[Any], folder: Path, progress: demo.Progress) -> None:
        self.calls += 1
        (folder / "model").mkdir()
        if self.error:
            raise self.error


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    fake = Builder()
    monkeypatch.setattr(demo, "read_source", lambda: json.dumps({}))
    monkeypatch.setattr(demo, "parse", lambda source: questions())
    monkeypatch.setattr(demo_model, "build", fake.build)
    return fake


def test_make_writes_all_and_the_second_call_nothing(tmp_path: Path, builder: Builder) -> None:
    target = tmp_path / "a" / "demo"
    lines: list[str] = []
    assert demo.make(target, lines.append) == target
    assert {path.name for path in target.iterdir()} == {
        "tasks",
        "model",
        "expected.json",
        "stamp.json",
    }
    assert json.loads((target / "expected.json").read_text()) == demo.expected(questions())
    task = yaml.safe_load((target / "tasks" / "slurmeval_demo_choice.yaml").read_text())
    assert Path(task["dataset_kwargs"]["data_files"]["test"]).is_file(), "the final path"
    assert [path.name for path in target.parent.iterdir()] == ["demo"], "nothing else is left"
    assert target.stat().st_mode & 0o777 == 0o755
    demo.make(target, lines.append)
    assert builder.calls == 1
    assert lines[-1].endswith("is there already")


def test_a_demo_of_another_version_or_place_is_made_anew(
    tmp_path: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = demo.make(tmp_path / "demo", lambda line: None)
    (target / "old").touch()
    monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    demo.make(target, lambda line: None)
    assert builder.calls == 2
    assert not (target / "old").exists()
    moved = target.rename(tmp_path / "moved")
    assert not demo.is_made(moved), "its tasks name the files of the old place"


def test_a_failure_leaves_what_was_there(tmp_path: Path, builder: Builder) -> None:
    target = demo.make(tmp_path / "demo", lambda line: None)
    (target / "stamp.json").write_text("{}")
    builder.error = RuntimeError("no luck")
    with pytest.raises(RuntimeError, match="no luck"):
        demo.make(target, lambda line: None)
    assert (target / "expected.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_directory_of_somebody_else_is_not_touched(tmp_path: Path, builder: Builder) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not a demo directory"):
        demo.make(tmp_path, lambda line: None)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert builder.calls == 0


def test_main_prints_a_line_for_each_step_and_returns_exit_codes(
    tmp_path: Path, builder: Builder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main([str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("demo: 64 MMLU questions from nvidia-lm-eval")
    assert out[-1].endswith(f"demo: ready in {tmp_path / 'demo'}")
    with pytest.raises(SystemExit, match="2"):
        demo.main(["one", "two"])
    assert capsys.readouterr().err.startswith("usage: python -m slurmeval.demo")
    (tmp_path / "file").touch()
    assert demo.main([str(tmp_path / "file")]) == 2
    assert "is not a demo directory" in capsys.readouterr().err


def test_the_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMEVAL_DEMO", "/data/demo")
    assert demo.directory() == Path("/data/demo")
    monkeypatch.delenv("SLURMEVAL_DEMO")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert demo.directory() == Path("/cache/slurmeval/demo")


def test_the_model_names_the_package_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match="needs the package torch"):
        demo_model.build([("Q", " A")], tmp_path, lambda line: None)
