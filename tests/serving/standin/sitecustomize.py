"""Lets Export-Deploy's Megatron classes run without Megatron; on PYTHONPATH, every process has it.

``megatron`` and ``pytriton`` become empty packages, and of Export-Deploy itself one package is
replaced: ``nemo_deploy.llm.inference``, which builds Megatron's engine. ``engine.py`` takes its
place. All else (DeployRay, MegatronRayDeployable, ModelWorker, MegatronLLMDeployable) is real.
"""

import importlib.abc
import importlib.util
import sys
import types

REPLACED = "nemo_deploy.llm.inference"


class Anything:
    """Stands for any class of a missing package; keeps what it is given."""

    def __init__(self, *args, **kwargs):
        self.__dict__.update(kwargs)


class Missing(types.ModuleType):
    """A module of a missing package."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Anything,), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules that are not there."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "pytriton") or name.startswith(REPLACED):
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Missing(spec.name)

    def exec_module(self, module):
        if module.__name__ == "pytriton.decorators":
            module.batch = lambda function: function
            module.first_value = lambda *names: lambda function: function
        if module.__name__.startswith(REPLACED):
            import engine

            module.create_mcore_engine = engine.create_mcore_engine


sys.meta_path.insert(0, Finder())
