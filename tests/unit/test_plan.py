"""The sums of a plan, against a reading of Export-Deploy's rule by brute force."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurmeval.config.schema import Config, Deploy
from slurmeval.errors import ConfigError
from slurmeval.parallelism import check_parallelism
from slurmeval.plan import make_plan

TASK = {"name": "mine", "type": "lm-evaluation-harness.mine"}


def config(**sections):
    base = {
        "model": {"checkpoint_path": "/ckpt/iter_0000100"},
        "deploy": {"num_gpus": 8},
        "eval": {"tasks": [TASK]},
        "run": {"env": {"nodes": 1}},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return Config.model_validate(base)


sizes = st.sampled_from([1, 2, 3, 4, 8])


@given(st.integers(1, 64), st.integers(1, 4), sizes, sizes, sizes, sizes, sizes)
def test_parallelism_is_accepted_exactly_where_ranks_divide(
    gpus, replicas, tensor, pipeline, context, expert, expert_tensor
):
    deploy = Deploy(
        num_gpus=gpus,
        num_replicas=replicas,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    world = gpus / replicas
    works = (
        world == int(world)
        and any(world == n * tensor * pipeline * context for n in range(1, 65))
        and any(world == n * expert_tensor * expert * pipeline for n in range(1, 65))
    )
    try:
        check_parallelism(deploy)
    except ConfigError:
        assert not works
    else:
        assert works


@given(st.integers(1, 64), st.integers(1, 4), sizes, sizes)
def test_the_hint_names_a_number_of_gpus_that_works(gpus, replicas, tensor, expert):
    deploy = Deploy(
        num_gpus=gpus,
        num_replicas=replicas,
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
    )
    try:
        check_parallelism(deploy)
    except ConfigError as error:
        if "no multiple" in error.message:
            return
        better = int(error.hint.split("=")[1].split()[0])
        check_parallelism(deploy.model_copy(update={"num_gpus": better}))


def test_more_gpus_than_the_nodes_have_is_an_error_with_the_numbers():
    with pytest.raises(ConfigError, match=r"num_gpus=16.*1 node\(s\) x 8 GPUs.*are 8") as caught:
        make_plan(config(deploy={"num_gpus": 16}, run={"env": {"nodes": 1, "gpus_per_node": 8}}))
    assert "nodes=2" in caught.value.hint


def test_idle_gpus_are_a_warning():
    plan = make_plan(config(run={"env": {"nodes": 2, "gpus_per_node": 8}}))
    assert plan.warnings == ("8 of 16 GPUs stay idle",)
    assert plan.gpus_per_node == 8


def test_megatron_without_gpus_is_refused():
    with pytest.raises(ConfigError, match="needs GPUs"):
        make_plan(config(deploy={"num_gpus": 0}))


def test_every_node_gets_cpus_for_its_ranks_its_replicas_and_serve():
    plan = make_plan(config(deploy={"num_gpus": 8, "num_replicas": 2, "num_cpus_per_replica": 4}))
    assert plan.cpus_per_node == 8 + 2 * 4 + 2


def test_serve_takes_more_requests_than_the_evaluator_sends():
    plan = make_plan(config(eval={"tasks": [TASK], "parallelism": 64}))
    assert plan.max_ongoing_requests >= 64


@pytest.mark.parametrize(
    ("wanted", "base", "expected"),
    [
        (None, None, "eval_results"),
        ("/lustre/me/eval_results", "/lustre/me", "eval_results"),
        ("/lustre/me", "/lustre/me", "eval_results"),
        ("/lustre/me/a/b", "/lustre/me", "a/b"),
        ("/scores", "/lustre/me", "/scores"),
        ("results", None, "results"),
    ],
)
def test_results_lie_in_the_jobs_own_directory(wanted, base, expected):
    plan = make_plan(
        config(
            eval={"tasks": [TASK], "execution": {"output_dir": wanted}},
            run={"env": {"remote_job_dir": base}},
        )
    )
    assert plan.output_dir == expected


def test_known_benchmarks_bring_their_type_endpoint_and_image():
    plan = make_plan(
        config(
            eval={"tasks": [{"name": "adlr_winogrande_5_shot"}], "limit_samples": 7},
            run={"env": {"container": "/images/nemo.sqsh"}},
        )
    )
    (task,) = plan.tasks
    assert task.type == "lm-evaluation-harness.adlr_winogrande_5_shot"
    assert task.endpoint == "completions"
    assert task.image is not None and "lm-evaluation-harness" in task.image
    assert task.params["limit_samples"] == 7
    assert task.params["extra"]["tokenizer"] == "/ckpt/iter_0000100"


def test_without_containers_benchmarks_have_no_image():
    (task,) = make_plan(config(eval={"tasks": [{"name": "adlr_winogrande_5_shot"}]})).tasks
    assert task.image is None


def test_a_benchmarks_own_parameters_win():
    own = {**TASK, "params": {"parallelism": 2, "extra": {"num_fewshot": 3}}}
    (task,) = make_plan(
        config(eval={"tasks": [own], "parallelism": 9, "extra": {"num_fewshot": 0}})
    ).tasks
    assert task.params["parallelism"] == 2
    assert task.params["extra"]["num_fewshot"] == 3


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([], "nothing to evaluate"),
        ([TASK, TASK], "there twice"),
        ([{"name": "ray", "type": "a.b"}], "own steps"),
        ([{"name": "hellaswagg"}], "hellaswagg"),
    ],
)
def test_impossible_task_lists_are_refused(tasks, words):
    with pytest.raises(ConfigError, match=words):
        make_plan(config(eval={"tasks": tasks}))


def test_pyxis_mounts_what_the_job_reads_once():
    plan = make_plan(
        config(
            model={"checkpoint_path": "/lustre/ckpt/iter_1", "tokenizer": "/tok"},
            run={"env": {"container": "/i.sqsh", "mounts": ["/lustre", "/data:/d"]}},
        )
    )
    assert plan.mounts == ("/lustre:/lustre", "/data:/d", "/tok:/tok")


def test_the_local_executor_has_one_node():
    with pytest.raises(ConfigError, match="one node"):
        make_plan(config(run={"env": {"executor": "local", "nodes": 2}}))
