"""The generate stage on a real Ray with fake engines: the chain, its bounds, its errors row by row."""

from __future__ import annotations

import json

import pytest
from conftest import ids

from kun_ray.generate import generate
from kun_ray.schema import DOCUMENT, with_steps


def test_the_full_chain_gives_every_row_once(cluster, documents, chain, capsys):
    source = documents(600, marks={7: "bad", 8: "bad", 9: "cut"}, rejected=range(0, 600, 10))
    job = chain(source)
    summary = generate(job.config())

    assert ids(job.folder()) == ids(source)
    assert summary == job.folder().read_json("summary.json")
    assert summary["rows"] == summary["rows_in"] == 600 and summary["duplicates"] == 0
    assert (summary["ok"], summary["rejected"], summary["failed"]) == (537, 62, 1)
    assert summary["reasons"] == {"rejected/too_short": 60, "rejected/verdict_bad": 2, "failed/truncated": 1}
    for row in job.rows():
        n = int(row["title"])
        if row["status"] == "ok":
            assert row["text"].startswith(f"第{n:04d}篇")
            assert row["instruction"] == f"请写出第{n:04d}篇的主要内容" and row["answer"].startswith(f"第{n:04d}篇")
            assert row["verdict"] == "好" and row["score"] == pytest.approx(0.75)
            assert row["polish_output_tokens"] == 7 and row["polish_finish_reason"] == "stop"
        else:
            assert row["text"] is None and row["answer"] is None
    table = job.folder().dataset().to_table()
    assert table.schema.equals(with_steps(DOCUMENT, ["label", "score", "polish"]))
    assert (job.folder().exists("_SUCCESS"), job.folder().exists("_checkpoint")) == (True, True)

    before = {path: job.folder().filesystem.get_file_info(path).mtime for path in job.folder().parts()}
    assert generate(job.config()) == summary
    assert "complete already; nothing to do" in capsys.readouterr().out
    assert {path: job.folder().filesystem.get_file_info(path).mtime for path in job.folder().parts()} == before
