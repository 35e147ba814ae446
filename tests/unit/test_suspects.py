"""Rows in flight survive the process; two deaths, the last one alone, quarantine a row; hopeless engines are told apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kun_ray.suspects import Breaker, Deaths, Flight, flight_path, groups, left_behind


def test_the_rows_of_a_killed_process_can_be_read(tmp_path: Path) -> None:
    script = (
        "import os, signal; from pathlib import Path; from kun_ray.suspects import Flight\n"
        f"flight = Flight(Path({str(tmp_path / 'flight')!r}), 8)\n"
        "slots = {row: flight.enter(row) for row in ('a' * 32, 'b' * 32, 'c' * 32)}\n"
        "flight.leave(slots['b' * 32]); flight.enter('d' * 32); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert sorted(left_behind(tmp_path / "flight")) == ["a" * 32, "c" * 32, "d" * 32]
    new = Flight(tmp_path / "flight", 8)
    assert left_behind(tmp_path / "flight") == new.rows() == []
    new.remove()
    assert not os.listdir(tmp_path) and left_behind(tmp_path / "flight") == left_behind(None) == []


def test_as_many_rows_as_there_are_slots(tmp_path: Path) -> None:
    flight = Flight(tmp_path / "flight", 3)
    slots = [flight.enter(name) for name in ("x", "y", "z")]
    with pytest.raises(IndexError):
        flight.enter("too many")
    for slot in slots:
        flight.leave(slot)
    assert Flight(None, 2).enter("kept in memory alone") in (0, 1)


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert flight_path("actor") == tmp_path / f"kun_ray-{os.getuid()}" / "flight-actor"
    (tmp_path / f"kun_ray-{os.getuid()}").rmdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"kun_ray-{os.getuid()}").symlink_to(tmp_path / "theirs")
    assert flight_path("actor") is None


def test_two_deaths_the_last_one_alone() -> None:
    deaths = Deaths()
    deaths.add("p", ["a", "b", "c"], "x", False, True)
    assert deaths.suspects["p"] == {"a": 1, "b": 1, "c": 1}
    deaths.clear("p", ["a"])
    deaths.add("p", ["b", "c"], "x", False, True)
    assert deaths.suspects["p"] == {"b": 2, "c": 2}, "not alone"
    deaths.add("p", ["b"], "x", True, True)
    assert deaths.suspects["p"] == {"b": -3, "c": 2}
    assert Deaths({"p": {"b": -3}}).suspects["p"] == {"b": -3}, "another run of the folder knows"
    assert deaths.suspects["other"] == {} and dict(deaths.counts["p"]) == {"restarts": 3, "hangs": 1}
    alone = Deaths()
    alone.add("p", ["a"], "x", False, True)
    assert alone.suspects["p"] == {"a": 1}, "one death proves nothing"


def test_engines_that_only_die_are_given_up() -> None:
    deaths = Deaths()
    for _ in range(20):
        deaths.add("p", ["a"], "x", False, answered=True)
    assert deaths.fatal("p") is None
    for n in range(5):
        assert deaths.fatal("p") is None
        deaths.add("p", [str(n)], "CUDA error", False, answered=False)
    assert "6 engines in a row died before they answered anything; the last one said: CUDA error" in (
        deaths.fatal("p") or ""
    )
    assert deaths.fatal("q") is None


def test_suspects_run_alone_or_a_few_at_a_time() -> None:
    rows = [{"doc_id": name} for name in "abcde"]
    counts = {"a": 1, "b": 2, "c": 1, "d": 1, "e": 1}
    assert [[row["doc_id"] for row in group] for group in groups(rows, counts, 1)] == [
        ["a"],
        ["c"],
        ["d"],
        ["e"],
        ["b"],
    ]
    assert [[row["doc_id"] for row in group] for group in groups(rows, counts, 3)] == [["a", "c", "d"], ["e"], ["b"]]


def test_the_breaker_tells_a_broken_engine_from_bad_rows() -> None:
    breaker = Breaker()
    assert [breaker.note(True) for _ in range(19)] == [None] * 19
    assert breaker.note(True) == "the first 20 requests all failed"

    breaker = Breaker()
    notes = [breaker.note(n % 2 == 0) for n in range(1000)]
    assert notes == [None] * 1000, "half of them"
    assert "101 of the last 200 requests failed" in {breaker.note(True) for _ in range(2)}

    breaker = Breaker()
    breaker.note(False)
    assert [breaker.note(True) for _ in range(198)] == [None] * 198, "not enough to tell"


def test_a_living_pool_outlasts_deaths_elsewhere() -> None:
    """A spot node is taken away while its eight replicas load; another node's go on answering."""
    deaths = Deaths()
    for n in range(8):
        deaths.add("p", [], "its process ended without a word", False, answered=False)
        if n % 4 == 3:
            deaths.answered("p")
    assert deaths.fatal("p") is None
