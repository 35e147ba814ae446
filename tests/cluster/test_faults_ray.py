"""Whatever is killed, the same command ends with every row exactly once."""

from __future__ import annotations

import collections
import os
import random
import signal
import threading
import time
from pathlib import Path

import fake
import pytest
from chains import WAIT_S, address, ids, kill_session, wait_until

from kun_ray.config import KunError
from kun_ray.generate import generate


def num_ended(job) -> int:
    return sum(event["event"] == "end" for event in fake.read_journal(job.plan))


def polished(job) -> set[int]:
    return {e["row"] for e in fake.read_journal(job.plan) if (e["step"], e["event"]) == ("polish", "end")}


def test_ctrl_c_and_sigterm_end_a_run_that_can_go_on(cluster, documents, chain, tmp_path):
    source = documents(240)
    job = chain(source, service_s=(0.0, 0.3))

    process = job.start(tmp_path / "first")  # with a Ray of its own, all of it in the terminal's process group
    try:
        wait_until(lambda: num_ended(job) > 100 or process.poll() is not None, "rows")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(WAIT_S) == 130
    finally:
        kill_session(process)
    log = (tmp_path / "first").read_text()
    assert "\n# steps:\n" in log, "the configuration stands in the log"
    assert "stopping: finishing the rows in flight" in log and "run the same command again to continue" in log
    assert "Traceback" not in log
    finished = {int(row["title"]) for row in job.rows()}
    assert 0 < len(finished) < 240 and finished == polished(job)  # nothing that was paid for is lost
    with pytest.raises(KunError, match="is not complete"):
        generate(job.config(f"input={job.output}", f"output={tmp_path / 'next'}"))

    endless = chain(source, service_s=(3600.0, 3600.0))  # the rows in flight will not finish within the grace time
    process = endless.start(tmp_path / "second", address(), "stop_grace_s=1")
    try:
        started = sum(event["event"] == "start" for event in fake.read_journal(job.plan))
        wait_until(
            lambda: (
                sum(e["event"] == "start" for e in fake.read_journal(job.plan)) > started or process.poll() is not None
            ),
            "rows in flight",
        )
        process.terminate()
        assert process.wait(WAIT_S) == 130, (tmp_path / "second").read_text()
    finally:
        kill_session(process)
    assert "run the same command again to continue" in (tmp_path / "second").read_text()

    job = chain(source)
    assert generate(job.config())["rows"] == 240
    assert ids(job.folder()) == ids(source)


@pytest.mark.timeout(2400)
def test_twenty_kills_lose_nothing_and_double_nothing(cluster, documents, chain, tmp_path):
    """SIGKILL of the driver at twenty random moments, from before the first row to the last file; then one run to the end."""
    source = documents(600)
    job = chain(source, {"all": ["label", "score", "polish"]}, service_s=(0.0, 0.05))
    for kill in range(20):
        before, process = num_ended(job), job.start(tmp_path / "log", address())
        try:
            if kill % 2:
                time.sleep(random.uniform(0.1, 5.0))
            else:
                more = random.randint(1, 150)
                wait_until(lambda: num_ended(job) > before + more or process.poll() is not None, f"{more} calls")  # noqa: B023
            assert process.poll() in (None, 0), (tmp_path / "log").read_text()
        finally:
            kill_session(process)
    summary = generate(job.config())
    assert ids(job.folder()) == ids(source) and summary["ok"] == 600
    assert summary["rows"] == summary["rows_in"] == 600 and summary["repeated_ids"] == 0
    pool = job.config().pools["all"]
    check_redone(
        job, summary, 20 * (pool.num_concurrent_blocks() * pool.rows_per_block + 2 * job.config().rows_per_file)
    )


def check_redone(job, summary, most_rows: int) -> None:
    """The journal knows every call that ended; all but the one of each row are redone, and no more than were under way."""
    calls = num_ended(job)
    assert calls <= 3 * (600 + most_rows)
    tokens = sum(7 if e["step"] != "score" else 1 for e in fake.read_journal(job.plan) if e["event"] == "end")
    assert summary["useful_output_tokens"] == 600 * (7 + 1 + 7)
    assert summary["useful_output_tokens"] <= summary["output_tokens"] <= tokens
    assert summary["tokens_redone"] == summary["output_tokens"] - summary["useful_output_tokens"]
    assert summary["goodput"] == pytest.approx(summary["useful_output_tokens"] / summary["output_tokens"], abs=1e-3)


def test_dead_engines_and_processes_are_replaced(cluster, documents, chain):
    """Replays finish their rows in another order; Ray Data skips the outputs that it has already."""
    marks = {33: "exit", 150: "dead", 260: "exit"}
    source = documents(400, marks=marks)
    job = chain(source, {"all": ["label", "score", "polish"]}, service_s=(0.0, 0.2))
    summary = generate(job.config("pools.all.replicas=2"))

    assert summary["ok"] == 400
    assert ids(job.folder()) == ids(source)
    events = fake.read_journal(job.plan)
    times = collections.Counter(e["row"] for e in events if (e["step"], e["event"]) == ("polish", "end"))
    assert len(times) == 400 and max(times.values()) > 1  # rows of other blocks were replayed as well
    assert len({event["engine"] for event in events}) >= 2 + len(marks)
    for row in job.rows():
        assert row["answer"].startswith(row["text"][:6]) and row["instruction"][3:9] == row["text"][:6]


def test_rows_that_kill_engines_are_quarantined_and_their_neighbours_live(cluster, documents, chain):
    """One kills the whole process, one only the engine, each time; both with others inside, and then alone."""
    source = documents(120, marks={40: "crash", 90: "fatal"})
    job = chain(source, {"all": ["label", "score", "polish"]}, service_s=(0.05, 0.15))
    summary = generate(job.config())

    assert ids(job.folder()) == ids(source)
    assert summary["ok"] == 118 and summary["reasons"] == {"failed/quarantined": 2}
    assert sorted(row["title"] for row in job.rows() if row["status"] == "failed") == ["40", "90"]
    assert all(row["text"] is None for row in job.rows() if row["status"] == "failed")
    killers = [e for e in fake.read_journal(job.plan) if e["event"] == "start" and e["row"] in (40, 90)]
    assert sorted(event["row"] for event in killers) == [40, 40, 90, 90]
    assert [killers[n]["in_flight"] for n in (1, 3)] == [1, 1] or killers[-1]["in_flight"] == 1
    assert summary["pools"]["all"]["restarts"] in (3, 4)  # both may be inside at one death
    assert not job.folder().exists("_suspects.json")


def test_an_engine_that_hangs_is_replaced(cluster, documents, chain):
    source = documents(60, marks={30: "hang"})
    job = chain(source, {"label": ["label"]})
    summary = generate(job.config("pools.label.hang_timeout_s=3"))
    assert ids(job.folder()) == ids(source) and summary["ok"] == 60
    assert (summary["pools"]["label"]["restarts"], summary["pools"]["label"]["hangs"]) == (1, 1)


def test_an_engine_that_fails_at_everything_ends_the_run(cluster, documents, chain):
    source = documents(100, marks=dict.fromkeys(range(100), "error"))
    job = chain(source, {"label": ["label"]})
    with pytest.raises(
        KunError,
        match=r"pool label, step label: the first 20 requests all failed; the last error: ValueError: row \d+ cannot be served",
    ):
        generate(job.config())
    assert job.folder().num_rows() == 0 and not job.folder().is_complete()

    chain(source, {"label": ["label"]}, start_error="CUDA out of memory")
    with pytest.raises(KunError, match=r"pool label: its engine cannot start: RuntimeError: CUDA out of memory"):
        generate(job.config())
    assert len(list(Path(job.plan.journal).glob("started-*"))) == 3


def test_failed_rows_run_again_and_replace_the_failed_ones(cluster, documents, chain, tmp_path):
    source = documents(120, marks={5: "flaky", 50: "flaky", 51: "error"})
    job = chain(source, {"label": ["label"]})
    first = generate(job.config())
    assert first["reasons"] == {"failed/engine_error": 3}
    calls = num_ended(job)
    again = generate(job.config("retry=failed"))
    assert ids(job.folder()) == ids(source)
    assert (again["ok"], again["failed"], again["rows"]) == (119, 1, 120)
    assert num_ended(job) == calls + 3 and again["runs"] == 2
    assert [row["title"] for row in job.rows() if row["status"] == "failed"] == ["51"]
    assert generate(job.config()) == again, "without `retry` there is nothing to do"


def test_a_killed_actor_is_replaced_and_blames_nobody(cluster, documents, chain):
    """SIGKILL from outside, with rows inside: they run again, alone, and pass."""
    source = documents(200)
    job = chain(source, {"label": ["label"]}, service_s=(0.1, 0.3))

    def kill_one() -> None:
        wait_until(lambda: num_ended(job) > 40, "calls")
        os.kill(fake.read_journal(job.plan)[-1]["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    summary = generate(job.config())
    killer.join()
    assert summary["ok"] == 200 and ids(job.folder()) == ids(source)
    assert summary["restarts"] == 1 and summary["hangs"] == 0
    assert 0 <= summary["tokens_redone"] <= 7 * 200


def test_a_run_that_died_around_a_write_continues(cluster, documents, chain):
    source = documents(60)
    job = chain(source, {"label": ["label"]})
    summary = generate(job.config())
    folder = job.folder()
    assert [table.num_rows for table in map(_read, folder.parts())] == [32, 28]
    calls = num_ended(job)

    folder.filesystem.delete_file(folder.child("_SUCCESS"))  # died after the last write: no engine is needed
    assert generate(job.config())["reasons"] == summary["reasons"]
    assert ids(folder) == ids(source) and num_ended(job) == calls

    folder.filesystem.delete_file(
        folder.child("_SUCCESS")
    )  # died in the midst of a write: uncommitted, and half a file
    torn = folder.parts()[0]
    checkpoint = folder.child("_checkpoint/") + torn.rsplit("/", 1)[-1].replace("-0.parquet", ".parquet")
    os.rename(checkpoint, checkpoint.replace(".parquet", ".pending.parquet"))
    os.truncate(torn, 1000)
    assert generate(job.config())["rows"] == 60
    assert ids(folder) == ids(source) and num_ended(job) == calls + 32 and folder.num_rows() == 60


def _read(path):
    import pyarrow.parquet as pq

    return pq.read_table(path)
