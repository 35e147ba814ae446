"""Replies as an engine gives them, and what a step makes of a row."""

from __future__ import annotations

from typing import Any

from kun_ray.replies import Reply

ANSWER = "春天适合去爬山，记得带上水和外套，也要看好天气再出门。"


def said(text: str, finish_reason: str = "stop") -> Reply:
    return Reply(10, 5, finish_reason, text)


def chose(*logprobs: float) -> Reply:
    return Reply(10, 1, "chosen", logprobs=logprobs)


def settled(found: dict[str, Any]) -> tuple[str | None, str | None]:
    return found.get("status"), found.get("reason")
