"""What prepare changes in a text: markup, invisible characters and blanks are removed, personal data is masked.

Called by filters.py, row by row. Everything here is linear in the length of the text, whatever the text is, and never
raises: what cannot be repaired is left for the filters to reject.
"""

from __future__ import annotations

import datetime
import html
import ipaddress
import re
import unicodedata
from collections.abc import Mapping
from typing import Final, NamedTuple

MASKS: Final = {
    "email": "〔邮箱〕",
    "id_card": "〔身份证号〕",
    "bank_card": "〔银行卡号〕",
    "phone": "〔电话〕",
    "ip": "〔IP〕",
}
"""The kinds of personal data and what replaces each, in the order in which they claim overlapping digits."""


class Personal(NamedTuple):
    """One piece of personal data: `text[start:end]`."""

    start: int
    end: int
    kind: str


# Only elements that HTML really has: `List<String>`, `<stdio.h>` and `a < b` are text.
_BLOCK_TAGS = (
    "address article aside blockquote br caption center dd div dl dt fieldset figcaption figure footer form h1 h2 h3 h4"
    " h5 h6 head header hr html body legend li main nav ol option p pre section select summary table tbody td tfoot th"
    " thead title tr ul"
).replace(" ", "|")
_INLINE_TAGS = (
    "abbr acronym a audio base bdi bdo big button b canvas cite code col colgroup data del details dfn dir em embed font"
    " frame frameset iframe img input ins i kbd label link map area marquee mark meta meter nobr noframes noscript object"
    " output param picture progress q rp rt ruby samp script small source span strike strong style sub sup svg path s"
    " textarea template time tt u var video wbr"
).replace(" ", "|")
_TAG_END = r"(?=[\s/>])[^<>]{0,4000}>"
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCK_TAGS}){_TAG_END}", re.IGNORECASE)
_INLINE_TAG = re.compile(
    rf"</?(?:{_INLINE_TAGS}){_TAG_END}|<!doctype[^<>]{{0,400}}>|<\?xml[^<>]{{0,400}}>", re.IGNORECASE
)
_BBCODE = re.compile(
    r"\[/?(?:url|img|size|color|font|quote|code|align|email|attach|media)(?:=[^\[\]\n]{0,400})?\]", re.IGNORECASE
)
_BBCODE_LETTER = re.compile(r"\[/([bius])\]", re.IGNORECASE)
_WIKI_LINK = re.compile(r"\[\[(?:[^\[\]|\n]{0,200}\|)?([^\[\]|\n]{0,200})\]\]")
_CUTS = (  # opening, closing: removed with everything between
    (re.compile(r"<!--"), re.compile(r"-->")),
    (re.compile(r"<script\b", re.IGNORECASE), re.compile(r"</script\s*>", re.IGNORECASE)),
    (re.compile(r"<style\b", re.IGNORECASE), re.compile(r"</style\s*>", re.IGNORECASE)),
)
# A semicolon is demanded (except after nbsp): in `?a=1&copy=2` the browser's rule would write ©.
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});|&nbsp;?")

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BREAKS = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Controls, soft hyphen, zero-width, bidi, byte order marks, noncharacters.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b\u200c\u200e\u200f"
    r"\u202a-\u202e\u2060-\u206f\u3164\ufdd0-\ufdef\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff]+"
)
# Apart, because one character above U+FFFF makes a whole set ten times slower: tags, and joiners that join no emoji.
_INVISIBLE_TAG = re.compile("[\U000e0000-\U000e007f]+")
_JOINER = re.compile("(?<![\ufe0f\u2600-\u27bf\U0001f300-\U0001faff])\u200d")
_UNTIDY = re.compile(r"[\t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]|  | \n|\n |\n\n\n")
_BLANKS = re.compile(r"[ \t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]+")
_LINE_EDGES = re.compile(r" ?\n ?")
_EMPTY_LINES = re.compile(r"\n{3,}")


def clean(text: str) -> str:
    """The text in NFC without invisible characters, with runs of blanks collapsed to one and of empty lines to one.

    NFC, not NFKC: full-width punctuation is proper Chinese and stays. Lone surrogates become U+FFFD, so that the result
    can always be encoded.
    """
    if not text.isascii():
        if _SURROGATE.search(text):
            text = _SURROGATE.sub("\ufffd", text)
        if not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
    if "\x1b" in text:
        text = _ANSI.sub("", text)
    text = _INVISIBLE_TAG.sub("", _INVISIBLE.sub("", _BREAKS.sub("\n", text)))
    if "\u200d" in text:
        text = _JOINER.sub("", text)
    if _UNTIDY.search(text):
        text = _EMPTY_LINES.sub("\n\n", _LINE_EDGES.sub("\n", _BLANKS.sub(" ", text)))
    return text.strip()


def has_markup(text: str) -> bool:
    """Whether the text holds an HTML element, a comment or BBCode."""
    return any(pattern.search(text) for pattern in (_BLOCK_TAG, _INLINE_TAG, _BBCODE, _CUTS[0][0]))


def strip_markup(text: str) -> str:
    """The text without HTML, BBCode and wiki links: scripts, styles and comments go whole, block elements become line
    breaks, entities become their characters."""
    if "<" in text:
        for opening, closing in _CUTS:
            text = _cut_between(text, opening, closing)
        text = _INLINE_TAG.sub("", _BLOCK_TAG.sub("\n", text))
    if "[" in text:
        text = _WIKI_LINK.sub(r"\1", _BBCODE.sub("", text))
        closed = "".join(set(_BBCODE_LETTER.findall(text)))  # `a[i]` is an index unless there is a `[/i]`
        if closed:
            text = re.sub(rf"\[/?[{closed}]\]", "", text, flags=re.IGNORECASE)
    return unescape(text)


def unescape(text: str) -> str:
    """Entities as characters, twice, because crawls escape twice (`&amp;nbsp;`)."""
    for _ in range(2):
        if "&" not in text:
            break
        text = _ENTITY.sub(lambda match: html.unescape(match.group()), text)
    return text


def _cut_between(text: str, opening: re.Pattern[str], closing: re.Pattern[str]) -> str:
    kept: list[str] = []
    position = 0
    for start in opening.finditer(text):
        if start.start() < position:
            continue
        end = closing.search(text, start.end())
        if end is None:  # never closed: a mention of the tag, not a block
            break
        kept.append(text[position : start.start()])
        position = end.end()
    return "".join([*kept, text[position:]]) if position else text


# Personal data -----------------------------------------------------------------------------------------------------

# Digits of any script, full-width letters and signs become ASCII one for one, so that spans keep their places.
_FOREIGN_DIGITS = {
    code: str(unicodedata.digit(chr(code))) for code in range(0x80, 0x20000) if unicodedata.category(chr(code)) == "Nd"
}
_TO_ASCII = {
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
    **_FOREIGN_DIGITS,
    **{ord(dash): "-" for dash in "‐‑‒–−"},
}
_DISGUISED = re.compile("[Ａ-Ｚａ-ｚ＠．‐‑‒–−" + "".join(chr(code) for code in _FOREIGN_DIGITS if code < 0x10000) + "]")
_DISGUISED_ABOVE = re.compile("[\U000104a0-\U0001fbf9]")
# Patterns open with what they consume and look behind it (`\d(?<!…)`): the scan then skips to candidates, five times faster.
_NUMBER = re.compile(r"\d[\d -]{9,}[\dXx]", re.ASCII)
_EMAIL = re.compile(
    r"[A-Za-z0-9](?<![\w.%+-].)[\w.%+-]{0,63}(?:@| @ )[A-Za-z0-9][A-Za-z0-9-]{0,62}(?:\.[A-Za-z0-9-]{1,63}){0,5}\.[A-Za-z]{2,24}",
    re.ASCII,
)
_ID_CARD = re.compile(
    r"(?<!\d)([1-9]\d{5})[ -]?((?:19|20)\d{2})[ -]?(\d{2})[ -]?(\d{2})[ -]?(\d{3}[\dXx])(?![0-9A-Za-z])", re.ASCII
)
_BANK_CARD = re.compile(r"(?<![\d.])(?:\d{16,19}|\d{4}(?:[ -]\d{4}){3}(?:[ -]?\d{1,3})?)(?!\d)", re.ASCII)
# UnionPay 62 and 60/9558 (older domestic cards), Visa 4, Mastercard 51–55 and 2221–2720, JCB 35.
_CARD_PREFIX = re.compile(r"62|60|9558|4|5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720|35")
_PHONE = re.compile(
    r"(?<!\d)(?<!\d\.)(?:(?:\+|00)?86[ -]?)?1[3-9]\d(?:\d{8}|-\d{4}-\d{4}| (?!(?:19|20)\d\d (?:19|20)\d\d)\d{4} \d{4})"
    r"(?![\d%])(?!\.\d)(?! ?(?:元|块|美元|万|亿|吨|人次|字节|bytes))",
    re.ASCII,
)
_IP = re.compile(r"\d(?<![\d.].)\d{0,2}(?:\.\d{1,3}){3}(?!\.?\d)", re.ASCII)
_VERSION = re.compile(r"(?:版本号?|版|[Vv]ersion|[Vv]er\.?|(?<![A-Za-z])[Vv])[^\n\d]{0,6}$")

_PROVINCES = re.compile("1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3]|91")
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def find_personal(text: str) -> list[Personal]:
    """Every piece of personal data in the text, in order, without overlaps.

    Mainland mobile numbers, resident identity numbers (GB 11643: province, date and check digit must fit), e-mail
    addresses, bank cards (16–19 digits, a known prefix, Luhn), public IPv4 addresses that are not version numbers.
    Full-width digits and letters are read as ASCII.
    """
    if _DISGUISED.search(text) or _DISGUISED_ABOVE.search(text):
        text = text.translate(_TO_ASCII)
    found: list[Personal] = []
    if "@" in text:
        found += [Personal(*match.span(), "email") for match in _EMAIL.finditer(text)]
    for number in _NUMBER.finditer(text):
        window = max(0, number.start() - 1), number.end() + 6  # a sign before, a unit after
        found += [
            Personal(*match.span(), "id_card") for match in _ID_CARD.finditer(text, *window) if _is_id_card(match)
        ]
        found += [
            Personal(*match.span(), "bank_card") for match in _BANK_CARD.finditer(text, *window) if _is_card(match)
        ]
        found += [Personal(*match.span(), "phone") for match in _PHONE.finditer(text, *window)]
    if text.count(".") >= 3:
        found += [Personal(*match.span(), "ip") for match in _IP.finditer(text) if _is_public_ip(match)]
    if len(found) < 2:
        return found
    priority = list(MASKS)
    chosen: list[Personal] = []
    taken = bytearray(len(text))
    for item in sorted(found, key=lambda item: priority.index(item.kind)):
        if not any(taken[item.start : item.end]):
            taken[item.start : item.end] = b"\x01" * (item.end - item.start)
            chosen.append(item)
    return sorted(chosen)


def mask_personal(text: str, found: list[Personal], masks: Mapping[str, str] = MASKS) -> str:
    """The text with every piece in `found` replaced by the mask of its kind."""
    pieces: list[str] = []
    position = 0
    for item in found:
        pieces += [text[position : item.start], masks[item.kind]]
        position = item.end
    return "".join([*pieces, text[position:]]) if position else text


def _is_id_card(match: re.Match[str]) -> bool:
    area, year, month, day, tail = match.groups()
    digits = area + year + month + day + tail.upper()
    if not _PROVINCES.match(area):
        return False
    try:
        born = datetime.date(int(year), int(month), int(day))
    except ValueError:
        return False
    check = sum(weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, digits, strict=False)) % 11
    return "10X98765432"[check] == digits[17] and 1900 <= born.year <= 2030


def _is_card(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match.group())
    if not 16 <= len(digits) <= 19 or not _CARD_PREFIX.match(digits) or len(set(digits)) < 4:
        return False
    doubled = "0246813579"
    luhn = sum(int(doubled[int(digit)] if place % 2 else digit) for place, digit in enumerate(reversed(digits)))
    return luhn % 10 == 0


def _is_public_ip(match: re.Match[str]) -> bool:
    """Whether an address may be a person's. Private, loopback, link-local, shared (carriers'), documentation, benchmark,
    multicast and reserved ones are no host's on the Internet, and tutorials need them; all octets under 10 are section
    numbers or public resolvers. Of the rest nothing tells a person's from a server's: all are masked."""
    octets = match.group().split(".")
    if any(int(octet) > 255 for octet in octets) or all(len(octet) == 1 for octet in octets):
        return False
    if any(len(octet) > 1 and octet[0] == "0" for octet in octets):
        return False
    address = ipaddress.IPv4Address(match.group())
    if not address.is_global or address.is_multicast:  # multicast counts as global there
        return False
    before = match.string[max(0, match.start() - 12) : match.start()]
    return not _VERSION.search(before) and not match.string.startswith(("版", " 版"), match.end())
