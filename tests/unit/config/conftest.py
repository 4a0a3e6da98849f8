from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from slurmeval.config.load import Loaded, load
from slurmeval.errors import ConfigError

# A slow machine is no failure, and nothing is written beside the tests.
settings.register_profile("slurmeval", deadline=None, max_examples=50, database=None)
settings.load_profile("slurmeval")

Load = Callable[..., Loaded]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project's root, where the search for env.toml ends, below a home directory."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "pyproject.toml").touch()
    return root


@pytest.fixture
def load_here(project: Path, tmp_path: Path) -> Load:
    """``load`` in the project, with a model and without the tester's environment."""

    def run(*configs: str, overrides: tuple[str, ...] = (), **options: Any) -> Loaded:
        options.setdefault("profile", None)
        options.setdefault("cwd", project)
        environ = {"HOME": str(tmp_path), **options.pop("environ", {})}
        model = options.pop("model", "/models/iter_0000100")
        given = (f"run.model={model}",) if model else ()
        return load(configs, overrides=(*given, *overrides), environ=environ, **options)

    return run


@pytest.fixture
def refused(load_here: Load) -> Callable[..., str]:
    """The message with which a configuration is refused."""

    def run(*configs: str, **options: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            load_here(*configs, **options)
        assert caught.value.exit_code == 2
        return caught.value.format_message()

    return run
