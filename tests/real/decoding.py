"""Log-probabilities and greedy decoding by transformers: what an engine on the same weights is compared with."""

from __future__ import annotations

import torch

GREEDY = {"temperature": 0.0, "top_p": 1.0}
NEAR = 2e-3
"""Two fp32 implementations may differ by this much in a log-probability (nats)."""


@torch.no_grad()
def logprobs(network, ids: list[int]) -> torch.Tensor:
    """log p(next token) after each token of `ids`. Shape: [len(ids), vocabulary]."""
    return torch.log_softmax(network(torch.tensor([ids])).logits[0].double(), dim=-1)


def greedy(network, ids: list[int], stop: set[int], most: int, penalty: float = 1.0) -> list[int]:
    """The tokens that a greedy decoder must give, up to the first step at which two tokens are too close to tell."""
    found: list[int] = []
    while len(found) < most:
        scores = logprobs(network, ids + found)[-1]
        seen = torch.tensor(sorted({*ids, *found}))
        logits = scores.clone()
        if penalty != 1.0:
            with torch.no_grad():
                logits = network(torch.tensor([ids + found])).logits[0, -1].double()
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        first, second = logits.topk(2).values.tolist()
        if first - second < 0.02:
            break
        found.append(int(logits.argmax()))
        if found[-1] in stop:
            break
    return found


def text_of(running, tokens: list[int]) -> str:
    """What vLLM makes of them: the bytes of a character that the limit has cut are left out."""
    return running.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")
