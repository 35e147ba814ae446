"""The steps of Kun: perplexity, label, score, polish. Each is a value of one Step type, built from its configuration.

A step knows its prompt, its sampling and how to read the reply; it never calls an engine itself (pool.py does).
Source: Kun (arXiv 2401.06477) §3 and its published scripts; scoring a pair on a scale follows Humpback (arXiv 2308.06259).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from omegaconf import MISSING
from transformers import PreTrainedTokenizerFast

from kun_ray.config import one_of, require
from kun_ray.prompts import Prompt, PromptConfig, build_prompt, choices
from kun_ray.schema import FAILED, REJECTED

STEPS = ("perplexity", "label", "score", "polish")


@dataclasses.dataclass
class Sampling:
    """How a reply is decoded. The defaults are Kun's (its inference script)."""

    temperature: float = 0.5
    """0 decodes greedily."""
    top_p: float = 0.95
    """Nucleus: the smallest set of tokens with this probability mass is sampled from."""
    repetition_penalty: float = 1.2
    """Above 1 makes tokens that were already seen less likely."""
    max_tokens: int = 1024
    """A longer reply is cut and the row fails as `truncated`."""
    stop: list[str] = dataclasses.field(default_factory=list)
    """Strings that end the reply."""
    seed: int | None = None
    """Makes each request's sampling repeatable, at some cost in speed."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "sampling.temperature must not be negative")
        require(0 < self.top_p <= 1, "sampling.top_p must lie in (0, 1]")
        require(self.repetition_penalty > 0, "sampling.repetition_penalty must be above 0 (1 leaves it out)")
        require(self.max_tokens >= 1, "sampling.max_tokens must be at least 1")


@dataclasses.dataclass
class PerplexityConfig:
    """Perplexity of a document under a language model, as a filter before label."""

    max: float | None = None
    """Documents above it are rejected as `perplexity`; null only records it. Relative to the model."""
    min: float | None = None
    """Documents below it (boilerplate that the model knows by heart) are rejected as `perplexity`."""


@dataclasses.dataclass
class LabelConfig:
    """label: text → instruction."""

    prompt: PromptConfig = MISSING
    """Asks for the instruction that {text} most likely answers."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """Decoding of the instruction."""
    reject_words: list[str] = dataclasses.field(default_factory=list)
    """An instruction with one of these needs material that the row cannot show: rejected as `keyword:<word>`."""
    min_chars: int = 4
    """Shorter instructions are rejected as `instruction_short`."""
    max_chars: int = 500
    """Longer instructions are rejected as `instruction_long`."""

    def __post_init__(self) -> None:
        _require_fields("label", self.prompt, needed={"text"}, allowed={"title"})


@dataclasses.dataclass
class ScoreConfig:
    """score: is the instruction any good?"""

    prompt: PromptConfig = MISSING
    """Holds the rubric and asks for one of the candidates. With `input: pair` it names {instruction} and {text}."""
    input: str = "instruction"
    """`instruction`: the instruction alone (Kun). `pair`: instruction and text (Humpback)."""
    mode: str = "choose"
    """`choose` compares the candidates' probabilities in one prefill; `generate` decodes a reply and looks for the tag."""
    candidates: list[str] = dataclasses.field(default_factory=lambda: ["好", "差"])
    """The verdicts, best first for a binary rubric; for a scale `["1","2","3","4","5"]` with matching values."""
    values: list[float] = dataclasses.field(default_factory=lambda: [1.0, 0.0])
    """What each candidate is worth, 0–1; score is their mean under the model's probabilities."""
    threshold: float = 0.5
    """Rows with a lower score are rejected as `below_threshold` (`verdict_bad` if the verdict itself is a bad one)."""
    tag: str = "【{}】"
    """How a verdict is written in the reply; what stands before the braces is put into the prompt when choosing."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """Decoding in `generate` mode."""

    def __post_init__(self) -> None:
        one_of("score.input", self.input, ("instruction", "pair"))
        one_of("score.mode", self.mode, ("choose", "generate"))
        require(len(self.candidates) >= 2, "score.candidates needs at least two verdicts")
        require(len(self.candidates) == len(self.values), "score.values needs one value per candidate")
        require(all(0 <= value <= 1 for value in self.values), "score.values must lie between 0 and 1")
        require(0 <= self.threshold <= 1, "score.threshold must lie between 0 and 1, like score.values")
        require("{}" in self.tag, "score.tag needs {} where the verdict stands")
        needed = {"instruction", "text"} if self.input == "pair" else {"instruction"}
        _require_fields(
            "score",
            self.prompt,
            needed,
            allowed={"title"} if self.input == "pair" else set(),
            hint=f" when score.input is {self.input}",
        )


@dataclasses.dataclass
class PolishConfig:
    """polish: instruction and text → answer."""

    prompt: PromptConfig = MISSING
    """Gives {text} as known material and asks for {instruction} to be answered."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """Decoding of the answer."""
    reject_words: list[str] = dataclasses.field(default_factory=list)
    """An answer with one of these speaks of the material or of itself: rejected as `keyword:<word>`."""
    min_chars: int = 20
    """Shorter answers are rejected as `answer_short`."""
    max_repeats: int = 5
    """An answer in which a unit is repeated more often than this in a row is rejected as `repetition`."""

    def __post_init__(self) -> None:
        _require_fields("polish", self.prompt, needed={"instruction"}, allowed={"text", "title"})


@dataclasses.dataclass
class StepsConfig:
    """The steps' prompts, sampling and limits. Steps that no pool runs may be left out."""

    perplexity: PerplexityConfig = dataclasses.field(default_factory=PerplexityConfig)
    """Perplexity as a step."""
    label: LabelConfig | None = None
    """Text → instruction."""
    score: ScoreConfig | None = None
    """Instruction → verdict."""
    polish: PolishConfig | None = None
    """Instruction and text → answer."""


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


Parse = Callable[[Reply], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Step:
    """What one engine does to one row: fill `prompt`, decode (or choose, or measure), `parse` the reply into columns."""

    name: str
    prompt: Prompt
    parse: Parse
    sampling: Sampling | None = None
    """Set: the reply is generated."""
    candidates: tuple[int, ...] = ()
    """Set: the reply is chosen among these token ids. Neither set: the prompt's perplexity is measured."""

    def num_reserved_tokens(self) -> int:
        """Tokens of the context that this step needs besides the row's own text: the fixed prompt and the reply."""
        return self.prompt.num_fixed_tokens() + (self.sampling.max_tokens if self.sampling else 1)


def build_step(name: str, config: StepsConfig, tokenizer: PreTrainedTokenizerFast) -> Step:
    """The step `name`, its prompt rendered for this tokenizer. Raises ConfigError when it is not configured."""
    if name == "perplexity":
        limits = config.perplexity
        return Step(name, Prompt(("text",), tokenizer), lambda reply: parse_perplexity(reply, limits))
    chosen = getattr(config, name)
    require(chosen is not None, f"a pool runs `{name}`, but steps.{name} is not configured")
    if isinstance(chosen, LabelConfig):
        return Step(
            name, build_prompt(tokenizer, chosen.prompt), lambda reply: parse_label(reply, chosen), chosen.sampling
        )
    if isinstance(chosen, PolishConfig):
        return Step(
            name, build_prompt(tokenizer, chosen.prompt), lambda reply: parse_polish(reply, chosen), chosen.sampling
        )
    if chosen.mode == "generate":
        return Step(
            name, build_prompt(tokenizer, chosen.prompt), lambda reply: parse_verdict(reply, chosen), chosen.sampling
        )
    common, firsts = choices(tokenizer, chosen.candidates)
    prompt = build_prompt(tokenizer, chosen.prompt, chosen.tag.split("{}")[0]).extended(common)
    return Step(name, prompt, lambda reply: parse_choice(reply, chosen), candidates=tuple(firsts))


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


def _require_fields(step: str, prompt: PromptConfig, needed: set[str], allowed: set[str], hint: str = "") -> None:
    if isinstance(prompt, PromptConfig):  # MISSING is a str until it is filled in
        for name in sorted(needed - prompt.fields()):
            require(False, f"steps.{step}.prompt must name {{{name}}}{hint}")
        for name in sorted(prompt.fields() - needed - allowed):
            require(False, f"steps.{step}.prompt must not name {{{name}}}{hint}")


def _judged(config: ScoreConfig, verdict: int, score: float) -> dict[str, Any]:
    found: dict[str, Any] = {"verdict": config.candidates[verdict], "score": score}
    if config.values[verdict] < 0.5:
        return {**found, "status": REJECTED, "reason": "verdict_bad"}
    return {**found, "status": REJECTED, "reason": "below_threshold"} if score < config.threshold else found


def _keyword(text: str, words: list[str]) -> dict[str, Any]:
    word = next((word for word in words if word in text), None)
    return {} if word is None else {"status": REJECTED, "reason": f"keyword:{word}"}
