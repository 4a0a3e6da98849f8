"""Which known faults between endpoint and evaluator change scores; docs/fidelity.md explains them.

Stands alone: the standard library, and the tokenizers library where it is there. A job carries it
beside ``deploy.py``. It judges before a job, from the tokenizer's files, and in the job, from what
the endpoint really answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

#: What a fault makes worthless.
Spoils = Literal["loglikelihood", "is_greedy", "generation"]
#: A request's body in, the answer's first choice out; empty where the endpoint refuses.
Ask = Callable[[dict[str, Any]], Mapping[str, Any]]

#: One token in nearly every vocabulary, so that it can be judged without a tokenizer, too.
PROMPT = "a"
DOCUMENTED = "see docs/fidelity.md"


@dataclass(frozen=True)
class Fault:
    """A fault that changes scores.

    Attributes:
        name: ``shifted-loglikelihood``, ``shifted-is-greedy``, ``no-logprobs`` or ``stop-ignored``.
        spoils: What it makes worthless.
        message: What happens, for people.
        sure: Whether it is seen, and not only likely.
    """

    name: str
    spoils: Spoils
    message: str
    sure: bool = True


def special_tokens(tokenizer: Path) -> tuple[int, int] | None:
    """Return how many special tokens a tokenizer puts before and after a text.

    Args:
        tokenizer: Directory with ``tokenizer.json``.

    Returns:
        The two numbers, or None where the files do not say: no ``tokenizer.json``, an unknown kind
        of post-processor, or an ``add_bos_token`` that contradicts it, which some versions of
        transformers follow and others do not.
    """
    try:
        processor = json.loads((tokenizer / "tokenizer.json").read_bytes()).get("post_processor")
        config = json.loads((tokenizer / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, AttributeError):
        return None
    found = _added(processor)
    wanted = config.get("add_bos_token") if isinstance(config, dict) else None
    if found is None or (wanted is not None and bool(wanted) != (found[0] > 0)):
        return None
    return found


def _added(processor: Any) -> tuple[int, int] | None:
    """Return what a post-processor of the tokenizers library adds before and after one text."""
    if processor is None:
        return 0, 0
    kind = processor.get("type")
    if kind in ("RobertaProcessing", "BertProcessing"):
        return 1, 1
    if kind == "TemplateProcessing":
        pieces = ["Sequence" in piece for piece in processor["single"]]
        return (pieces.index(True), pieces[::-1].index(True)) if any(pieces) else None
    if kind == "Sequence":
        parts = [_added(part) for part in processor["processors"]]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return sum(before for before, _ in known), sum(after for _, after in known)
    return (0, 0) if kind == "ByteLevel" else None


def expected_faults(
    backend: str, special: tuple[int, int] | None, *, vllm: bool = False
) -> list[Fault]:
    """Return the faults that a job will meet, as far as they can be known before it runs.

    Those that ``deploy.py`` repairs are not among them. What Megatron's endpoint does depends on
    the container's Export-Deploy and Megatron Core: ``probe`` tells.

    Args:
        backend: ``hf`` or ``megatron``, as in ``deploy.backend``.
        special: What ``special_tokens`` said of the tokenizer.
        vllm: Whether ``deploy.use_vllm_backend`` is set; ``deploy.py`` repairs nothing there.
    """
    if backend != "hf" or special is None or special == (1, 0):
        return []
    if special == (0, 0) and not vllm:
        return []
    before, after = special
    seen = f"the tokenizer adds {before} token(s) before a text and {after} after it"
    return [_shifted(1 - before if not after else 0, seen)]


def token_counter(checkpoint: str, tokenizer: str | None) -> Callable[[str], int] | None:
    """Return what counts a text's tokens, without special ones, as the evaluator's tokenizer does.

    Args:
        checkpoint: The checkpoint's directory; Megatron-Bridge has ``tokenizer/`` in it.
        tokenizer: The evaluator's tokenizer, where it is another one.

    Returns:
        The function, or None where the files or the tokenizers library are not there.
    """
    places = [Path(tokenizer)] if tokenizer else [Path(checkpoint, "tokenizer"), Path(checkpoint)]
    file = next((f for place in places if (f := place / "tokenizer.json").is_file()), None)
    try:
        from tokenizers import Tokenizer

        made = Tokenizer.from_file(str(file))
    except Exception:  # what the library raises is plain Exception
        return None
    return lambda text: len(made.encode(text, add_special_tokens=False).ids)


def probe(ask: Ask, count: Callable[[str], int] | None = None) -> list[Fault]:
    """Ask a running endpoint three small questions and return the faults that its answers show.

    Args:
        ask: Sends a body to ``/v1/completions/`` and returns the answer's first choice.
        count: The number of tokens that the evaluator's tokenizer makes of a text, without special
            tokens; without it, the prompt counts as one token, and what follows is not sure.
    """
    echoed = ask({"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1})
    faults = logprob_faults(echoed.get("logprobs"), count(PROMPT) if count else None)
    plain = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    words = str(ask(plain).get("text") or "").split()
    if words and words[0] in str(ask(plain | {"stop": [words[0]]}).get("text")):
        faults.append(_stop_ignored())
    return faults


def logprob_faults(logprobs: Mapping[str, Any] | None, tokens: int | None) -> list[Fault]:
    """Judge the ``logprobs`` of a completion that echoes its prompt and adds one token.

    lm-eval counts its context in tokens without BOS and reads the entries from there up to the last
    but one, so there must be one entry for each token of the prompt and one for the added token.

    Args:
        logprobs: The choice's field of that name.
        tokens: The prompt's number of tokens, without special tokens; None where nobody knows.
    """
    entries = (logprobs or {}).get("token_logprobs")
    tops = (logprobs or {}).get("top_logprobs")
    if not entries:
        return [
            Fault(
                "no-logprobs",
                "loglikelihood",
                "the endpoint gives no log-probabilities of a prompt: loglikelihood tasks fail",
            )
        ]
    faults, sure, tokens = [], tokens is not None, tokens or 1
    if len(entries) != tokens + 1:
        seen = f"{len(entries)} log-probabilities for a prompt of {tokens} token(s) and one more"
        faults.append(_shifted(tokens + 1 - len(entries), seen, sure))
    if tops is not None and len(tops) != len(entries):
        faults.append(_shifted_greedy())
    return faults


def _shifted(missing: int, seen: str, sure: bool = True) -> Fault:
    what = (
        f"leaves out the first {missing} token(s) of each answer, and all of a one-token answer"
        if missing > 0
        else "scores other tokens than those of the answer"
    )
    return Fault(
        "shifted-loglikelihood",
        "loglikelihood",
        f"{seen}: lm-eval {what}; loglikelihood scores are wrong, {DOCUMENTED}",
        sure,
    )


def _shifted_greedy() -> Fault:
    return Fault(
        "shifted-is-greedy",
        "is_greedy",
        "top_logprobs is one entry shorter than token_logprobs: lm-eval's is_greedy is wrong, and "
        "with it metrics built on it, such as acc of lambada; acc of multiple choice is right, "
        f"{DOCUMENTED}",
    )


def _stop_ignored() -> Fault:
    return Fault(
        "stop-ignored",
        "generation",
        "the endpoint ignores stop sequences: answers run on to their end-of-sequence token or to "
        f"max_new_tokens, and metrics that read the whole answer see the rest, {DOCUMENTED}",
    )
