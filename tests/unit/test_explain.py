"""A plan in words, tables and JSON, as the command line prints them."""

import io
import json

import pytest
from click.testing import CliRunner
from rich.console import Console

from slurmeval import explain
from slurmeval.cli import cli
from slurmeval.config.schema import Config
from slurmeval.plan import make_plan


def config(deploy, **env):
    return Config.model_validate(
        {
            "run": {"env": env},
            "deploy": deploy,
            "eval": {"tasks": [{"name": "mine", "type": "lm-evaluation-harness.mine"}]},
        }
    )


def told(config):
    plan = make_plan(config)
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    for table in explain.tables(config, plan):
        console.print(table)
    return " ".join(explain.words(config, plan)), stream.getvalue()


TWO_STAGES = {
    "num_gpus": 16,
    "tensor_model_parallel_size": 4,
    "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 8,
}


def test_words_and_table_say_which_node_holds_which_ranks_and_that_this_is_no_promise():
    words, table = told(config(TWO_STAGES, nodes=2, gpus_per_node=8))
    assert "A replica has 16 rank(s)" in words
    assert "8 hold the model once." in words
    assert "expert 8 x expert-tensor 1 x pipeline 2 = 16" in words
    assert "no promise" in words and "rank 0" in words
    first, second = (line for line in table.splitlines() if "replica 1" in line)
    assert "1 of 2" in first and "rank 0-7, pipeline stage 0" in first
    assert "2 of 2" in second and "rank 8-15, pipeline stage 1" in second


def test_idle_nodes_and_gpus_are_counted():
    deploy = {"num_gpus": 4, "tensor_model_parallel_size": 4}
    words, table = told(config(deploy, nodes=3, gpus_per_node=8))
    assert "20 GPU(s) stay idle, 2 node(s) wholly so" in words
    assert [line for line in table.splitlines() if "3 of 3" in line and "0 of 8" in line]


def test_requests_are_set_against_what_replicas_take():
    deploy = {"num_gpus": 8, "num_replicas": 2, "max_ongoing_requests": 20, "max_batch_size": 6}
    words, _ = told(config(deploy))
    assert "sends up to 32 requests at once; 2 replica(s) take 40 (20 each)" in words
    assert "compute up to 6 each" in words


def test_the_hf_backend_has_no_ranks():
    words, table = told(config({"backend": "hf", "num_gpus": 4, "num_replicas": 2}, nodes=2))
    assert "its 2 GPU(s) on one node" in words
    assert "rank" not in table and "no promise" not in words


def test_memory_is_told_where_it_is_known(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/weights").write_bytes(bytes(4000))
    (tmp_path / "more").write_bytes(bytes(96))
    assert explain.size_on_disk(str(tmp_path)) == 4096
    assert explain.size_on_disk("/not/here") is None
    asked = config({"num_gpus": 8}, mem="200G")
    asked.model.checkpoint_path = str(tmp_path)
    words, _ = told(asked)
    assert "200G asked for" in words and "on disk" in words and "each of 4 ranks" in words


def run(*words):
    return CliRunner().invoke(cli, ["plan", *words], env={"COLUMNS": "160"})


def test_the_command_prints_the_plan_without_asking_for_the_model():
    result = run("-c", "sft", "run.env.gpus_per_node=8", "deploy.num_replicas=2")
    assert result.exit_code == 0, result.output
    assert "2 replica(s) on 8 GPU(s)" in result.output
    assert "adlr_winogrande_5_shot" in result.output


def test_json_holds_the_same_facts():
    result = run("-c", "sft", "--json", "run.env.gpus_per_node=8", "run.env.nodes=2")
    facts = json.loads(result.stdout)
    assert facts["nodes"]["idle_gpus"] == 8
    assert facts["model"]["checkpoint"] is None
    assert facts["placement"] == [[{"replica": 0, "ranks": [0, 7]}], []]
    assert facts["placement_is_guaranteed"] is False
    assert facts["replicas"]["copies"] == 2
    assert [task["name"] for task in facts["tasks"]][-1] == "piqa"
    assert any("idle" in line for line in facts["warnings"])


@pytest.mark.parametrize("command", ["plan", "render", "submit"])
def test_plan_render_and_submit_refuse_the_same_sums(command, tmp_path):
    words = [command, "run.model=/ckpt", "deploy.num_gpus=6"]
    if command == "render":
        words += ["-o", str(tmp_path / "job")]
    if command == "submit":
        words += ["--profile", "local", "--dry-run"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2
    assert "does not divide" in str(result.exception) + result.output
    assert not (tmp_path / "job").exists()
