"""The report: what is counted, what is sampled, and that nothing in a text becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_run import FATES, HOSTILE, WEB, make_run
from hypothesis import given
from hypothesis import strategies as st
from report_page import Page

from kun_ray.report import ReportConfig, cards, report, tables, write_report
from kun_ray.report.excerpts import read_excerpts
from kun_ray.report.openings import effective_number, opening
from kun_ray.report.page import as_script_data
from kun_ray.report.reasons import explain
from kun_ray.report.runs import find_run
from kun_ray.report.sample import StratifiedSample, fetch_rows
from kun_ray.report.survey import Histogram, Survey, survey
from kun_ray.report.tables import Measured
from kun_ray.scan import doc_ids
from kun_ray.schema import DOCUMENT, doc_id, to_table
from kun_ray.store import Folder, open_stage

REPO = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def surveyed(folder: Path, size: int = 100, find: list[str] | None = None) -> Survey:
    return survey(find_run(str(folder)).rows, size, find or [])


def test_every_document_is_either_lost_at_one_step_or_ok(run: Path) -> None:
    measured = Measured(find_run(str(run)), surveyed(run), {})
    rows = tables.funnel([measured])
    left = [(row["name"], row["cells"][0]["rows"]) for row in rows]
    assert left == [
        ("documents", 21), ("read without error", 20), ("passed the filters", 8), ("not a duplicate", 7),
        ("has an instruction", 7), ("instruction is good", 6), ("has an answer", 3), ("exported", 3),
    ]  # fmt: skip
    assert measured.survey.num("ok") == 3


def test_a_reason_belongs_to_the_step_that_gave_it(run: Path) -> None:
    steps = {(status, reason, step) for _, status, reason, step in surveyed(run).counts}
    assert ("rejected", "repetition", "filter") in steps and ("rejected", "repetition", "polish") in steps
    assert ("failed", "engine_error", "polish") in steps, "label and score had answered"
    assert ("failed", "bad_json", "read") in steps and ("rejected", "near_duplicate", "dedup") in steps


def test_a_single_row_is_settled_by_the_same_rule_as_a_whole_column(run: Path) -> None:
    stage = find_run(str(run)).rows
    rows = stage.folder.dataset().to_table().to_pylist()
    one_by_one = Counter(
        (r["source"], r["status"], r["reason"] or "", cards.settled_by(r, ["label", "score", "polish"])) for r in rows
    )
    assert one_by_one == surveyed(run).counts


def test_what_an_engine_refuses_first_is_the_first_steps_loss(tmp_path: Path) -> None:
    row = {"reason": "engine_error", "status": "failed"}
    assert cards.settled_by(row, ["label", "score"]) == "label"
    assert cards.settled_by({**row, "label_prompt_tokens": 4}, ["label", "score"]) == "score"


def test_histograms_give_the_percentiles_of_the_values(run: Path) -> None:
    values = np.random.default_rng(0).integers(0, 900, 5000).astype(float)
    histogram = Histogram(np.arange(16_386, dtype=float))
    for part in np.array_split(values, 7):
        histogram.add(part)
    expected = np.percentile(values, (5, 50, 95), method="inverted_cdf")
    assert [histogram.percentile(p) for p in (5, 50, 95)] == expected.tolist()
    found = surveyed(run).histograms
    assert found["score"].total == sum("score" in fate for fate in FATES)
    assert found["answer"].total == 3 and found["tokens"].total == 7


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_perplexity_that_is_no_number_leaves_the_report_whole(value: float) -> None:
    row = {"doc_id": "a", "source": "s", "status": "ok", "reason": None, "perplexity": value, "score": value}
    (card,) = cards.cards([cards.Sampled({"a": row}, {}, {}, [])])
    assert json.loads(as_script_data(card))["runs"][0]["perplexity"] is None


def test_ok_rows_come_first_and_the_others_by_their_reason() -> None:
    fates = {"a": ("rejected", "too_short"), "b": ("ok", None), "c": ("failed", "bad_json")}
    rows = {id: {"doc_id": id, "source": "s", "status": status, "reason": why} for id, (status, why) in fates.items()}
    assert [card["id"] for card in cards.cards([cards.Sampled(rows, {}, {}, [])])] == ["b", "c", "a"]


def test_values_beyond_a_histogram_are_counted_at_its_ends() -> None:
    histogram = Histogram(np.linspace(0, 1, 11))
    histogram.add(np.array([-3.0, 7.0, np.nan]))
    assert histogram.counts[0] == histogram.counts[-1] == 1


def test_every_reason_is_in_a_small_sample(run: Path) -> None:
    one = surveyed(run, 1)
    rows = fetch_rows(find_run(str(run)).rows.folder, one.sample.take(1))
    assert {row["reason"] for row in rows.values()} == {reason or None for _, _, reason, _ in one.counts}


def test_a_large_stratum_does_not_crowd_out_small_ones() -> None:
    sample = StratifiedSample(100)
    for stratum, num_rows in {("ok", "a"): 1000, ("rejected", "common"): 1000, ("rejected", "rare"): 3}.items():
        ids = [doc_id("s", str(stratum), n, "") for n in range(num_rows)]
        sample.add(stratum, doc_ids(pa.chunked_array([pa.array(ids)])))
    taken = sample.take(50)
    assert len(taken) == len(set(taken)) == 50
    rare = {doc_id("s", str(("rejected", "rare")), n, "") for n in range(3)}
    assert rare <= set(taken)
    assert sum(doc_id("s", str(("ok", "a")), n, "") in set(taken) for n in range(1000)) == 25


def test_the_sample_does_not_depend_on_the_order_of_rows() -> None:
    ids = [doc_id("s", "f", n, "") for n in range(5000)]
    samples = []
    for seed in (1, 2):
        random.Random(seed).shuffle(ids)
        sample = StratifiedSample(20)
        for start in range(0, 5000, 700):
            sample.add(("ok",), doc_ids(pa.chunked_array([pa.array(ids[start : start + 700])])))
        samples.append(sorted(sample.take(20)))
    assert samples[0] == samples[1] == sorted(ids)[:20]


def test_a_document_that_is_looked_for_is_among_the_samples(tmp_path: Path, run: Path) -> None:
    wanted = next(iter(fetch_rows(Folder(str(run / "generate")), surveyed(run, 1).sample.take(1))))
    assert wanted in surveyed(run, 1, [wanted]).found
    by_file = surveyed(run, 1, ["rows.parquet"]).found
    assert len(by_file) == 5
    page = Page(report(ReportConfig([str(run)], str(tmp_path / "p.html"), samples=1, find=["rows.parquet"])))
    assert {card["id"] for card in page.data["cards"]} >= set(by_file)


def test_text_comes_from_prepare_where_generate_has_dropped_it(run: Path) -> None:
    page = Page(write_report([str(run)]))
    by_reason = {(fate["reason"], fate["step"]): card for card in page.data["cards"] for fate in card["runs"]}
    assert by_reason["verdict_bad", "score"]["text"] == WEB[1]
    assert by_reason["verdict_bad", "score"]["origin"] == "stage"


def test_text_that_no_stage_holds_is_read_from_the_corpus(run: Path) -> None:
    page = Page(write_report([str(run)]))
    cards_of = {
        source: [c for c in page.data["cards"] if c["source"] == source] for source in ("english", "wudao", "rows")
    }
    assert sorted(c["text"] for c in cards_of["rows"]) == [f"Parquet row {n} in English." for n in range(5)]
    assert sorted(c["text"] for c in cards_of["wudao"]) == [f"WuDao in English, {n}." for n in range(2)]
    assert all(c["text"].startswith("Not Chinese at all, number") for c in cards_of["english"])
    too_short = next(c for c in page.data["cards"] if c["runs"][0]["reason"] == "too_short")
    assert too_short["text"] == "太短。" and too_short["origin"] == "corpus"
    broken = next(c for c in page.data["cards"] if c["runs"][0]["reason"] == "bad_json")
    assert broken["text"] == '{"text": "这一行没有写完', "a record that cannot be read is shown as it stands"


def test_personal_data_in_an_excerpt_is_masked(run: Path) -> None:
    text = Path(write_report([str(run)])).read_text()
    assert "My mail is" in text and "someone@example.com" not in text


def test_a_corpus_that_has_moved_leaves_the_report_without_excerpts(tmp_path: Path, run: Path) -> None:
    shutil.move(run / "corpora", tmp_path / "elsewhere")
    page = Page(write_report([str(run)]))
    assert {c["text"] for c in page.data["cards"] if c["source"] == "rows"} == {None}
    stage = find_run(str(run)).chain[0]
    assert (
        read_excerpts(stage, [{"doc_id": "0" * 32, "source": "rows", "meta": '{"file":"rows.parquet","offset":0}'}])
        == {}
    )


def test_nothing_in_a_text_becomes_markup(run: Path) -> None:
    path = write_report([str(run)])
    page = Page(path)
    assert HOSTILE in json.dumps(page.data, ensure_ascii=False).replace('\\"', '"')
    tags = Counter(tag for tag, _ in page.elements)
    assert tags["script"] == 2 and tags["img"] == tags["iframe"] == tags["object"] == tags["base"] == 0
    assert not [attrs for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert any(HOSTILE in cell for row in page.rows for cell in row), "the source's name, as text"


def test_only_the_pages_own_script_may_run_and_nothing_may_be_loaded(run: Path) -> None:
    page = Page(write_report([str(run)]))
    policy = next(
        a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy is not None and policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    links = [a.get(name) for _, a in page.elements for name in ("src", "href", "xlink:href") if a.get(name)]
    assert links and all(str(link).startswith("#") for link in links)


@given(st.text())
def test_data_in_a_script_element_cannot_end_it(text: str) -> None:
    written = as_script_data({"x": text, "y": f"</script>{text}<!--"})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written)["x"] == text


@given(st.text(alphabet="的茶水温要紧，。a b\n", max_size=60), st.text(alphabet="的茶水温要紧，。a b\n", max_size=60))
def test_changes_hold_the_whole_text_and_the_whole_answer(text: str, answer: str) -> None:
    edits = cards.changes(text, answer)
    assert edits is not None
    assert "".join(part for kind, part in edits if kind <= 0) == text
    assert "".join(part for kind, part in edits if kind >= 0) == answer


def test_changes_are_whole_words_and_leave_what_is_the_same() -> None:
    edits = cards.changes("绿茶用八十度左右的水，水太烫会把茶叶烫熟。", "绿茶用八十度左右的水，水太热会把茶叶烫熟。")
    assert edits == [(0, "绿茶用八十度左右的水，"), (-1, "水太烫会"), (1, "水太热会"), (0, "把茶叶烫熟。")]
    assert cards.changes("茶" * 5000, "水" * 5000) is None or len(cards.changes("茶" * 5000, "水" * 5000) or []) == 2


@pytest.mark.parametrize(
    ("instruction", "verb", "noun"),
    [
        ("写一篇关于春节的作文", "写", "作文"),
        ("请写一封简短的请假条，理由是感冒发烧。", "写", "请假条"),
        ("请介绍一下泡茶的方法。", "介绍", "方法"),
        ("列出五种常见的水果", "列出", "水果"),
        ("你能帮我推荐几道家常菜吗？", "推荐", "家常菜"),
        ("什么是光合作用？", "是", "光合作用"),
        ("春天的早晨", "", ""),
    ],
)
def test_an_instruction_opens_with_a_verb_and_what_it_asks_for(instruction: str, verb: str, noun: str) -> None:
    assert opening(instruction) == (verb, noun)


def test_the_effective_number_of_equal_kinds_is_their_number() -> None:
    assert effective_number([5, 5, 5, 5]) == pytest.approx(4)
    assert effective_number([1000, 1]) == pytest.approx(1, abs=0.02)
    assert effective_number([]) == 0


def test_every_reason_that_the_documentation_lists_is_explained() -> None:
    table = (REPO / "docs/architecture.md").read_text().split("| status | reason | set by |")[1].split("\n\n")[0]
    reasons = [word for line in table.splitlines()[2:] for word in line.split("|")[2].replace("`", "").split(", ")]
    assert len(reasons) > 25
    assert [reason.strip() for reason in reasons if not explain(reason.strip())] == []


SCRIPT = """
import resource, sys
from kun_ray.report.runs import find_run
from kun_ray.report.survey import survey
stage = find_run(sys.argv[1]).rows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = survey(stage, 100, [])
print(found.num_rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    """A batch of rows, fixed histograms and at most 100 ids per stratum are held: 1.5 M rows like 50 k of them.

    One part of 50,000 rows is linked many times; its ids repeat, which neither counting nor sampling minds.
    """
    text = pa.array([f"{doc_id('s', 'f', n, '')}的说明，" * 8 for n in range(50_000)])
    ids = pa.array([doc_id("s", "f", n, "") for n in range(50_000)])
    table = to_table([], DOCUMENT).append_column("instruction", pa.array([], pa.string()))
    columns = {name: pa.nulls(50_000, table.schema.field(name).type) for name in table.schema.names}
    columns |= {"doc_id": ids, "text": text, "instruction": text, "source": pa.array(["s"] * 50_000)}
    columns |= {"tokens": pa.array(range(50_000), pa.int32()), "status": pa.array((["ok"] + ["rejected"] * 9) * 5_000)}
    part = tmp_path / "part.parquet"
    pq.write_table(pa.table(columns), part, row_group_size=5_000)
    grown = []
    for num_parts in (1, 30):
        stage = open_stage(str(tmp_path / f"run{num_parts}/generate"), {"pools": {}}, {})
        for number in range(num_parts):
            Path(stage.child(f"part-{number:03d}.parquet")).hardlink_to(part)
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, f"{tmp_path}/run{num_parts}"], capture_output=True, text=True, cwd=REPO
        )
        num_rows, kilobytes = map(int, done.stdout.split())
        assert num_rows == num_parts * 50_000, done.stderr
        grown.append(kilobytes)
    assert grown[1] - grown[0] < 30_000, f"kilobytes for 50 k and 1.5 M rows: {grown}"
