"""Values keep their meaning on the way through layers, profiles and interpolation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slurmeval.config.load import load
from slurmeval.errors import ConfigError


def loaded(
    here: Path, *overrides: str, toml: str = "", yaml: str = "", profile: str | None = None
) -> Any:
    (here / "env.toml").write_text(toml)
    (here / "c.yaml").write_text(yaml)
    environ = {"HOME": str(here), "FOO": "a${b}c"}
    given = ["model.checkpoint_path=/c", *overrides]
    found = load(
        ["./c.yaml"], profile=profile, overrides=given, cwd=here, environ=environ,
        resolve_model=False,
    )  # fmt: skip
    return found.config


@pytest.mark.parametrize("text", ["{}", "/x/{}"])
def test_keys_that_refer_to_each_other_are_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"model.tokenizer \(command line\): it refers to itself"):
        loaded(
            tmp_path,
            "model.tokenizer=" + text.format("${run.env.hf_home}"),
            "run.env.hf_home=" + text.format("${model.tokenizer}"),
        )


def test_a_literal_dollar_brace_of_a_profile_stays_one(tmp_path):
    toml = (
        '[p]\nexecutor = "local"\naccount = "me"\n'
        'setup_lines = ["export X=\\\\${HOME}/x", "Y=\\\\${HOME}/${account}", "Z=\\\\$A"]\n'
        '[p.env_vars]\nA = "${oc.env:FOO}"\n'
    )
    env = loaded(tmp_path, toml=toml, profile="p").run.env
    assert env.setup_lines == ["export X=${HOME}/x", "Y=${HOME}/me", "Z=\\$A"]
    assert env.env_vars == {"A": "a${b}c"}


def test_null_within_text_is_refused_for_relative_references_too(tmp_path):
    with pytest.raises(ConfigError, match=r"refers to \.user, which has no value"):
        loaded(tmp_path, yaml='run: {env: {user: null, hf_home: "/x/${.user}/y"}}')


def test_variables_keep_their_text(tmp_path):
    yaml = "run: {env: {env_vars: {A: 3.10, B: True, C: 1e6, D: 007, E: '5', F: null}}}"
    assert loaded(tmp_path, "run.env.env_vars.G=1.10", yaml=yaml).run.env.env_vars == {
        "A": "3.10", "B": "True", "C": "1e6", "D": "007", "E": "5", "G": "1.10",
    }  # fmt: skip
    toml = '[p]\nexecutor = "local"\n[p.env_vars]\nA = 3.10\nB = 1\n'
    env = loaded(tmp_path, toml=toml, profile="p").run.env
    assert env.env_vars == {"A": "3.10", "B": "1"}


def test_the_image_of_the_heir_counts(tmp_path):
    toml = '[a]\nexecutor = "slurm"\ncontainer_image = "old"\n[b]\nextends = "a"\ncontainer = "new"'
    assert loaded(tmp_path, toml=toml, profile="b").run.env.image == "new"


def test_a_secret_does_not_travel_in_the_runtime_environment(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.env\.secrets") as caught:
        loaded(tmp_path, "deploy.runtime_env.env_vars.HF_TOKEN=hf_1234")
    assert "hf_1234" not in str(caught.value)


def test_a_value_where_the_name_of_a_secret_belongs_is_not_shown(tmp_path):
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, "run.env.secrets=[sk-abc-123]")
    assert "run.env.secrets" in str(caught.value)
    assert "sk-abc-123" not in caught.value.format_message()
