"""Instruction data as rows, whatever holds them: a generate stage, an export in any of its formats, a jsonl file.

contamination.py, pairwise.py and review.py read with it. It streams, and changes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq

from kun_ray import formats, store
from kun_ray.config import ConfigError, KunError, require, without_credentials
from kun_ray.names import path_parts, short_names
from kun_ray.schema import OK

Row = dict[str, Any]
"""`id`, `source`, and the columns that there are."""
COLUMNS = ("doc_id", "source", "status", "instruction", "input", "output", "answer", "text")


def read_rows(uri: str) -> Iterator[Row]:
    """The rows of a finished generate stage that are ok, of an export (train, then valid), or of a jsonl file.

    Raises:
        ConfigError: it is none of these.
        KunError: a stage is not finished, or a line is no JSON object.
    """
    folder = store.Folder(uri)
    splits = [f"{place}/{split}" for place in ("parquet", "alpaca", "sharegpt") for split in ("train", "valid")]
    if uri.endswith((".jsonl", ".json")) and folder.exists():
        yield from _read_jsonl(folder, folder.path)
    elif folder.exists() and folder.parts():
        for path in store.require_complete(uri).parts():
            yield from _read_parquet(folder, path)
    elif found := [name for split in splits for name in (f"{split}.parquet", f"{split}.jsonl") if folder.exists(name)]:
        for name in (name for name in found if name.split("/")[0] == found[0].split("/")[0]):
            read = _read_parquet if name.endswith(".parquet") else _read_jsonl
            yield from read(folder, folder.child(name))
    else:
        raise ConfigError(
            f"{without_credentials(uri)} is neither a finished generate stage (part-*.parquet), nor an export (parquet/, alpaca/ "
            "or sharegpt/), nor a .jsonl file"
        )


def reply(row: Row) -> str | None:
    """A row's answer: `answer` in a stage, `output` in Alpaca, `response` elsewhere."""
    return next((row[name] for name in ("answer", "output", "response") if row.get(name)), None)


def instruction(row: Row) -> str | None:
    """A row's instruction, with Alpaca's `input` below it."""
    asked = row.get("instruction") or row.get("prompt")
    return f"{asked}\n{row['input']}" if asked and row.get("input") else asked


def _read_parquet(folder: store.Folder, path: str) -> Iterator[Row]:
    with folder.filesystem.open_input_file(path) as file, pq.ParquetFile(file) as parquet:
        names = [name for name in COLUMNS if name in parquet.schema_arrow.names]
        exported = orjson.loads((parquet.schema_arrow.metadata or {}).get(formats.RESPONSE, b"null"))
        for batch in parquet.iter_batches(batch_size=1024, columns=names):
            for row in batch.to_pylist():
                if row.pop("status", OK) == OK:
                    if exported:  # as the other formats have it: the export may leave the polished answer unused
                        row |= formats.alpaca(row, exported["column"], exported["text_is_input"])
                        row.pop("answer", None)
                    yield {"id": row.pop("doc_id", ""), **row}


def _read_jsonl(folder: store.Folder, path: str) -> Iterator[Row]:
    with folder.filesystem.open_input_stream(path) as stream, io.BufferedReader(stream) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = dict(orjson.loads(line))
            except (ValueError, TypeError):
                raise KunError(f"{path}, line {number}: not a JSON object; give one object a line") from None
            said = formats.conversation(row)
            if said:
                *before, (asked, answered) = said[1]
                earlier = "\n".join(part for turn in before for part in turn)
                row |= {"instruction": f"{earlier}\n{asked}" if earlier else asked, "output": answered}
            yield {"id": f"{path.rsplit('/', 1)[-1]}:{number}", "source": "", **row}


@dataclasses.dataclass(frozen=True)
class Pair:
    """One instruction and what one or more models answered."""

    id: str
    instruction: str
    answers: tuple[str, ...]


def read_pairs(uri: str) -> dict[str, tuple[str, str]]:
    """Instruction → (id, answer) of every row that has both; the first answer counts if an instruction comes twice."""
    found: dict[str, tuple[str, str]] = {}
    for row in read_rows(uri):
        asked, answered = instruction(row), reply(row)
        if asked and answered:
            found.setdefault(asked.strip(), (str(row["id"]), answered))
    return found


def paired(uris: list[str]) -> list[Pair]:
    """The instructions that two sources have in common, with both answers. Raises ConfigError when there are none."""
    first, second = (read_pairs(uri) for uri in uris)
    pairs = [Pair(first[a][0], a, (first[a][1], second[a][1])) for a in first if a in second]
    if not pairs:
        shown = [without_credentials(uri) for uri in uris]
        raise ConfigError(
            f"{shown[0]} ({len(first):,} instructions with an answer) and {shown[1]} ({len(second):,}) have no instruction in "
            "common: both models must have answered the same ones"
        )
    if len(pairs) < max(len(first), len(second)):
        print(f"{len(pairs):,} instructions are in both: the first has {len(first):,}, the second {len(second):,}")
    return pairs


def source_names(uris: list[str], names: list[str]) -> list[str]:
    """A name for each source: those given, or the parts in which their paths differ."""
    if names:
        require(len(names) == len(uris), f"names: {len(uris)} are needed, one for each of answers")
    else:
        names = short_names(uris)
    require(len(set(names)) == len(names), f"names: two are the same ({', '.join(names)})")
    return list(names)


def folder_name(path: str) -> str:
    """A name for a model's folder that does not depend on which other models are named beside it."""
    place = path if "://" in path or not Path(path).exists() else str(Path(path).resolve())
    return f"{path_parts(path)[-1]}-{hashlib.blake2b(place.rstrip('/').encode(), digest_size=4).hexdigest()}"
