"""Manual pages (roff) and web pages (HTML) → paragraphs → page-like documents. bench/corpora.py calls it.

Good enough for text that a language model should see; no layout is kept, and nothing here is a parser of full roff.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import ClassVar

MIN_CHARS, MAX_CHARS = 100, 900
MIN_HAN_SHARE = 0.2
"""Pages with fewer Han characters among all that are not blank are translations that never began."""

_ESCAPES = {"-": "-", "e": "\\", "\\": "\\", ".": ".", "'": "'", "`": "`", " ": " ", "~": " ", "0": " ", "t": " "}
_NAMED = {"lq": "“", "rq": "”", "em": "—", "en": "–", "bu": "·", "co": "©", "aq": "'", "dq": '"', "rs": "\\", "ti": "~"}
_ROFF = re.compile(
    r"\\(?:\".*|[fm](?:\[[^\]]*\]|\(..|.)|s[+-]?\d+|[hvwlL]'[^']*'|[nk](?:\(..|\[[^\]]*\]|[+-]?.)|z"
    r"|\*?(?:\((?P<two>..)|\[(?P<long>[^\]]*)\])|\*.|(?P<one>.)|$)"
)
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')
_BREAKS = {
    "PP",
    "P",
    "LP",
    "Pp",
    "TP",
    "TQ",
    "IP",
    "HP",
    "RS",
    "RE",
    "br",
    "sp",
    "It",
    "Bl",
    "El",
    "Bd",
    "Ed",
    "Sp",
    "Vb",
    "Ve",
    "EX",
    "EE",
    "nf",
    "fi",
    "CS",
    "CE",
    "D1",
    "Dl",
}
_HEADINGS = {"SH", "SS", "Sh", "Ss"}
_WORDS = {
    "B",
    "I",
    "BR",
    "BI",
    "IR",
    "RB",
    "RI",
    "SB",
    "SM",
    "Nm",
    "Nd",
    "Ar",
    "Xr",
    "Ic",
    "Pa",
    "Op",
    "Fl",
    "Dq",
    "Pq",
    "Sq",
    "Qq",
    "Em",
    "Sy",
    "Li",
    "Cm",
    "Ev",
    "Va",
    "Fn",
    "Dv",
    "It",
}
_HAN = r"[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]"
_WRAP = re.compile(rf"(?<={_HAN})[ \t]*\n[ \t]*(?={_HAN})")


def from_roff(source: str) -> tuple[str, list[str]]:
    """A manual page in man or mdoc macros: its name and paragraphs. Tables, definitions and conditions are left out."""
    title = ""
    paragraphs = [""]
    until: str | None = None
    filled = True
    for line in source.splitlines():
        macro, _, rest = line[1:].lstrip().partition(" ") if line[:1] in (".", "'") else ("", "", line)
        if until is not None:
            until = None if macro == until or line.strip() == f".{until}" else until
        elif line[:1] not in (".", "'"):
            paragraphs[-1] += _unescape(line) + "\n"
            if not filled or not line.strip():
                paragraphs.append("")
        elif macro in ("de", "ig", "am", "TS"):
            until = {"TS": "TE"}.get(macro, ".")
        elif macro in ("TH", "Dt"):
            title = next(iter(_arguments(rest)), "").lower()
        elif macro in _HEADINGS:
            paragraphs += [f"# {' '.join(_arguments(rest))}", ""]
        else:
            filled = macro not in ("nf", "EX", "Vb") and (filled or macro in ("fi", "EE", "Ve"))
            if macro in _BREAKS:
                paragraphs.append("")
            if macro == "IP":  # the second argument is an indentation
                paragraphs[-1] += next(iter(_arguments(rest)), "") + "\n"
            if macro in _WORDS:
                paragraphs[-1] += ("" if macro in ("BR", "BI", "IR", "RB", "RI") else " ").join(_arguments(rest)) + "\n"
    return title, _tidy(paragraphs)


def _unescape(text: str) -> str:
    def plain(match: re.Match[str]) -> str:
        name = match["two"] or match["long"]
        return _NAMED.get(name, "") if name else _ESCAPES.get(match["one"] or "", "")

    return _ROFF.sub(plain, text)


def _arguments(text: str) -> list[str]:
    return [_unescape(quoted.replace('""', '"') or bare) for quoted, bare in _ARGUMENT.findall(text)]


class _Html(HTMLParser):
    """Paragraphs of an HTML or XHTML page, less scripts, navigation and tables of contents."""

    VOID: ClassVar = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
    SKIPPED: ClassVar = {"script", "style", "nav", "header", "aside", "footer", "noscript", "button"}
    SKIPPED_CLASSES: ClassVar = {"toc", "navheader", "navfooter", "howtogetheader"}
    INLINE: ClassVar = {
        "a",
        "abbr",
        "b",
        "code",
        "em",
        "font",
        "i",
        "kbd",
        "q",
        "samp",
        "small",
        "span",
        "strong",
        "sub",
        "sup",
        "td",
        "th",
        "tt",
        "u",
        "var",
    }

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self.paragraphs = [""]
        self._in_title = False
        self._in_pre = False
        self._depth_skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._depth_skipped or tag in self.SKIPPED or dict(attrs).get("class") in self.SKIPPED_CLASSES:
            self._depth_skipped += tag not in self.VOID
        elif tag == "title":
            self._in_title = True
        elif tag in ("h1", "h2", "h3", "h4", "h5", "h6"):
            self.paragraphs.append("# ")
        elif tag not in self.INLINE:
            self.paragraphs.append("")
            self._in_pre |= tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._depth_skipped:
            self._depth_skipped -= tag not in self.VOID
        elif tag == "title":
            self._in_title = False
        elif tag in ("td", "th"):
            self.paragraphs[-1] += " | "
        elif tag not in self.INLINE and tag not in self.VOID:
            self.paragraphs.append("")
            self._in_pre &= tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif not self._depth_skipped:
            first, *lines = data.split("\n") if self._in_pre else [data]
            self.paragraphs[-1] += first
            self.paragraphs += lines


def from_html(source: str) -> tuple[str, list[str]]:
    """A page of HTML or XHTML: its title and paragraphs."""
    parser = _Html()
    parser.feed(source)
    parser.close()
    return " ".join(parser.title.split()), _tidy(parser.paragraphs)


def _tidy(paragraphs: Sequence[str]) -> list[str]:
    """Paragraphs on one line each, without the line breaks that wrapped them; headings that lead nowhere go."""
    joined = [" ".join(_WRAP.sub("", paragraph).split()).removesuffix(" |") for paragraph in paragraphs]
    kept = [paragraph for paragraph in joined if paragraph not in ("", "#")]
    following = [*kept[1:], "#"]
    return [one for one, two in zip(kept, following, strict=False) if not (one[:2] == "# " and two[:1] == "#")]


def pages(paragraphs: Sequence[str]) -> list[str]:
    """Documents of 100–900 characters, cut between paragraphs, preferably before a heading, and within one only where
    it alone is longer. What is left over at the end joins the page before it; pages that are not Chinese go."""
    found = [""]
    for paragraph in paragraphs:
        heading, text = paragraph.startswith("# "), paragraph.removeprefix("# ")
        for part in re.findall(rf".{{1,{MAX_CHARS - 1}}}(?:[。；！？.;!?\s]|$)|.{{1,{MAX_CHARS}}}", text, re.DOTALL):
            limit = MAX_CHARS / 3 if heading else MAX_CHARS
            if len(found[-1]) + len(part) + 1 > limit and len(found[-1]) >= MIN_CHARS:
                found.append("")
            found[-1] = f"{found[-1]}\n{part}".strip()
    if len(found) > 1 and len(found[-1]) < MIN_CHARS:
        found[-2:] = ["\n".join(found[-2:])]
    return [page for page in found if _is_chinese(page)]


def _is_chinese(page: str) -> bool:
    num_han = sum("\u3400" <= character <= "\u9fff" for character in page)
    return num_han > 0 and num_han >= MIN_HAN_SHARE * len("".join(page.split()))
