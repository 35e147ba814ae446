"""Leases: one living run per folder; a dead one's hold ends, at once on its own host and by its age elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pyarrow import fs

from kun_ray import lease, store
from kun_ray.config import KunError
from kun_ray.store import Folder

FINGERPRINT = {"input": "abc"}


def opened(path: Path, lease_s: float = 60.0) -> Any:
    return lease.opened(str(path), FINGERPRINT, {}, lease_s)


def foreign(path: Path, age_s: float) -> None:
    """A lease that a run on another host renewed `age_s` ago."""
    path.mkdir(exist_ok=True)
    now = time.time()
    held = {
        "host": "elsewhere",
        "place": "there",
        "pid": 1,
        "born": "x",
        "token": "t",
        "since": now - 999,
        "renewed": now - age_s,
    }
    (path / lease.LEASE).write_text(json.dumps(held))


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        assert lease.read(folder) is not None
        with pytest.raises(KunError, match=rf"in use by another run \(host .*, process {os.getpid()}, since .*output="):
            opened(tmp_path).__enter__()
        assert lease.read(folder) is not None
    assert os.listdir(tmp_path) == ["manifest.json"]
    with opened(tmp_path):
        pass


def test_an_error_inside_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), opened(tmp_path):
        raise ZeroDivisionError
    assert not (tmp_path / lease.LEASE).exists()


def test_a_complete_folder_needs_no_lease(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        folder.finish({})
        with opened(tmp_path) as again:  # readers of a finished stage and runs that have nothing to do
            assert again.is_complete()


def test_a_process_that_is_gone_from_this_host_holds_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, time; from kun_ray import lease\n"
        f"with lease.opened({str(tmp_path)!r}, {FINGERPRINT!r}, {{}}, 1000.0): print('held', flush=True); time.sleep(1000)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(KunError, match=rf"process {process.pid}.*its lease ends (99\d|1000) s from now"):
            opened(tmp_path, 1000.0).__enter__()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with opened(tmp_path, 1000.0):
        pass


def test_a_holder_elsewhere_is_judged_by_its_age(tmp_path: Path) -> None:
    foreign(tmp_path, age_s=50)
    with pytest.raises(KunError, match="host elsewhere, process 1.*sign of life 50 s ago.*ends 10 s from now"):
        opened(tmp_path).__enter__()
    with opened(tmp_path, lease_s=49):
        pass


def test_a_process_of_another_container_is_judged_by_its_age(tmp_path: Path) -> None:
    """On the same machine and under the same name, but its number means nothing here."""
    with opened(tmp_path) as folder:
        held = folder.read_json(lease.LEASE)
    (tmp_path / lease.LEASE).write_text(json.dumps({**held, "pid": 2**22 + 1, "place": f"{held['place']}0"}))
    with pytest.raises(KunError, match="in use"):
        opened(tmp_path).__enter__()
    (tmp_path / lease.LEASE).write_text(json.dumps({**held, "pid": 2**22 + 1}))
    with opened(tmp_path):
        pass


def test_a_holder_renews(tmp_path: Path) -> None:
    with opened(tmp_path, lease_s=0.6) as folder:
        first = lease.read(folder)
        time.sleep(1.0)
        second = lease.read(folder)
        assert first and second and second["renewed"] > first["renewed"] and second["since"] == first["since"]
        with pytest.raises(KunError, match="in use"):
            opened(tmp_path, lease_s=0.6).__enter__()


def test_a_run_that_was_replaced_ends(tmp_path: Path) -> None:
    """It had been cut off for longer than the lease, and another one has gone on."""
    with pytest.raises(KunError, match=r"was taken over by another run \(host elsewhere"), opened(tmp_path, 0.6):
        foreign(tmp_path, age_s=0)
        time.sleep(30)
    assert json.loads((tmp_path / lease.LEASE).read_text())["host"] == "elsewhere", "the other one's lease stays"


def test_of_two_that_begin_together_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other writes between this one's look and its own: as on an object store, the last word counts."""
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: foreign(tmp_path, age_s=0))
    with pytest.raises(KunError, match="host elsewhere"):
        opened(tmp_path).__enter__()


def test_where_files_can_only_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on S3, through pyarrow's own interface."""
    object_store = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("file", auto_mkdir=True)))
    monkeypatch.setattr(store, "resolve", lambda uri: (object_store, str(tmp_path)))
    again = lease.opened("s3://bucket/run", FINGERPRINT, {}, 60.0)
    with (
        lease.opened("s3://bucket/run", FINGERPRINT, {}, 60.0),
        pytest.raises(KunError, match="s3://bucket/run is in use"),
    ):
        again.__enter__()
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_files_that_a_killed_run_was_about_to_rename_are_dropped(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    (tmp_path / "summary.json.1234.tmp").write_text("ha")
    with opened(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [lease.LEASE, "manifest.json"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path):
        pass

    def full(self: Folder, name: str, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "write_text", full)
    with pytest.raises(KunError, match="cannot write to .*No space left on device; mend"):
        opened(tmp_path).__enter__()
