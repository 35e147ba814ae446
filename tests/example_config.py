"""The shipped configuration of generate with what a user must add, and files of a test's own."""

from __future__ import annotations

from pathlib import Path

REPO = Path(__file__).parents[1]
GENERATE = [
    str(REPO / "conf/generate.yaml"),
    "input=in",
    "output=out",
    "pools.label.model=a/label",
    "pools.chat.model=a/chat",
]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)
