"""What ``run.model=NAME:VERSION`` means, with registries that are files."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slurmeval.config.load import load
from slurmeval.config.schema import Config
from slurmeval.errors import ConfigError
from slurmeval.plan import make_plan
from slurmeval.registry.artifact import Artifact, NotInRegistry, Reference
from slurmeval.registry.files import FileRegistry
from slurmeval.registry.lookup import Question, find_artifact
from slurmeval.registry.model import cache_name
from slurmeval.registry.weights_and_biases import referenced_path
from slurmeval.render import names, render, template_environment

FILE = """\
sft:
  v1: /ckpt/sft/iter_0001000
  v2:
    path: /ckpt/sft/iter_0002000
    metadata: {iteration: 2000, data: {tokens: 1.5e9}}
  v10: /ckpt/sft/iter_0010000
  best: v2
rl:
  v1: ~/rl
  latest: v1
  v2: /ckpt/rl
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "artifacts.yaml").write_text(FILE)
    return tmp_path


@pytest.fixture
def registry(project):
    return FileRegistry(project / "artifacts.yaml", "artifacts.yaml")


def resolved(project, model, *overrides, **options):
    return load(
        options.pop("configs", ()),
        profile=options.pop("profile", None),
        overrides=(f"run.model={model}", *overrides),
        cwd=project,
        environ={"HOME": str(project / "home"), **options.pop("environ", {})},
        **options,
    )


# References


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("sft", Reference("sft", "latest")),
        ("sft:v5", Reference("sft", "v5")),
        ("sft:5", Reference("sft", "v5")),
        ("sft:best", Reference("sft", "best")),
        ("proj/sft:v1", Reference("sft", "v1", project="proj")),
        ("team/proj/sft:v1", Reference("sft", "v1", "team", "proj")),
    ],
)
def test_references(text, reference):
    assert Reference.parse(text) == reference


@pytest.mark.parametrize("text", ["a b", "sft:", ":v1", "a/b/c/d:v1", "sft:v1:v2", "$(x)", ""])
def test_what_is_no_reference(text):
    with pytest.raises(ConfigError, match="neither a path nor an artifact"):
        Reference.parse(text)


words = st.from_regex(r"[A-Za-z0-9_.-]+", fullmatch=True)


@given(words, words, words.filter(lambda word: not word.isdigit()))
def test_a_reference_is_written_as_it_is_read(project_name, name, version):
    text = f"{project_name}/{name}:{version}"
    assert str(Reference.parse(text)) == text


# artifacts.yaml


@pytest.mark.parametrize(
    ("name", "version", "concrete", "path"),
    [
        ("sft", "v1", "v1", "/ckpt/sft/iter_0001000"),
        ("sft", "latest", "v10", "/ckpt/sft/iter_0010000"),
        ("sft", "best", "v2", "/ckpt/sft/iter_0002000"),
        ("rl", "latest", "v1", "~/rl"),
    ],
)
def test_versions_and_aliases(registry, name, version, concrete, path):
    artifact = registry.resolve(name, version)
    assert (artifact.version, artifact.path, artifact.download) == (concrete, path, None)


def test_the_source_is_the_line(registry):
    assert registry.resolve("sft", "best").source == "artifacts.yaml:3"


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("stf", "v1", 'has no artifact stf; did you mean "sft"?'),
        ("sft", "v3", "artifacts.yaml:1: sft has no version v3; it has v1, v2, v10, best"),
    ],
)
def test_what_is_not_in_the_file(registry, name, version, message):
    with pytest.raises(NotInRegistry) as caught:
        registry.resolve(name, version)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {v1: v2, v2: v1}", "a.yaml:1: v1 -> v2 -> v1"),
        ("a:\n  v1: 7", "a.yaml:2: a version is an absolute path"),
        ("a:\n  v1: {path: rel/x}", "a.yaml:2: a version is an absolute path"),
        ("a:\n  v1: {path: /x, iteration: 3}", "no iteration"),
        ("a:\n  v1: {path: /x, metadata: 3}", "metadata is a mapping"),
        ("a: /x", "a.yaml:1: a is a mapping of versions"),
        ("- a", "a mapping is expected"),
        ("a: [", "a.yaml:1"),
    ],
)
def test_files_that_are_wrong(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        FileRegistry(tmp_path / "a.yaml", "a.yaml").resolve("a", "v1")
    assert message in caught.value.message


# Which registry


def test_the_file_lies_here_or_above_or_is_the_users_own(project):
    deep = project / "x/y"
    deep.mkdir(parents=True)
    assert find_artifact(Question("sft:v1"), deep, {}).path == "/ckpt/sft/iter_0001000"
    own = project / "config/slurmeval"
    own.mkdir(parents=True)
    (own / "artifacts.yaml").write_text("mine: {v1: /mine}")
    (project / "artifacts.yaml").unlink()
    environ = {"XDG_CONFIG_HOME": str(project / "config")}
    assert find_artifact(Question("mine"), deep, environ).path == "/mine"


def test_the_file_beside_a_named_env_toml_counts_first(project, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "env.toml").touch()
    (shared / "artifacts.yaml").write_text("sft: {v1: /shared}")
    question = Question("sft:v1", env_file=shared / "env.toml")
    assert find_artifact(question, project, {}).path == "/shared"
    environ = {"NEMOTRON_ENV_FILE": str(shared / "env.toml")}
    assert find_artifact(Question("sft:v1"), project, environ).path == "/shared"


def test_a_registry_can_be_named(project):
    (project / "other.yaml").write_text("sft: {v1: /other}")
    question = Question("sft:v1", registry="other.yaml")
    assert find_artifact(question, project, {}).path == "/other"
    with pytest.raises(ConfigError, match=r"no file nowhere\.yaml"):
        find_artifact(Question("sft:v1", registry="nowhere.yaml"), project, {})
    with pytest.raises(ConfigError, match=r"run\.wandb\.project is not set"):
        find_artifact(Question("sft:v1", registry="wandb"), project, {})


# In a configuration


def test_latest_is_pinned_and_recorded(project):
    loaded = resolved(project, "sft")
    config = loaded.config
    assert config.model.checkpoint_path == "/ckpt/sft/iter_0010000"
    assert config.run.model == "sft:v10"
    assert config.run.artifact.requested == "sft:latest"
    assert config.run.artifact.source == "artifacts.yaml:6"
    assert any("sft:latest is sft:v10" in note for note in loaded.notes)
    assert yaml.safe_load(yaml.safe_dump(loaded.values))["run"]["artifact"]["version"] == "v10"


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("${art:model,name}", "sft"),
        ("${art:model,version}", "v2"),
        ("${art:model,metadata.iteration}", "2000"),
        ("${art:model,iteration}", "2000"),
        ("at-${art:model,metadata.data.tokens}", "at-1500000000.0"),
    ],
)
def test_attributes_of_the_artifact(project, reference, value):
    loaded = resolved(project, "sft:best", f"model.model_id='{reference}'")
    assert loaded.config.model.model_id == value


def test_an_unknown_attribute_names_the_known_ones(project):
    with pytest.raises(ConfigError, match=r'no metadata iterations; did you mean "iteration"'):
        resolved(project, "sft:v2", "model.model_id='${art:model,metadata.iterations}'")


def test_an_unknown_artifact_is_one_clear_message(project):
    with pytest.raises(ConfigError) as caught:
        resolved(project, "stf:v1")
    assert caught.value.message.startswith("artifacts.yaml has no artifact stf; did you mean")
    assert caught.value.exit_code == 2


def test_nothing_is_looked_up_where_a_path_is_given(project):
    (project / "artifacts.yaml").write_text("broken: [")
    loaded = resolved(project, "sft:v1", "model.checkpoint_path=/mine")
    assert loaded.config.model.checkpoint_path == "/mine"
    assert loaded.config.run.artifact is None
    assert resolved(project, "/path").config.run.artifact is None


def test_nothing_is_looked_up_to_show_a_configuration(project):
    (project / "artifacts.yaml").write_text("broken: [")
    loaded = resolved(project, "sft:v1", resolve_model=False)
    assert any("looked up when the job is made" in note for note in loaded.notes)


# W&B: where a reference artifact lies


def entries(*refs, digest="0"):
    return [SimpleNamespace(path="p", ref=ref, digest=digest) for ref in refs]


@pytest.mark.parametrize(
    ("metadata", "files", "path"),
    [
        ({}, entries(None), None),
        ({}, entries("s3://b/iter_1/x"), None),
        ({}, entries("file:///c/iter_0000010/a", "file:///c/iter_0000010/b/c"), "/c/iter_0000010"),
        ({}, entries("file:///c/i/common.pt", None), "/c/i"),
        ({}, entries("file:///c%20d/i/common.pt"), "/c d/i"),
        ({"absolute_path": "/lustre/sft", "iteration": 10}, [], "/lustre/sft/iter_0000010"),
        (
            {"absolute_path": "/lustre/sft"},
            entries("file:///nemo_run/sft/iter_0000010/common.pt"),
            "/lustre/sft/iter_0000010",
        ),
        (
            {"absolute_path": "/lustre/sft/iter_0000010/", "iteration": 7},
            [],
            "/lustre/sft/iter_0000010",
        ),
        (
            {"absolute_path": "/lustre/rl/step_5", "step": 5},
            entries("file:///x/a"),
            "/lustre/rl/step_5",
        ),
        ({"absolute_path": "not/absolute"}, entries("file:///c/i/x"), "/c/i"),
    ],
)
def test_reference_artifacts(metadata, files, path):
    assert referenced_path(metadata, files) == path


def test_a_directory_that_an_older_client_logged_as_one_entry():
    ref = "file:///c/iter_0000010"
    assert referenced_path({}, entries(ref, digest=ref)) == "/c/iter_0000010"


def test_other_files_have_another_place_in_the_cache():
    one = Artifact("sft", "v1", "W&B", digest="a1b2c3d4e5f6")
    two = Artifact("sft", "v1", "W&B", digest="ffb2c3d4e5f6")
    assert cache_name(one) == "sft-v1-a1b2c3d4" and cache_name(two) != cache_name(one)


# The job's download


@pytest.fixture
def stored(tmp_path):
    """A configuration whose model W&B stores."""
    path = str(tmp_path / "my;cache/models/sft-v1-abc")
    artifact = {"name": "sft", "version": "v1", "requested": "sft:latest", "source": "W&B t/p"}
    download = {"path": path, "download": "t/p/sft:v1", "base_url": "http://wandb.example"}
    return Config.model_validate(
        {
            "run": {"artifact": artifact | download, "env": {"container_image": "/i.sqsh"}},
            "model": {"checkpoint_path": path, "tokenizer": "/tok"},
            "eval": {"tasks": [{"name": "mine", "type": "lm-evaluation-harness.mine"}]},
        }
    )


def test_a_job_that_downloads_carries_the_script_and_mounts_the_cache(stored, tmp_path):
    plan = make_plan(stored)
    assert f"{tmp_path}/my;cache/models:{tmp_path}/my;cache/models" in plan.mounts
    assert "def fetch(" in render(stored, plan)["fetch_model.py"].text
    stored.run.artifact = None
    assert "fetch_model.py" not in render(stored, make_plan(stored))


def model_phase(config, folder, fetch):
    """Run the phase as the job does, with another fetch_model.py."""
    job = folder / "job"
    job.mkdir()
    (job / "deploy.py").touch()
    (job / "fetch_model.py").write_text(fetch)
    templates = template_environment()
    known = names(config, make_plan(config), {})
    helpers = templates.get_template("helpers.sh.j2").render(**known)
    phase = templates.get_template("phases/model.sh.j2").render(**known)
    setting = (
        f"set -uo pipefail\nJOB_DIR={job} JOB_ID=7 JOB_NAME=j ATTEMPT=0 OUTPUT_DIR=eval_results\n"
        "NODE_TMP=/tmp NODE_NAMES=n HEAD_NODE=n HEAD_IP=127.0.0.1 GPUS_PER_NODE=0 CPUS_PER_NODE=1\n"
        "RAY_DEADLINE=1 SERVE_HOST=n ON_HEAD=() SERVE_CONTAINER=()\nscheduler_says() { :; }\n"
    )
    script = folder / "script.sh"
    script.write_text(
        f"#!/bin/bash\n{setting}{helpers}\nprepare\n{phase}\nfetch_model\necho went on\n"
    )
    return subprocess.run(["bash", script], capture_output=True, text=True, check=False)


def test_the_job_fetches_before_anything_else(stored, tmp_path):
    fetch = (
        "import pathlib, sys\n"
        "pathlib.Path(sys.argv[0]).with_name('said').write_text('\\n'.join(sys.argv[1:]))\n"
        "print('2026-01-01 00:00:00  the model is here')\n"
    )
    done = model_phase(stored, tmp_path, fetch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "went on" in done.stdout and "the model is here" in done.stdout
    path = f"{tmp_path}/my;cache/models/sft-v1-abc"
    assert (tmp_path / "job/said").read_text().split("\n") == [
        *("--artifact", "t/p/sft:v1", "--base-url", "http://wandb.example", "--target", path)
    ]
    assert (tmp_path / "my;cache/models").is_dir()


def test_a_model_that_cannot_be_fetched_ends_the_job_with_its_reason(stored, tmp_path):
    fetch = "print('2026-01-01 00:00:00  ERROR: W&B: no such thing'); raise SystemExit(1)\n"
    done = model_phase(stored, tmp_path, fetch)
    assert done.returncode == 1 and "went on" not in done.stdout
    assert "model: W&B: no such thing" in done.stdout


def test_with_a_path_no_registry_is_imported(project):
    program = (
        "import sys\n"
        "from slurmeval.cli import cli\n"
        "cli(['render', 'run.model=/ckpt', 'model.tokenizer=/tok', '-o', 'job'],"
        " standalone_mode=False)\n"
        "print(sorted({'wandb', 'paramiko', 'ray', 'torch', 'requests'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("iteration", [2000, "2000", 2000.0])
def test_the_iteration_of_an_artifact(iteration):
    assert referenced_path({"absolute_path": "/c", "iteration": iteration}, []) == "/c/iter_0002000"
