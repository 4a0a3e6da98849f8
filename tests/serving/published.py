"""The published releases of Export-Deploy: fetched without their dependencies, read, not run."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

VERSIONS = ("0.3.1", "0.4.0", "0.5.0", "0.6.0", "0.7.1")
MEGATRON, HF = (
    "nemo_deploy/llm/megatronllm_deployable_ray.py",
    "nemo_deploy/llm/hf_deployable_ray.py",
)


def fetch(version: str, folder: Path) -> Path:
    """Return a directory that holds a release's modules; skips the test without a package index."""
    unpacked = folder / version
    if not unpacked.exists():
        python = "3.11" if version < "0.5" else "3.12"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
        ]
        command += ["--only-binary=:all:", f"--python-version={python}", "--retries=1"]
        ran = subprocess.run(
            [*command, f"nemo-export-deploy=={version}"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if ran.returncode:
            reason = ran.stderr.strip().splitlines()[-1]
            pytest.skip(f"nemo-export-deploy {version} cannot be fetched: {reason}")
        (wheel,) = folder.glob(f"nemo_export_deploy-{version}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    return unpacked


@functools.cache
def parse(path: Path) -> ast.Module:
    """Return a module's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def find(tree: ast.AST, name: str) -> ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef:
    """Return the class or function of a name within a tree."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and node.name == name:
            return node
    raise AssertionError(f"there is no {name}")


def parameters(function: ast.AST) -> tuple[set[str], set[str], bool]:
    """Return a function's parameters without ``self``, those without a default, and **kwargs."""
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    given = function.args
    names = [arg.arg for arg in given.args]
    needed = set(names[: len(names) - len(given.defaults)]) - {"self"}
    for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        names.append(arg.arg)
        needed |= {arg.arg} if default is None else set()
    return set(names) - {"self"}, needed, given.kwarg is not None


def names_read(tree: ast.AST | list[ast.stmt]) -> set[str]:
    """Return the plain names that code reads."""
    nodes = tree if isinstance(tree, list) else [tree]
    return {
        node.id
        for top in nodes
        for node in ast.walk(top)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def keywords_of_calls(tree: ast.AST, name: str) -> list[set[str]]:
    """Return the keywords of each call of a function or method of this name."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        {keyword.arg for keyword in call.keywords if keyword.arg}
        for call in calls
        if name in (getattr(call.func, "id", None), getattr(call.func, "attr", None))
    ]
