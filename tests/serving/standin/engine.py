"""Stands in for Megatron's engine: a small HuggingFace model, its output layer cut over the ranks.

No rank can answer without all others: each holds a slice of the vocabulary, and they exchange
their logits over a real process group. What the ranks were given, and where they run, is written to
``$ENGINE_RECORD/<rank 0's pid>/<rank>.json`` when they are up.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

GPUS_OF_A_NODE = int(os.environ.get("ENGINE_GPUS_OF_A_NODE", "1"))
torch.cuda.device_count = lambda: GPUS_OF_A_NODE


def upstream_returns() -> int:
    """Return how many values the installed ``create_mcore_engine`` returns."""
    import nemo_deploy

    source = Path(nemo_deploy.__file__).parent / "llm" / "inference" / "inference_base.py"
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "create_mcore_engine":
            return len(node.returns.slice.elts)
    raise AssertionError("create_mcore_engine is not in inference_base.py")


def on_cpu(make: Any) -> Any:
    """Return ``torch.empty`` or ``torch.tensor`` for machines without CUDA."""
    return lambda *args, **options: make(*args, **{**options, "device": "cpu"})


class Engine:
    """What ``create_mcore_engine`` returns first."""

    def __init__(self, path: Path, *, coordinated: bool, limit: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.coordinated, self.limit = coordinated and self.world > 1, limit
        self.shard = torch.tensor_split(self.model.lm_head.weight, self.world)[self.rank]

    def follow(self) -> None:
        """Compute what rank 0 computes, for as long as there is one."""
        while True:
            work: list[Any] = [None]
            dist.broadcast_object_list(work, src=0)
            self.compute(*work[0])

    def generate(
        self,
        prompts: list[str],
        add_BOS: bool = False,
        common_inference_params: Any = None,
        sampling_params: Any = None,
    ) -> list[Any]:
        """Answer prompts; all ranks are called with the same ones."""
        given = sampling_params or common_inference_params
        limit, stop = given.num_tokens_to_generate, getattr(given, "stop_words", None) or []
        top = getattr(given, "top_n_logprobs", 0)
        work = (list(prompts), limit, stop, top)
        if self.coordinated:
            dist.broadcast_object_list([work], src=0)
        return self.compute(*work)

    def compute(self, prompts: list[str], limit: int, stop: list[str], top: int) -> list[Any]:
        if len(prompts) > self.limit:
            raise ValueError(f"{len(prompts)} prompts, max_batch_size is {self.limit}")
        return [self.answer(prompt, limit, stop, top) for prompt in prompts]

    @torch.no_grad()
    def answer(self, prompt: str, limit: int, stop: list[str], top: int) -> Any:
        ids = self.tokenizer(prompt)["input_ids"]
        hidden_bos = ids[0] == self.tokenizer.bos_token_id
        length, text = len(ids), ""
        for _ in range(limit):
            logprobs = self.logprobs(ids)
            ids.append(int(logprobs[-1].argmax()))
            text = self.tokenizer.decode(ids[length:])
            if ids[-1] == self.tokenizer.eos_token_id or any(word in text for word in stop):
                break
        # Megatron adds no BOS: the first token that counts is the one after it.
        first = 2 if hidden_bos else 1
        rows = [float(logprobs[at - 1, ids[at]]) for at in range(first, len(ids))]
        tops = [self.best(logprobs[at - 1], top) for at in range(first, len(ids))]
        cut = length - first
        return SimpleNamespace(
            prompt=prompt,
            generated_text=text,
            prompt_log_probs=rows[:cut],
            generated_log_probs=rows[cut:],
            prompt_top_n_logprobs=tops[:cut],
            generated_top_n_logprobs=tops[cut:],
        )

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Return the log probabilities of the next token at each place, from all ranks' slices."""
        hidden = self.model.model(torch.tensor([ids])).last_hidden_state[0]
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, hidden @ self.shard.T)
        return torch.cat(parts, dim=1).log_softmax(-1)

    def best(self, row: torch.Tensor, count: int) -> dict[str, float]:
        values, places = row.topk(count) if count else ([], [])
        return {
            self.tokenizer.decode([int(at)]): float(v) for v, at in zip(values, places, strict=True)
        }


def create_mcore_engine(
    path: Path,
    num_devices: int | None = None,
    num_nodes: int | None = None,
    params_dtype: Any = torch.bfloat16,
    inference_batch_times_seqlen_threshold: int = 32768,
    inference_max_seq_length: int = 4096,
    max_batch_size: int = 8,
    random_seed: int | None = None,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int = 1,
    sequence_parallel: bool = False,
    enable_flash_decode: bool = False,
    enable_cuda_graphs: bool = False,
    legacy_ckpt: bool = False,
    model_type: str = "gpt",
    model_format: str = "nemo",
    micro_batch_size: int | None = None,
    buffer_size_gb: float = 10.0,
    legacy_model_format: bool = False,
) -> tuple[Any, ...]:
    """Stand in for Export-Deploy's function of this name."""
    from nemo_deploy.llm import megatronllm_deployable_ray as upstream

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    world = dist.get_world_size()
    assert (
        world == tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    )
    assert model_format == "megatron"
    coordinated = "generate_other_ranks" not in inspect.getsource(upstream)
    engine = Engine(path, coordinated=coordinated, limit=max_batch_size)
    record(path, max_batch_size, tensor_model_parallel_size, pipeline_model_parallel_size)
    torch.empty, torch.tensor = on_cpu(torch.empty), on_cpu(torch.tensor)
    if engine.coordinated and engine.rank > 0:
        threading.Thread(target=engine.follow, daemon=True).start()
    tokenizer = SimpleNamespace(_tokenizer=engine.tokenizer, tokenizer=engine.tokenizer)
    values: list[Any] = [engine, None, tokenizer]
    return tuple(values if upstream_returns() == 3 else (engine, tokenizer))


def record(path: Path, batch: int, tensor: int, pipeline: int) -> None:
    """Write down what this rank is."""
    group: list[Any] = [os.getpid()]
    dist.broadcast_object_list(group, src=0)
    folder = Path(os.environ["ENGINE_RECORD"]) / str(group[0])
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "rank": dist.get_rank(),
        "world": dist.get_world_size(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "path": str(path),
        "max_batch_size": batch,
        "tensor": tensor,
        "pipeline": pipeline,
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(about))
