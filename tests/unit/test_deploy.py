"""deploy.py's knobs, sums and repairs; what needs Ray or Export-Deploy is in tests/serving."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from slurmeval import deploy
from slurmeval.config.schema import Config
from slurmeval.resources import bundled

ALL_KNOBS = {knob.name for knob in deploy.KNOBS}


def values(**changes: Any) -> dict[str, Any]:
    base = {knob.name: knob.default for knob in deploy.KNOBS}
    return {**base, "clients": None, "checkpoint_path": "/ckpt", **changes}


def read(tmp_path: Path, config: Any = None, *flags: str) -> dict[str, Any]:
    words = ["--address", "127.0.0.1:1", *flags]
    if config is not None:
        path = tmp_path / "config.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        words += ["--config", str(path)]
    return deploy.read_settings(deploy.parse_arguments(words))


# Knobs: one table, the schema and the help say the same.


def test_the_table_and_the_schema_have_the_same_knobs_and_defaults() -> None:
    config = Config().model_dump()
    schema = {**config["deploy"], **config["model"]}
    assert schema == {knob.name: knob.default for knob in deploy.KNOBS}
    assert len(ALL_KNOBS) == len(deploy.KNOBS)


def test_help_explains_each_knob_with_default_and_origin(tmp_path: Path) -> None:
    script = tmp_path / "deploy.py"  # alone, as in a job directory, and without Ray
    script.write_text(bundled("deploy.py"))
    ran = subprocess.run(
        [sys.executable, "-S", "-c", "import sys, runpy; sys.path.append(sys.argv.pop(1));"
         "runpy.run_path('deploy.py', run_name='__main__')", str(Path(yaml.__file__).parents[1]),
         "--help"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    text = " ".join(ran.stdout.split())
    for knob in deploy.KNOBS:
        default = "null" if knob.default is None else knob.default
        assert f"--{knob.name} " in text
        assert f"{knob.text} (default {default}; of {knob.upstream}" in text


def test_the_file_then_the_command_line_win(tmp_path: Path) -> None:
    config = {
        "model": {"checkpoint_path": "/a"},
        "deploy": {"num_gpus": 4, "port": 9000},
        "eval": {
            "parallelism": 8,
            "concurrency": 2,
            "tasks": [{"params": {"parallelism": 12}}, {}],
        },
    }
    got = read(tmp_path, config, "--port", "9001", "--sequence_parallel", "--runtime_env", "{a: 1}")
    assert (got["checkpoint_path"], got["num_gpus"], got["port"]) == ("/a", 4, 9001)
    assert got["sequence_parallel"] is True and got["runtime_env"] == {"a": 1}
    assert got["clients"] == 24
    assert got["tensor_model_parallel_size"] == 4


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ({"deploy": {"num_gpu": 4}}, (), "no knob num_gpu; did you mean num_gpus?"),
        ("deploy: [1", (), "config.yaml"),
        ("- 1", (), "config.yaml"),
        (None, ("--num_gpus", "8"), "checkpoint_path is not set"),
        (None, ("--checkpoint_path", "/a", "--backend", "nim"), "backend is nim"),
        (None, ("--checkpoint_path", "/a", "--num_replicas", "3"), "no multiple of num_replicas 3"),
        (
            None,
            ("--checkpoint_path=/a", "--backend=hf", "--num_gpus=1", "--num_replicas=3",
             "--num_gpus_per_replica=0.5"),
            "0.5 x num_replicas 3 is more than num_gpus 1",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_deployed_is_a_configuration_error(
    tmp_path: Path, config: Any, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(deploy.DeployError, match=message.replace("?", r"\?")) as error:
        read(tmp_path, config, *flags)
    assert error.value.exit_code == 2


def test_a_config_file_that_is_not_there_and_no_address(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.yaml")
    arguments = deploy.parse_arguments(["--address", "h:1", "--config", missing])
    with pytest.raises(deploy.DeployError, match=r"none\.yaml"):
        deploy.read_settings(arguments)
    for address in ((), ("--address", "auto")):
        with pytest.raises(SystemExit) as end:
            deploy.parse_arguments(list(address))
        assert end.value.code == 2


def test_of_a_directory_of_iterations_the_latest_is_served(tmp_path: Path) -> None:
    for name in ("iter_0000900", "iter_0001000", "iter_10000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run_config.yaml").touch()
    (tmp_path / "iter_0002000").mkdir()  # cut short
    assert deploy.latest_iteration(tmp_path).name == "iter_10000000"
    assert deploy.latest_iteration(tmp_path / "iter_0000900").name == "iter_0000900"
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("1000\n")
    assert deploy.latest_iteration(tmp_path).name == "iter_0001000"
    tracker.write_text("2000")
    with pytest.raises(deploy.DeployError, match=r"iter_0002000.* there is: iter_0000900, iter_0"):
        deploy.latest_iteration(tmp_path)
    assert deploy.latest_iteration(tmp_path / "none") == tmp_path / "none"


def test_each_flag_of_upstreams_newest_scripts_is_a_knob() -> None:
    """Of deploy_ray_inframework.py and deploy_ray_hf.py, whose sources no package holds."""
    megatron = """account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split batch_wait_timeout_s context_parallel_size
        cuda_visible_devices enable_cuda_graphs enable_flash_decode
        expert_model_parallel_size expert_tensor_parallel_size host include_dashboard
        inference_max_seq_length legacy_ckpt legacy_model_format max_batch_size
        micro_batch_size model_id model_type num_cpus num_cpus_per_replica num_gpus
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage num_replicas
        pipeline_model_parallel_size port random_seed runtime_env sequence_parallel
        tensor_model_parallel_size"""
    hf = """task trust_remote_code device_map max_memory model_id host port num_cpus num_gpus
        include_dashboard num_replicas num_gpus_per_replica num_cpus_per_replica torch_dtype
        cuda_visible_devices max_ongoing_requests use_vllm_backend"""
    assert {*megatron.split(), *hf.split()} <= ALL_KNOBS


# What the installed Export-Deploy makes of the knobs.


def test_defaults_ask_for_nothing_that_could_be_missing() -> None:
    for backend, installed in itertools.product(("megatron", "hf"), ("0.3.1", "0.7.1", "unknown")):
        wanted = values(backend=backend, tensor_model_parallel_size=1)
        assert deploy.fit_knobs(wanted, set(), installed) == ({}, [])


@pytest.mark.parametrize(
    ("knob", "value", "installed", "lacks", "message"),
    [
        ("expert_tensor_parallel_size", 2, "0.4.0", True, "is not a knob of Export-Deploy 0.4.0"),
        ("inference_max_seq_length", 8192, "0.3.0", True, "is not a knob of Export-Deploy 0.3.0"),
        ("random_seed", 1, "0.7.1", False, "is not used by Export-Deploy 0.7.1"),
        ("legacy_model_format", True, "0.7.1", False, "no static engine"),
        ("legacy_model_format", True, "unknown", False, "no static engine"),
    ],
)
def test_a_knob_that_scores_depend_on_is_an_error(
    knob: str, value: Any, installed: str, lacks: bool, message: str
) -> None:
    known = ALL_KNOBS - {knob} if lacks else ALL_KNOBS
    with pytest.raises(deploy.DeployError, match=message) as error:
        deploy.fit_knobs(values(**{knob: value}), known, installed)
    assert error.value.exit_code == 2 and f"{knob}={value}" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "installed", "message"),
    [
        ({"enable_cuda_graphs": True}, "0.6.0", "only fills batches"),
        ({"enable_flash_decode": True}, "0.3.1", "never reaches the model"),
        ({"num_layers_in_first_pipeline_stage": 3}, "0.5.0", "layout stays"),
        ({"num_cpus": 4}, "0.7.1", "starts no Ray"),
        ({"cuda_visible_devices": "0"}, "0.7.1", "Ray chooses"),
        ({"torch_dtype": "bfloat16"}, "0.7.1", "is for backend hf"),
        ({"backend": "hf", "tensor_model_parallel_size": 2}, "0.7.1", "is for backend megatron"),
        ({"backend": "hf", "device_map": "balanced", "max_memory": "9GiB"}, "0.7.1", "75GiB"),
        ({"backend": "hf", "use_vllm_backend": True, "task": "x"}, "0.7.1", "with vLLM"),
    ],
)
def test_another_knob_that_does_nothing_is_a_warning(
    changes: dict[str, Any], installed: str, message: str
) -> None:
    _, warnings = deploy.fit_knobs(values(**changes), ALL_KNOBS, installed)
    assert len(warnings) == 1 and message in warnings[0]


def test_what_works_is_passed_on_without_a_word() -> None:
    wanted = {"random_seed": 7, "legacy_model_format": True, "batch_wait_timeout_s": 0.02}
    got, warnings = deploy.fit_knobs(values(**wanted), ALL_KNOBS, "0.6.0")
    assert wanted.items() <= got.items() and warnings == []
    assert "micro_batch_size" not in got and "num_gpus" not in got
    got, _ = deploy.fit_knobs(values(backend="hf", device_map=None), ALL_KNOBS, "0.6.0")
    assert got["device_map"] is None and "tensor_model_parallel_size" not in got


@pytest.mark.parametrize(
    ("changes", "ongoing", "batch", "notes"),
    [
        ({"clients": 32}, 64, 32, 0),
        ({"clients": 8}, 32, 8, 1),
        ({"clients": 128}, 256, 32, 0),
        ({"clients": 48, "num_replicas": 2}, 96, 24, 1),
        ({"clients": 48, "num_replicas": 2, "max_ongoing_requests": 10}, 10, 24, 2),
        ({"clients": None}, 64, 32, 0),
        ({"clients": 8, "backend": "hf"}, 32, 32, 0),
    ],
)
def test_load_is_fitted_to_the_clients(
    changes: dict[str, Any], ongoing: int, batch: int, notes: int
) -> None:
    given = values(**changes)
    assert len(deploy.fit_load(given)) == notes
    assert (given["max_ongoing_requests"], given["max_batch_size"]) == (ongoing, batch)


# The cluster.


def best_ranks(nodes: list[tuple[str, float, float]], replicas: int, cpus: float) -> int:
    """Try every place for every replica; -1 where they do not fit."""
    best = -1
    for places in itertools.product(range(len(nodes)), repeat=replicas):
        left = [c - cpus * places.count(at) for at, (_, _, c) in enumerate(nodes)]
        if min(left) >= 0:
            best = max(best, sum(int(min(g, c)) for (_, g, _), c in zip(nodes, left, strict=True)))
    return best


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 12)), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_megatron_fits_where_some_placement_does(
    sizes: list[tuple[int, int]], replicas: int, world: int, cpus: int
) -> None:
    nodes = [(f"n{at}", float(g), float(c)) for at, (g, c) in enumerate(sizes)]
    wanted = values(
        num_gpus=world * replicas, num_replicas=replicas, num_cpus_per_replica=float(cpus)
    )
    fits = best_ranks(nodes, replicas, cpus) >= world * replicas
    assert (deploy.shortage(nodes, wanted) == "") == fits


def test_a_shortage_is_said_with_numbers() -> None:
    nodes = [("a", 4.0, 13.0), ("b", 4.0, 13.0)]
    wanted = values(num_gpus=8, num_cpus_per_replica=8)
    assert deploy.shortage(nodes, wanted) == ""
    said = deploy.shortage([("b", 4.0, 1.0), ("a", 4.0, 13.0)], wanted)
    assert "room for 5 of 8 ranks" in said and "a: 4 GPUs, 13 CPUs, b: 4 GPUs, 1 CPUs" in said
    assert "room for 0 of 1 replicas" in deploy.shortage([("a", 8.0, 4.0)], wanted)
    hf = values(backend="hf", num_gpus=4, num_replicas=2, num_cpus_per_replica=2)
    assert deploy.shortage([("a", 2.0, 2.0), ("b", 3.0, 9.0)], hf) == ""
    assert "room for 1 of 2 replicas" in deploy.shortage([("a", 1.0, 9.0), ("b", 3.0, 9.0)], hf)
    cpu = values(backend="hf", num_gpus=0, num_replicas=3, num_cpus_per_replica=0.1)
    assert deploy.shortage([("a", 0.0, 0.3)], cpu) == ""


# Batches. Rows that answer like numpy's, because upstream's do.


class Rows(list):  # type: ignore[type-arg]
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple):
            rows, columns = key
            return Rows([row[columns] for row in list.__getitem__(self, rows)])
        return list.__getitem__(self, key)


def tokens(request: dict[str, Any]) -> list[float]:
    """The logprobs of a prompt and its answer: the model of these tests."""
    draw = random.Random(request["prompts"][0])
    echoed = [-draw.random() for _ in request["prompts"][0][1:]] if request["echo"] else []
    return echoed + [-draw.random() for _ in range(request["max_length"])]


async def upstream(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answer a batch with the first request's parameters, padded, as Export-Deploy 0.5 to 0.7."""
    first = requests[0]
    merged = [{**first, "prompts": request["prompts"]} for request in requests]
    if any("bad" in request["prompts"][0] for request in requests):
        raise ValueError("one of the prompts is bad")
    rows = [tokens(request) for request in merged]
    if first["compute_logprob"] and not first["echo"] and len({len(row) for row in rows}) > 1:
        raise ValueError("inhomogeneous")
    width = max(map(len, rows))
    answers = []
    for request, row in zip(merged, rows, strict=True):
        answer: dict[str, Any] = {"sentences": [f"{request['prompts'][0]} {request['max_length']}"]}
        if first["compute_logprob"]:
            answer["log_probs"] = Rows([row + [0.0] * (width - len(row))])
        if first["n_top_logprobs"]:
            answer["top_logprobs"] = [json.dumps([{"t": value} for value in row])]
        answers.append(answer)
    return answers


PROMPTS = st.text("ab", min_size=1, max_size=6).map(lambda text: [text])
PLAIN = {
    "max_length": 1, "temperature": 0.0, "stop_words": None,
    "compute_logprob": False, "echo": False, "n_top_logprobs": 0,
}  # fmt: skip
LOGLIKELIHOOD = {**PLAIN, "compute_logprob": True, "echo": True, "n_top_logprobs": 1}
ANY = {
    "max_length": st.integers(1, 3),
    "temperature": st.sampled_from([0.0, 1.0]),
    "stop_words": st.sampled_from([None, ["\n"]]),
    "compute_logprob": st.booleans(),
    "echo": st.booleans(),
    "n_top_logprobs": st.sampled_from([0, 1]),
}
REQUESTS = st.one_of(
    PROMPTS.map(lambda prompt: {"prompts": prompt, **LOGLIKELIHOOD}),
    PROMPTS.map(lambda prompt: {"prompts": prompt, **PLAIN}),
    st.fixed_dictionaries({"prompts": PROMPTS, **ANY}),
    st.just({"prompts": ["bad"], **PLAIN}),
)


def opened(answer: Any) -> Any:
    try:
        return {name: answer[name] for name in answer} if isinstance(answer, dict) else answer["x"]
    except ValueError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=8))
def test_in_any_batch_each_answer_is_the_one_it_would_have_alone(
    requests: list[dict[str, Any]],
) -> None:
    together = asyncio.run(deploy.in_compatible_groups(upstream, requests))
    for request, answer in zip(requests, together, strict=True):
        (alone,) = asyncio.run(deploy.in_compatible_groups(upstream, [request]))
        assert opened(answer) == opened(alone)


def test_compatible_requests_stay_together() -> None:
    sizes: list[int] = []

    async def counted(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        sizes.append(len(requests))
        return await upstream(requests)

    def ask(prompt: str, **changes: Any) -> dict[str, Any]:
        loglikelihood = {"compute_logprob": True, "echo": True, "n_top_logprobs": 1}
        return {"prompts": [prompt], "max_length": 1, **loglikelihood, **changes}

    requests = [ask("abc"), ask("ab", compute_logprob=False), ask("abcdef"), ask("a")]
    asyncio.run(deploy.in_compatible_groups(counted, requests))
    assert sizes == [3, 1]


def test_padding_that_cannot_be_told_from_tokens_is_refused() -> None:
    def answer(row: list[float], tops: int) -> dict[str, Any]:
        return {"log_probs": Rows([row]), "top_logprobs": [json.dumps([{}] * tops)]}

    assert deploy.unpadded([answer([-1.0, 0.0], 1), answer([-1.0, -2.0], 2)]) is not None
    assert deploy.unpadded([answer([-1.0, -3.0], 1), answer([-1.0, -2.0], 2)]) is None
    assert deploy.unpadded([answer([-1.0, 0.0], 1), answer([-1.0, 0.0], 1)]) is None
    assert deploy.unpadded([{"log_probs": Rows([[-1.0]])}, {"log_probs": Rows([[-1.0]])}]) is None


# Answers on their way out.


def through(
    request: dict[str, Any], choice: dict[str, Any], status: int = 200, pieces: int = 1
) -> tuple[dict[str, Any], dict[bytes, bytes]]:
    """Send a request and its answer through the channels; return the choice and the headers."""
    data = json.dumps({"choices": [choice]}).encode()
    asked = json.dumps(request).encode()
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": asked, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def talk() -> None:
        hear, tell = deploy.mended_channels(receive, send)
        await hear()
        headers = [(b"content-length", str(len(data)).encode()), (b"x", b"y")]
        await tell({"type": "http.response.start", "status": status, "headers": headers})
        size = -(-len(data) // pieces)
        for i in range(pieces):
            piece = data[i * size : (i + 1) * size]
            await tell({"type": "http.response.body", "body": piece, "more_body": i < pieces - 1})

    asyncio.run(talk())
    body = b"".join(message.get("body", b"") for message in sent[1:])
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(body)).encode()
    return json.loads(body)["choices"][0], dict(sent[0]["headers"])


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (None, "one. Q: two\n"),
        ([], "one. Q: two\n"),
        (["", "Q:"], "one. "),
        ("Q:", "one. "),
        (["\n", "Q:"], "one. "),
        (["three"], "one. Q: two\n"),
    ],
)
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_text_ends_before_its_first_stop_sequence(stop: object, text: str, pieces: int) -> None:
    said = {"text": "one. Q: two\n", "finish_reason": "length"}
    choice, headers = through({"prompt": "x", "stop": stop}, said, pieces=pieces)
    ended = "length" if text == said["text"] else "stop"
    assert choice == {"text": text, "finish_reason": ended}
    assert headers[b"x"] == b"y"


def test_a_message_of_a_chat_ends_before_its_stop_sequence_too() -> None:
    choice, _ = through({"stop": ["b"]}, {"message": {"content": "abc"}})
    assert choice == {"message": {"content": "a"}, "finish_reason": "stop"}


def test_an_error_and_an_echoed_prompt_pass_as_they_are() -> None:
    assert through({"stop": ["b"]}, {"text": "abc"}, status=500)[0] == {"text": "abc"}
    assert through({"stop": ["b"], "echo": True}, {"text": "abc"})[0] == {"text": "abc"}


def test_the_first_token_of_an_echo_has_a_place_among_the_top_logprobs() -> None:
    short = {"token_logprobs": [None, -1.0, -2.0], "top_logprobs": [{"a": -1.0}, {"b": -2.0}]}
    full = {**short, "top_logprobs": [None, {"a": -1.0}, {"b": -2.0}]}
    for logprobs in (short, full):
        choice, _ = through({"echo": True}, {"text": "ab", "logprobs": logprobs})
        assert choice["logprobs"] == full


# The HuggingFace deployable.


class Tokenizer:
    def __init__(self, special: int) -> None:
        self.special = special

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * (len(text.split()) + self.special * add_special_tokens)}


@pytest.mark.parametrize(("special", "first"), [(1, []), (0, [None])])
def test_logprobs_start_where_clients_count_from(special: int, first: list[None]) -> None:
    def infer(inputs: dict[str, Any]) -> dict[str, Any]:
        inputs.pop("prompts")
        row = [-1.0] * (2 + special + 1)  # a prompt of three words without its first token, and one
        return {"sentences": ["x"], "log_probs": [row], "top_logprobs": [json.dumps(row)]}

    repaired = deploy.repaired_hf(infer, Tokenizer(special))
    got = repaired({"prompts": ["a b c"], "echo": True, "compute_logprob": True})
    assert got["log_probs"][0] == [*first, *[-1.0] * (3 + special)]
    assert json.loads(got["top_logprobs"][0]) == got["log_probs"][0]
    asked = {"prompts": ["a b c"], "echo": False, "compute_logprob": True}
    assert repaired(asked)["log_probs"][0] == [-1.0] * (3 + special)


def test_what_cannot_be_aligned_and_error_texts_are_errors() -> None:
    echoed = {"prompts": ["a b"], "echo": True, "compute_logprob": True}
    answer = {"sentences": ["x"], "log_probs": [[-1.0, -1.0]]}
    with pytest.raises(ValueError, match="adds 2 tokens"):
        deploy.repaired_hf(lambda inputs: dict(answer), Tokenizer(2))(echoed)
    with pytest.raises(ValueError, match="An error occurred: CUDA"):
        deploy.repaired_hf(lambda inputs: {"sentences": ["An error occurred: CUDA"]}, None)({})


# Watching.


class FakeReplicas:
    def __init__(self, *states: Any) -> None:
        self.states = iter(states)

    def update(self) -> None: ...

    def problem(self) -> str:
        state = next(self.states)
        if isinstance(state, Exception):
            raise state
        return str(state)


def stops_after(polls: int) -> Any:
    left = iter([False] * polls + [True])
    return lambda: next(left)


def test_a_deployment_that_recovers_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    replicas = FakeReplicas("", "1 of 2 replicas", "1 of 2 replicas", "")
    deploy.watch(stops_after(4), replicas, patience=60)  # type: ignore[arg-type]
    said = [line[21:] for line in capsys.readouterr().out.splitlines()]
    assert said == ["1 of 2 replicas", "all replicas are well again"]


@pytest.mark.parametrize(
    ("state", "code", "message"),
    [
        ("application DEPLOY_FAILED: out of memory", 1, "unhealthy for .*out of memory"),
        ("application UNHEALTHY: rank 1 is dead", 1, "unhealthy for .*rank 1"),
        (ConnectionError("GCS"), 3, "cluster is lost"),
    ],
)
def test_a_deployment_that_is_ill_for_good_ends_the_watch(
    state: Any, code: int, message: str
) -> None:
    replicas = FakeReplicas("", state)
    with pytest.raises(deploy.DeployError, match=message) as error:
        deploy.watch(stops_after(9), replicas, patience=-1)  # type: ignore[arg-type]
    assert error.value.exit_code == code


def test_a_signal_gives_up_before_the_endpoint_is_up_and_stops_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    armed: list[tuple[float, int]] = []
    monkeypatch.setattr(deploy, "end_within", lambda *given: armed.append(given))
    run = deploy.Run(deploy.parse_arguments(["--address", "h:1"]))
    with pytest.raises(deploy.Signalled):
        run.on_signal(signal.SIGTERM, None)
    assert armed == [(deploy.SHUTDOWN_SECONDS, 143)]
    run.serving = True
    run.on_signal(signal.SIGTERM, None)
    assert run.stop() and len(armed) == 1


def test_the_completion_file_stops(tmp_path: Path) -> None:
    done = tmp_path / "done"
    run = deploy.Run(deploy.parse_arguments(["--address", "h:1", "--completion-file", str(done)]))
    assert not run.stop()
    done.touch()
    assert run.stop()


def test_a_seed_of_0_is_a_seed():
    with pytest.raises(
        deploy.DeployError, match=r"random_seed=0 is not used by Export-Deploy 0\.7"
    ):
        deploy.fit_knobs(values(random_seed=0), {"random_seed"}, "0.7.1")


def test_a_copy_of_an_iteration_is_not_the_latest(tmp_path):
    for name in ("iter_0001000_backup", "iter_0002000", "iter_0001000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run_config.yaml").touch()
    assert deploy.latest_iteration(tmp_path).name == "iter_0002000"


def test_temperature_0_is_greedy_whatever_top_p_is():
    request = {"prompts": ["a"], "temperature": 0, "top_k": 0, "top_p": 0.9999999}
    assert deploy.greedy(request) == request | {"top_k": 1, "top_p": 0.0}
    assert deploy.greedy(warm := request | {"temperature": 0.7}) == warm
