"""The parts of a start: each from the moment before, pools from when Ray was there, the first replica counts."""

from __future__ import annotations

import pytest

from kun_ray.board import Board
from kun_ray.startup import MOMENTS, Startup


def test_parts_follow_each_other_and_pools_begin_where_the_driver_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.5, 105.0])
    monkeypatch.setattr("kun_ray.startup.time.time", lambda: next(clock))
    startup = Startup()
    startup.reached("preflight")
    startup.reached("ray")
    pools = {
        "label": {"engine": 130.0, "actor": 107.0, "first_row": 131.5, "first_token": 131.0},
        "chat": {"actor": 108.0},  # not a single row came so far
    }
    assert startup.summary(pools) == {
        "began": 100.0,
        "preflight_s": 1.5,
        "ray_s": 3.5,
        "pools": {
            "label": {"actor_s": 2.0, "engine_s": 23.0, "first_token_s": 1.0, "first_row_s": 0.5},
            "chat": {"actor_s": 3.0},
        },
    }


def test_of_several_replicas_the_first_counts() -> None:
    board = Board.__ray_metadata__.modified_class()  # type: ignore[attr-defined]
    board.reached("label", dict.fromkeys(MOMENTS, 20.0))
    board.reached("label", {"engine": 15.0, "first_row": 30.0})
    assert board.moments() == {"label": {"actor": 20.0, "engine": 15.0, "first_token": 20.0, "first_row": 20.0}}
