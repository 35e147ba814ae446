"""The step `choose`: text → one of a few options, by their log-probabilities in one prefill.

The evaluate stage asks examination questions and a judge's verdicts with it; steps.py builds the Step. The text is asked
through the chat template, or as a plain continuation for base models, which have not learnt one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Protocol

from kun_ray.config import ConfigError, require
from kun_ray.prompts import Prompt, PromptConfig, build_prompt, encode_text
from kun_ray.schema import FAILED

if TYPE_CHECKING:  # transformers takes seconds to import, and most processes never need it
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass
class ChooseConfig:
    """choose: text → one of the options."""

    options: list[str] = dataclasses.field(default_factory=lambda: ["A", "B", "C", "D"])
    """What may be answered."""
    reply_prefix: str = "答案："
    """How the reply begins, up to the option."""
    plain: bool = False
    """Gives the text as it is, to be continued, without the chat template: for base models."""

    def __post_init__(self) -> None:
        require(len(self.options) >= 2, "choose.options needs at least two")
        require(len(set(self.options)) == len(self.options), "choose.options names one twice")


class HasLogprobs(Protocol):
    """The part of a Reply that is read here."""

    @property
    def logprobs(self) -> tuple[float, ...]: ...


def choices(
    tokenizer: PreTrainedTokenizerFast, candidates: list[str], key: str = "score.candidates"
) -> tuple[list[int], list[int]]:
    """What `Engine.choose` needs to tell candidate replies apart by one token.

    In byte-level vocabularies 好 and 差 may begin with the same token: the common beginning then goes into the prompt.

    Returns:
        (ids that all candidates begin with, for each candidate its first distinguishing token id).
    Raises:
        ConfigError: two candidates cannot be told apart by one token.
    """
    encoded = [encode_text(tokenizer, candidate) for candidate in candidates]
    common = 0
    while all(len(ids) > common for ids in encoded) and len({ids[common] for ids in encoded}) == 1:
        common += 1
    firsts = [ids[common] if len(ids) > common else -1 for ids in encoded]
    if -1 in firsts or len(set(firsts)) < len(candidates):
        shown = ", ".join(f"{candidate} = {ids}" for candidate, ids in zip(candidates, encoded, strict=True))
        raise ConfigError(
            f"{key} cannot be told apart by one token of this tokenizer ({shown}): choose others, such as A and B"
        )
    return encoded[0][:common], firsts


def choose_prompt(tokenizer: PreTrainedTokenizerFast, config: ChooseConfig) -> tuple[Prompt, tuple[int, ...]]:
    """The prompt up to the option, and the token id that begins each option there. Raises ConfigError if they are the same."""
    if not config.plain:
        common, firsts = choices(tokenizer, [config.reply_prefix + option for option in config.options], "options")
        return build_prompt(tokenizer, PromptConfig(user="{text}")).extended(common), tuple(firsts)
    # An option is tokenised where it will stand, behind a text and a new line: some tokenizers put a blank before the
    # first word of what they are given.
    before = encode_text(tokenizer, "甲")
    common, firsts = choices(tokenizer, [f"甲\n{config.reply_prefix}{option}" for option in config.options], "options")
    reply = common[len(before) :]
    if common[: len(before)] != before:
        reply, firsts = choices(tokenizer, [f"\n{config.reply_prefix}{option}" for option in config.options], "options")
    beginning = tokenizer.backend_tokenizer.encode("", add_special_tokens=True).ids
    start = tuple(i for i in beginning if i == tokenizer.bos_token_id)
    return Prompt((start, "text", tuple(reply)), tokenizer), tuple(firsts)


def parse_choose(reply: HasLogprobs, config: ChooseConfig) -> dict[str, Any]:
    """The option with the highest log-probability, and all of them in the order of `options`."""
    if not math.isfinite(max(reply.logprobs)) or any(map(math.isnan, reply.logprobs)):
        return {"status": FAILED, "reason": "unparsable"}
    best = max(range(len(reply.logprobs)), key=reply.logprobs.__getitem__)
    return {"verdict": config.options[best], "logprobs": list(reply.logprobs)}
