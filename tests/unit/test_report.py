"""The report: which stages belong together, what is counted, what is sampled, and that nothing in a text becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_run import FATES, HOSTILE, WEB, make_run, write_stage
from hypothesis import given
from hypothesis import strategies as st

from kun_ray.config import ConfigError, KunError
from kun_ray.report import ReportConfig, cards, report, tables, write_report
from kun_ray.report.excerpts import read_excerpts
from kun_ray.report.openings import effective_number, opening
from kun_ray.report.page import as_script_data
from kun_ray.report.reasons import explain
from kun_ray.report.runs import differences, find_run
from kun_ray.report.sample import StratifiedSample, fetch_rows
from kun_ray.report.survey import Histogram, Survey, survey
from kun_ray.report.tables import Measured
from kun_ray.report.throughput import read_throughput
from kun_ray.scan import doc_ids
from kun_ray.schema import DOCUMENT, doc_id, to_table
from kun_ray.store import Folder, open_stage

REPO = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


class Page(HTMLParser):
    """A page's elements, scripts, rows of its tables, and the data of its sample browser."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self._in_script = False
        self.feed(Path(path).read_text())
        self.data: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        elif self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def row(self, head: str) -> list[str]:
        return next(row for row in self.rows if row and row[0].strip() == head)


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


def test_restarts_and_lost_replicas_are_found(run: Path) -> None:
    found = read_throughput(Folder(str(run / "generate")))
    assert found is not None
    assert found.restarts_s == [15.0] and found.losses_s == [15.0]
    assert [(attempt.rows, attempt.elapsed_s) for attempt in found.attempts] == [(8, 15.0), (13, 10.0)]
    assert found.seconds.tolist() == [5, 10, 15, 20, 25], "time in which nothing ran does not count"
    assert set(found.curves) == {"rows_per_s", "label tokens_per_s", "label in_flight"}
    svg = Path(write_report([str(run)])).read_text()
    assert svg.count("restart-0") == 3 and "started again" in svg


def test_metrics_of_a_file_system_that_cannot_append_are_read(tmp_path: Path, run: Path) -> None:
    lines = (run / "generate/metrics.jsonl").read_text().splitlines()
    (tmp_path / "other/_metrics").mkdir(parents=True)
    for number, line in enumerate(lines):
        (tmp_path / f"other/_metrics/{number:04d}.jsonl").write_text(line + "\n")
    here, there = read_throughput(Folder(str(run / "generate"))), read_throughput(Folder(str(tmp_path / "other")))
    assert here is not None and there is not None and here.attempts == there.attempts


def test_a_week_of_metrics_becomes_few_points_of_the_same_mean(tmp_path: Path) -> None:
    stage = open_stage(str(tmp_path / "s"), {}, {})
    lines = [{"elapsed_s": 5.0 * n, "rows_done": n, "rows_per_s": float(n % 7), "pools": {}} for n in range(20_000)]
    (tmp_path / "s/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"elapsed_s": 1')
    found = read_throughput(stage)
    assert found is not None and len(found.seconds) <= 300
    assert found.curves["rows_per_s"].mean() == pytest.approx(np.mean([n % 7 for n in range(20_000)]), rel=0.01)


def test_two_runs_stand_side_by_side_with_what_differs(tmp_path: Path, run: Path) -> None:
    other = make_run(tmp_path / "strict", run / "corpora", threshold=0.8)
    page = Page(write_report([str(run), str(other)]))
    assert [cell.strip() for cell in page.row("generate steps.score.threshold")[1:]] == ["0.5", "0.8"]
    assert [cell.split()[0] for cell in page.row("has an answer")[1:]] == ["3", "1"]
    card = next(c for c in page.data["cards"] if c["text"] == WEB[9])
    assert [(fate["run"], fate["status"]) for fate in card["runs"]] == [(0, "ok"), (1, "rejected")]
    assert differences([find_run(str(run)), find_run(str(run))]) == []


def test_the_chain_of_a_stage_is_found_by_its_data_wherever_it_lies(tmp_path: Path, run: Path) -> None:
    assert [s.name for s in find_run(str(run)).stages] == ["prepare", "generate", "export"]
    assert [s.name for s in find_run(str(run / "generate")).stages] == ["prepare", "generate"]
    assert [s.name for s in find_run(str(run / "export")).stages] == ["prepare", "generate", "export"]
    shutil.move(run, tmp_path / "moved")
    assert [s.name for s in find_run(str(tmp_path / "moved")).stages] == ["prepare", "generate", "export"]


def test_a_stage_of_another_chain_is_named_and_left_out(run: Path) -> None:
    rows = [{"doc_id": doc_id("s", "f", 0, ""), "source": "s", "text": "a", "meta": "{}", "status": "ok"}]
    write_stage(run / "old", rows, DOCUMENT, {"corpora": {"s": {}}}, {})
    found = find_run(str(run))
    assert found.left_out == ["old"] and [s.name for s in found.chain] == ["prepare", "generate"]
    assert "belong to another chain: old" in Path(write_report([str(run)])).read_text()


def test_a_run_that_still_runs_is_shown_as_far_as_it_is(run: Path) -> None:
    (run / "generate/_SUCCESS").unlink()
    shutil.rmtree(run / "export")
    next((run / "generate").glob("part-1*")).unlink()
    text = Path(write_report([str(run)])).read_text()
    assert "generate is unfinished: the page shows the 11 rows written so far." in text


def test_a_folder_without_stages_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(KunError, match="there is no folder"):
        write_report([str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(KunError, match="holds no prepare or generate stage"):
        write_report([str(tmp_path / "empty")])
    with pytest.raises(ConfigError, match="give at least one run"):
        write_report([])


def test_the_job_takes_folders_and_settings(tmp_path: Path, run: Path) -> None:
    def job(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPO / "jobs/report.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPO)

    odd = tmp_path / "lr=1e-5"
    shutil.copytree(run, odd)
    done = job(str(run), str(odd), f"output={tmp_path}/deep/both.html", "samples=3")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "deep/both.html").stat().st_size > 10_000
    twice = job(str(run), f"runs=[{odd}]")
    assert twice.returncode == 2 and "say the same" in twice.stderr


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
