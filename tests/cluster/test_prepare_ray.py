"""prepare on a real Ray: killed in mid-read, run again, every record once and every planted duplicate found."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import yaml
from chains import address, kill_session, wait_until

from kun_ray.config import load
from kun_ray.prepare import PrepareConfig, prepare
from kun_ray.store import Folder

REPO = Path(__file__).parents[2]


def test_a_killed_prepare_continues(cluster, demo_texts, tmp_path):
    """Six files of two corpora hold 2,400 texts, 240 of which stand in another file as well, and 12 broken lines."""
    rng = random.Random(0)
    sentences = sorted(
        {s + "。" for text in demo_texts for s in text.split("。") if 12 < len(s) < 60 and "\n" not in s}
    )
    texts = ["".join(rng.sample(sentences, 6)) for _ in range(2400)]
    files: list[list[str]] = [texts[start::6] for start in range(6)]
    for index, text in enumerate(texts[:240]):
        files[(index + 1) % 6].append(text)
    for number, records in enumerate(files):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in records] + ['{"text": "断了'] * 2
        folder = tmp_path / ("sky" if number < 3 else "more")
        folder.mkdir(exist_ok=True)
        (folder / f"2020-40_zh_head_{number:04d}.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "corpora": [
            {"name": "sky", "format": "skypile", "paths": [str(tmp_path / "sky")]},
            {"name": "more", "format": "jsonl", "paths": [str(tmp_path / "more")]},
        ],
        "output": str(tmp_path / "prepare"),
        "read_tasks": 6,
        "batch_rows": 32,
        "rows_per_file": 100,
        "filters": {"language": False, "min_chinese_share": 0},
        "ray": {"log_every_s": 0.5},
    }
    path = tmp_path / "prepare.yaml"
    path.write_text(yaml.safe_dump(config))
    clean = Folder(f"{config['output']}/_clean")
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, str(REPO / "jobs/prepare.py"), str(path), address()]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ), start_new_session=True)
    try:
        wait_until(lambda: clean.parts() or process.poll() is not None, "a first file")
        assert process.poll() is None, (tmp_path / "log").read_text()
    finally:
        kill_session(process)
    assert not Folder(config["output"]).is_complete()
    assert "\n# corpora:\n" in (tmp_path / "log").read_text(), "the configuration stands in the log"

    summary = prepare(load(PrepareConfig, [str(path)]))
    rows = Folder(config["output"]).dataset().to_table().to_pylist()
    assert len({row["doc_id"] for row in rows}) == len(rows) == summary["rows"] == 2652
    assert Counter(row["status"] for row in rows) == {s: n for s in ("ok", "rejected", "failed") if (n := summary[s])}
    assert summary["reasons"]["failed/bad_json"] == 12 and summary["reasons"]["rejected/duplicate"] == 240
    by_id = {row["doc_id"]: row for row in rows}
    for row in rows:
        assert (row["text"] is not None) == (row["status"] == "ok")
        if row["reason"] == "duplicate":
            kept = by_id[json.loads(row["meta"])["duplicate_of"]]
            assert kept["status"] == "ok" or kept["reason"] == "near_duplicate"
    expected = {(corpus, number) for corpus, number in zip(["sky"] * 3 + ["more"] * 3, range(6), strict=True)}
    assert {(row["source"], int(json.loads(row["meta"])["file"][-10:-6])) for row in rows} == expected
    assert not clean.exists()
