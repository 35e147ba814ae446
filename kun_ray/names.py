"""Short names for folders and models, as reports and evaluations show them."""

from __future__ import annotations


def short_names(paths: list[str]) -> list[str]:
    """The last part of each path (not `model`, as training calls every model), with as many before it as tell it from the others."""
    parts = [path_parts(path) for path in paths]
    names = []
    for number, mine in enumerate(parts):
        others = [other for n, other in enumerate(parts) if n != number]
        length = next((n for n in range(1, len(mine)) if all(mine[-n:] != o[-n:] for o in others)), len(mine))
        names.append("-".join(mine[-length:]))
    return names


def path_parts(path: str) -> list[str]:
    """The folders of a path or URI, without what calls every model the same."""
    parts = [part for part in path.split("://")[-1].partition("?")[0].split("/") if part not in ("", ".")]
    return parts[:-1] if len(parts) > 1 and parts[-1] == "model" else parts
