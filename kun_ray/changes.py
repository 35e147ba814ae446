"""What a fingerprint says: which stage it belongs to, and what differs between two of them, one line a key.

store.py asks when a run meets a folder that is there already; the report asks which stages lie in a run's folder.
"""

from __future__ import annotations

import json
from typing import Any, Final

PREPARE, GENERATE, EXPORT, TRAIN, REVIEW = "prepare", "generate", "export", "train", "review"
_KEYS: Final = {"corpora": PREPARE, "pools": GENERATE, "selection": EXPORT, "training": TRAIN, "answers": REVIEW}
"""The key that only this stage's fingerprint has."""


def stage_of(fingerprint: dict[str, Any]) -> str | None:
    """The stage that a fingerprint belongs to; None where no key tells."""
    return next((stage for key, stage in _KEYS.items() if key in fingerprint), None)


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each key whose value is another one now, with both values, sorted by key."""
    old, new = dict(flatten(before)), dict(flatten(now))
    return [
        f"{key}: was {', now '.join(_short(old.get(key, 'absent'), new.get(key, 'absent')))}"
        for key in sorted({*old, *new})
        if old.get(key, "absent") != new.get(key, "absent")
    ]


def flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """A nested mapping as (dotted key, value) pairs, in its own order."""
    if isinstance(value, dict):
        return [
            pair for key, item in value.items() for pair in flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, value)]


def _short(*values: Any) -> list[str]:
    """Long values from shortly before the place where they begin to differ."""
    texts = [json.dumps(value, ensure_ascii=False) for value in values]
    differ = next((i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), 0)
    start = max(0, differ - 20) if max(map(len, texts)) > 80 else 0
    return [
        f"{'…' if start else ''}{text[start : start + 78]}{'…' if len(text) > start + 78 else ''}" for text in texts
    ]
