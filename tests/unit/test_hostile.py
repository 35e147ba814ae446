"""Whatever stands in a corpus ends as rows or as one clear error: no crash, no hang, no neighbour lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
from hostile import KINDS, neighbour

from kun_ray.config import KunError
from kun_ray.corpora import CorpusConfig, list_files, read_file
from kun_ray.prepare import PrepareConfig, clean_batch


def outcome(path: Path, format: str = "jsonl", **fields: Any) -> list[dict[str, Any]]:
    """The rows of one file or folder as prepare has them before it looks for duplicates."""
    corpus = CorpusConfig("c", format, [str(path)], meta_fields=["id"], **fields)
    config = PrepareConfig(corpora=[corpus], output="x")
    tables = [table for file in list_files(corpus) for table in read_file(corpus, file)]
    return [row for table in tables for row in clean_batch(table, config).to_pylist()]


def reasons(rows: list[dict[str, Any]]) -> list[str | None]:
    return [row["reason"] for row in rows]


def error(row: dict[str, Any]) -> str:
    return str(json.loads(row["meta"])["error"])


def test_there_are_many_kinds() -> None:
    assert len(KINDS) >= 100


@pytest.mark.parametrize("name", KINDS)
def test_bad_input_becomes_rows(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    path = tmp_path / f"{name}{kind.suffix}"
    path.write_bytes(kind.content)
    started = time.process_time()
    rows = outcome(path, kind.format)
    assert time.process_time() - started < 10
    assert reasons(rows) == kind.outcome
    assert len({row["doc_id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["status"] in ("ok", "rejected", "failed") and (row["text"] is None) == (row["status"] != "ok")
        assert json.loads(row["meta"])["file"].startswith(path.name)
        assert row["status"] != "failed" or error(row)
    assert os.listdir(tmp_path) == [path.name], "nothing is unpacked"


def test_what_stays_is_cleaned(tmp_path: Path) -> None:
    def texts(name: str) -> str:
        (tmp_path / name).write_bytes(KINDS[name].content)
        return "".join(row["text"] or "" for row in outcome(tmp_path / name))

    for name in ("nul_bytes_in_text", "right_to_left_override", "zero_width_between_all", "ansi_escapes"):
        assert all(char.isprintable() or char == "\n" for char in texts(name))
    assert "alert" not in texts("script") and "<" not in texts("script")
    assert "〔电话〕" in texts("personal_data_in_disguise")
    assert "<|im_end|>" in texts("control_tokens_of_chatml"), "text is kept; prompts.py keeps it text"


# What cannot be listed or is no file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: os.mkfifo(folder / "x.jsonl"), "neither a file nor a folder"),
        (lambda folder: (folder / "x.jsonl").symlink_to("/dev/zero"), "neither a file nor a folder"),
        (lambda folder: (folder / "notes.txt").write_text("x"), "nothing matches"),
        (lambda folder: None, "nothing matches"),
    ],
)
def test_what_is_no_data_is_refused_by_name(make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(KunError, match=words) as caught:
        outcome(tmp_path / "x.jsonl")
    assert str(tmp_path) in str(caught.value)


def test_a_name_that_is_not_utf_8_is_one_clear_error(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xca\xfd.jsonl"))).write_bytes(neighbour())
    with pytest.raises(KunError, match="not UTF-8.*rename it"):
        outcome(tmp_path)


def test_pipes_devices_and_loops_below_a_folder_are_passed_by(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_bytes(neighbour())
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/zero")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("/nowhere")
    rows = outcome(tmp_path)
    found = {json.loads(row["meta"])["file"]: row["reason"] for row in rows}
    assert found == {"good.jsonl": None, "loop.jsonl": "unreadable_file", "gone.jsonl": "unreadable_file"}


def test_a_name_with_a_newline_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "a\nb\u202e'$(touch x).jsonl").write_bytes(neighbour())
    assert json.loads(outcome(tmp_path)[0]["meta"])["file"] == "a\nb\u202e'$(touch x).jsonl"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_a_failed_row(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(neighbour())
    (tmp_path / "x.jsonl").chmod(0)
    assert reasons(outcome(tmp_path)) == ["unreadable_file"]


# Size ------------------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys, time
from kun_ray.contents import ExtractFields
from kun_ray.documents import read_documents
from kun_ray.sources import CorpusFile

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.process_time()
path, size = sys.argv[1], int(sys.argv[2])
for as_objects in (False, True):
    tables = read_documents(CorpusFile(path, "x", size), "c", ExtractFields("text", None, []), as_objects)
    print([row["reason"] for table in tables for row in table.to_pylist()])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, time.process_time() - started)
"""


def test_100_mb_on_one_line_is_neither_held_nor_slow(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    hostile.one_long_line(path, 100 << 20)
    arguments = [sys.executable, "-c", MEASURE, str(path), str(path.stat().st_size)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    lines, objects, used = done.stdout.splitlines()
    assert lines == objects == str([None, "record_too_large", None])
    num_mb, seconds = used.split()
    assert int(num_mb) < 250 and float(seconds) < 10


def test_records_of_many_mb_are_filtered_a_few_at_a_time(tmp_path: Path) -> None:
    with (tmp_path / "x.jsonl").open("wb") as stream:
        for index in range(8):
            stream.write(b'{"text": "%d%s"}\n' % (index, "长".encode() * (7 << 20)))
    corpus = CorpusConfig("c", "jsonl", [str(tmp_path)])
    sizes = [table.nbytes for table in read_file(corpus, list_files(corpus)[0])]
    assert max(sizes) < 64 << 20 and len(sizes) == 8
