"""The package's data: templates, shipped configs and files that travel with a job.

A checkout holds ``templates/`` and ``configs/`` beside the package; a wheel holds them inside it.
"""

from __future__ import annotations

from pathlib import Path

from slurmeval.errors import SlurmevalError

_PACKAGE = Path(__file__).resolve().parent


def template_dir() -> Path:
    """Return the directory of the Jinja templates.

    Raises:
        SlurmevalError: The installation lacks it.
    """
    return _data_dir("templates")


def config_dir() -> Path:
    """Return the directory of the shipped configs.

    Raises:
        SlurmevalError: The installation lacks it.
    """
    return _data_dir("configs")


def bundled(name: str) -> str:
    """Return the text of a file of the package that travels with a job, such as ``deploy.py``.

    Args:
        name: The file's name, without a directory.

    Raises:
        SlurmevalError: The installation lacks it.
    """
    path = _PACKAGE / name
    if not path.is_file():
        raise _incomplete(path)
    return path.read_text(encoding="utf-8")


def _data_dir(name: str) -> Path:
    """Return a data directory: inside the package (wheel), else beside it (checkout)."""
    for path in (_PACKAGE / name, _PACKAGE.parent / name):
        if path.is_dir():
            return path
    raise _incomplete(_PACKAGE / name)


def _incomplete(path: Path) -> SlurmevalError:
    return SlurmevalError(
        f"this installation of slurmeval is incomplete: {path} is missing",
        hint="install it again: pip install --force-reinstall slurmeval",
    )
