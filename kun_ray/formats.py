"""The files of an export: chosen rows as Alpaca jsonl, ShareGPT jsonl and Parquet, written once and read back.

`export.export` calls it with the split of every row; it streams the rows and never decides anything about them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from kun_ray.config import KunError
from kun_ray.selection import SPLITS, Array, column_names, read_batches
from kun_ray.store import Folder

FORMATS: Final = ("alpaca", "sharegpt", "parquet")
RESPONSE: Final = b"kun_ray.response"
"""Key in a Parquet file's metadata: which of its columns the other formats give as the response, and whether the text is asked about."""
ROLES: Final = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""What ShareGPT and its kin call those who speak."""
_ROW_GROUP_BYTES: Final = 64 << 20

Write = Callable[[pa.RecordBatch], None]


def file_name(name: str, split: str) -> str:
    """Where one split of one format lies in the export, such as `alpaca/train.jsonl`."""
    return f"{name}/{split}.{'parquet' if name == 'parquet' else 'jsonl'}"


def digest(value: Any) -> str:
    """32 hex digits that stand for a JSON-able value, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def alpaca(row: dict[str, Any], reply: str, with_text: bool) -> dict[str, Any]:
    """Stanford Alpaca's record; `input` is empty unless the document is given along."""
    return {"instruction": row["instruction"], "input": (row["text"] or "") if with_text else "", "output": row[reply]}


def sharegpt(row: dict[str, Any], reply: str, with_text: bool) -> dict[str, Any]:
    """One exchange of ShareGPT; the document comes below the instruction, where LLaMA-Factory puts Alpaca's input."""
    human = f"{row['instruction']}\n{row['text']}" if with_text and row["text"] else row["instruction"]
    return {
        "conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": row[reply]}],
        "id": row["doc_id"],
    }


def conversation(record: dict[str, Any]) -> tuple[str | None, list[tuple[str, str]], str] | None:
    """(system, [(user, assistant), …], input) of an Alpaca or ShareGPT record; None if it is neither."""
    messages = record.get("conversations") or record.get("messages")
    if messages is None:
        asked, answer, extra = (record.get(name) for name in ("instruction", "output", "input"))
        extra = "" if extra is None else extra
        if not (isinstance(asked, str) and isinstance(answer, str) and isinstance(extra, str)):
            return None
        try:
            history = [(str(q), str(a)) for q, a in record.get("history") or []]
        except (TypeError, ValueError):
            return None
        return record.get("system") or None, [*history, (asked, answer)], extra
    try:
        said = [(ROLES[m.get("from") or m["role"]], m.get("value") or m["content"]) for m in messages]
    except (KeyError, TypeError, AttributeError):
        return None
    system = record.get("system") or None
    if said and said[0][0] == "system":
        system, said = said[0][1], said[1:]
    roles = [role for role, _ in said]
    if not said or roles != ["user", "assistant"] * (len(said) // 2) or not all(isinstance(t, str) for _, t in said):
        return None
    return system, [(said[n][1], said[n + 1][1]) for n in range(0, len(said), 2)], ""


def json_line(value: dict[str, Any]) -> bytes:
    """One object as one line, also for readers that take U+0085, U+2028 or U+2029 for the end of a line."""
    line = orjson.dumps(value)
    for separator, escaped in ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029")):
        line = line.replace(separator, escaped)
    return line + b"\n"


def write_rows(
    source: Folder,
    target: Folder,
    splits: Array,
    names: list[str],
    reply: str,
    with_text: bool,
    generate: dict[str, Any],
) -> None:
    """Streams the chosen rows of `source` into every format's files under `target`.

    Args:
        splits: the split of every row of `source` in reading order, int8 [rows] (`selection.split`).
        names: formats to write.
        reply: column that becomes the response.
        with_text: whether the document is given along with the instruction.
        generate: the generate stage's fingerprint; every Parquet row carries its digest, the file's metadata the whole.
    Raises:
        KunError: `source` does not hold as many rows as `splits`.
    """
    columns = [name for name in column_names(source) if name not in ("status", "reason")]
    if "parquet" not in names:
        columns = ["doc_id", "instruction", *{reply, *(["text"] if with_text else [])}]
    start = 0
    with contextlib.ExitStack() as stack:
        writers: dict[str, Write] = {}
        for batch in read_batches(source, columns):
            codes = splits[start : start + batch.num_rows]
            start += batch.num_rows
            if start > len(splits):
                break
            for split, code in SPLITS.items():
                chosen = batch.filter(pa.array(codes == code))
                for name in names if chosen.num_rows else ():
                    path = file_name(name, split)
                    if path not in writers:
                        output = _output(target, name, path, batch.schema, reply, with_text, generate)
                        writers[path] = stack.enter_context(output)
                    writers[path](chosen)
        if start != len(splits):
            raise KunError(
                f"{source.uri} held {len(splits)} rows a moment ago and no longer does: "
                "let whatever writes there end, then run this again"
            )


def read_back(folder: Folder, name: str, split: str) -> dict[str, Any]:
    """Rows, bytes and SHA-256 of one file as it lies in the folder now."""
    path = file_name(name, split)
    checksum, num_bytes, num_lines = hashlib.sha256(), 0, 0
    with folder.filesystem.open_input_file(folder.child(path)) as file:
        while chunk := file.read(8 << 20):
            checksum.update(chunk)
            num_bytes += len(chunk)
            num_lines += chunk.count(b"\n")
        rows = pq.ParquetFile(file).metadata.num_rows if name == "parquet" else num_lines
    return {
        "path": path,
        "format": name,
        "split": split,
        "rows": rows,
        "bytes": num_bytes,
        "sha256": checksum.hexdigest(),
    }


@contextlib.contextmanager
def _output(
    target: Folder, name: str, path: str, schema: pa.Schema, reply: str, with_text: bool, generate: dict[str, Any]
) -> Iterator[Write]:
    """One file of the export, open for batches of rows."""
    with _published(target, path) as sink:
        if name == "parquet":
            response = json.dumps({"column": reply, "text_is_input": with_text})
            with _parquet(sink, schema, generate, response) as write_parquet:
                yield write_parquet
        else:
            to_object = {"alpaca": alpaca, "sharegpt": sharegpt}[name]

            def write(batch: pa.RecordBatch) -> None:
                sink.write(b"".join(json_line(to_object(row, reply, with_text)) for row in batch.to_pylist()))

            yield write


@contextlib.contextmanager
def _parquet(sink: pa.NativeFile, schema: pa.Schema, generate: dict[str, Any], response: str) -> Iterator[Write]:
    """Row groups of about 64 MB, so that small batches do not make a file of small groups."""
    lineage = digest(generate)
    fields = pa.schema([*schema, pa.field("generate_digest", pa.string(), nullable=False)])
    whole = json.dumps(generate, ensure_ascii=False)
    fields = fields.with_metadata({"kun_ray.generate_fingerprint": whole, RESPONSE: response})
    waiting: list[pa.RecordBatch] = []

    with pq.ParquetWriter(sink, fields, compression="zstd") as writer:

        def flush() -> None:
            table = pa.Table.from_batches(waiting, schema)
            writer.write_table(
                pa.Table.from_arrays([*table.columns, pa.repeat(lineage, table.num_rows)], schema=fields)
            )
            waiting.clear()

        def write(batch: pa.RecordBatch) -> None:
            waiting.append(batch)
            if sum(held.nbytes for held in waiting) >= _ROW_GROUP_BYTES:
                flush()

        yield write
        if waiting:
            flush()


@contextlib.contextmanager
def _published(folder: Folder, name: str) -> Iterator[pa.NativeFile]:
    """A file that appears under its name only once it is whole.

    Object stores show an object when it is closed and have no rename: S3 would copy, which ends at 5 GB. There the
    file is written in place, and the missing `_SUCCESS` and README.md mark a half export.
    """
    filesystem, path = folder.filesystem, folder.child(name)
    partial = f"{path}.tmp" if filesystem.type_name in ("local", "hdfs") else path
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with filesystem.open_output_stream(partial) as sink:
        yield sink
    if partial != path:
        filesystem.move(partial, path)
