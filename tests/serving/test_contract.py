"""What deploy.py and the tests' stand-in assume of each published Export-Deploy."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import published
import pytest

from slurmeval import deploy

pytestmark = pytest.mark.serving
STANDIN = Path(__file__).with_name("standin") / "engine.py"
#: Upstream's flags that have another name here, and what is only for a local Ray of theirs.
RENAMED = {"megatron_checkpoint", "model_path"}
NEMO_2_CHECKPOINTS = {"nemo_checkpoint"}


@pytest.fixture(scope="module", params=published.VERSIONS)
def release(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.getbasetemp() / "published"
    folder.mkdir(exist_ok=True)
    return request.param, published.fetch(request.param, folder)


def deployable(root: Path, backend: str) -> tuple[ast.AST, set[str], set[str], set[str]]:
    """Return a deployable's class, its parameters, those it needs, and those it passes on."""
    module = published.MEGATRON if backend == "megatron" else published.HF
    name = "MegatronRayDeployable" if backend == "megatron" else "HFRayDeployable"
    tree = published.parse(root / module)
    own = published.find(tree, name)
    names, needed, more = published.parameters(published.find(own, "__init__"))
    passed_on: set[str] = set()
    if backend == "megatron" and more:
        inner = tree.body and next(
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if alias.name.startswith("MegatronLLMDeployable")
        )
        source = published.parse(root / "nemo_deploy" / "llm" / "megatronllm_deployable.py")
        passed_on, _, _ = published.parameters(
            published.find(published.find(source, inner), "__init__")
        )
    return own, names, needed, passed_on


def settings(backend: str, **changes: Any) -> dict[str, Any]:
    values = {knob.name: knob.default for knob in deploy.KNOBS}
    return {**values, "backend": backend, "checkpoint_path": "/ckpt", "clients": 32, **changes}


def bound(version: str, root: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords with which deploy.py binds, as ``bind`` puts them together."""
    _, names, _, passed_on = deployable(root, values["backend"])
    given, _ = deploy.fit_knobs(values, names | passed_on, version)
    given["model_id"] = "m"
    if values["backend"] == "hf":
        return {**given, "hf_model_id_path": "/ckpt"}
    given |= {"megatron_checkpoint_filepath": "/ckpt", "num_gpus": 8}
    if "nemo_checkpoint_filepath" in names:
        given |= {"nemo_checkpoint_filepath": None, "model_format": "megatron"}
    return given


@pytest.mark.parametrize("backend", ["megatron", "hf"])
def test_our_call_binds(release: tuple[str, Path], backend: str) -> None:
    version, root = release
    _, names, needed, passed_on = deployable(root, backend)
    given = bound(version, root, settings(backend))
    assert needed <= given.keys() <= names | passed_on
    tuned = {"micro_batch_size": 2, "max_batch_size": 4} if backend == "megatron" else {"task": "t"}
    assert tuned.items() <= bound(version, root, settings(backend, **tuned)).items()


def test_parallelism_reaches_the_deployable_or_is_refused(release: tuple[str, Path]) -> None:
    version, root = release
    for name in (knob.name for knob in deploy.KNOBS if knob.name.endswith("parallel_size")):
        try:
            given = bound(version, root, settings("megatron", **{name: 2}))
        except deploy.DeployError as error:
            assert version in str(error) and name == "expert_tensor_parallel_size"
            assert version < "0.5"
        else:
            assert given[name] == 2


def test_each_flag_of_upstreams_scripts_is_a_knob(release: tuple[str, Path]) -> None:
    _, root = release
    known = {knob.name for knob in deploy.KNOBS} | RENAMED | NEMO_2_CHECKPOINTS
    runner = published.find(published.parse(root / "nemo_deploy" / "deploy_ray.py"), "DeployRay")
    offered: set[str] = set()
    for method in ("__init__", "deploy_inframework_model", "deploy_huggingface_model"):
        names, _, _ = published.parameters(published.find(runner, method))
        offered |= names
    offered -= {"address", "ignore_reinit_error", "test_mode"}
    offered -= {"megatron_checkpoint_filepath", "hf_model_id_path", "model_format"}
    assert offered <= known


def test_knobs_said_to_do_nothing_do_nothing(release: tuple[str, Path]) -> None:
    version, root = release
    source = published.parse(root / "nemo_deploy" / "llm" / "inference" / "inference_base.py")
    build = published.find(source, "create_mcore_engine")
    for node in ast.walk(build):  # only for checkpoints of NeMo 2, which are not offered
        if isinstance(node, ast.If) and "'nemo'" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    read = published.names_read(build)
    claimed = {
        knob.name: deploy.release(version) >= deploy.release(knob.unused[0])
        for knob in deploy.KNOBS
        if knob.group == "megatron" and knob.unused[1]
    }
    layout = {name for name in claimed if "pipeline" in name}
    assert "model_config_kwargs" not in read and all(claimed[name] for name in layout)
    for name in claimed.keys() - layout - {"enable_cuda_graphs", "legacy_model_format"}:
        assert (name not in read) == claimed[name], name
    assert "enable_cuda_graphs" not in read
    assert ("legacy_model_format" in read) == (version in ("0.5.0", "0.6.0"))


def test_the_ways_into_the_deployables_are_there(release: tuple[str, Path]) -> None:
    version, root = release
    for backend in ("megatron", "hf"):
        own, names, _, _ = deployable(root, backend)
        asked, _, _ = published.parameters(published.find(own, "completions"))
        assert asked == {"request"} and "self.model_id = model_id" in ast.unparse(own)
        methods = {node.name for node in ast.walk(own) if hasattr(node, "name")}
        assert "check_health" not in methods
        if backend == "megatron":
            assert "self.workers = " in ast.unparse(own)
            batches = "_batched_infer_impl" in methods
            assert batches == ("batch_wait_timeout_s" in names) == (version >= "0.5")
    model = published.parse(root / "nemo_deploy" / "llm" / "hf_deployable.py")
    assert "self.tokenizer = " in ast.unparse(model)
    asked, _, _ = published.parameters(published.find(model, "ray_infer_fn"))
    assert asked == {"inputs"}
    compute = published.find(model, "_compute_logprobs")
    asked, _, _ = published.parameters(compute)
    assert asked == {"prompts", "output_infer", "compute_logprob", "n_top_logprobs", "echo"}
    for key in ("sequences", "input_lengths", "scores"):
        assert repr(key) in ast.unparse(compute)
    assert f"'{deploy.ERROR_TEXT} {{0}}'" in ast.unparse(published.find(model, "ray_infer_fn"))


def test_batches_share_the_parameters_that_the_guard_looks_at(release: tuple[str, Path]) -> None:
    version, root = release
    own, _, _, _ = deployable(root, "megatron")
    if version < "0.5":
        assert "batch" not in ast.unparse(published.find(own, "completions"))
        return
    merge = ast.unparse(published.find(own, "_batched_infer_impl"))
    assert "first = inference_inputs_list[0]" in merge  # once this goes, so may the guard
    assert "offset:offset + count" in merge and "'log_probs'" in merge


# The stand-in for the engine has the surface of what it stands for.


def differences(engine: ast.Module, root: Path) -> list[str]:
    """Return where the stand-in would not fit an Export-Deploy that lies in a directory."""
    model = published.parse(root / "nemo_deploy" / "llm" / "megatronllm_deployable.py")
    source = published.parse(root / "nemo_deploy" / "llm" / "inference" / "inference_base.py")
    theirs, needed, _ = published.parameters(published.find(source, "create_mcore_engine"))
    ours, our_needs, _ = published.parameters(published.find(engine, "create_mcore_engine"))
    calls = published.keywords_of_calls(model, "create_mcore_engine")
    assert calls
    found = [f"create_mcore_engine lacks {name}" for name in theirs.union(*calls) - ours]
    found += [f"create_mcore_engine needs {name}" for name in our_needs - needed]
    takes, _, _ = published.parameters(published.find(published.find(engine, "Engine"), "generate"))
    given = [
        {keyword.arg for keyword in call.keywords if keyword.arg}
        for call in ast.walk(model)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "self.mcore_engine.generate"
    ]
    assert given
    found += [f"generate lacks {name}" for name in set().union(*given) - takes]
    read = {
        node.attr
        for node in ast.walk(published.find(model, "_infer_fn"))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "r"
    } - {"merge"}
    assert read
    answer = published.find(engine, "answer")
    (made,) = published.keywords_of_calls(answer, "SimpleNamespace")
    return sorted(found + [f"an answer lacks {name}" for name in read - made])


def test_the_stand_in_fits_each_release(release: tuple[str, Path]) -> None:
    assert differences(published.parse(STANDIN), release[1]) == []


def test_the_stand_in_fits_the_installed_classes() -> None:
    assert differences(published.parse(STANDIN), installed()) == []


@pytest.mark.parametrize(
    ("text", "instead", "difference"),
    [
        ("    max_batch_size: int = 8,\n", "", "create_mcore_engine lacks max_batch_size"),
        ("    path: Path,\n", "    path: Path,\n    gpu: int,\n", "create_mcore_engine needs gpu"),
        (
            "        prompts: list[str],\n        add_BOS",
            "        add_BOS",
            "generate lacks prompts",
        ),
        ("generated_log_probs=", "log_probs=", "an answer lacks generated_log_probs"),
    ],
)
def test_another_surface_is_noticed(text: str, instead: str, difference: str) -> None:
    source = STANDIN.read_text()
    assert source.count(text) == 1
    assert differences(ast.parse(source.replace(text, instead)), installed()) == [difference]


def installed() -> Path:
    """Return the directory of the installed Export-Deploy."""
    found = importlib.util.find_spec("nemo_deploy")
    if found is None or found.origin is None:
        pytest.skip("nemo-export-deploy is not installed")
    return Path(found.origin).parents[1]
