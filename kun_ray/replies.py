"""Reading what an engine answers: one function a step, reply → the row's new columns, or why the row ends here.

steps.py binds each to its configuration. Source: Kun (arXiv 2401.06477) §3 and its published scripts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

from kun_ray.schema import FAILED, REJECTED

if TYPE_CHECKING:
    from kun_ray.steps import LabelConfig, PerplexityConfig, PolishConfig, ScoreConfig


@dataclasses.dataclass(frozen=True)
class Reply:
    """What an engine answers to one prompt."""

    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: str
    text: str = ""
    logprobs: tuple[float, ...] = ()
    """Natural logarithms. From `choose`: of each candidate, shape [len(candidates)]. From `perplexity`: of each token of the
    prompt after the first, shape [prompt length − 1]."""
    perplexity: float | None = None
    num_cached_tokens: int = 0
    """Tokens of the prompt that the engine's prefix cache held."""


def parse_perplexity(reply: Reply, config: PerplexityConfig) -> dict[str, Any]:
    """Perplexity = exp(−mean log-probability of the text's tokens), checked against its limits."""
    measured = reply.perplexity
    found = {"perplexity": measured}
    if measured is None or not math.isfinite(measured):
        return {**found, "perplexity": None, "status": FAILED, "reason": "unparsable"}
    out_of_range = (config.max is not None and measured > config.max) or (
        config.min is not None and measured < config.min
    )
    return {**found, "status": REJECTED, "reason": "perplexity"} if out_of_range else found


def parse_label(reply: Reply, config: LabelConfig) -> dict[str, Any]:
    """The instruction: stripped, cut at five or more blanks, repeated lines collapsed; then Kun's keyword rules."""
    instruction = tidy(reply.text)
    found: dict[str, Any] = {"instruction": instruction or None}
    if reply.finish_reason == "length":
        return {**found, "status": FAILED, "reason": "truncated"}
    if not instruction:
        return {**found, "status": FAILED, "reason": "unparsable"}
    if len(instruction) < config.min_chars:
        return {**found, "status": REJECTED, "reason": "instruction_short"}
    if len(instruction) > config.max_chars:
        return {**found, "status": REJECTED, "reason": "instruction_long"}
    return {**found, **_keyword(instruction, config.reject_words)}


def parse_choice(reply: Reply, config: ScoreConfig) -> dict[str, Any]:
    """Verdict and score from the candidates' log-probabilities: score = Σ softmax(logprobs) · values."""
    highest = max(reply.logprobs)
    if not math.isfinite(highest) or any(map(math.isnan, reply.logprobs)):
        return {"status": FAILED, "reason": "unparsable"}
    weights = [math.exp(logprob - highest) for logprob in reply.logprobs]
    probabilities = [weight / sum(weights) for weight in weights]
    verdict = max(range(len(weights)), key=weights.__getitem__)
    score = sum(p * value for p, value in zip(probabilities, config.values, strict=True))
    return _judged(config, verdict, score)


def parse_verdict(reply: Reply, config: ScoreConfig) -> dict[str, Any]:
    """Verdict from a decoded reply: the one tag that it holds; among several, the worst (Kun: good and not bad)."""
    present = [i for i, candidate in enumerate(config.candidates) if config.tag.replace("{}", candidate) in reply.text]
    if not present:
        return {"status": FAILED, "reason": "truncated" if reply.finish_reason == "length" else "unparsable"}
    verdict = min(present, key=config.values.__getitem__)
    return _judged(config, verdict, config.values[verdict])


def parse_polish(reply: Reply, config: PolishConfig) -> dict[str, Any]:
    """The answer, checked for length, repetition and words that betray the material."""
    answer = reply.text.strip()
    found: dict[str, Any] = {"answer": answer or None}
    if reply.finish_reason == "length":
        return {**found, "status": FAILED, "reason": "truncated"}
    if len(answer) < config.min_chars:
        return {**found, "status": REJECTED, "reason": "answer_short"}
    if repeats(f"{answer}\n", config.max_repeats):  # the last of several equal lines has lost its line end
        return {**found, "status": REJECTED, "reason": "repetition"}
    return {**found, **_keyword(answer, config.reject_words)}


def tidy(text: str) -> str:
    """A generated instruction: stripped, cut at the first run of five blanks, each distinct line kept once."""
    text = re.split(r"\s{5,}", text.strip(), maxsplit=1)[0]
    return "\n".join(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def repeats(text: str, most: int) -> bool:
    """Whether a unit of 1–40 characters that holds a letter stands more than `most` times in a row."""
    return any(
        re.search(r"[^\W\d_]", found.group(1)) for found in re.finditer(rf"(.{{1,40}}?)\1{{{most},}}", text, re.DOTALL)
    )


def _judged(config: ScoreConfig, verdict: int, score: float) -> dict[str, Any]:
    found: dict[str, Any] = {"verdict": config.candidates[verdict], "score": score}
    if config.values[verdict] < 0.5:
        return {**found, "status": REJECTED, "reason": "verdict_bad"}
    return {**found, "status": REJECTED, "reason": "below_threshold"} if score < config.threshold else found


def _keyword(text: str, words: list[str]) -> dict[str, Any]:
    word = next((word for word in words if word in text), None)
    return {} if word is None else {"status": REJECTED, "reason": f"keyword:{word}"}
