from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slurmeval.config.keys import all_keys
from slurmeval.config.layers import leaves
from slurmeval.config.load import load, render_yaml
from slurmeval.errors import ConfigError


def lookup(values: object, dotted: str) -> object:
    for key in dotted.split("."):
        values = values[int(key)] if isinstance(values, list) else values[key]  # type: ignore[index]
    return values


# Layers


def test_layers_later_wins(load_here, project):
    (project / "a.yaml").write_text("eval: {parallelism: 4, max_retries: 1}\n")
    (project / "b.yaml").write_text("eval: {parallelism: 8}\n")
    config = load_here("./a.yaml", "b.yaml").config
    assert (config.eval.parallelism, config.eval.max_retries) == (8, 1)
    config = load_here("a.yaml", "b.yaml", overrides=("eval.parallelism=16",)).config
    assert config.eval.parallelism == 16
    assert load_here("b.yaml", "a.yaml").config.eval.parallelism == 4


def test_lists_replace_and_mappings_merge(load_here, project):
    (project / "a.yaml").write_text("eval: {tasks: [{name: mine}], extra: {a: 1}}\n")
    (project / "b.yaml").write_text("eval: {extra: {b: 2}}\n")
    loaded = load_here("a.yaml", "b.yaml")
    assert [task.name for task in loaded.config.eval.tasks] == ["mine"]
    assert loaded.config.eval.extra == {"a": 1, "b": 2}


def test_an_empty_section_says_nothing(load_here, project):
    (project / "a.yaml").write_text("run:\n  env:\n    # nodes: 4\neval:\n")
    assert load_here("a.yaml").values == load_here().values


def test_a_null_switches_an_optional_section_off(load_here):
    assert load_here(overrides=("eval.export.wandb=null",)).config.eval.export.wandb is None


def test_default_may_be_named_and_is_the_base_all_the_same(load_here):
    assert load_here("tiny", "default").values == load_here("tiny").values


def test_a_file_with_a_byte_order_mark_loads(load_here, project):
    (project / "a.yaml").write_text("\ufeffeval: {parallelism: 4}\n", encoding="utf-8")
    assert load_here("a.yaml").config.eval.parallelism == 4


# The command line


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("eval.tasks.0.params.limit_samples=5", "eval.tasks.0.params.limit_samples", 5),
        ("eval.tasks[1].params.limit_samples=5", "eval.tasks.1.params.limit_samples", 5),
        ("eval.tasks=[{name: mine}]", "eval.tasks", [{"name": "mine"}]),
        ("model.tokenizer=null", "model.tokenizer", None),
        ("model.tokenizer=", "model.tokenizer", None),
        ("run.env.mounts=[/a:/a,/b:/b]", "run.env.mounts", ["/a:/a", "/b:/b"]),
        ("run.env.mounts=/a:/a", "run.env.mounts", ["/a:/a"]),
        ("run.env.time=12:00:00", "run.env.time", "12:00:00"),
        ("run.env.account=12345", "run.env.account", "12345"),
        ("run.env.account=007", "run.env.account", "007"),
        ("run.env.account=no", "run.env.account", "no"),
        ("run.env.exclusive=yes", "run.env.exclusive", True),
        ("run.env.nodelist=node[1-4]", "run.env.nodelist", "node[1-4]"),
        ("run.env.env_vars.A=1", "run.env.env_vars.A", "1"),
        ("run.env.env_vars={A: true, B: 0.5}", "run.env.env_vars", {"A": "true", "B": "0.5"}),
        ("run.env={nodes: 2}", "run.env.nodes", 2),
        ("eval.extra.a.b=[1, {c: 2}]", "eval.extra.a.b", [1, {"c": 2}]),
        ("eval.limit_samples=0.5", "eval.limit_samples", 0.5),
        ("run.env.constraint=a=b", "run.env.constraint", "a=b"),
    ],
)
def test_overrides(load_here, override, key, value):
    loaded = load_here(overrides=(override,))
    assert lookup(loaded.values, key) == value


def test_an_override_keeps_what_stands_beside_it(load_here):
    loaded = load_here(overrides=("run.env.env_vars={A: a}", "run.env.env_vars={B: b}"))
    assert loaded.config.run.env.env_vars == {"A": "a", "B": "b"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.parallelism", "is not KEY=VALUE"),
        ("eval..a=1", "a part of it is empty"),
        ("=1", "a part of it is empty"),
        ("eval.tasks=[a", r"eval\.tasks \(command line\) is not valid YAML"),
        ("eval.extra={a: 1, a: 2}", "stands here twice"),
        ("eval.tasks.9.name=x", r"eval\.tasks is a list with positions 0 to 3"),
        ("eval.tasks.name=x", r"eval\.tasks is a list"),
    ],
)
def test_bad_overrides(refused, override, message):
    assert re.search(message, refused(overrides=(override,)))


@given(
    st.one_of(
        st.text(max_size=30),
        st.builds(
            "{}{}={}".format,
            st.sampled_from([".".join(path) for path in all_keys()]),
            st.sampled_from(["", ".0", "[0]", ".x"]),
            st.one_of(st.text(max_size=8), st.text("{}[]$:,1a.\\ \"'", max_size=12)),
        ),
    )
)
def test_no_override_crashes(tmp_path_factory, text):
    cwd = tmp_path_factory.getbasetemp()
    try:
        loaded = load(
            [], profile="local", overrides=["run.model=/m", text], cwd=cwd, environ={"HOME": "/h"}
        )
    except ConfigError as error:
        assert error.format_message()
    else:
        assert yaml.safe_load(render_yaml(loaded)) == loaded.values


# Interpolation


def test_references_and_environment(load_here):
    loaded = load_here(
        overrides=(
            "run.env.host=login",
            "run.env.remote_job_dir=/lustre/${oc.env:USER}",
            "run.env.account=${oc.env:ACCOUNT,proj}",
            "model.tokenizer=${model.checkpoint_path}/tokenizer",
        ),
        environ={"USER": "ann"},
    )
    execution = loaded.config.eval.execution
    assert execution.hostname == "login"
    assert execution.account == "proj"
    assert execution.output_dir == "/lustre/ann/eval_results"
    assert loaded.config.model.tokenizer == "/models/iter_0000100/tokenizer"


def test_the_environment_that_counts_is_the_one_given(load_here, refused, monkeypatch):
    monkeypatch.setenv("WHO", "the process")
    override = ("run.env.user=${oc.env:WHO}",)
    assert load_here(overrides=override, environ={"WHO": "you"}).config.run.env.user == "you"
    assert "WHO is not set" in refused(overrides=override)


def test_resolvers_do_not_outlive_a_load(load_here, refused):
    from omegaconf import OmegaConf

    load_here()
    refused(overrides=("run.env.user=${oc.env:NOT_THERE}",))
    assert not OmegaConf.has_resolver("art")
    assert not OmegaConf.has_resolver("demo")
    assert OmegaConf.create({"a": "${oc.env:HOME,none}"}).a


def test_the_output_directory_is_null_without_a_job_directory(load_here):
    assert load_here().config.eval.execution.output_dir is None


def test_a_text_around_a_null_is_an_error_elsewhere(refused):
    message = refused(overrides=("model.tokenizer=${run.env.remote_job_dir}/tok",))
    assert "model.tokenizer (command line): it refers to run.env.remote_job_dir" in message


def test_a_default_inside_a_resolver_may_be_null(load_here):
    override = ("model.tokenizer=${oc.env:TOK,${run.env.host}}",)
    assert load_here(overrides=override).config.model.tokenizer is None
    assert load_here(overrides=override, environ={"TOK": "t"}).config.model.tokenizer == "t"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${run.env.hots}", 'run.env.hots, which does not exist; did you mean "run.env.host"?'),
        ("${HOME}/x", "${oc.env:HOME}, one of the job's shell $HOME or \\${HOME}"),
        ("${run.env.user}", "refers to itself"),
        ("${oc.env:NOPE}", "environment variable NOPE is not set"),
        ("${nosuch:a}", "${nosuch:…} is not known; known are oc.env, art and demo"),
        ("${art:data,path}", '${art:data,…} is not known; the only artifact is "model"'),
        ("${art:model,version}", "${art:model,version} is known only of an artifact"),
        ("a ${ b", "is not an interpolation"),
        ("???", "a value must be given here"),
    ],
)
def test_bad_interpolations(refused, value, message):
    refusal = refused(overrides=(f"run.env.user={value}",))
    assert refusal.startswith("run.env.user (command line): ")
    assert message in refusal


def test_a_key_that_refers_to_a_bad_one_is_not_told_again(refused):
    assert refused(overrides=("run.env.host=${oc.env:NOPE}",)).count("NOPE is not set") == 1


def test_an_escaped_dollar_brace_is_literal(load_here):
    loaded = load_here(overrides=(r"run.env.setup_lines=['export P=\${HOME}/x:$PATH']",))
    assert loaded.config.run.env.setup_lines == ["export P=${HOME}/x:$PATH"]


def test_demo_paths(load_here, tmp_path):
    override = ("model.checkpoint_path=${demo:model}", "model.tokenizer=${demo:tasks}")
    config = load_here(overrides=override).config
    assert config.model.checkpoint_path == f"{tmp_path}/.cache/slurmeval/demo/model"
    environ = {"XDG_CACHE_HOME": "/cache"}
    assert load_here(overrides=override, environ=environ).config.model.tokenizer == (
        "/cache/slurmeval/demo/tasks"
    )
    environ["SLURMEVAL_DEMO"] = "/demo"
    config = load_here(overrides=override, environ=environ).config
    assert config.model.checkpoint_path == "/demo/model"


# The model


def test_the_model_is_the_checkpoint(load_here):
    assert load_here().config.model.checkpoint_path == "/models/iter_0000100"


def test_a_checkpoint_path_wins_over_any_model(load_here):
    loaded = load_here("sft", model=None, overrides=("model.checkpoint_path=/mine",))
    assert loaded.config.model.checkpoint_path == "/mine"


def test_no_model(refused):
    message = refused(model=None)
    assert "model.checkpoint_path (configs/default.yaml:" in message
    assert "no model is given: run.model=/path" in message


@pytest.mark.parametrize("model", ["ModelArtifact-sft:v5", "name"])
def test_an_artifact_needs_a_registry(refused, model):
    message = refused(model=model)
    assert f"run.model is {model}, and there is no registry to ask" in message
    assert "run.model=/path" in message and "artifacts.yaml" in message


def test_a_config_can_be_shown_without_its_model(load_here):
    loaded = load_here("sft", model=None, resolve_model=False)
    assert loaded.values["run"]["model"] == "ModelArtifact-sft:latest"
    assert loaded.values["model"]["checkpoint_path"] == "${art:model,path}"
    assert any("model.checkpoint_path has no value yet" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("model", "absolute"),
    [
        ("./ckpt", "{cwd}/ckpt"),
        ("../ckpt", "{home}/ckpt"),
        ("ckpts/iter_1", "{cwd}/ckpts/iter_1"),
        ("~/ckpt", "{home}/ckpt"),
        ("/a/../b", "/a/../b"),
    ],
)
def test_a_relative_checkpoint_on_this_machine(load_here, project, tmp_path, model, absolute):
    found = load_here(model=model, profile="local").config.model.checkpoint_path
    assert found == absolute.format(cwd=project, home=tmp_path)


def test_a_relative_checkpoint_means_nothing_on_a_cluster(load_here, refused):
    cluster = ("run.env.tunnel=ssh", "run.env.host=login")
    message = refused(model="./ckpt", overrides=cluster)
    assert 'must be an absolute path on the cluster, got "./ckpt"' in message
    assert load_here(model="~/c", overrides=cluster).config.model.checkpoint_path == "~/c"


def test_a_hub_name_stays_as_it_is(load_here):
    loaded = load_here(model=None, overrides=("model.checkpoint_path=org/m", "deploy.backend=hf"))
    assert loaded.config.model.checkpoint_path == "org/m"


# Keys that mean the same


def test_partition_by_mode(load_here, project):
    (project / "env.toml").write_text(
        '[c]\npartition = "p"\nrun_partition = "r"\nbatch_partition = "b"\n[d]\npartition = "p"\n'
    )
    for attached, expected in ((True, "r"), (False, "b")):
        loaded = load_here(profile="c", attached=attached)
        assert loaded.config.run.env.partition == expected
        assert loaded.config.eval.execution.partition == expected
        assert load_here(profile="d", attached=attached).config.run.env.partition == "p"
        own = load_here(profile="c", attached=attached, overrides=("run.env.partition=x",))
        assert own.config.run.env.partition == "x"
    own = load_here(profile="c", overrides=("run.env.run_partition=x",))
    assert own.config.run.env.partition == "x"


def test_the_image_written_last_counts_under_either_name(load_here, project):
    (project / "env.toml").write_text('[c]\ncontainer_image = "new"\n[d]\ncontainer = "old"\n')
    (project / "a.yaml").write_text("run: {env: {container_image: file}}\n")
    assert load_here("a.yaml", profile="d").config.run.env.image == "old"
    assert load_here("a.yaml", profile="c").config.run.env.image == "new"
    mine = load_here(profile="c", overrides=("run.env.container=mine",))
    assert mine.config.run.env.image == "mine"


# Secrets


def test_a_secret_of_the_environment_travels_by_name(load_here, project):
    (project / "env.toml").write_text(
        "[c]\nenv_vars = { NGC_API_KEY = \"${oc.env:NGC_API_KEY,''}\", A = 'a' }\n"
    )
    loaded = load_here(profile="c", environ={"NGC_API_KEY": "s3cret"})
    assert loaded.config.run.env.env_vars == {"A": "a"}
    assert loaded.config.run.env.secrets == ["WANDB_API_KEY", "HF_TOKEN", "NGC_API_KEY"]
    assert (loaded.secret_values, loaded.notes) == ({}, [])
    assert "s3cret" not in repr(loaded) + render_yaml(loaded, origin=True)
    assert load_here(profile="c").config.run.env.secrets == ["WANDB_API_KEY", "HF_TOKEN"]


def test_a_secret_of_the_file_is_kept_apart(load_here, project):
    (project / "env.toml").write_text("[c.env_vars]\nMY_TOKEN = 's3cret'\n")
    loaded = load_here(profile="c")
    assert loaded.secret_values == {"MY_TOKEN": "s3cret"}
    assert "MY_TOKEN" in loaded.config.run.env.secrets
    assert loaded.notes == [
        "MY_TOKEN (env.toml:2 [c]) is a secret: it is kept out of the script and of config.yaml"
    ]
    assert "s3cret" not in repr(loaded) + render_yaml(loaded, origin=True)


def test_a_name_that_only_looks_like_a_token_is_no_secret(load_here):
    loaded = load_here(overrides=("run.env.env_vars.TOKENIZERS_PARALLELISM=false",))
    assert loaded.config.run.env.env_vars == {"TOKENIZERS_PARALLELISM": "false"}


@pytest.mark.parametrize(
    "override",
    ["run.env.api_key=s3cret", "deploy.password=s3cret", "run.env.env_vars.MY_TOKEN=[s3cret]"],
)
def test_no_message_shows_a_secret(refused, override):
    assert "s3cret" not in refused(overrides=(override,))


# Problems


def test_every_problem_is_named_with_its_place(refused, project):
    (project / "my.yaml").write_text(
        "eval:\n  parralelism: 64\n  tasks:\n    - nam: x\n    - name: ok\n      params: {a: 1}\n"
    )
    message = refused("my.yaml", overrides=("deploy.port=99999", "run.env.time=soon"))
    assert message.splitlines() == [
        "6 problems in the configuration:",
        "  run.env.time (command line): must be a time as Slurm writes it, such as 04:00:00"
        ' or 1-12:00:00, got "soon"',
        "  deploy.port (command line): must be at most 65535, got 99999",
        "  eval.tasks.0.name (my.yaml:4): is required",
        '  eval.tasks.0.nam (my.yaml:4): unknown key; did you mean "name"?',
        "  eval.tasks.1.params.a (my.yaml:6): unknown key; known here: limit_samples, parallelism,"
        " max_retries, request_timeout, temperature, top_p, max_new_tokens, extra",
        '  eval.parralelism (my.yaml:2): unknown key; did you mean "parallelism"?',
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("deploy.num_gpus=many", 'must be a whole number, got "many"'),
        ("deploy.num_gpus=1.5", "must be a whole number, got 1.5"),
        ("deploy.num_gpus=null", "must be a whole number, got nothing (null)"),
        ("deploy.num_gpus=[8]", "must be a whole number, got a list"),
        ("deploy.num_gpus=true", "must be a number, got true"),
        ("deploy.port=80", "must be at least 1024, got 80"),
        ("deploy.backend=hugging", "must be 'megatron' or 'hf', got \"hugging\""),
        ("deploy.num_cpus_per_replica=0", "must be more than 0, got 0"),
        ("deploy.trust_remote_code=maybe", 'must be true or false, got "maybe"'),
        ("eval.limit_samples=some", 'must be a number, got "some"'),
        ("eval.limit_samples=-1", "must be more than 0, got -1"),
        ("eval.limit_samples=inf", 'must be a finite number, got "inf"'),
        ("eval.tasks=piqa", 'must be a list, got "piqa"'),
        ("eval.tasks=[piqa]", 'must be a mapping (key: value), got "piqa"'),
        ("run.env.qos=1.50", 'must be text (write it in quotes: "…"), got 1.5'),
        ("run.env=null", "must be a mapping (key: value), got nothing (null)"),
        ("run.name=my job", "may hold letters, digits, dots, dashes and underscores only"),
        (f"run.name={'x' * 200}", "must not be longer than 128 characters"),
        ("parallelism=4", "unknown key; did you mean eval.parallelism?"),
        ("run.comms.zzz=1", "unknown key; known here: endpoint_file, completion_file"),
        ("run.env.tunnel=ssh", 'tunnel "ssh" needs the name of a login node here'),
        ("eval.tasks=[{name: a}, {name: a}]", 'the task "a" is there twice'),
    ],
)
def test_wrong_values(refused, override, message):
    refusal = refused(overrides=(override,))
    assert message in refusal
    assert "pydantic" not in refusal
    assert "Traceback" not in refusal


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eval: [\n", "my.yaml:2:1: "),
        ("eval:\n  a: 1\n  a: 2\n", 'my.yaml:3:3: the key "a" stands here twice'),
        ("eval:\n\ta: 1\n", "my.yaml:2:1: found character '\\t'"),
        ("- a\n", "my.yaml: a config is a mapping"),
        ("a: !!python/object:os.system {}\n", "my.yaml:1:4: the tag"),
        ("a: &x [*x]\n", "my.yaml:1:"),
        ("a: *x\n", "my.yaml:1:4: an alias (*name) without its anchor"),
        ("a: 1\n---\nb: 1\n", "my.yaml:2:1: "),
        ("a: \x07\n", "my.yaml: a character that YAML does not allow"),
        ("a: " + "[" * 1500, "my.yaml: it is nested too deeply"),
    ],
)
def test_files_that_are_no_config(refused, project, text, message):
    (project / "my.yaml").write_text(text)
    assert refused("my.yaml").startswith(message)


def test_a_file_that_is_no_text(refused, project):
    (project / "my.yaml").write_bytes(b"a: \xff\n")
    assert refused("my.yaml") == "my.yaml is not UTF-8 text (byte 3)"


def test_aliases_of_aliases_are_bounded(refused, project):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (project / "my.yaml").write_text("\n".join(lines))
    assert "more than 100000 values" in refused("my.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pretain", 'there is no config "pretain"; did you mean pretrain?'),
        ("zzz", "shipped configs: default, "),
        ("./my.yml", "did you mean my.yaml?"),
        ("nowhere/x.yaml", "-c nowhere/x.yaml: there is no such file"),
        ("../project/", "this is a directory"),
        ("my", "your own file is given by its path: -c ./my.yaml"),
    ],
)
def test_configs_that_are_not_there(refused, project, name, message):
    (project / "my.yaml").write_text("{}")
    assert message in refused(name)


# Origins and printing


def test_origins(load_here, project):
    (project / "my.yaml").write_text("eval:\n  tasks:\n    - name: a\n    - name: b\n")
    (project / "env.toml").write_text('[wandb]\nentity = "e"\n\n[c]\nnodes = 2\n')
    loaded = load_here("tiny", "my.yaml", profile="c", overrides=("eval.tasks.1.params.top_p=1",))
    origins = loaded.origins
    assert origins["eval.tasks.0.name"] == "my.yaml:3"
    assert origins["eval.tasks.1.name"] == "my.yaml:4"
    assert origins["eval.tasks.1.params.top_p"] == "command line"
    assert origins["run.env.nodes"] == "env.toml:5 [c]"
    assert origins["run.wandb.entity"] == "env.toml:2 [wandb]"
    assert re.fullmatch(r"configs/tiny\.yaml:\d+", origins["eval.limit_samples"])
    assert re.fullmatch(r"configs/default\.yaml:\d+", origins["deploy.port"])
    assert set(origins) == {".".join(path) for path, _ in leaves(loaded.values)}


def test_origin_lines_are_the_right_lines(load_here):
    text = (Path(__file__).parents[3] / "configs" / "default.yaml").read_text().splitlines()
    for key, origin in load_here(model=None, resolve_model=False).origins.items():
        line = text[int(origin.rpartition(":")[2]) - 1]
        name = [part for part in key.split(".") if not part.isdigit()][-1]
        assert name in line or line.strip().startswith("- ")


def test_render_yaml_reads_back(load_here):
    loaded = load_here("tiny", overrides=("run.env.setup_lines=['a: b', \"x\\ny\", '#']",))
    assert yaml.safe_load(render_yaml(loaded)) == loaded.values
    annotated = render_yaml(loaded, origin=True)
    assert yaml.safe_load(annotated) == loaded.values
    leaf_lines = [line for line in annotated.splitlines() if "  # " in line]
    assert len(leaf_lines) == len(loaded.origins)
    assert len({line.index("  # ") for line in leaf_lines if line.index("  # ") < 72}) == 1


def test_loading_twice_gives_the_same(load_here):
    assert load_here("tiny").values == load_here("tiny").values
