"""Candidates of a choice: the one token that tells them apart, or a refusal."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from kun_ray.choose import choices
from kun_ray.config import ConfigError
from kun_ray.prompts import encode_text


def test_choices_with_different_first_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    common, firsts = choices(tokenizer, ["好", "差"])
    assert common == [] and firsts == [encode_text(tokenizer, word)[0] for word in ("好", "差")]
    assert len(set(firsts)) == 2


def test_choices_put_a_common_beginning_into_the_prompt(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    good, bad = (encode_text(byte_tokenizer, word) for word in ("好", "差"))
    assert good[0] == bad[0] and len(good) == len(bad) == 3, "E5 A5 BD and E5 B7 AE"
    assert choices(byte_tokenizer, ["好", "差"]) == ([good[0]], [good[1], bad[1]])


def test_choices_after_a_longer_common_beginning(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    good, bad = (encode_text(byte_tokenizer, word) for word in ("很好", "很差"))
    assert choices(byte_tokenizer, ["很好", "很差"]) == (good[:4], [good[4], bad[4]])


@pytest.mark.parametrize(
    "candidates",
    [["好", "好的"], ["好的", "好"], ["好", "好"], ["好", ""], ["好", "差", "下"], ["AB", "AC", "D", "DE"]],
)
def test_candidates_that_one_token_cannot_tell_apart(
    byte_tokenizer: PreTrainedTokenizerFast, candidates: list[str]
) -> None:
    with pytest.raises(ConfigError, match="cannot be told apart by one token") as caught:
        choices(byte_tokenizer, candidates)
    assert all(candidate in str(caught.value) for candidate in candidates) and "A and B" in str(caught.value)
