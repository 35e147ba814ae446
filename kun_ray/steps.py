"""The steps of Kun: perplexity, label, score, polish. Each is a value of one Step type, built from its configuration.
`choose` (choose.py) is the evaluate stage's.

A step knows its prompt, its sampling and how to read the reply (replies.py); it never calls an engine itself (pool.py does).
Source: Kun (arXiv 2401.06477) §3 and its published scripts; scoring a pair on a scale follows Humpback (arXiv 2308.06259).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from kun_ray.choose import ChooseConfig, choices, choose_prompt, parse_choose
from kun_ray.config import one_of, require
from kun_ray.prompts import Prompt, PromptConfig, build_prompt
from kun_ray.replies import Reply, parse_choice, parse_label, parse_perplexity, parse_polish, parse_verdict

if TYPE_CHECKING:  # transformers takes seconds to import, and most processes never need it
    from transformers import PreTrainedTokenizerFast

COLUMNS_READ = {
    "perplexity": ["text"],
    "label": ["text"],
    "score": ["instruction"],
    "polish": ["text", "instruction"],
    "choose": ["text"],
}
"""Columns that each step reads."""
STEPS = tuple(COLUMNS_READ)


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
class StepConfig:
    """What every step may have."""

    adapter: str | None = None
    """LoRA adapter (folder, as the train stage publishes it) on the pool's model, for this step alone; null takes the model
    as it is. So one pool serves steps that were trained apart."""


@dataclasses.dataclass
class PerplexityConfig(StepConfig):
    """Perplexity of a document under a language model, as a filter before label."""

    max: float | None = None
    """Documents above it are rejected as `perplexity`; null only records it. Relative to the model."""
    min: float | None = None
    """Documents below it (boilerplate that the model knows by heart) are rejected as `perplexity`."""


@dataclasses.dataclass
class LabelConfig(StepConfig):
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
class ScoreConfig(StepConfig):
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
class PolishConfig(StepConfig):
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
    choose: ChooseConfig | None = None
    """Text → one of some options."""


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
    adapter: str | None = None
    """LoRA adapter that the engine answers with."""

    def num_reserved_tokens(self) -> int:
        """Tokens of the context that this step needs besides the row's own text: the fixed prompt and the reply."""
        return self.prompt.num_fixed_tokens() + (self.sampling.max_tokens if self.sampling else 1)


def build_step(name: str, config: StepsConfig, tokenizer: PreTrainedTokenizerFast) -> Step:
    """The step `name`, its prompt rendered for this tokenizer. Raises ConfigError when it is not configured."""
    if name == "perplexity":
        limits = config.perplexity
        prompt = Prompt(("text",), tokenizer)
        return Step(name, prompt, lambda reply: parse_perplexity(reply, limits), adapter=limits.adapter)
    chosen = getattr(config, name)
    require(chosen is not None, f"a pool runs `{name}`, but steps.{name} is not configured")
    if isinstance(chosen, ChooseConfig):
        prompt, firsts = choose_prompt(tokenizer, chosen)
        return Step(name, prompt, lambda reply: parse_choose(reply, chosen), candidates=firsts)
    if isinstance(chosen, ScoreConfig) and chosen.mode == "choose":
        common, first_ids = choices(tokenizer, chosen.candidates)
        prompt = build_prompt(tokenizer, chosen.prompt, chosen.tag.split("{}")[0]).extended(common)
        firsts, adapter = tuple(first_ids), chosen.adapter
        return Step(name, prompt, lambda reply: parse_choice(reply, chosen), candidates=firsts, adapter=adapter)
    parse: dict[str, Callable[[Reply, Any], dict[str, Any]]]
    parse = {"label": parse_label, "score": parse_verdict, "polish": parse_polish}
    prompt = build_prompt(tokenizer, chosen.prompt)
    return Step(name, prompt, lambda reply: parse[name](reply, chosen), chosen.sampling, adapter=chosen.adapter)


def _require_fields(step: str, prompt: PromptConfig, needed: set[str], allowed: set[str], hint: str = "") -> None:
    if isinstance(prompt, PromptConfig):  # MISSING is a str until it is filled in
        for name in sorted(needed - prompt.fields()):
            require(False, f"steps.{step}.prompt must name {{{name}}}{hint}")
        for name in sorted(prompt.fields() - needed - allowed):
            require(False, f"steps.{step}.prompt must not name {{{name}}}{hint}")
