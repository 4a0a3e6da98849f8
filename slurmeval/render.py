"""A ``Plan`` becomes a job directory: pure, deterministic to the byte.

Every value that a template writes is quoted for the shell; a template that wants it raw says so
with ``|raw``. What stands in a comment goes through ``|comment``.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import PurePosixPath
from typing import Any

import jinja2
import yaml

from slurmeval import __version__
from slurmeval.config.schema import Config, Env
from slurmeval.errors import ConfigError
from slurmeval.jobfiles import JobFile, JobFiles
from slurmeval.parallelism import cpus_asked
from slurmeval.plan import Plan
from slurmeval.resources import bundled, template_dir
from slurmeval.runconfig import run_config_text

SCRIPT = "job.sbatch"
#: Names of one line of an ``#SBATCH`` directive; anything else could start a comment or a word.
DIRECTIVE = re.compile(r"^[A-Za-z0-9_.,:/=@%+\[\]()&|*^!~-]+$")


#: An assignment of a plain word, and the comment behind it.
ASSIGNMENT = re.compile(r"^([A-Z_]+=[^\s'\"]*) +# (.*)$", re.MULTILINE)


class Raw(str):
    """Text that goes into a template as it stands."""


def quote(value: Any) -> str:
    """Return a value as one word of a shell command."""
    if isinstance(value, jinja2.Undefined):
        return str(value)  # a StrictUndefined raises here, and names itself
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | str):
        return shlex.quote(str(value))
    raise ConfigError(f"a template writes {value!r}, which is no word of a shell command")


def comment(text: str) -> Raw:
    """Return text that stays within its comment line."""
    return Raw("".join(c if c.isprintable() else " " for c in text))


def align(text: str) -> Raw:
    """Return assignments with their comments in one column; quoted values stay as they are."""
    return Raw(ASSIGNMENT.sub(lambda found: f"{found[1]:<27} # {found[2]}", text))


def template_environment(loader: jinja2.BaseLoader | None = None) -> jinja2.Environment:
    """Return the Jinja environment of the job script."""
    environment = jinja2.Environment(
        loader=loader or jinja2.FileSystemLoader(template_dir()),
        undefined=jinja2.StrictUndefined,
        finalize=quote,
        comment_start_string="{##",  # {# is bash: ${#array[@]}
        comment_end_string="##}",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["raw"] = lambda value: Raw(str(value))
    environment.filters["comment"] = comment
    environment.filters["align"] = align
    return environment


def render_script(config: Config, plan: Plan, *, carry: JobFiles | None = None) -> str:
    """Return the text of the job script.

    Args:
        config: The validated configuration.
        plan: What was decided from it.
        carry: Files that the script carries as quoted heredocs and unpacks first, so that it needs
            nothing beside itself (``slurmeval render -o - | sbatch``).

    Raises:
        ConfigError: A template that is wrong, or a value that an #SBATCH line cannot hold.
    """
    try:
        template = template_environment().get_template("eval.sbatch.j2")
        return template.render(**names(config, plan, carry or {}))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"template {error.name}:{error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise ConfigError(f"template eval.sbatch.j2: {error.message}") from error


def names(config: Config, plan: Plan, carry: JobFiles) -> dict[str, Any]:
    """Return all names that a template may use."""
    return {
        "plan": plan,
        "env": config.run.env,
        "deploy": config.deploy,
        "deadlines": config.run.deadlines,
        "comms": config.run.comms,
        "checkpoint": config.model.checkpoint_path or "none",
        "version": __version__,
        "requeue": config.run.requeue,
        "container_env": ",".join(["HF_HOME", *plan.environment, *config.run.env.secrets]),
        "directives": directives(config.run.env, plan, warning=config.run.requeue.warning_seconds)
        if plan.slurm
        else [],
        "executor_template": f"executor/{config.run.env.executor}.sh.j2",
        "container_template": f"container/{config.run.env.runtime}.sh.j2",
        "launch_command": f"sbatch {SCRIPT}" if plan.slurm else f"bash {SCRIPT}",
        "artifact": config.run.artifact,
        "model_cache": model_cache(config),
        "companions": companions(carry),
        "companion_folders": sorted({str(PurePosixPath(name).parent) for name in carry}),
    }


def model_cache(config: Config) -> str:
    """Return the directory of downloaded models; empty where the job downloads none."""
    artifact = config.run.artifact
    return str(PurePosixPath(artifact.path).parent) if artifact and artifact.download else ""


def directives(env: Env, plan: Plan, *, warning: int) -> list[str]:
    """Return sbatch's options as the script's ``#SBATCH`` lines hold them.

    Args:
        env: Where the job runs.
        plan: What was decided.
        warning: Seconds before the walltime's end at which the script is told (man sbatch,
            ``--signal``).

    Raises:
        ConfigError: A value with a character that an ``#SBATCH`` line cannot hold.
    """
    options: list[tuple[str, object]] = [
        ("job-name", plan.job_name),
        ("clusters", env.clusters),
        ("account", env.account),
        ("partition", env.partition),
        ("qos", env.qos),
        ("nodes", plan.nodes),
        ("ntasks-per-node", 1),
        ("cpus-per-task", cpus_asked(env, plan.cpus_per_node)),
        ("mem", env.mem),
        ("time", env.time),
        ("constraint", env.constraint),
        ("nodelist", env.nodelist),
        ("exclude", env.exclude),
        ("reservation", env.reservation),
        ("dependency", env.dependency),
        ("mail-type", env.mail_type),
        ("mail-user", env.mail_user),
        ("signal", f"B:USR2@{warning}" if env.requeue else None),
        ("output", "slurm-%j.out"),
        ("open-mode", "append"),
    ]
    if plan.gpus_per_node:
        if env.gpu_request == "gpus-per-node":
            options.insert(6, ("gpus-per-node", plan.gpus_per_node))
        elif env.gpu_request == "gres":
            options.insert(6, ("gres", f"gpu:{plan.gpus_per_node}"))
    lines = [f"--{name}={value}" for name, value in options if value is not None]
    lines += ["--exclusive"] if env.exclusive else []
    lines += ["--requeue"] if env.requeue else ["--no-requeue"]
    lines += env.sbatch_args
    for line in lines:
        if not DIRECTIVE.match(line):
            raise ConfigError(
                f"#SBATCH {line!r}: a batch script's option line cannot hold this",
                hint="letters, digits and _ . , : / = @ % + - [ ] ( ) & | * ^ ! ~ are allowed",
            )
    return lines


def resolved_config(config: Config, plan: Plan) -> dict[str, Any]:
    """Return the configuration with what the plan decided, as deploy.py and verdict.py read it."""
    values = config.model_dump(mode="json")
    values["deploy"]["max_ongoing_requests"] = plan.max_ongoing_requests
    return values


def render(config: Config, plan: Plan) -> JobFiles:
    """Return the files of a job directory; ``manifest.json`` names them and their checksums."""
    header = "# Made by slurmeval: the resolved configuration; deploy.py and verdict.py read it.\n"
    files: JobFiles = {
        SCRIPT: JobFile(render_script(config, plan), executable=True),
        "config.yaml": JobFile(header + to_yaml(resolved_config(config, plan))),
        "deploy.py": JobFile(bundled("deploy.py")),
        "fidelity.py": JobFile(bundled("fidelity.py")),
        "verdict.py": JobFile(bundled("verdict.py")),
    }
    if model_cache(config):
        files["fetch_model.py"] = JobFile(bundled("fetch_model.py"))
    for task in plan.tasks:
        files[f"eval/{task.name}.yaml"] = JobFile(run_config_text(task, plan.model_id))
    files.update(plan.files)
    manifest = {
        "slurmeval": __version__,
        "tasks": [
            {
                "name": task.name,
                "type": task.type,
                "endpoint": task.endpoint,
                "image": task.image,
                "digest": task.digest,
                "primary": task.primary,
                "asks": task.asks,
            }
            for task in plan.tasks
        ],
        "files": {
            name: hashlib.sha256(file.text.encode()).hexdigest() for name, file in files.items()
        },
    }
    files["manifest.json"] = JobFile(json.dumps(manifest, indent=2) + "\n")
    return files


def to_yaml(values: dict[str, Any]) -> str:
    """Return values as YAML in their own order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def companions(files: JobFiles) -> list[tuple[str, str, str]]:
    """Return name, text and heredoc delimiter of every file that the script needs beside itself."""
    return [
        (name, file.text, heredoc_tag(name, file.text))
        for name, file in files.items()
        if name != SCRIPT
    ]


def heredoc_tag(name: str, text: str) -> str:
    """Return a heredoc delimiter for a file that no line of its text equals."""
    tag = "END_OF_" + re.sub(r"\W", "_", name).upper()
    lines = set(text.splitlines())
    while tag in lines:
        tag += "_"
    return tag
