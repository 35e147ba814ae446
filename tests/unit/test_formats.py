"""The files of an export: what trainers and libraries read in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from example_export import FINGERPRINT, lines, row, run, summary_of

ODD = 'a\u2028b\u2029c\u0085d\x00e"\\f\ud83d\ude00 \x1b[31m</s>|\ufeff\r\n尾'.encode("utf-16", "surrogatepass").decode(
    "utf-16"
)


def test_formats_have_the_keys_that_trainers_read(tmp_path: Path) -> None:
    rows = [row(n) for n in range(3)]
    out = run(tmp_path, rows)
    first = rows[0]
    assert lines(out / "alpaca/train.jsonl")[0] == {
        "instruction": first["instruction"],
        "input": "",
        "output": first["answer"],
    }
    assert lines(out / "sharegpt/train.jsonl")[0] == {
        "conversations": [{"from": "human", "value": first["instruction"]}, {"from": "gpt", "value": first["answer"]}],
        "id": first["doc_id"],
    }
    info = json.loads((out / "dataset_info.json").read_text())
    assert info["kun_alpaca"] == {
        "file_name": "alpaca/train.jsonl",
        "formatting": "alpaca",
        "columns": {"prompt": "instruction", "query": "input", "response": "output"},
    }
    assert info["kun_sharegpt"]["columns"] == {"messages": "conversations"}
    assert info["kun_sharegpt"]["tags"]["assistant_tag"] == "gpt"
    assert set(info) == {"kun_alpaca", "kun_sharegpt"}
    assert all((out / entry["file_name"]).is_file() for entry in info.values())


def test_parquet_keeps_the_lineage(tmp_path: Path) -> None:
    rows = [row(n) for n in range(30)]
    out = run(tmp_path, rows, formats=["parquet"])
    table = pq.read_table(out / "parquet/train.parquet")
    kept = {entry["doc_id"]: entry for entry in table.to_pylist()}
    for given in rows:
        found = kept[given["doc_id"]]
        for name in ("source", "title", "meta", "text", "instruction", "answer", "verdict"):
            assert found[name] == given[name]
        assert found["generate_digest"] == summary_of(out)["generate_digest"]
    generate = json.loads((table.schema.metadata or {})[b"kun_ray.generate_fingerprint"])
    assert generate["prompts"] == FINGERPRINT["prompts"]
    assert json.loads((out / "dataset_info.json").read_text()) == {}


def test_datasets_loads_every_config_offline(tmp_path: Path) -> None:
    rows = [row(n, answer=ODD if n == 7 else f"回答{n}") for n in range(60)]
    out = run(tmp_path, rows, valid_fraction=0.2)
    run(tmp_path, rows, valid_fraction=0.2, formats=["parquet"], output=f"{out}-parquet")
    script = (
        "import sys, json\nfrom datasets import load_dataset\n"
        "found = {}\n"
        "for place in (['', 'alpaca'], ['', 'sharegpt'], ['/parquet'], ['-parquet', 'parquet']):\n"
        "    data = load_dataset(sys.argv[1] + place[0], *place[1:])\n"
        "    found[place[-1]] = {s: [d.num_rows, sorted(d.column_names)] for s, d in data.items()}\n"
        "answers = [a for s in load_dataset(sys.argv[1]).values() for a in s['output']]\n"
        "print(json.dumps([found, answers]))\n"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_DATASETS_CACHE": str(tmp_path / "c"),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found, answers = json.loads(done.stdout)
    summary = summary_of(out)
    for name, columns in {"alpaca": ["input", "instruction", "output"], "sharegpt": ["conversations", "id"]}.items():
        assert found[name] == {"train": [summary["train"], columns], "validation": [summary["valid"], columns]}
    for place in ("/parquet", "parquet"):
        assert {split: content[0] for split, content in found[place].items()} == {
            "train": summary["train"],
            "validation": summary["valid"],
        }
        assert {"doc_id", "text", "generate_digest"} <= set(found[place]["train"][1])
    assert ODD in answers


def test_odd_characters_stay_on_one_line(tmp_path: Path) -> None:
    out = run(tmp_path, [row(0, instruction=ODD, answer=ODD), row(1)])
    for name in ("alpaca", "sharegpt"):
        text = (out / name / "train.jsonl").read_bytes().decode("utf-8")
        assert len(text.splitlines()) == 2 == text.count("\n")
    assert lines(out / "alpaca/train.jsonl")[0]["output"] == ODD
    assert "尾" in (out / "alpaca/train.jsonl").read_text("utf-8")
