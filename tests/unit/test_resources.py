from __future__ import annotations

from pathlib import Path

import pytest

from slurmeval import resources
from slurmeval.errors import SlurmevalError


def test_a_checkout_has_its_data():
    assert (resources.config_dir() / "default.yaml").is_file()
    assert resources.template_dir().is_dir()
    assert '"""' in resources.bundled("deploy.py")


def test_a_wheel_has_them_inside_the_package(tmp_path: Path, monkeypatch):
    package = tmp_path / "site-packages" / "slurmeval"
    for name in ("templates", "configs"):
        (package / name).mkdir(parents=True)
        (package.parent / name).mkdir()
    monkeypatch.setattr(resources, "_PACKAGE", package)
    assert resources.template_dir() == package / "templates"
    assert resources.config_dir() == package / "configs"


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "slurmeval")
    for get in (resources.template_dir, resources.config_dir, lambda: resources.bundled("x.py")):
        with pytest.raises(SlurmevalError, match=r"incomplete: .* is missing") as caught:
            get()
        assert "install it again" in caught.value.format_message()
