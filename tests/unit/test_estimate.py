"""What a plan reckons from a sample of corpora: records, documents, tokens, seconds."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from kun_ray import estimate
from kun_ray.config import load
from kun_ray.demo.layout import clean_texts
from kun_ray.estimate import sample_corpora
from kun_ray.plan import PreparePlan
from kun_ray.prepare import ONE_CORE, clean_batch


def corpus(folder: Path, name: str, texts: list[str], ascii_only: bool = False) -> str:
    """A jsonl file as the entry of `corpora` that names it."""
    lines = "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts)
    (folder / f"{name}.jsonl").write_text(lines)
    return f"{{name: {name}, format: jsonl, paths: [{folder}/{name}.jsonl]}}"


def sampled(folder: Path, *corpora: str, **options: Any) -> tuple[Any, Any]:
    config = load(PreparePlan, [f"corpora=[{','.join(corpora)}]", f"output={folder}/out"])
    return sample_corpora(config, dataclasses.replace(config, **options))


def test_each_corpus_is_scaled_by_itself(tmp_path: Path) -> None:
    text = clean_texts()[0][:90]
    short = corpus(tmp_path, "short", [f"{n}{text}" for n in range(24_000)])
    long = corpus(tmp_path, "long", [f"{n}{text}" * 40 for n in range(600)])
    total, work = sampled(tmp_path, short, long)
    assert total.records == pytest.approx(24_600, rel=0.02)
    assert "(short 24," in work.notes[0] and "long 600)" in work.notes[0]
    alone = [sampled(tmp_path, one)[0].records for one in (short, long)]
    assert total.records == pytest.approx(sum(alone), rel=0.02)


def test_a_corpus_of_few_files_is_sampled_beside_one_of_many(tmp_path: Path) -> None:
    text = clean_texts()[0]
    many = [corpus(tmp_path, f"many-{n:02}", [f"{n}{text}"] * 50) for n in range(40)]
    (tmp_path / "folder").mkdir()
    for entry in many:
        name = entry.split(",")[0].removeprefix("{name: ")
        (tmp_path / f"{name}.jsonl").rename(tmp_path / "folder" / f"{name}.jsonl")
    few = corpus(tmp_path, "few", [f"{n}{text}" for n in range(7)])
    total, work = sampled(tmp_path, f"{{name: many, format: jsonl, paths: [{tmp_path}/folder]}}", few)
    assert "many 2,000, few 7)" in work.notes[0] and total.records == pytest.approx(2007)


def test_escaped_and_failed_records_do_not_mislead(tmp_path: Path) -> None:
    text = clean_texts()[0]
    escaped = corpus(tmp_path, "escaped", [f"{n}{text}" for n in range(6000)], ascii_only=True)
    total, _ = sampled(tmp_path, escaped, sample_records=300)
    assert total.records == pytest.approx(6000, rel=0.02)
    (tmp_path / "broken.jsonl").write_text('{"other": "no text in it"}\n' * 6000)
    broken = f"{{name: broken, format: jsonl, paths: [{tmp_path}/broken.jsonl]}}"
    total, work = sampled(tmp_path, broken, sample_records=300)
    assert total.records == pytest.approx(6000, rel=0.02) and work.documents == 0


def test_loading_the_tokenizer_is_not_multiplied_by_all_records(
    tmp_path: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a first call takes a second more, as one does that loads something."""
    calls: list[int] = []

    def slow_at_first(table: Any, config: Any) -> Any:
        calls.append(table.num_rows)
        time.sleep(1.0 if len(calls) == 1 else 0.0)
        return clean_batch(table, config)

    monkeypatch.setattr(estimate, "clean_batch", slow_at_first)
    argv = [f"corpora=[{corpus(tmp_path, 's', clean_texts()[:50])}]", f"output={tmp_path}/out"]
    config = load(PreparePlan, [*argv, f"tokenizer={model_folder()}", "sample_records=100"])
    before = {name: os.environ.get(name) for name in ONE_CORE}
    assert sample_corpora(config, config)[0].core_seconds < 1.0 and len(calls) == 2
    assert {name: os.environ.get(name) for name in ONE_CORE} == before
