"""What execution.py does without a cluster: signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kun_ray import execution
from kun_ray.config import PARENT, ConfigError, KunError, RayConfig
from kun_ray.room import require_local_cores


def test_many_more_engines_than_cores_are_refused_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    require_local_cores(RayConfig(), 4, "out")
    with pytest.raises(ConfigError, match="out starts 50 engines .* this machine has 2 cores: lower replicas"):
        require_local_cores(RayConfig(), 50, "out")
    require_local_cores(RayConfig(num_cpus=64), 50, "out")
    require_local_cores(RayConfig(address="auto"), 50, "out")


def test_a_local_ray_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: its sockets' paths would be too long, which it finds out before it starts a process."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 20)))
    with pytest.raises(KunError, match="Ray does not start here: .*AF_UNIX path length") as caught:
        execution.connect(RayConfig())
    assert "None" not in str(caught.value)


def test_a_killed_drivers_share_of_the_cluster_is_soon_free() -> None:
    """Ray Data reads the times from the environment when it first runs: a process of its own shows that ours arrive there."""
    code = (
        "import ray; ray.is_initialized = lambda: True\n"
        "from kun_ray import config, execution; execution.connect(config.RayConfig())\n"
        "from ray.data._internal.cluster_autoscaler.default_cluster_autoscaler_v2 import DefaultClusterAutoscalerV2 as Data\n"
        "print(Data.AUTOSCALING_REQUEST_EXPIRE_TIME_S, Data.MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.split() == ["15", "5"], ran.stderr


def test_a_cluster_that_does_not_answer_is_named() -> None:
    with pytest.raises(ConfigError, match="no Ray cluster answers at 127.0.0.1:nowhere: .*ray start --head"):
        execution.connect(RayConfig(address="127.0.0.1:nowhere"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(execution, "SAME_STOP_S", 0.3)
    yield


def test_two_signals_at_once_are_one_wish_to_a_pipelines_stage(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray job stop` sends SIGTERM to the pipeline and to the stage, and the pipeline sends the stage SIGINT."""
    monkeypatch.setenv(PARENT, str(os.getppid()))
    with execution.stopping(lambda: None, 60.0) as stopped:
        signal.raise_signal(signal.SIGTERM)
        assert stopped.is_set()
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.4)
        with pytest.raises(KeyboardInterrupt):  # a person who presses Ctrl-C once more
            signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_stops_a_job_at_once(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PARENT, raising=False)
    with execution.stopping(lambda: None, 60.0):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
