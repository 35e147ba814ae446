"""What a record of each corpus holds: the text, title and meta of a WuDao, WanJuan or other record.

corpora.py chooses by the corpus's format, documents.py and parquet.py call.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from kun_ray.records import Columns, Records

WANJUAN_SUBSETS = ("WebText-cn", "Law-cn", "Patent-cn", "ChinaNews-cn", "TextBook-cn", "Wiki-cn", "Exam-cn")


class Content(NamedTuple):
    """What a record holds. `text` is whatever stands in its place: only a string makes a readable document."""

    text: object
    title: object
    meta: dict[str, object]
    text_field: str


Extract = Callable[[dict[str, Any], str], Content]
"""Finds the content of a record, which it must not change, for it may be asked twice; the second argument is the full path
of its file."""


class Contents(NamedTuple):
    """What several records hold, column by column."""

    texts: Sequence[object]
    titles: Sequence[object]
    meta: dict[str, list[Any]]
    """By field; None where a record lacks it."""
    text_fields: Sequence[str]
    """Where each text stands, for errors."""


class ExtractTogether(abc.ABC):
    """An Extract that finds the contents of several records of a file in one go, for less than a call for each."""

    @abc.abstractmethod
    def together(self, values: Sequence[dict[str, Any]], path: str) -> Contents:
        """What these records hold, in their order."""

    def __call__(self, value: dict[str, Any], path: str) -> Content:
        texts, titles, meta, text_fields = self.together([value], path)
        found = {field: values[0] for field, values in meta.items() if values[0] is not None}
        return Content(texts[0], titles[0], found, text_fields[0])


@dataclasses.dataclass(frozen=True)
class ExtractFields(ExtractTogether):
    """Records whose text stands in a named field: SkyPile, plain jsonl and Parquet."""

    text_field: str
    title_field: str | None
    meta_fields: Sequence[str]

    def fields(self) -> list[str]:
        """All fields that are looked at."""
        return [self.text_field, *([] if self.title_field is None else [self.title_field]), *self.meta_fields]

    def together(self, values: Sequence[dict[str, Any]], path: str) -> Contents:
        there = _there(values) if len(self.fields()) > 1 else {self.text_field}
        texts, titles = _column(values, self.text_field, there), _column(values, self.title_field, there)
        return Contents(texts, titles, _meta(values, self.meta_fields, there), [self.text_field] * len(values))


class ExtractWudao(ExtractTogether):
    """WuDaoCorpora 2.0: id, uniqueKey, titleUkey, dataType, title, content. A title that content repeats is cut off."""

    def __init__(self, meta_fields: Sequence[str]) -> None:
        self._fields = list(dict.fromkeys(["id", "uniqueKey", "titleUkey", "dataType", *meta_fields]))

    def together(self, values: Sequence[dict[str, Any]], path: str) -> Contents:
        there = _there(values)
        titles = _column(values, "title", there)
        texts = [
            without_title(text, title) if isinstance(text, str) and isinstance(title, str) else text
            for text, title in zip(_column(values, "content", there), titles, strict=True)
        ]
        return Contents(texts, titles, _meta(values, self._fields, there), ["content"] * len(values))


class ExtractWanjuan(ExtractTogether):
    """WanJuan 1.0 (CN): id, content; Exam-cn is rendered as text. The subset is the record's own, else the path's."""

    def __init__(self, meta_fields: Sequence[str]) -> None:
        fields = dict.fromkeys(["id", "q_type", "grade", "major", "keypoint", *meta_fields])
        self._fields = [field for field in fields if field != "subset"]

    def together(self, values: Sequence[dict[str, Any]], path: str) -> Contents:
        there = _there(values)
        texts, titles = _column(values, "content", there), _column(values, "title", there)
        text_fields = ["content"] * len(values)
        by_path = wanjuan_subset(path)
        subsets = [own if isinstance(own, str) else by_path for own in _column(values, "subset", there)]
        for row in [row for row, text in enumerate(texts) if text is None]:
            if subsets[row] == "Exam-cn" or "q_main" in values[row]:
                texts[row], titles[row], text_fields[row] = render_exam(values[row]), None, "q_main"
        meta = {**({} if set(subsets) == {None} else {"subset": subsets}), **_meta(values, self._fields, there)}
        return Contents(texts, titles, meta, text_fields)


@functools.lru_cache(maxsize=64)
def wanjuan_subset(path: str) -> str | None:
    """The WanJuan subset that a path names; the last one counts."""
    lowered = path.lower()
    places = {subset: lowered.rfind(subset.lower()) for subset in WANJUAN_SUBSETS}
    last = max(WANJUAN_SUBSETS, key=lambda subset: places[subset])
    return last if places[last] >= 0 else None


def render_exam(value: dict[str, Any]) -> str | None:
    """An exam question as text: 题目, 选项, 答案, 解析, less what it lacks; None without a question."""
    question = _plain(value.get("q_main"))
    if not question:
        return None
    options = [f"{letter.upper()}. {option}" for letter in "abcde" if (option := _plain(value.get(f"option_{letter}")))]
    answer = _plain(value.get("std_ans")) or _plain(value.get("answer"))
    explanation = _plain(value.get("answer_detail"))
    lines = [f"题目：{question}"]
    lines += ["选项：", *options] if options else []
    lines += [f"答案：{answer}"] if answer else []
    lines += [f"解析：{explanation}"] if explanation else []
    return "\n".join(lines)


def without_title(text: str, title: str) -> str:
    """`text` less the title that it opens with.

    WuDao has lost its newlines, so a heading and a sentence that begins with the same words look alike. The title goes
    if a blank or the end of a sentence follows or closes it, or if it is 10 characters or longer and the text goes on
    as no sentence about it would (是, 的, a comma, …). Nothing is cut that would leave no text.
    """
    title = title.strip()
    opening = text.lstrip()
    if not title or not opening.startswith(title):
        return text
    rest = opening[len(title) :]
    body = rest.lstrip(" \t\r\n\u3000。！？!?：:|-—_")
    separate = body != rest or title[-1] in "。！？!?…"
    if body and (separate or (len(title) >= 10 and rest[0] not in "是为的在位由于有将被与和及，、,（(《》”」")):
        return body
    return text


def as_columns(extract: Extract, records: Records, path: str) -> Columns | None:
    """What all of `records` hold; None if one is nested too deep, or if `extract` finds it for one at a time."""
    if not isinstance(extract, ExtractTogether):
        return None
    try:
        return Columns(records.offsets, *extract.together(records.values, path))
    except RecursionError:
        return None


def one_by_one(extract: Extract, found: Records | Columns, path: str) -> Iterator[tuple[int, Callable[[], Content]]]:
    """The offset of each record, and a function that finds its content, which may raise RecursionError."""
    if isinstance(found, Records):
        return zip(found.offsets, (functools.partial(extract, value, path) for value in found.values), strict=True)
    contents = zip(found.texts, found.titles, found.metas(), found.text_fields, strict=True)
    return zip(found.offsets, (functools.partial(Content, *content) for content in contents), strict=True)


def _there(values: Sequence[dict[str, Any]]) -> set[str]:
    """Every field that one of them has: the others need not be looked for in each."""
    return set[str]().union(*values)


def _column(values: Sequence[dict[str, Any]], field: str | None, there: set[str]) -> list[Any]:
    return [value.get(field) for value in values] if field in there else [None] * len(values)


def _meta(values: Sequence[dict[str, Any]], fields: Sequence[str], there: set[str]) -> dict[str, list[Any]]:
    return {field: _column(values, field, there) for field in fields if field in there}


def _plain(value: object) -> str:
    if isinstance(value, list):
        return "；".join(part for part in map(_plain, value) if part)
    return str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
