"""From a configuration to a plan."""

import json

import pytest
from pydantic import ValidationError

from slurmeval import deploy
from slurmeval.config.schema import Config
from slurmeval.errors import ConfigError
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


def test_more_gpus_than_the_nodes_have_is_an_error_with_the_numbers():
    with pytest.raises(ConfigError, match=r"num_gpus=16.*1 node\(s\) x 8 GPUs.*are 8") as caught:
        make_plan(config(deploy={"num_gpus": 16}, run={"env": {"nodes": 1, "gpus_per_node": 8}}))
    assert "nodes=2" in caught.value.hint


def test_idle_gpus_are_a_warning():
    plan = make_plan(config(run={"env": {"nodes": 2, "gpus_per_node": 8}}))
    assert plan.warnings[0] == "8 of 16 GPUs stay idle; 1 of 2 nodes would do (run.env.nodes=1)"
    assert plan.gpus_per_node == 8


def test_megatron_without_gpus_is_refused():
    with pytest.raises(ConfigError, match="needs GPUs"):
        make_plan(config(deploy={"num_gpus": 0}))


def test_every_node_gets_cpus_for_its_ranks_its_replicas_and_serve():
    plan = make_plan(config(deploy={"num_gpus": 8, "num_replicas": 2, "num_cpus_per_replica": 4}))
    assert plan.cpus_per_node == 8 + 2 * 4 + 2


def test_a_node_may_hold_all_ranks_where_gpus_are_left_over():
    plan = make_plan(config(deploy={"num_gpus": 8}, run={"env": {"nodes": 2, "gpus_per_node": 8}}))
    assert plan.cpus_per_node == 8 + 8 + 2


def test_a_profiles_cpus_are_rays_where_they_are_enough():
    assert make_plan(config(run={"env": {"cpus_per_node": 96}})).cpus_per_node == 96


@pytest.mark.parametrize("key", ["cpus_per_node", "cpus_per_task"])
def test_too_few_cpus_are_a_warning_with_the_numbers(key):
    plan = make_plan(config(run={"env": {key: 4}}))
    (warning,) = [line for line in plan.warnings if key in line]
    assert f"{key}=4" in warning and "18 CPUs" in warning
    assert plan.cpus_per_node == 18


def test_requests_beyond_what_the_replicas_take_are_a_warning():
    own = {**TASK, "params": {"parallelism": 40}}
    plan = make_plan(
        config(
            deploy={"num_gpus": 8, "num_replicas": 2, "max_ongoing_requests": 10},
            eval={"tasks": [own], "parallelism": 8},
        )
    )
    (warning,) = [line for line in plan.warnings if "queues" in line]
    assert "sends 40 requests" in warning and "take 20" in warning


def test_a_benchmarks_own_parallelism_counts():
    own = {**TASK, "params": {"parallelism": 100}}
    assert make_plan(config(eval={"tasks": [own]})).max_ongoing_requests >= 100


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
    assert task.params["extra"]["tokenizer"] == "/ckpt/iter_0000100/tokenizer"


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


@pytest.mark.parametrize("image", ["nemo.sqsh", "./nemo", "~/nemo.sqsh"])
def test_images_by_a_relative_path_are_refused(image):
    with pytest.raises(ConfigError, match="relative path"):
        make_plan(config(run={"env": {"container": image}}))


def test_what_pyxis_cannot_mount_is_refused_by_name():
    with pytest.raises(ConfigError, match="a:b"):
        make_plan(
            config(
                model={"checkpoint_path": "/lustre/a:b"},
                run={"env": {"container": "/i.sqsh"}},
            )
        )
    with pytest.raises(ConfigError, match="holds a space"):
        make_plan(
            config(
                eval={"tasks": [{**TASK, "container": "an image"}]},
                run={"env": {"container": "/i.sqsh"}},
            )
        )


@pytest.mark.parametrize(("special", "warned"), [(("BOS", "EOS"), True), (("BOS",), False)])
def test_a_tokenizer_that_spoils_scores_is_a_warning_for_those_that_it_spoils(
    tmp_path, special, warned
):
    pieces = [{"SpecialToken": {"id": name}} for name in special]
    single = [*pieces[:1], {"Sequence": {"id": "A"}}, *pieces[1:]]
    processor = {"type": "TemplateProcessing", "single": single}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"post_processor": processor}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    names = ({"name": "piqa"}, {"name": "adlr_mmlu_pro_5_shot_base"})
    plan = make_plan(
        config(
            model={"checkpoint_path": str(tmp_path)},
            deploy={"backend": "hf", "num_gpus": 1},
            eval={"tasks": list(names)},
        )
    )
    found = [warning for warning in plan.warnings if "loglikelihood scores are wrong" in warning]
    assert [warning.startswith("piqa: the tokenizer adds 1") for warning in found] == [
        True
    ] * warned


@pytest.mark.parametrize("sign", [" ", "\t", '"', "$", "`", "\\", ","])
@pytest.mark.parametrize(
    "key", ["mounts", "node_tmp", "remote_job_dir", "hf_home", "checkpoint_path", "output_dir"]
)
def test_what_pyxis_would_misread_or_run_is_refused_by_name(key, sign):
    path = f"/a{sign}b"
    sections = {"run": {"env": {"container": "registry.example/image:1"}}}
    if key == "checkpoint_path":
        sections["model"] = {key: path, "tokenizer": "org/name"}
    elif key == "output_dir":
        sections["eval"] = {"execution": {key: path}}
    else:
        sections["run"]["env"][key] = [f"{path}:/c"] if key == "mounts" else path
    if (key, sign) == ("mounts", ","):
        with pytest.raises(ValidationError, match="mounts"):
            config(**sections)
        return
    with pytest.raises(ConfigError, match="pyxis cannot mount") as caught:
        make_plan(config(**sections))
    assert key in str(caught.value)
    sections["run"]["env"]["container_runtime"] = "none"
    make_plan(config(**sections))


def test_results_outside_the_job_directory_are_mounted():
    sections = {"eval": {"execution": {"output_dir": "/lustre/results"}}}
    assert "/lustre/results:/lustre/results" in make_plan(config(**sections)).mounts
    assert not any("eval_results" in mount for mount in make_plan(config()).mounts)


@pytest.mark.parametrize(
    ("gpus", "replicas", "share", "wrong"),
    [
        (1, 2, 0.5, None),
        (2, 3, 0.5, None),
        (8, 2, 1, None),
        (4, 3, 1, None),
        (2, 2, 4, "num_gpus_per_replica=4 x deploy.num_replicas=2 is more than deploy.num_gpus=2"),
        (2, 5, 0.5, "num_gpus_per_replica=0.5 x deploy.num_replicas=5 is more"),
    ],
)
def test_a_replica_has_the_gpus_that_it_is_given(gpus, replicas, share, wrong):
    made = config(
        deploy={
            "backend": "hf",
            "num_gpus": gpus,
            "num_replicas": replicas,
            "num_gpus_per_replica": share,
        }
    )
    if wrong is None:
        make_plan(made)
        assert deploy.gpus_of_replica(made.deploy.model_dump()) == share
        return
    with pytest.raises(ConfigError, match=wrong) as caught:
        make_plan(made)
    assert "nearest that works" in str(caught.value.hint)
