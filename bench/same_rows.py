"""A reader that gives our rows of a sound file and does nothing else: what CPython and the libraries take for them.

kun_ray_side.py and reader_pieces.py time it; the first sees that its rows are ours. It knows what every record holds, checks
nothing but Parquet's UTF-8, and ends at a broken record. Whoever takes less in CPython, with these libraries, gives less.
"""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from zlib_ng import gzip_ng

from kun_ray.archives import Readable
from kun_ray.contents import wanjuan_subset, without_title
from kun_ray.schema import DOCUMENT, OK, doc_ids

TOGETHER, TABLE, CHUNK = 128, 1920, 1 << 20
"""Records that are parsed at once (they stay in the cache), rows of a table, bytes that are read at once."""
_BETWEEN = re.compile(rb'\},?\s*(?=\{\s*"[^"\\]*"\s*:)')
Values = list[dict[str, Any]]
Parts = tuple[list[str], list[str | None], list[bytes]]
"""Texts, titles, and meta without the brace that closes it."""


def same_rows(format: str, path: str, name: str) -> Iterator[pa.Table]:
    """The rows of one sound file.

    Args:
        format: that of the corpus, which is also called so.
        path: where the file is.
        name: what ids and meta call it.
    """
    if path.endswith(".parquet"):
        yield from _of_parquet(format, path, name)
        return
    with _opened(path, name) as (name, stream):
        place = _place(name)
        ids, encoded, titles, metas = [], [], [], []  # type: ignore[var-annotated]
        for offsets, values in (_objects if format == "wudao" else _lines)(stream):
            found, own_titles, own = _CONTENT[format](values, f"{path}!{name}")
            texts = [*map(str.encode, found)]
            ids += doc_ids(format, name, offsets, texts)
            encoded += texts
            titles += own_titles
            metas += [b"%b%b%d}" % (meta, place, offset) for meta, offset in zip(own, offsets, strict=True)]
            if len(ids) >= TABLE:
                yield _table(format, ids, _strings(encoded), titles, metas)
                ids, encoded, titles, metas = [], [], [], []
        yield _table(format, ids, _strings(encoded), titles, metas)


def _of_parquet(source: str, path: str, name: str) -> Iterator[pa.Table]:
    place, row = _place(name), 0
    for batch in pq.ParquetFile(path).iter_batches(TABLE, columns=["text"]):
        texts, offsets = batch.column(0), range(row, row + batch.num_rows)
        texts.validate(full=True)
        ids = doc_ids(source, name, offsets, texts.view(pa.binary()).to_numpy(zero_copy_only=False).tolist())
        yield _table(source, ids, texts, [None] * len(ids), [b"{%b%d}" % (place, offset) for offset in offsets])
        row += batch.num_rows


@contextlib.contextmanager
def _opened(path: str, name: str) -> Iterator[tuple[str, Readable]]:
    """What ids call the text in a file, and its bytes."""
    if path.endswith(".tar.gz"):
        with gzip_ng.open(path) as whole, tarfile.open(fileobj=whole, mode="r|", bufsize=CHUNK) as archive:
            member = cast(tarfile.TarInfo, archive.next())
            yield f"{name}!{member.name}", cast(Readable, archive.extractfile(member))
    else:
        with gzip_ng.open(path) if path.endswith(".gz") else open(path, "rb", buffering=0) as stream:
            yield name, cast(Readable, stream)


def _lines(stream: Readable) -> Iterator[tuple[Sequence[int], Values]]:
    offset, held = 0, b""
    while chunk := stream.read(CHUNK):
        lines, held = io.BytesIO(held + chunk), b""
        while several := [*islice(lines, TOGETHER)]:
            held = b"" if several[-1].endswith(b"\n") else several.pop()
            if several:
                yield [*accumulate(map(len, several[:-1]), initial=offset)], [*map(orjson.loads, several)]
                offset += sum(map(len, several))
    if held:
        yield [offset], [orjson.loads(held)]


def _objects(stream: Readable) -> Iterator[tuple[Sequence[int], Values]]:
    held, base, chunk = b"", 0, b"more"
    while chunk:
        chunk = stream.read(CHUNK)
        data = held + chunk
        ends = [found.span() for found in _BETWEEN.finditer(data)] + ([] if chunk else [(data.rindex(b"}"), len(data))])
        starts = [0 if base else data.index(b"{"), *(end for _, end in ends)]
        for first in range(0, len(ends), TOGETHER):
            some = starts[first : min(first + TOGETHER, len(ends))]
            raw = data[some[0] : ends[first + len(some) - 1][0] + 1]
            yield [base + start for start in some], orjson.loads(b"[%b]" % raw)
        base += starts[len(ends)]
        held = data[starts[len(ends)] :]


def _of_wudao(values: Values, path: str) -> Parts:
    titles = [value["title"] for value in values]
    texts = [without_title(value["content"], title) for value, title in zip(values, titles, strict=True)]
    return texts, titles, _metas(values, ("id", "uniqueKey", "titleUkey", "dataType"))


def _of_wanjuan(values: Values, path: str) -> Parts:
    subset = orjson.dumps({"subset": wanjuan_subset(path)})[:-1] + b","
    metas = [subset + meta[1:] for meta in _metas(values, ("id",))]
    return [value["content"] for value in values], [None] * len(values), metas


def _of_jsonl(values: Values, path: str) -> Parts:
    return [value["text"] for value in values], [None] * len(values), _metas(values, ("id", "url"))


def _of_skypile(values: Values, path: str) -> Parts:
    return [value["text"] for value in values], [None] * len(values), [b"{"] * len(values)


_CONTENT: dict[str, Callable[[Values, str], Parts]] = {
    "wudao": _of_wudao, "wanjuan": _of_wanjuan, "jsonl": _of_jsonl, "skypile": _of_skypile,
}  # fmt: skip


def _metas(values: Values, fields: Sequence[str]) -> list[bytes]:
    return [orjson.dumps({field: value[field] for field in fields})[:-1] + b"," for value in values]


def _place(name: str) -> bytes:
    return b'%b,"offset":' % orjson.dumps({"file": name})[1:-1]


def _strings(texts: list[bytes]) -> Any:
    return pa.array(texts, pa.binary()).view(pa.string())


def _table(source: str, ids: list[str], texts: Any, titles: list[str | None], metas: list[bytes]) -> pa.Table:
    columns = {
        "doc_id": ids, "source": pa.repeat(source, len(ids)), "text": texts, "title": titles, "meta": _strings(metas),
        "status": pa.repeat(OK, len(ids)),
    }  # fmt: skip
    filled = {f.name: columns[f.name] if f.name in columns else pa.nulls(len(ids), f.type) for f in DOCUMENT}
    return pa.Table.from_pydict(filled, schema=DOCUMENT)
