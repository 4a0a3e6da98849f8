"""Benchmarks of a configuration: parameters checked and merged, own tasks shipped, put in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slurmeval.config.schema import Config
from slurmeval.errors import ConfigError
from slurmeval.plan import make_plan
from slurmeval.taskplan import TaskPlan, check_value, peak_requests, plan_tasks

LM = "lm-evaluation-harness"


def planned(tasks: list[dict[str, Any]], here: Path | None = None, **sections: Any) -> TaskPlan:
    values = {
        "model": {"checkpoint_path": "/ckpt/iter_0000100", **sections.pop("model", {})},
        "deploy": {"num_gpus": 8, **sections.pop("deploy", {})},
        "run": {"env": sections.pop("env", {})},
        "eval": {"tasks": tasks, **sections},
    }
    return plan_tasks(Config.model_validate(values), here)


def one(task: dict[str, Any], **sections: Any) -> Any:
    return planned([task], **sections).tasks[0]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"extra": {"num_fewshots": 5}}, 'did you mean "num_fewshot"'),
        ({"extra": {"judge": {"url": "http://x"}}}, "extra.judge: this benchmark has no such"),
        ({"extra": {"temperature": 1}}, "extra.temperature"),
    ],
)
def test_unknown_parameters_of_a_known_benchmark_are_refused(params, words):
    with pytest.raises(ConfigError) as caught:
        one({"name": "hellaswag", "params": params})
    assert words in caught.value.format_message()
    assert "check_extra: false" in caught.value.format_message()


def test_an_own_task_of_a_known_harness_is_checked_too():
    with pytest.raises(ConfigError, match="num_shots"):
        one({"name": "mine", "type": f"{LM}.mine", "params": {"extra": {"num_shots": 1}}})


def test_a_parameter_that_the_harness_does_not_use_is_refused():
    with pytest.raises(ConfigError, match=r"params\.request_timeout"):
        one({"name": "tooltalk", "params": {"request_timeout": 30}})


def test_an_own_harness_and_an_own_image_take_what_they_like():
    mine = one({"name": "mine", "type": "quiz.sums", "params": {"extra": {"largest": 9}}})
    assert mine.params["extra"] == {"largest": 9}
    patched = {"name": "hellaswag", "check_extra": False, "params": {"extra": {"patched": 1}}}
    assert one(patched).params["extra"]["patched"] == 1


def test_what_eval_sets_for_all_reaches_those_that_have_it_and_the_rest_is_said():
    plan = planned(
        [{"name": "hellaswag"}, {"name": "tooltalk"}],
        extra={"num_fewshot": 3},
        request_timeout=99,
    )
    hellaswag, tooltalk = plan.tasks
    assert hellaswag.params["extra"]["num_fewshot"] == 3
    assert hellaswag.params["request_timeout"] == 99
    assert "extra" not in tooltalk.params and "request_timeout" not in tooltalk.params
    assert any("tooltalk: no parameter num_fewshot" in note for note in plan.notes)


def test_a_limit_of_samples_that_a_benchmark_cannot_have_is_said():
    plan = planned([{"name": "genai_perf_generation"}], limit_samples=10, env={})
    assert any("no parameter limit_samples" in note for note in plan.notes)


def test_an_extra_that_no_benchmark_has_is_refused():
    with pytest.raises(ConfigError, match=r"eval\.extra\.fewshot"):
        planned([{"name": "hellaswag"}], extra={"fewshot": 1})


@pytest.mark.parametrize(
    ("task", "model", "words"),
    [
        ({}, {"tokenizer": "/with space/tok"}, "the tokenizer"),
        ({}, {"tokenizer": "/a,b"}, "','"),
        ({}, {"model_id": "a b"}, "model.model_id"),
        ({"include_path": "/my tasks", "type": f"{LM}.mine"}, {}, "include_path"),
        ({"params": {"extra": {"tokenizer": "/a b"}}}, {}, "extra.tokenizer"),
    ],
)
def test_paths_that_break_the_harness_are_refused_by_name(task, model, words):
    with pytest.raises(ConfigError) as caught:
        one({"name": "hellaswag", **task}, model=model)
    assert words in caught.value.format_message()


@pytest.mark.parametrize(
    "text", ["$(touch x)", "`touch x`", "a; b", 'a"b', "a\nb", "a|b", "a\\b", "{{ config }}", "a&b"]
)
@pytest.mark.parametrize("key", ["args", "tokenizer_backend"])
def test_text_that_a_shell_would_run_is_refused_by_name(text, key):
    if (key, text) == ("args", 'a"b'):
        text = 'a "b'  # quotes are for several words, and have to close
    with pytest.raises(ConfigError, match=rf"extra\.{key}"):
        one({"name": "hellaswag", "params": {"extra": {key: text}}})


def test_arguments_may_hold_words_in_quotes():
    text = "--system_instruction 'Be brief.' --apply_chat_template"
    assert one({"name": "hellaswag", "params": {"extra": {"args": text}}}).params["extra"][
        "args"
    ] == (text)


def test_endpoints_that_are_not_served_or_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="another kind"):
        one({"name": "ocrbench"})
    with pytest.raises(ConfigError, match="works with completions, not chat"):
        one({"name": "hellaswag", "endpoint_type": "chat"})


def test_a_type_has_one_dot():
    with pytest.raises(ConfigError, match="more than one dot"):
        one({"name": "mine", "type": f"{LM}.my.task"})


def test_images_and_digests():
    env = {"container": "/images/nemo.sqsh"}
    known = one({"name": "hellaswag"}, env=env)
    assert known.image.endswith("lm-evaluation-harness:26.03")
    assert known.digest.startswith("sha256:")
    other = one({"name": "hellaswag", "container": "/images/mine.sqsh"}, env=env)
    assert (other.image, other.digest) == ("/images/mine.sqsh", None)
    assert one({"name": "hellaswag"}).image is None


def test_the_tokenizer_reaches_every_harness_that_takes_one():
    assert one({"name": "hellaswag"}).params["extra"]["tokenizer_backend"] == "huggingface"
    ruler = one({"name": "ruler-4k-completions"})
    assert ruler.params["extra"] == {"tokenizer": "/ckpt/iter_0000100/tokenizer"}
    assert "extra" not in one({"name": "tooltalk"}).params


def test_an_image_that_takes_more_parameters_still_gets_the_tokenizer():
    more = {"name": "hellaswag", "check_extra": False, "params": {"extra": {"own": 1}}}
    extra = one(more).params["extra"]
    assert (extra["own"], extra["tokenizer"]) == (1, "/ckpt/iter_0000100/tokenizer")


def test_the_same_question_is_asked_again_where_answers_are_sampled():
    assert one({"name": "hellaswag"}).reuse_answers
    assert one({"name": "adlr_humaneval_greedy"}).reuse_answers
    assert not one({"name": "adlr_humaneval_sampled"}).reuse_answers
    assert not one({"name": "hellaswag", "params": {"temperature": 0.7}}).reuse_answers


def test_benchmarks_that_run_what_the_model_writes_are_named():
    assert any(
        "runs the code" in note for note in planned([{"name": "adlr_humaneval_greedy"}]).notes
    )
    assert planned([{"name": "hellaswag"}]).notes == ()


def test_keys_that_a_benchmark_needs_and_nobody_passes_on_are_named():
    (note,) = planned([{"name": "aa_lcr"}]).notes
    assert note == "aa_lcr needs JUDGE_API_KEY in its environment: name it in run.env.secrets"
    assert planned([{"name": "aa_lcr"}], env={"secrets": ["JUDGE_API_KEY"]}).notes == ()


SUITE = [
    {"name": "piqa"},
    {"name": "adlr_mmlu_pro_5_shot_base"},
    {"name": "truthfulqa"},
    {"name": "hellaswag"},
]


def test_at_once_run_those_that_send_the_same_kind_of_request_the_longest_first():
    plan = planned(SUITE, concurrency=2)
    assert [(task.name, task.group) for task in plan.tasks] == [
        ("hellaswag", "logprobs"),
        ("piqa", "logprobs"),
        ("adlr_mmlu_pro_5_shot_base", "-"),
        ("truthfulqa", "-"),
    ]
    (note,) = plan.notes
    assert "run alone: adlr_mmlu_pro_5_shot_base, truthfulqa" in note
    assert "batches" in note


def test_what_a_benchmark_asks_for():
    asks = {task.name: task.asks for task in planned(SUITE).tasks}
    assert asks == {
        "piqa": "loglikelihood",
        "hellaswag": "loglikelihood",
        "adlr_mmlu_pro_5_shot_base": "generation",
        "truthfulqa": None,
    }
    assert one({"name": "mine", "type": f"{LM}.mine"}).asks is None


def test_where_the_endpoint_answers_each_request_by_itself_all_may_run_at_once():
    for deploy in ({"backend": "hf"}, {"max_batch_size": 1}):
        plan = planned(SUITE, concurrency=2, deploy=deploy)
        assert {task.group for task in plan.tasks} == {"any"}
        assert plan.notes == ()


def test_one_by_one_the_order_is_the_users():
    plan = planned(SUITE)
    assert [task.name for task in plan.tasks] == [task["name"] for task in SUITE]
    assert plan.notes == ()


def test_a_limit_of_samples_makes_a_long_benchmark_short():
    tasks = [{"name": "hellaswag", "params": {"limit_samples": 10}}, {"name": "piqa"}]
    assert [t.name for t in planned(tasks, concurrency=2).tasks] == ["piqa", "hellaswag"]
    tasks = [{"name": "hellaswag", "params": {"limit_samples": 0.5}}, {"name": "piqa"}]
    assert [t.name for t in planned(tasks, concurrency=2).tasks] == ["hellaswag", "piqa"]


def test_the_endpoint_is_made_for_all_that_run_at_once():
    values = {
        "deploy": {"num_gpus": 8},
        "eval": {
            "tasks": [{"name": "piqa", "params": {"parallelism": 7}}, *SUITE[1:]],
            "parallelism": 10,
            "concurrency": 2,
        },
    }
    config = Config.model_validate(values)
    assert peak_requests(config) == 20
    assert make_plan(config).max_ongoing_requests >= 20


def test_data_sets_offline_where_a_cache_is_given():
    def environment(**env: Any) -> dict[str, str]:
        values = {"deploy": {"num_gpus": 8}, "eval": {"tasks": [{"name": "piqa"}]}}
        return make_plan(Config.model_validate({**values, "run": {"env": env}})).environment

    assert environment() == {}
    given = environment(hf_home="/lustre/hf")
    assert given == {
        "HF_HOME": "/lustre/hf",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    online = environment(hf_home="/lustre/hf", env_vars={"HF_HUB_OFFLINE": "0"})
    assert online["HF_HUB_OFFLINE"] == "0"


def test_text_in_lists_is_checked_too():
    with pytest.raises(ConfigError, match=r"extra\.x\.1 is"):
        check_value("extra.x", "x", ["plain", "it's $(id)"])
