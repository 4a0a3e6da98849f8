from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurmeval.cluster.access import Access
from slurmeval.config.keys import all_keys
from slurmeval.config.layers import leaves
from slurmeval.config.load import shipped_configs
from slurmeval.config.schema import Config, Env, Task, TaskParams
from slurmeval.resources import config_dir
from slurmeval.tasks import find

#: A seed user's file, with every key of the documented structure.
SEED = """\
run:
  model: ModelArtifact-sft:latest
  env:
    container: nvcr.io/nvidian/nemo:25.11-nano-v3.rc2
  comms:
    endpoint_file: endpoint.json
    completion_file: done
model:
  checkpoint_path: ${art:model,path}
  model_type: gpt
deploy:
  host: "0.0.0.0"
  port: 8000
  num_gpus: 8
  tensor_model_parallel_size: 4
  expert_model_parallel_size: 1
  pipeline_model_parallel_size: 1
eval:
  execution:
    hostname: ${run.env.host}
    username: ${run.env.user}
    account: ${run.env.account}
    partition: ${run.env.partition}
    output_dir: ${run.env.remote_job_dir}/eval_results
  export:
    wandb:
      entity: ${run.wandb.entity}
      project: ${run.wandb.project}
  tasks:
    - name: adlr_arc_challenge_llama_25_shot
    - name: adlr_winogrande_5_shot
    - name: hellaswag
    - name: piqa
  parallelism: 32
  max_retries: 5
  request_timeout: 360
"""


def shipped(name: str) -> Any:
    return yaml.safe_load((config_dir() / f"{name}.yaml").read_text(encoding="utf-8"))


def test_default_yaml_holds_every_key_and_the_schemas_defaults():
    given = {path: value for path, value in leaves(shipped("default")) if path[1:2] != ("tasks",)}
    defaults = dict(leaves(Config().model_dump()))
    defaults.pop(("eval", "tasks"))
    defaults.pop(("eval", "export", "wandb"))
    interpolated = {path for path, value in given.items() if "${" in str(value)}
    assert {path: value for path, value in given.items() if path not in interpolated} == {
        path: value for path, value in defaults.items() if path not in interpolated
    }
    assert all(defaults.get(path) is None for path in interpolated)


def test_default_yaml_explains_every_section():
    text = (config_dir() / "default.yaml").read_text()
    for name in Config.model_fields:
        assert re.search(rf"^{name}:", text, re.MULTILINE)
    assert text.count("#") > 60


def test_a_seed_users_file_loads(load_here, refused, project):
    (project / "seed.yaml").write_text(SEED)
    config = load_here("./seed.yaml").config
    assert config.run.env.image == "nvcr.io/nvidian/nemo:25.11-nano-v3.rc2"
    assert config.deploy.host == "0.0.0.0"
    assert config.model.checkpoint_path == "/models/iter_0000100"
    assert "ModelArtifact-sft:latest" in refused("./seed.yaml", model=None)


def test_the_default_is_the_seeds_structure_but_for_the_host(load_here):
    seed, default = yaml.safe_load(SEED), shipped("default")
    seed["deploy"]["host"] = "127.0.0.1"
    seed["run"]["model"] = seed["run"]["env"]["container"] = None
    merged = dict(leaves(default))
    assert {path: merged[path] for path, _ in leaves(seed)} == dict(leaves(seed))


@pytest.mark.parametrize("name", ["default", "pretrain", "sft", "rl", "tiny"])
def test_shipped_configs_load_and_name_known_tasks(load_here, name):
    config = load_here(name).config
    assert config.eval.tasks
    for task in config.eval.tasks:
        assert find(task.name).name == task.name


@pytest.mark.parametrize("name", ["pretrain", "sft", "rl"])
def test_stages_name_their_model(name):
    assert shipped(name)["run"]["model"] == f"ModelArtifact-{name}:latest"


def test_tiny_lays_over_a_stage(load_here):
    config = load_here("sft", "tiny", model=None, resolve_model=False).config
    assert config.run.model == "ModelArtifact-sft:latest"
    assert [task.name for task in config.eval.tasks] == ["piqa"]
    assert config.eval.limit_samples == 100


def test_the_shipped_names():
    assert {"default", "pretrain", "sft", "rl", "tiny"} <= set(shipped_configs())


@pytest.fixture(scope="module")
def page() -> str:
    return (Path(__file__).parents[3] / "docs" / "configuration.md").read_text(encoding="utf-8")


def test_the_docs_name_every_key(page):
    named = set(re.findall(r"`([\w.\[\]]+)`", page))
    keys = {".".join(path) for path in all_keys()}
    keys |= {f"eval.tasks[].{name}" for name in Task.model_fields}
    keys |= {f"eval.tasks[].params.{name}" for name in TaskParams.model_fields}
    assert keys <= named


def test_the_docs_examples_load(load_here, project, page):
    (project / "env.toml").write_text(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])
    (project / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    config = load_here("./mine.yaml", profile="mycluster", environ={"USER": "ann"}).config
    assert config.run.env.host


def test_how_to_get_at_a_cluster_has_the_schemas_defaults():
    assert Access.of(Env()) == Access()
    assert Access.recorded({**asdict(Access(host="here")), "of": "a newer version"}).host == "here"
