"""Deduplication: planted duplicates are found wherever they lie, and nothing else is."""

from __future__ import annotations

import functools
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from kun_ray import schema
from kun_ray.config import ConfigError, KunError
from kun_ray.dedup import _pairs, find_duplicates
from kun_ray.signatures import DedupConfig, signatures

LOCAL = pafs.LocalFileSystem()
CHARACTERS = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]


def in_a_loop(function: Any, items: Any) -> list[Any]:
    return [function(item) for item in items]


def document(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(CHARACTERS, k=length))


def edited(rng: random.Random, text: str, edits: int) -> str:
    chars = list(text)
    for place in rng.sample(range(len(chars)), edits):
        chars[place] = rng.choice(CHARACTERS)
    return "".join(chars)


def jaccard(left: str, right: str, ngram: int = 5) -> float:
    a, b = ({text[i : i + ngram] for i in range(len(text) - ngram + 1)} for text in (left, right))
    return len(a & b) / len(a | b)


def similar(rng: random.Random, text: str, low: float, high: float) -> str:
    """An edited copy whose Jaccard similarity lies between low and high."""
    while True:
        copy = edited(rng, text, rng.randint(1, max(1, len(text) // 12)))
        if low <= jaccard(text, copy) <= high:
            return copy


def write(folder: Path, rows: list[tuple[str, str]], files: int, config: DedupConfig, status: str = "ok") -> list[str]:
    """(doc_id, text) rows as Parquet parts with signatures, a few row groups each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for part in range(files):
        ids, texts = [row[0] for row in rows[part::files]], [row[1] for row in rows[part::files]]
        table = pa.table({"doc_id": ids, "status": [status] * len(ids), **signatures(texts, config)})
        paths.append(str(folder / f"part-{status}-{part:05d}.parquet"))
        pq.write_table(table, paths[-1], row_group_size=700)
    return paths


def ids_of(texts: list[str]) -> list[tuple[str, str]]:
    return [(schema.doc_id("test", "file", offset, text), text) for offset, text in enumerate(texts)]


def found(paths: list[str], config: DedupConfig) -> dict[str, tuple[str, str]]:
    table = find_duplicates(paths, LOCAL, config, in_a_loop)
    doc_ids: list[Any] = table.column("doc_id").to_pylist()
    assert doc_ids == sorted(set(doc_ids))
    return {row["doc_id"]: (row["reason"], row["duplicate_of"]) for row in table.to_pylist()}


@functools.cache
def corpus() -> tuple[list[tuple[str, str]], dict[str, str], dict[str, str]]:
    """20,000 documents: rows, the group of each near duplicate's set, the group of each exact duplicate's set."""
    rng = random.Random(7)
    texts: list[str] = []
    near: list[tuple[int, int]] = []
    exact: list[tuple[int, int]] = []
    for _ in range(1500):
        texts.append(document(rng, rng.randint(120, 500)))
        near.append((len(texts) - 1, len(texts)))
        texts.append(similar(rng, texts[-1], 0.8, 0.97))
    for _ in range(500):
        texts.append(document(rng, rng.randint(30, 300)))
        exact.append((len(texts) - 1, len(texts)))
        texts.append("　".join((texts[-1][:10], texts[-1][10:20] + "，\n", texts[-1][20:] + "。")))
    for _ in range(500):  # related, but not near duplicates
        texts.append(document(rng, rng.randint(120, 500)))
        texts.append(similar(rng, texts[-1], 0.4, 0.62))
    while len(texts) < 20_000:
        texts.append(document(rng, rng.randint(30, 200)))
    rows = ids_of(texts)
    pairs = [{rows[a][0]: rows[b][0] for a, b in planted} for planted in (near, exact)]
    return rows, pairs[0], pairs[1]


@functools.cache
def corpus_rows_shuffled() -> list[tuple[str, str]]:
    rows = list(corpus()[0])
    random.Random(3).shuffle(rows)
    return rows


def test_recall_and_precision_on_planted_duplicates(tmp_path: Path) -> None:
    config = DedupConfig()
    _, near, exact = corpus()
    result = found(write(tmp_path, corpus_rows_shuffled(), 5, config), config)
    planted = {frozenset(pair): "near_duplicate" for pair in near.items()}
    planted |= {frozenset(pair): "duplicate" for pair in exact.items()}
    reported = {frozenset((doc_id, kept)): reason for doc_id, (reason, kept) in result.items()}
    right = sum(planted.get(pair) == reason for pair, reason in reported.items())
    near_found = sum(reason == "near_duplicate" and pair in planted for pair, reason in reported.items())
    assert sum(reason == "duplicate" for reason in reported.values()) == len(exact)
    assert near_found / len(near) >= 0.95
    assert right / len(reported) >= 0.95
    assert all(kept < doc_id for doc_id, (_, kept) in result.items()), "the smallest doc_id is kept"


def test_result_does_not_depend_on_files_order_or_split(tmp_path: Path) -> None:
    config = DedupConfig(rows_per_task=1_000)
    first = found(write(tmp_path / "a", corpus_rows_shuffled()[:6000], 3, config), config)
    reordered = corpus_rows_shuffled()[:6000][::-1]
    whole = DedupConfig()
    second = found(write(tmp_path / "b", reordered, 7, whole), whole)
    paths = write(tmp_path / "c", reordered, 2, whole)
    third = {
        row["doc_id"]: (row["reason"], row["duplicate_of"])
        for row in find_duplicates(paths[::-1], LOCAL, whole, in_a_loop).to_pylist()
    }
    assert first and first == second == third


def test_exact_duplicates_ignore_layout_width_and_case(tmp_path: Path) -> None:
    config = DedupConfig()
    texts = [
        "请打开 Settings，版本是 2.0。",
        "请打开ＳＥＴＴＩＮＧＳ，\n版本是２．０",
        "请打开 Settings，版本是 3.0。",
        "。。。",
        "！！！",
    ]
    rows = ids_of(texts)
    result = found(write(tmp_path, rows, 2, config), config)
    assert set(result) == {max(rows[0][0], rows[1][0])}
    assert next(iter(result.values())) == ("duplicate", min(rows[0][0], rows[1][0]))


def test_only_rows_with_status_ok_count(tmp_path: Path) -> None:
    config = DedupConfig()
    rng = random.Random(1)
    text = document(rng, 200)
    rows = ids_of([text, text + " ", edited(rng, text, 1)])
    paths = write(tmp_path, rows[:1], 1, config) + write(tmp_path, rows[1:], 1, config, status="rejected")
    assert found(paths, config) == {}


def test_short_documents_are_never_near_duplicates(tmp_path: Path) -> None:
    config = DedupConfig(min_chars=50)
    rng = random.Random(2)
    text = document(rng, 45)
    assert found(write(tmp_path, ids_of([text, text[:-1]]), 1, config), config) == {}
    text = document(rng, 80)
    assert len(found(write(tmp_path, ids_of([text, text[:-1]]), 1, config), config)) == 1


def test_duplicate_of_names_a_kept_document(tmp_path: Path) -> None:
    """A set of exact duplicates whose first is a near duplicate of another document points to what is kept."""
    config = DedupConfig()
    rng = random.Random(4)
    texts = []
    for _ in range(40):
        text = document(rng, 300)
        copy = edited(rng, text, 1)
        texts += [text, copy, copy + "。", copy + " ！", text + "\n"]
    rows = ids_of(texts)
    result = found(write(tmp_path, rows, 3, config), config)
    assert len(result) == 40 * 4
    assert not set(result) & {kept for _, kept in result.values()}


def test_true_pairs_in_a_huge_bucket_are_found(tmp_path: Path) -> None:
    """2,000 pages share a long frame, so they fill the same buckets; only planted pairs are near duplicates."""
    config = DedupConfig()
    rng = random.Random(5)
    frame = document(rng, 260)
    texts = [frame + document(rng, 110) for _ in range(2000)]
    assert 0.45 < jaccard(texts[0], texts[1]) < 0.6
    planted = list(range(200))
    texts += [edited(rng, texts[i], 2) for i in planted]
    rows = ids_of(texts)
    result = found(write(tmp_path, rows, 2, config), config)
    reported = {frozenset((doc_id, kept)) for doc_id, (_, kept) in result.items()}
    truth = {frozenset((rows[i][0], rows[2000 + n][0])) for n, i in enumerate(planted)}
    assert len(reported & truth) >= 0.95 * len(truth)
    assert len(reported & truth) >= 0.95 * len(reported)


def test_either_kind_can_be_switched_off(tmp_path: Path) -> None:
    rng = random.Random(6)
    text = document(rng, 200)
    rows = ids_of([text, text + "。", edited(rng, text, 1)])
    for config, reasons in (
        (DedupConfig(near=False), ["duplicate"]),
        (DedupConfig(exact=False), ["near_duplicate", "near_duplicate"]),
        (DedupConfig(exact=False, near=False), []),
    ):
        result = found(write(tmp_path / str(reasons), rows, 1, config), config)
        assert sorted(reason for reason, _ in result.values()) == reasons


def test_no_files_and_empty_files(tmp_path: Path) -> None:
    config = DedupConfig()
    assert find_duplicates([], LOCAL, config, in_a_loop).num_rows == 0
    assert find_duplicates(write(tmp_path, [], 1, config), LOCAL, config, in_a_loop).num_rows == 0
    assert (
        find_duplicates(write(tmp_path, ids_of(["独一无二的一篇文章"]), 1, config), LOCAL, config, in_a_loop).num_rows
        == 0
    )


def test_signatures_are_the_same_in_another_process() -> None:
    text = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。" * 4
    script = (
        f"from kun_ray.signatures import *; print(signatures([{text!r}, None], DedupConfig())['minhash'].to_pylist())"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    here = signatures([text, None], DedupConfig())["minhash"].to_pylist()
    assert other == str(here)
    assert here[1] is None
    assert here != signatures([text, None], DedupConfig(seed=1))["minhash"].to_pylist()


def test_signature_does_not_depend_on_its_batch() -> None:
    rng = random.Random(8)
    texts = [document(rng, rng.randint(5, 300)) for _ in range(50)]
    config = DedupConfig()
    together = signatures(texts, config)
    for index in (0, 17, 49):
        alone = signatures([texts[index]], config)
        assert alone["exact"][0] == together["exact"][index]
        assert alone["minhash"][0].as_py() == together["minhash"][index].as_py()


def test_bands_follow_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9):
        bands, rows = DedupConfig(threshold=threshold).bands
        assert bands * rows <= 128
        assert 1 - (1 - threshold**rows) ** bands >= 0.95
        assert DedupConfig(threshold=threshold).least_match < threshold


def test_other_settings_and_foreign_files_are_refused(tmp_path: Path) -> None:
    paths = write(tmp_path, ids_of(["一篇文章"]), 1, DedupConfig())
    with pytest.raises(KunError, match="other `dedup` settings"):
        find_duplicates(paths, LOCAL, DedupConfig(threshold=0.5), in_a_loop)
    pq.write_table(pa.table({"doc_id": ["x"], "status": ["ok"]}), tmp_path / "foreign.parquet")
    with pytest.raises(KunError, match="no column `exact`"):
        find_duplicates([str(tmp_path / "foreign.parquet")], LOCAL, DedupConfig(), in_a_loop)
    short_id = write(tmp_path / "short", [("12", "一篇文章")], 1, DedupConfig())
    with pytest.raises(KunError, match="32 lower-case hex"):
        find_duplicates(short_id, LOCAL, DedupConfig(), in_a_loop)
    with pytest.raises(ConfigError, match="threshold"):
        DedupConfig(threshold=1.5)


def test_alike_members_of_a_bucket_are_compared_even_if_both_differ_from_its_hub() -> None:
    rng = np.random.default_rng(0)
    sketches = rng.integers(0, 256, (1000, 126), dtype=np.uint8)
    sketches[700] = sketches[300]
    opens = np.zeros(1000, bool)
    opens[0] = True
    left, right = _pairs(np.arange(1000), opens, sketches, rotation=7)
    assert len(left) < 1000 * 6
    assert {300, 700} in [{a, b} for a, b in zip(left.tolist(), right.tolist(), strict=True)]
    assert {(0, member) for member in range(1, 1000)} <= set(zip(left.tolist(), right.tolist(), strict=True))


def test_tasks_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    config = DedupConfig()
    rng = random.Random(9)
    text = document(rng, 200)
    paths = write(tmp_path, ids_of([text, edited(rng, text, 1)]), 2, config)

    def through_pickle(function: Any, items: Any) -> list[Any]:
        return [pickle.loads(pickle.dumps(function))(pickle.loads(pickle.dumps(item))) for item in items]

    assert find_duplicates(paths, LOCAL, config, through_pickle).num_rows == 1
