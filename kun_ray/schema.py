"""The row contract: column names, statuses and the Arrow schema of every stage (docs/architecture.md, "The row").

Every stage reads and writes rows of this shape, and every input row leaves exactly one output row. This module imports
nothing of the package.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Sequence
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

OK: Final = "ok"
REJECTED: Final = "rejected"
"""The method's decision: the document or what was made of it is not wanted."""
FAILED: Final = "failed"
"""An accident: the row could not be read or processed."""
STATUSES: Final = (OK, REJECTED, FAILED)
DEFERRED: Final = "deferred"
"""A row that a stopping run did not start. Such rows are never written, so the next run does them."""

DOCUMENT: Final = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("title", pa.string()),
        pa.field("meta", pa.string()),
        pa.field("tokens", pa.int32()),
        pa.field("perplexity", pa.float32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
    ]
)
"""What prepare writes: one row per document read. `meta` is a JSON object that always holds `file` and `offset` (where
the record stands) and the corpus's own fields. `text` is null unless status is ok; `tokens` counts the label model's own
tokens; `perplexity` is null unless it was measured."""

STEP_RESULTS: Final[dict[str, list[pa.Field]]] = {
    "perplexity": [pa.field("perplexity", pa.float32())],
    "label": [pa.field("instruction", pa.string())],
    "score": [pa.field("verdict", pa.string()), pa.field("score", pa.float32())],
    "polish": [pa.field("answer", pa.string())],
    "choose": [pa.field("verdict", pa.string()), pa.field("logprobs", pa.list_(pa.float32()))],
}
"""The columns that each step writes, besides its token counts and finish reason."""


def step_fields(step: str) -> list[pa.Field]:
    """The columns that one step adds to a row: its results, its token counts, its finish reason."""
    return [
        *STEP_RESULTS[step],
        pa.field(f"{step}_prompt_tokens", pa.int32()),
        pa.field(f"{step}_output_tokens", pa.int32()),
        pa.field(f"{step}_finish_reason", pa.string()),
    ]


def with_steps(schema: pa.Schema, steps: list[str]) -> pa.Schema:
    """`schema` with the columns of `steps` added where they are missing, `status` and `reason` kept last."""
    fields = [field for field in schema if field.name not in ("status", "reason")]
    names = {field.name for field in fields}
    for step in steps:
        for field in step_fields(step):
            if field.name not in names:
                fields.append(field)
                names.add(field.name)
    return pa.schema([*fields, DOCUMENT.field("status"), DOCUMENT.field("reason")])


_LENGTH: Final = struct.Struct("<Q").pack


def doc_id(source: str, file: str, offset: int, text: str | bytes) -> str:
    """The identity of a document: 32 hex digits of BLAKE2b-128 over its source, file, offset in it, and text (in UTF-8).

    Stable over runs and machines as long as `file` is given relative to the corpus root; never a row number of a run.
    """
    encoded = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return doc_ids(source, file, [offset], [encoded])[0]


def doc_ids(source: str, file: str, offsets: Sequence[int], texts: Sequence[bytes]) -> list[str]:
    """`doc_id` of several documents of one file."""
    opening, ids = _file_digest(source, file), []
    for offset, text in zip(offsets, texts, strict=True):
        place = b"%d" % offset
        digest = opening.copy()
        digest.update(b"%b%b%b%b" % (_LENGTH(len(place)), place, _LENGTH(len(text)), text))
        ids.append(digest.hexdigest())
    return ids


@functools.lru_cache(maxsize=64)
def _file_digest(source: str, file: str) -> hashlib.blake2b:
    """What the digests of all documents of one file begin with."""
    parts = [part.encode("utf-8", "surrogatepass") for part in (source, file)]
    return hashlib.blake2b(b"".join(len(part).to_bytes(8, "little") + part for part in parts), digest_size=16)


def to_table(rows: list[dict[str, object]], schema: pa.Schema) -> pa.Table:
    """Rows as a table of exactly `schema`; a missing key is null. Raises pa.ArrowInvalid on a wrong type."""
    columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def without_deferred(block: pa.Table) -> pa.Table:
    """The rows of `block` that may be written."""
    return block.filter(pc.not_equal(block["status"], DEFERRED))


def changed(block: pa.Table, rows: list[dict[str, object]], schema: pa.Schema, names: set[str]) -> pa.Table:
    """`block` as `schema`, with the columns of `names` taken from `rows` and all others as they are."""
    columns = [
        pa.array([row.get(field.name) for row in rows], field.type) if field.name in names else block[field.name]
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
