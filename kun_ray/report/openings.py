"""With which verb an instruction begins and what it asks for: 写 → 作文. The variety of these pairs is a first measure
of how varied instructions are (Self-Instruct, arXiv 2212.10560, figure 2). `survey` counts, the page shows.

The part-of-speech tags are rjieba's: a dictionary's, not a parser's, so single pairs may be wrong; shares hold.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Final

import rjieba

NOT_ASKING: Final = frozenset(
    ["请", "请问", "能", "能够", "能否", "可以", "可", "是", "有", "没有", "要", "会", "想", "应", "应该", "需要", "必须", "让",
     "帮", "帮忙", "麻烦"]
)  # fmt: skip
"""Verbs that come before the one that says what to do: politeness, modals, copulas."""


def opening(instruction: str) -> tuple[str, str]:
    """The first verb that asks for something and the noun it acts on; "" for what is not there.

    Of 写一篇关于春节的作文 it is (写, 作文): a noun before 的 describes the noun behind it.
    """
    verb, weak_verb, noun = "", "", ""
    tagged: list[tuple[str, str]] = rjieba.tag(instruction)
    for position, (word, tag) in enumerate(tagged):
        if (tag.startswith("v") or word.endswith("一下")) and not verb:
            word = word.removesuffix("一下")
            if word in NOT_ASKING:
                weak_verb = weak_verb or word
            elif word:
                verb = word
        elif tag.startswith(("n", "vn", "l")) and (verb or weak_verb):
            describes = position + 1 < len(tagged) and tagged[position + 1][0] == "的"
            if not describes:
                noun = word
                break
        elif tag == "x" and verb and word in "，。！？；：\n,.!?;:":
            break
    return verb or weak_verb, noun


def count_openings(instructions: Iterable[str]) -> Counter[tuple[str, str]]:
    """How often each pair of `opening` occurs."""
    return Counter(opening(instruction) for instruction in instructions)


def effective_number(counts: Iterable[int]) -> float:
    """exp(entropy): of how many equally frequent kinds the variety is (Hill number of order 1)."""
    values = [count for count in counts if count]
    total = sum(values)
    return math.exp(-sum(n / total * math.log(n / total) for n in values)) if total else 0.0
