"""Both sides' arithmetic, written out, to see that nothing else makes their numbers differ.

Export-Deploy's server runs the whole text through the model and takes log-softmax row by row, from
its second token on; lm-eval's client sums the entries from its own context length on, in double
precision. The harness's backend runs the text without its last token and sums in single precision.
The two forward passes have another length, so their matrix products round differently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from samples import Answer


class Replay:
    """One checkpoint, asked as each side asks it."""

    def __init__(self, model: Path, *, repaired: bool = True) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch, self.repaired = torch, repaired
        torch.set_num_threads(1)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()

    def ids(self, text: str, *, special: bool) -> list[int]:
        """Return a text's tokens, with or without what the tokenizer adds."""
        return list(self.tokenizer(text, add_special_tokens=special).input_ids)

    def rows(self, ids: list[int]) -> Any:
        """Return the logits after each token."""
        with self.torch.no_grad():
            return self.model(input_ids=self.torch.tensor([ids])).logits[0]

    def entries(self, text: str) -> list[tuple[float, bool]]:
        """Return the server's entries for a text: log-probability, and is it the largest.

        ``deploy.py`` puts an empty one first where the tokenizer adds no BOS.
        """
        ids = self.ids(text, special=True)
        empty = self.repaired and len(ids) == len(self.ids(text, special=False))
        found = [(0.0, True)] if empty else []
        for row, token in zip(self.rows(ids), ids[1:], strict=False):
            logprobs = row.log_softmax(-1)
            found.append((logprobs[token].item(), bool(logprobs[token] == logprobs.max())))
        return found

    def chain(self, answer: Answer, *, client_bos: bool = False) -> tuple[float, bool]:
        """Return what lm-eval's client makes of the server's entries."""
        whole = self.ids(answer.context + str(answer.continuation), special=client_bos)
        start = len(self.ids(answer.context, special=client_bos))
        scored = self.entries(self.tokenizer.decode(whole))[start:]
        return sum(value for value, _ in scored), all(greedy for _, greedy in scored)

    def direct(self, answer: Answer) -> tuple[float, bool]:
        """Return what the harness's own backend computes."""
        ids = self.ids(answer.context + str(answer.continuation), special=True)
        start = len(self.ids(answer.context, special=True))
        logprobs = self.rows(ids[:-1]).log_softmax(-1)[start - 1 :]
        wanted = self.torch.tensor(ids[start:])
        scored = logprobs.gather(1, wanted[:, None])[:, 0]
        return float(scored.sum()), bool((logprobs.argmax(-1) == wanted).all())


def cut(text: str, until: list[str]) -> str:
    """Return a text up to its first stop sequence, as the harness's backend cuts it."""
    for stop in until:
        text = text.split(stop)[0]
    return text
