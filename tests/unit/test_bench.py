"""The formulas of the benchmarks, on turns whose figures are known."""

from __future__ import annotations

import importlib
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of bench/."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def turn(who: str, engines: int, pair: int, seconds: float, opening: float = 0.0) -> dict[str, Any]:
    return {
        "who": who,
        "engines": engines,
        "pair": pair,
        "seconds": seconds,
        "from_opening_s": seconds + opening,
        "output_tokens": 1000,
    }


def test_efficiency_is_ours_over_theirs(bench: Any) -> None:
    turns = []
    for engines, ours in ((0, 10.0), (1, 20.0)):
        for pair in (1, 2, 3):
            turns += [turn("kun_ray", engines, pair, ours, ours), turn("vllm.LLM", engines, pair, 9.0 + pair)]
    found = bench("engine").efficiency(turns)
    assert found["efficiency_of_engines"] == [1.1, 0.55] and found["efficiency_min_max"] == [0.5, 1.2]
    assert found["efficiency"] == 0.8 and found["efficiency_from_opening"] == 0.4
    assert found["efficiency_of_totals"] == pytest.approx(66 / 90, abs=1e-4)
    low, high = found["efficiency_90_percent"]
    assert 0.5 <= low <= 0.55 and 1.1 <= high <= 1.2
    assert bench("engine").efficiency(turns[::2]) == {}  # no rival yet
    assert "efficiency_90_percent" not in bench("engine").efficiency(turns[:2])  # one pair says nothing of its spread


@pytest.mark.parametrize(("prompt", "output", "bound"), [(10_000, 1, "compute"), (1, 10_000, "memory")])
def test_the_least_time_is_what_must_be_computed_or_read(bench: Any, prompt: int, output: int, bound: str) -> None:
    shapes = bench("shapes")
    shape = shapes.Shape(64, 2, 4, 2, 128, 1000, 512)
    given = {"prompt_tokens": prompt, "cached_tokens": 0, "output_tokens": output, "rows": 1}
    weights, head = shape.num_matmul_parameters(), 1000 * 64
    flops = 2 * ((weights - head) * prompt + weights * output)
    read = output / 4 * 2 * weights + output * (prompt + output / 2) * shape.kv_bytes_per_token()
    limits = {"matmul_flops_per_s": 1e9, "copy_bytes_per_s": 1e9}
    assert shape.floor_seconds(given, 4, limits) == pytest.approx(max(flops, read) / 1e9)
    assert (flops > read) == (bound == "compute")


def test_replies_are_skewed_about_their_mean_and_never_too_long(bench: Any) -> None:
    lengths = [bench("sides").reply_tokens(f"第{n}篇文章", 75, 256) for n in range(4000)]
    assert min(lengths) == 1 and max(lengths) == 256 and 68 < sum(lengths) / len(lengths) < 76
    assert sorted(lengths)[2000] < 60  # half of them are shorter than the mean by far
    assert lengths[:9] == [bench("sides").reply_tokens(f"第{n}篇文章", 75, 256) for n in range(9)]


def test_a_rows_cost_is_that_of_the_further_rows(bench: Any) -> None:
    small = {"rows": 1000, "seconds": 10.0, "driver_cpu_s": 5.0, "cpu_s": 20.0}
    large = {"rows": 11_000, "seconds": 11.0, "driver_cpu_s": 5.5, "cpu_s": 23.0}
    assert bench("rows").costs(small, large) == {
        "us_per_row": 100.0,
        "driver_us_per_row": 50.0,
        "cpu_us_per_row": 300.0,
    }


def test_the_short_run_of_rows_leaves_something_to_go_on_with(bench: Any) -> None:
    (short,) = [run.short.split() for run in bench("all").ON_CPU if run.script == "rows"]
    assert short[0] == "--rows" and min(map(int, short[1:])) >= 4 * bench("rows").ROWS_PER_FILE


def test_everybody_is_first_and_last_equally_often(bench: Any) -> None:
    for names in (["a", "b"], ["a", "b", "c"]):
        orders = [bench("machine").in_turn(names, number) for number in range(1, 2 * len(names) + 1)]
        for place in (0, -1):
            assert sorted(order[place] for order in orders) == sorted(2 * names)
        assert all(sorted(order) == names for order in orders)


def test_a_threads_cpu_seconds_are_shared_out_by_its_stacks(bench: Any) -> None:
    profile, main = bench("driver_profile"), "write (kun_ray/execution.py)"
    loop = "thread (7): loop;StreamingExecutor.run (ray/data/streaming_executor.py)"
    seen = bench("stacks").Stacks(
        {
            f"thread (5): MainThread;{main};get_output_blocking (ray/data/x.py)": 3,
            f"thread (5): MainThread;{main}": 1,
            f"{loop};ResourceManager.update_usages (ray/data/y.py)": 6,
            f"{loop};RowBackpressure.can_add_input (kun_ray/execution.py)": 2,
            f"{loop};RowBackpressure.can_add_input (kun_ray/execution.py);metrics (ray/data/z.py)": 2,
        }
    )
    python, native = profile.by_part({5: ("main", 4.0), 7: ("loop", 10.0), 9: ("worker.io", 2.5)}, seen)
    assert {part: round(s, 6) for part, s in python.items() if s} == {
        "waits for the end": 3.0,
        "kun_ray": 3.0,
        "usages of all operators (update_usages)": 6.0,
        "other of the scheduling loop": 2.0,
    }
    assert native == {"worker.io": 2.5}
    assert profile.in_order({"a": 1.0, "b": 3.0, "c": 2.0}, 1e6, 1) == {"b": 3e6, "others": 3e6}


@pytest.mark.parametrize(("way", "ranks", "expected"), [("packed", 1, 1.0), ("padded", 1, 0.75), ("packed", 2, 1.0)])
def test_the_useful_share_of_what_is_computed(bench: Any, way: str, ranks: int, expected: float) -> None:
    lengths = np.array([100, 50] * 16)
    samples = types.SimpleNamespace(data=np.zeros(32, dtype=np.int16), lengths=lengths)
    padding = bench("padding")
    wide = padding.share(samples, way, ranks)
    assert wide == expected if way == "packed" else expected < wide <= 1.0  # like lengths are padded together
    assert padding.share(samples, "arrival") < 0.9
    assert padding.share(samples, way, ranks, size=64) is None


def test_an_advantage_is_that_of_each_round(bench: Any) -> None:
    turns = [
        {"way": way, "round": number, "rows": 100, "seconds": seconds, "engine_cpu_s": 5.0, "steps": 7}
        for number in (1, 2, 3)
        for way, seconds in (("kun_ray", 10.0 * number), ("per_file", 13.0 * number), ("ray_data_llm", 20.0 * number))
    ]
    found = bench("rivals").summarise(turns)
    assert found["advantage"] == {"per_file": 1.3, "ray_data_llm": 2.0} and found["rows_per_s"]["kun_ray"] == 5.0


def test_a_result_is_written_whole_with_its_machine(bench: Any, tmp_path: Path) -> None:
    path = bench("machine").write(tmp_path, "one", {"rows": 3})
    found = json.loads(path.read_text())
    assert found["rows"] == 3 and found["machine"]["cores"] and found["date"] and list(tmp_path.iterdir()) == [path]


def test_the_table_of_the_page_is_that_of_the_results(bench: Any) -> None:
    """Whoever measures anew runs bench/table.py."""
    table = bench("table")
    assert table.BEGIN + table.table() + table.END in table.PAGE.read_text()


@pytest.mark.parametrize(
    ("mark", "values", "shown"),
    [
        ("≥ 2", {"a": 2.0, "b": 1.5}, "| ≥ 2 | 2, 1.5 | 1 of 2 |"),
        ("≥ 2 s", {"a": 2.0, "b": None}, "| ≥ 2 s | 2 | yes |"),
        ("± 0.2", {"a": -0.3, "b": 0.25}, "| ± 0.2 | -0.3, 0.25 | **no** |"),
        ("≤ 0.2", {"a": -0.3}, "| ≤ 0.2 | -0.3 | yes |"),
        ("", {"a": "tokens", "b": "tokens"}, "|  | tokens |  |"),
    ],
)
def test_a_figure_says_whether_it_reached_its_mark(bench: Any, mark: str, values: dict[str, Any], shown: str) -> None:
    table = bench("table")
    figure = table.Figure("speed", mark, "file", "of/*/median")
    result = {"date": "2026-11-29", "of": {name: {"median": value} for name, value in values.items()}}
    assert table.row(figure, result) == f"| speed {shown} file: of/…/median | 2026-11-29 |"
    for nothing in ({}, {"of": {}}, {"of": {"a": {"median": None}}}):
        with pytest.raises(KeyError):
            table.row(figure, {"date": "2026-11-29", **nothing})


def test_the_marks_of_the_table_are_those_that_the_scripts_give(bench: Any) -> None:
    table, marks = bench("table"), bench("rivals").MARKS
    bounds = {(one.file, one.key): float(one.mark.split()[1]) for one in table.FIGURES if one.mark}
    for file in ("rivals-tiny-label-like", "rivals-tiny-polish-like"):
        assert {way: bounds[file, f"advantage/{way}"] for way in marks} == marks
    for file, key in (("verdicts", "agreement"), ("planner", "off_by"), ("replicas", "least_of_linear")):
        assert json.loads((table.RESULTS / f"{file}.json").read_text())["mark"] == bounds[file, key]
    given = json.loads((table.RESULTS / "rows.json").read_text())["mark"]
    of_rows = {key.rpartition("/")[2]: bound for (file, key), bound in bounds.items() if file == "rows"}
    assert of_rows == given
