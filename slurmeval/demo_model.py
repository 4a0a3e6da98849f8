"""The demo's model: a tiny Llama that learns a list of answers by heart, in seconds on a CPU.

Needs torch, tokenizers and transformers, which come with the extra ``serve``.
"""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slurmeval.errors import ConfigError, SlurmevalError

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
SPECIAL = (UNKNOWN, BOS, EOS)
MAX_LENGTH = 2048
HIDDEN = 64
SEED = 1
LEARNING_RATE = 4e-3
MAX_STEPS = 400
CHECK_EVERY = 10
#: Each token of an answer must be more likely than any other token by this many nats: a hundred
#: times what rounding, another CPU, a GPU or half precision could turn round.
MARGIN = 5.0

Progress = Callable[[str], None]
Lesson = tuple[str, str]


def words(texts: Iterable[str]) -> list[str]:
    """Return the sorted words of ``texts``, each with the space before it, and the line end."""
    found = {"\n", " "}
    for text in texts:
        found.update(re.findall(r"\n| ?[^ \n]+| ", text))
    return sorted(found)


def make_tokenizer(texts: Iterable[str]) -> Any:
    """Return a fast tokenizer with a word for each word of ``texts``.

    It adds a BOS token, because Export-Deploy's HuggingFace server gives no probability for the
    first token of a prompt while lm-eval's client counts from it: with a BOS they agree.
    """
    tokenizers = _module("tokenizers")
    vocabulary = [*SPECIAL, *(word.replace(" ", "▁") for word in words(texts))]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split("\n", "isolated"),
            tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="never")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def build(lessons: Sequence[Lesson], folder: Path, progress: Progress) -> None:
    """Write ``folder/model``, which answers all ``lessons``, and ``folder/untrained``.

    Args:
        lessons: Prompts and the answers to them; an answer starts with a space.
        folder: An existing directory.
        progress: Called with one line for each step.

    Raises:
        ConfigError: torch, tokenizers or transformers is missing.
        SlurmevalError: The model did not learn the lessons.
    """
    torch, transformers = _module("torch"), _module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = make_tokenizer(text for lesson in lessons for text in lesson)
    _check_round_trip(tokenizer, lessons)
    with _one_thread(torch):
        torch.manual_seed(SEED)
        model = transformers.LlamaForCausalLM(_config(transformers, tokenizer)).float()
        progress(f"demo: model of {sum(p.numel() for p in model.parameters()):,} parameters")
        _save(model, tokenizer, folder / "untrained")
        _train(torch, model, _Batch(torch, tokenizer, lessons), progress)
        _save(model, tokenizer, folder / "model")


def _config(transformers: Any, tokenizer: Any) -> Any:
    return transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(EOS),
    )


def _check_round_trip(tokenizer: Any, lessons: Sequence[Lesson]) -> None:
    """Check that no text is lost: lm-eval sends decoded tokens, which the server encodes again."""
    for prompt, answer in lessons:
        ids = tokenizer.encode(prompt + answer, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != prompt + answer:
            raise SlurmevalError(f"the demo's tokenizer does not give back {prompt + answer!r}")


class _Batch:
    """All lessons as tensors, padded on the right, with the places of the answers' tokens."""

    def __init__(self, torch: Any, tokenizer: Any, lessons: Sequence[Lesson]) -> None:
        eos = tokenizer.token_to_id(EOS)
        rows, places, targets = [], [], []
        for number, (prompt, answer) in enumerate(lessons):
            start = len(tokenizer.encode(prompt).ids)
            ids = [*tokenizer.encode(prompt + answer).ids, eos]
            rows.append(ids)
            places += [(number, place - 1) for place in range(start, len(ids))]
            targets += ids[start:]
        width = max(map(len, rows))
        self.ids = torch.tensor([row + [eos] * (width - len(row)) for row in rows])
        self.mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        self.targets = torch.tensor(targets)
        self.rows, self.columns = (torch.tensor(axis) for axis in zip(*places, strict=True))

    def logits(self, model: Any) -> Any:
        """Return the logits of each answer's tokens, shape (tokens, vocabulary)."""
        hidden = model.model(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
        return model.lm_head(hidden[self.rows, self.columns])

    def margin(self, torch: Any, logits: Any) -> float:
        """Return by how many nats the least certain token is ahead of its strongest rival."""
        target = logits.gather(1, self.targets[:, None])[:, 0]
        rivals = logits.scatter(1, self.targets[:, None], float("-inf"))
        return float((target - rivals.max(dim=1).values).min())


def _train(torch: Any, model: Any, batch: _Batch, progress: Progress) -> None:
    """Train until each token of each answer is ahead by ``MARGIN``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    started = time.monotonic()
    margin = float("-inf")
    for step in range(1, MAX_STEPS + 1):
        logits = batch.logits(model)
        if step % CHECK_EVERY == 0:
            margin = batch.margin(torch, logits.detach())
            progress(f"demo: training step {step}, margin {margin:.1f} of {MARGIN} nats")
            if margin >= MARGIN:
                model.eval()
                return
        loss = torch.nn.functional.cross_entropy(logits, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.monotonic() - started
    raise SlurmevalError(
        f"the demo's model did not learn its questions: margin {margin:.2f} of {MARGIN} nats "
        f"after {MAX_STEPS} steps and {seconds:.0f} s",
        hint="please report this, with the output of: pip list",
    )


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Written by hand: what each version of transformers writes, another cannot always read.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": UNKNOWN,
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    # safetensors makes files that only their owner can read; a serving container may be another.
    (folder / "model.safetensors").chmod(0o644)


@contextmanager
def _one_thread(torch: Any) -> Iterator[None]:
    """Compute with one thread: the same sums everywhere, and no waiting on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"the demo's model needs the package {name}, which cannot be imported: {error}",
            hint="install it: pip install 'slurmeval[serve,eval]'",
        ) from error
