"""What a record of each corpus holds: the text, title and meta of a WuDao, WanJuan or other record.

corpora.py chooses by the corpus's format, documents.py and parquet.py call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
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


@dataclasses.dataclass(frozen=True)
class ExtractFields:
    """Records whose text stands in a named field: SkyPile, plain jsonl and Parquet."""

    text_field: str
    title_field: str | None
    meta_fields: Sequence[str]

    def fields(self) -> list[str]:
        """All fields that are looked at."""
        return [self.text_field, *([] if self.title_field is None else [self.title_field]), *self.meta_fields]

    def __call__(self, value: dict[str, Any], path: str) -> Content:
        title = None if self.title_field is None else value.get(self.title_field)
        return Content(value.get(self.text_field), title, _pick(value, self.meta_fields), self.text_field)

    def columns(self, values: list[dict[str, Any]]) -> tuple[list[Any], list[Any], list[dict[str, Any]]]:
        """Texts, titles and metas of several records: the same as a call for each, for less."""
        title, fields = self.title_field, self.meta_fields
        texts = [value.get(self.text_field) for value in values]
        titles = [None] * len(values) if title is None else [value.get(title) for value in values]
        metas = [_pick(value, fields) for value in values] if fields else [{}] * len(values)
        return texts, titles, metas


def extract_wudao(meta_fields: list[str]) -> Extract:
    """WuDaoCorpora 2.0: id, uniqueKey, titleUkey, dataType, title, content. A title that content repeats is cut off."""
    fields = list(dict.fromkeys(["id", "uniqueKey", "titleUkey", "dataType", *meta_fields]))

    def extract(value: dict[str, Any], path: str) -> Content:
        text, title = value.get("content"), value.get("title")
        if isinstance(text, str) and isinstance(title, str):
            text = without_title(text, title)
        return Content(text, title, _pick(value, fields), "content")

    return extract


def extract_wanjuan(meta_fields: list[str]) -> Extract:
    """WanJuan 1.0 (CN): id, content; Exam-cn is rendered as text. The subset is the record's own, else the path's."""
    fields = list(dict.fromkeys(["id", "q_type", "grade", "major", "keypoint", *meta_fields]))

    def extract(value: dict[str, Any], path: str) -> Content:
        own_subset = value.get("subset")
        subset = own_subset if isinstance(own_subset, str) else wanjuan_subset(path)
        meta = {"subset": subset, **_pick(value, fields)}
        if value.get("content") is None and (subset == "Exam-cn" or "q_main" in value):
            return Content(render_exam(value), None, meta, "q_main")
        return Content(value.get("content"), value.get("title"), meta, "content")

    return extract


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
    """What all of `records` hold; None if one is nested too deep, or has bytes for a text, which may be anything."""
    texts: Sequence[Any]
    titles: Sequence[Any]
    metas: Sequence[dict[str, Any]]
    if isinstance(extract, ExtractFields):
        texts, titles, metas = extract.columns(records.values)
    else:
        try:
            texts, titles, metas, _ = zip(*map(extract, records.values, repeat(path)), strict=True)
        except RecursionError:
            return None
    return None if bytes in set(map(type, texts)) else Columns(records.offsets, texts, titles, metas)


def one_by_one(extract: Extract, found: Records | Columns, path: str) -> Iterator[tuple[int, Callable[[], Content]]]:
    """The offset of each record, and a function that finds its content, which may raise RecursionError."""
    if isinstance(found, Records):
        return zip(found.offsets, (functools.partial(extract, value, path) for value in found.values), strict=True)
    assert isinstance(extract, ExtractFields), "columns come from Parquet, and only where fields are plain"
    rows = zip(found.texts, found.titles, found.metas, repeat(extract.text_field))
    return zip(found.offsets, (functools.partial(Content, *row) for row in rows), strict=True)


def _pick(value: dict[str, Any], fields: Sequence[str]) -> dict[str, object]:
    return {field: found for field in fields if (found := value.get(field)) is not None} if fields else {}


def _plain(value: object) -> str:
    if isinstance(value, list):
        return "；".join(part for part in map(_plain, value) if part)
    return str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
