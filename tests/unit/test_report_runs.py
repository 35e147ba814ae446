"""Which stages make up a run in the report, what differs between runs, and what their metrics say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_run import HOSTILE, WEB, make_run, write_stage
from report_page import Page

from kun_ray import selection
from kun_ray.config import ConfigError, KunError
from kun_ray.export import ExportConfig, export
from kun_ray.report import write_report
from kun_ray.report.reasons import explain
from kun_ray.report.runs import differences, find_run, find_runs, stages_of_some
from kun_ray.report.tables import _seconds, state
from kun_ray.report.throughput import read_throughput
from kun_ray.schema import DOCUMENT, doc_id
from kun_ray.selection import SelectionConfig
from kun_ray.store import Folder, open_stage

REPO = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def test_restarts_and_lost_replicas_are_found(run: Path) -> None:
    found = read_throughput(Folder(str(run / "generate")))
    assert found is not None
    assert found.restarts_s == [15.0] and found.losses_s == [15.0]
    assert [(attempt.rows, attempt.elapsed_s) for attempt in found.attempts] == [(8, 15.0), (13, 10.0)]
    assert found.seconds.tolist() == [5, 10, 15, 20, 25], "time in which nothing ran does not count"
    assert set(found.curves) == {"rows_per_s", "label tokens_per_s", "label in_flight"}
    svg = Path(write_report([str(run)])).read_text()
    assert svg.count("restart-0") == 3 and "started again" in svg


def _metrics(folder: Path, lines: list[dict[str, Any]]) -> Folder:
    stage = open_stage(str(folder), {}, {})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return stage


def test_a_pool_that_has_done_all_its_rows_has_lost_no_replica(tmp_path: Path) -> None:
    lines = [
        {
            "time": 1000.0 + 10 * n,
            "elapsed_s": 10.0 * n,
            "rows_total": 100,
            "rows_done": done,
            "pools": {
                "label": {"state": "running" if alive else "finished", "replicas": alive, "rows": rows},
                "chat": {"state": "running", "replicas": chat, "rows": done},
            },
        }
        for n, (rows, alive, done, chat) in enumerate([(80, 2, 40, 2), (100, 1, 60, 2), (100, 0, 80, 2)])
    ]
    found = read_throughput(_metrics(tmp_path / "healthy", lines))
    assert found is not None and found.losses_s == [] and found.restarts_s == []
    lines[2]["pools"]["chat"]["replicas"] = 1
    found = read_throughput(_metrics(tmp_path / "lost", lines))
    assert found is not None and found.losses_s == [20.0], "the pool that still works has lost one"


@pytest.mark.parametrize("first_s", [4.0, 5.0, 9.0])
def test_a_restart_is_found_however_long_the_killed_attempt_had_run(tmp_path: Path, first_s: float) -> None:
    """The killed attempt's only line stands at 5 s, as the first of the next one may."""
    lines = [
        {"time": began + elapsed_s, "elapsed_s": elapsed_s, "rows_done": done, "pools": {}}
        for began, elapsed_s, done in [(1000.0, 5.0, 8), (1012.0, first_s, 13), (1012.0, first_s + 5, 21)]
    ]
    found = read_throughput(_metrics(tmp_path / "s", lines))
    assert found is not None and found.restarts_s == [5.0]
    assert [attempt.rows for attempt in found.attempts] == [8, 13]


def test_no_attempt_counts_twice_once_the_summary_has_added_them_up(run: Path) -> None:
    summary = json.loads((run / "generate/summary.json").read_text()) | {"runs": 2, "elapsed_s": 26.0}
    (run / "generate/summary.json").write_text(json.dumps(summary))
    generate = find_run(str(run)).chain[-1]
    assert _seconds(generate, read_throughput(generate.folder)) == 26.0


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


def test_a_stage_that_one_run_lacks_is_one_line_and_values_are_written_as_in_yaml(tmp_path: Path, run: Path) -> None:
    other = tmp_path / "other/prepare"
    shutil.copytree(run / "prepare", other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["fingerprint"] |= {"filters": {"language": None, "words": ["好"]}}
    (other / "manifest.json").write_text(json.dumps(manifest))
    runs = find_runs([str(run), str(other)])
    assert stages_of_some(runs) == [("generate", ["run"]), ("export", ["run"])]
    found = dict(differences(runs))
    assert {key.partition(" ")[0] for key in found} == {"prepare"}
    assert found["prepare filters.language"] == ["–", "null"] and found["prepare filters.words"] == ["–", '["好"]']
    assert "generate: only in run" in Path(write_report([str(run), str(other)])).read_text()


def test_what_differs_stands_above_the_funnel_of_a_comparison_only(tmp_path: Path, run: Path) -> None:
    other = make_run(tmp_path / "strict", run / "corpora", threshold=0.8)
    ids = [a["id"] for tag, a in Page(write_report([str(run), str(other)])).elements if tag == "section"]
    assert ids[:3] == ["glance", "differences", "funnel"]
    page = Page(write_report([str(run)]))
    assert not [a for _, a in page.elements if a.get("id") == "differences" or a.get("href") == "#differences"]


def test_runs_are_called_by_what_tells_their_folders_apart(tmp_path: Path, run: Path) -> None:
    shutil.copytree(run, tmp_path / "again")
    exports = [str(run / "export"), str(tmp_path / "again/export/")]
    assert [found.name for found in find_runs(exports)] == ["run-export", "again-export"]
    assert [found.name for found in find_runs([str(run)])] == ["run"]
    assert Page(write_report(exports)).data["runs"] == ["run-export", "again-export"]


def test_a_training_stands_where_it_ran_and_is_running_or_stopped(run: Path) -> None:
    begun = {"prepare": 1, "train_label": 2, "generate": 3, "export": 4, "train_final": 5}
    for name in ("train_final", "train_label"):
        open_stage(str(run / name), {"training": {}}, {})
    for name, second in begun.items():
        manifest = json.loads((run / name / "manifest.json").read_text())
        (run / name / "manifest.json").write_text(json.dumps(manifest | {"created": f"2026-01-01 00:00:0{second}"}))
    found = find_run(str(run))
    assert [stage.name for stage in found.stages] == list(begun)
    assert [state(stage) for stage in found.stages] == [
        "complete", "running or stopped", "complete", "complete", "running or stopped",
    ]  # fmt: skip
    assert "Rows per second: generate<" in Path(write_report([str(run)])).read_text(), "whose curves these are"


def test_rows_that_an_export_leaves_out_have_their_reason(tmp_path: Path, run: Path) -> None:
    for name, chosen in {
        "strict": SelectionConfig(threshold=0.6, top_k=1),
        "quota": SelectionConfig(quotas={f"web{HOSTILE}": 2.0}),
    }.items():
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("export"))
        export(ExportConfig(f"{tmp_path}/{name}/generate", f"{tmp_path}/{name}/export", selection=chosen))
    shutil.rmtree(run / "export")
    page = Page(write_report([str(run), *(str(tmp_path / name) for name in ("strict", "quota"))]))
    lost = [[cell.strip().split()[0] for cell in page.row("exported")[1:]]]
    for reason in ("below_thresholdok, but its score", "beyond_top_kok, but", "over_quotaok, but"):
        (cells,) = [row[-3:] for row in page.rows if any(cell.strip().startswith(reason) for cell in row)]
        lost.append([cell.strip().split()[0] for cell in cells])
    assert lost == [["–", "1", "2"], ["–", "1", "0"], ["–", "1", "0"], ["–", "0", "1"]]
    assert not [a for tag, a in page.elements if tag == "button" and a.get("data-step") == "export"], "no sample has it"


def test_every_reason_of_an_export_is_explained() -> None:
    assert [fate for fate in selection.FATES if not explain(fate, "export")] == ["exported"]


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
    assert done.stdout == f"written to {tmp_path}/deep/both.html\n" and not twice.stdout, (
        "the answer, without its configuration"
    )
