from __future__ import annotations

import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurmeval.config.load import load
from slurmeval.config.tomllines import key_lines
from slurmeval.errors import ConfigError

NEMOTRON = """\
# A file as the users of Nemotron's recipes have it.
[wandb]
project = "nemotron"
entity = "team"

[artifacts]
backend = "file"
root = "/lustre/me/artifacts"

[cache]
git_dir = "/lustre/me/git-cache"

[cli]
theme = "github-light"

[base]
executor = "slurm"
account = "acct"
partition = "batch"
run_partition = "interactive"
batch_partition = "backfill"
build_partition = "cpu"
build_time = "02:00:00"
packager = "git"
tunnel = "ssh"
host = "login.example.com"
user = "${oc.env:USER}"
identity = "~/.ssh/id_ed25519"
workspace = "/lustre/me"
remote_job_dir = "${workspace}/run"
time = "04:00:00"
mem = "0"
exclusive = true
startup_commands = ["source /opt/env.sh"]

[base.env_vars]
HF_HOME = "${oc.env:HF_HOME,${workspace}/hf}"
HF_TOKEN = "${oc.env:HF_TOKEN,''}"
RAY_DEDUP_LOGS = 0

[cluster]
extends = "base"
nodes = 2
ntasks_per_node = 8
gpus_per_node = 8
cpus_per_task = 16
container = "/lustre/me/nemo.sqsh"
mounts = ["/lustre:/lustre", "${auto_mount:git+https://example.com/a.git@main,/opt/a}"]
setup_lines = '''
module load enroot
export A=b'''
env_vars = { B = "b" }

[laptop]
executor = "local"
nproc_per_node = 8

[cloud]
executor = "lepton"
nemo_run_dir = "/run"
"""


@pytest.fixture
def nemotron(project):
    (project / "env.toml").write_text(NEMOTRON)


@pytest.mark.usefixtures("nemotron")
def test_a_nemotron_file_works_unchanged(load_here):
    loaded = load_here(profile="cluster", environ={"USER": "ann"})
    env = loaded.config.run.env
    assert (env.executor, env.tunnel, env.host, env.user) == (
        "slurm",
        "ssh",
        "login.example.com",
        "ann",
    )
    assert env.identity == "~/.ssh/id_ed25519"
    assert (env.account, env.partition, env.time, env.mem) == (
        "acct",
        "interactive",
        "04:00:00",
        "0",
    )
    assert (env.nodes, env.gpus_per_node, env.cpus_per_task, env.exclusive) == (2, 8, 16, True)
    assert env.remote_job_dir == "/lustre/me/run"
    assert (env.image, env.runtime) == ("/lustre/me/nemo.sqsh", "pyxis")
    assert env.mounts == ["/lustre:/lustre"]
    assert env.env_vars == {"HF_HOME": "/lustre/me/hf", "RAY_DEDUP_LOGS": "0", "B": "b"}
    assert env.setup_lines == ["module load enroot\nexport A=b"]
    assert loaded.config.run.wandb.project == "nemotron"
    assert loaded.config.eval.export.wandb is not None
    assert loaded.config.eval.export.wandb.entity == "team"
    assert loaded.config.eval.execution.output_dir == "/lustre/me/run/eval_results"
    assert loaded.notes == [
        "env.toml [cluster]: ignored, other tools' keys: build_partition (line 22),"
        " build_time (line 23), packager (line 24), workspace (line 29),"
        " startup_commands (line 34)",
        "mounts (env.toml:48 [cluster]): git repositories of other tools are not mounted",
        "ntasks_per_node = 8 (env.toml:44 [cluster]) is not used: a job has one task on each node",
    ]
    assert loaded.origins["run.env.account"] == "env.toml:18 [base]"
    assert loaded.origins["run.env.env_vars.RAY_DEDUP_LOGS"] == "env.toml:39 [base]"
    assert loaded.origins["run.env.env_vars.B"] == "env.toml:52 [cluster]"


@pytest.mark.usefixtures("nemotron")
def test_a_local_profile_of_a_nemotron_file(load_here):
    loaded = load_here(profile="laptop")
    assert loaded.config.run.env.executor == "local"
    assert loaded.notes == [
        "env.toml [laptop]: ignored, other tools' keys: nproc_per_node (line 56)"
    ]


@pytest.mark.usefixtures("nemotron")
def test_other_executors_are_refused(refused):
    message = refused(profile="cloud")
    assert message.startswith('executor "lepton" (env.toml:59 [cloud]): slurmeval runs on slurm')


@pytest.mark.usefixtures("nemotron")
def test_wandb_fills_run_wandb_without_a_profile(load_here):
    loaded = load_here()
    assert loaded.config.run.wandb.entity == "team"
    assert loaded.config.run.env.account is None


def test_without_wandb_the_export_has_no_target(load_here):
    export = load_here().config.eval.export.wandb
    assert export is not None
    assert (export.entity, export.project) == (None, None)


def test_the_profile_lies_over_the_files_and_below_the_command_line(load_here, project):
    (project / "a.yaml").write_text("run: {env: {nodes: 2, account: file, qos: file}}\n")
    (project / "env.toml").write_text('[c]\naccount = "profile"\nnodes = 3\n')
    env = load_here("a.yaml", profile="c", overrides=("run.env.nodes=4",)).config.run.env
    assert (env.qos, env.account, env.nodes) == ("file", "profile", 4)


def test_mounts_add_up_and_variables_merge(load_here, project):
    (project / "a.yaml").write_text(
        "run:\n  env:\n    mounts: [/a:/a, /b:/b]\n    env_vars: {A: file, B: file}\n"
    )
    (project / "env.toml").write_text(
        '[c]\nmounts = ["/b:/b", "/c:/c"]\nenv_vars = { B = "profile", C = "profile" }\n'
        'lustre_mount = "/lustre:/lustre"\n[d]\nextends = "c"\nmounts = "/d:/d"\n'
        'lustre_mount = ""\n'
    )
    loaded = load_here("a.yaml", profile="c")
    assert loaded.config.run.env.mounts == ["/a:/a", "/b:/b", "/c:/c", "/lustre:/lustre"]
    assert loaded.config.run.env.env_vars == {"A": "file", "B": "profile", "C": "profile"}
    places = [loaded.origins[f"run.env.mounts.{n}"] for n in range(4)]
    assert places == ["a.yaml:3", "a.yaml:3", "env.toml:2 [c]", "env.toml:4 [c]"]
    assert load_here(profile="d").config.run.env.mounts == ["/d:/d"]
    assert load_here("a.yaml", profile="d").config.run.env.mounts == ["/a:/a", "/b:/b", "/d:/d"]


def test_a_profile_may_refer_to_the_whole_configuration(load_here, project):
    (project / "env.toml").write_text('[c]\nhf_home = "${model.checkpoint_path}/hf"\n')
    assert load_here(profile="c").config.run.env.hf_home == "/models/iter_0000100/hf"


def test_text_and_numbers_of_a_profile(load_here, project):
    (project / "env.toml").write_text("[c]\naccount = 12\nmem = 0\ntime = 60\n")
    env = load_here(profile="c").config.run.env
    assert (env.account, env.mem, env.time) == ("12", "0", "60")


# The profile "local"


def test_local_needs_no_file(load_here):
    loaded = load_here(profile="local")
    assert (loaded.config.run.env.executor, loaded.config.run.env.tunnel) == ("local", "local")
    assert loaded.origins["run.env.executor"] == "built-in profile local"
    assert loaded.notes == []


def test_local_of_a_file_lies_over_the_built_in_one(load_here, project):
    (project / "env.toml").write_text(
        '[local]\nhf_home = "/hf"\n[mine]\nextends = "local"\nnode_tmp = "/t"\n'
    )
    env = load_here(profile="mine").config.run.env
    assert (env.executor, env.hf_home, env.node_tmp) == ("local", "/hf", "/t")


# Which file


def test_the_search_goes_up_to_the_project_root(load_here, project, tmp_path):
    deep = project / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "env.toml").write_text('[c]\naccount = "outside"\n')
    with pytest.raises(ConfigError, match='no profile "c"'):
        load_here(profile="c", cwd=deep)
    (project / "env.toml").write_text('[c]\naccount = "root"\n')
    assert load_here(profile="c", cwd=deep).config.run.env.account == "root"
    (deep / "env.toml").write_text('[c]\naccount = "near"\n')
    assert load_here(profile="c", cwd=deep).config.run.env.account == "near"


def test_the_users_own_file_is_the_last(load_here, project, tmp_path):
    own = tmp_path / ".config" / "slurmeval"
    own.mkdir(parents=True)
    (own / "env.toml").write_text('[c]\naccount = "own"\n')
    loaded = load_here(profile="c")
    assert loaded.config.run.env.account == "own"
    assert loaded.origins["run.env.account"] == "~/.config/slurmeval/env.toml:2 [c]"
    xdg = tmp_path / "xdg" / "slurmeval"
    xdg.mkdir(parents=True)
    (xdg / "env.toml").write_text('[c]\naccount = "xdg"\n')
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    assert load_here(profile="c", environ=environ).config.run.env.account == "xdg"
    (project / "env.toml").write_text('[c]\naccount = "project"\n')
    assert load_here(profile="c", environ=environ).config.run.env.account == "project"


def test_named_files_win(load_here, project, tmp_path):
    for name in ("env.toml", "variable.toml", "option.toml"):
        (project / name).write_text(f'[c]\naccount = "{name}"\n')
    environ = {"NEMOTRON_ENV_FILE": "~/project/variable.toml"}
    assert load_here(profile="c", environ=environ).config.run.env.account == "variable.toml"
    loaded = load_here(profile="c", environ=environ, env_file=project / "option.toml")
    assert loaded.config.run.env.account == "option.toml"


# Bad input


def test_unknown_profile(refused, project):
    (project / "env.toml").write_text("[wandb]\n[cluster]\n[other]\n")
    message = refused(profile="clusterr")
    assert 'no profile "clusterr" in env.toml; did you mean "cluster"?' in message
    assert "profiles: cluster, other, local" in message
    assert 'no profile "wandb"' in refused(profile="wandb")


def test_no_file_at_all(refused, project):
    message = refused(profile="cluster")
    assert 'no profile "cluster": no env.toml was found' in message
    assert "(looked for env.toml, ~/.config/slurmeval/env.toml)" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[c]\nextends = "a"\n[a]\nextends = "b"\n[b]\nextends = "a"\n', "circle: a → b → a"),
        ('[c]\nextends = "c"\n', "circle: c → c"),
        (
            '[c]\nextends = "clustr"\n[cluster]\n',
            'profile "c" (env.toml:2 [c]) extends "clustr", which does not exist;'
            ' did you mean "cluster"?',
        ),
        ("[c]\nextends = ['a']\n", "extends (env.toml:2 [c]) must be the name of one profile"),
        (
            '[c]\npartitoin = "x"\n',
            'run.env.partitoin (env.toml:2 [c]): unknown key; did you mean "partition"?',
        ),
        ('[c]\nport = "x"\n', "run.env.port (env.toml:2 [c]): must be a whole number"),
        ('[c]\nexecutor = "slrum"\n', 'got "slrum"; did you mean "slurm"?'),
        ('[c]\nuser = "${oc.env:NOPE}"\n', "run.env.user (env.toml:2 [c]): the environment"),
        ("[c]\nnodes =\n", "env.toml is not valid TOML: Invalid value (at line 2, column 8)"),
        ("[c]\nnodes = 1\nnodes = 2\n", "env.toml is not valid TOML: Cannot overwrite"),
    ],
)
def test_bad_files(refused, project, text, message):
    (project / "env.toml").write_text(text)
    assert message in refused(profile="c")


def test_a_named_file_that_is_not_there(refused, project):
    assert refused(env_file=project / "no.toml").startswith("--env-file: there is no file")
    message = refused(environ={"NEMOTRON_ENV_FILE": "no.toml"})
    assert message == "NEMOTRON_ENV_FILE: there is no file no.toml"


def test_a_file_that_is_no_text(refused, project):
    (project / "env.toml").write_bytes(b"[c]\na = '\xff'\n")
    assert refused() == "env.toml is not UTF-8 text (byte 9)"


def test_keys_outside_any_section_are_named(load_here, project):
    (project / "env.toml").write_text('account = "x"\n[wandb]\nbase_url = "u"\n')
    assert load_here().notes == [
        "env.toml:1: account stands in no section and is ignored",
        "env.toml [wandb]: ignored, other tools' keys: base_url (line 3)",
    ]


# Lines of TOML


def test_key_lines():
    text = (
        'a = """\n[no]\nx = 1\n"""\n\n[t] # b = 1\n"b.c".d = [\n  1, # ]\n  "]",\n]\n'
        "e = { f = 1 }\r\n[t.\"u v\"]\ng = '''\n'''\nh=1#\n[[l]]\ni=1\n[[l]]\ni=2"
    )
    assert key_lines(text) == {
        ("a",): 1,
        ("t",): 6,
        ("t", "b.c"): 7,
        ("t", "b.c", "d"): 7,
        ("t", "e"): 11,
        ("t", "u v"): 12,
        ("t", "u v", "g"): 13,
        ("t", "u v", "h"): 15,
        ("l",): 16,
        ("l", "i"): 17,
    }


_NAMES = st.text("abc-_1", min_size=1, max_size=4)
_VALUES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=8).map(
        lambda text: json.dumps(text, ensure_ascii=False)
    ),
    st.text("ab#[]{}=\n\"'", max_size=8).map(lambda text: f'"""{_escaped(text)}"""'),
    st.text('ab#[]{}="\\', max_size=8).map(lambda text: f"'{text}'"),
    st.lists(st.sampled_from(["1", "'#'", '"]"', "{ a = '}' }"])).map(
        lambda items: "[\n" + ",  # ]\n".join(items) + "\n]"
    ),
)


def _escaped(text: str) -> str:
    return text.replace('"', '\\"')


@given(st.dictionaries(_NAMES, st.dictionaries(_NAMES, _VALUES, max_size=4), max_size=4))
def test_key_lines_of_any_document(sections):
    lines, expected = [], {}
    for name, keys in sections.items():
        expected[(name,)] = len("\n".join(lines).splitlines()) + 1 if lines else 1
        lines.append(f"[{name}]")
        for key, value in keys.items():
            expected[(name, key)] = "\n".join(lines).count("\n") + 2
            lines.append(f"{key} = {value}")
    text = "\n".join(lines)
    expected = {path: line for path, line in expected.items() if len(path) == 2}
    tomllib.loads(text)
    found = {path: line for path, line in key_lines(text).items() if len(path) == 2}
    assert found == expected


@given(st.text("[]{}=\"'#\n\\ab1. ,", max_size=40))
def test_no_env_file_crashes(tmp_path_factory, text):
    cwd = tmp_path_factory.getbasetemp()
    file = cwd / "any.toml"
    file.write_text(text)
    try:
        load(
            [],
            profile="a",
            overrides=["run.model=/m"],
            env_file=file,
            cwd=cwd,
            environ={"HOME": "/h"},
        )
    except ConfigError as error:
        assert error.format_message()
