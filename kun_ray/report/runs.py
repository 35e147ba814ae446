"""A run as the report sees it: which stage folders belong together, in the order in which rows passed them.

`report` calls find_runs for the folders that it is given. Stages that still run are read as far as they are; nothing is
ever written here.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import PurePosixPath
from typing import Any

from pyarrow import fs

from kun_ray.changes import EXPORT, GENERATE, PREPARE, flatten, stage_of
from kun_ray.config import KunError, without_credentials
from kun_ray.names import short_names
from kun_ray.store import MANIFEST, SUMMARY, Folder, input_fingerprint

OTHER = "other"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage folder, complete or still being written."""

    name: str
    kind: str
    folder: Folder
    manifest: dict[str, Any]
    summary: dict[str, Any]
    """Empty until the stage is complete."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        return dict(self.manifest.get("fingerprint") or {})

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.manifest.get("config") or {})

    @property
    def created(self) -> str:
        return str(self.manifest.get("created", ""))

    @property
    def has_rows(self) -> bool:
        """Whether its parts hold one row per document."""
        return self.kind in (PREPARE, GENERATE)

    @property
    def input_digest(self) -> str | None:
        """What its input's files were when it began (`store.input_fingerprint`)."""
        return self.fingerprint.get("input_data" if self.kind == EXPORT else "input")


@dataclasses.dataclass(frozen=True)
class Run:
    """Stages that belong together: a chain from prepare to export, and whatever else lies in the folder, where it began."""

    name: str
    uri: str
    stages: list[Stage]
    left_out: list[str]
    """Names of stages in the folder that belong to another chain."""

    @property
    def rows(self) -> Stage:
        """The last stage that holds a row for every document: all that became of them is in it."""
        return [stage for stage in self.stages if stage.has_rows][-1]

    @property
    def chain(self) -> list[Stage]:
        """The stages that hold rows, first to last."""
        return [stage for stage in self.stages if stage.has_rows]

    @property
    def export(self) -> Stage | None:
        """The finished export of these rows, the newest one."""
        return next((s for s in reversed(self.stages) if s.kind == EXPORT and s.summary), None)


def find_runs(uris: list[str]) -> list[Run]:
    """`find_run` of each folder, under names that tell the runs apart: two exports are both called `export`."""
    runs = [find_run(uri.rstrip("/")) for uri in uris]
    names = short_names([Folder(run.uri).path for run in runs])
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def find_run(uri: str) -> Run:
    """The run in a folder: of stage folders, or of one stage, to which its inputs are found.

    The chain is followed back from the newest stage that holds rows; a stage's input is recognised by the digest in its
    manifest, so folders may have been moved.

    Raises:
        KunError: there is no such folder, or no stage with rows in it.
    """
    folder, shown = Folder(uri), without_credentials(uri)
    if not folder.exists():
        raise KunError(f"there is no folder {shown}: give the folder that holds prepare, generate and export")
    own = _read(folder)
    found = [own] if own else _stages_below(folder)
    leaves = [stage for stage in found if stage.has_rows]
    if own and own.kind == EXPORT:
        source = _input_of(own, found)
        leaves = [source] if source else []
    if not leaves:
        raise KunError(
            f"{shown} holds no prepare or generate stage: give the folder above them, or one of them "
            f"({'found: ' + ', '.join(stage.name for stage in found) if found else 'nothing in it has a ' + MANIFEST})"
        )
    leaf = max(leaves, key=lambda stage: (stage.kind == GENERATE, stage.created))
    chain = [leaf]
    while (source := _input_of(chain[0], found)) is not None and all(
        source.folder.path != s.folder.path for s in chain
    ):
        chain.insert(0, source)
    exports = [stage for stage in found if stage.kind == EXPORT and _is_input(leaf, stage)]
    others = [stage for stage in found if stage.kind == OTHER]
    stages = [*chain, *sorted(exports, key=lambda stage: stage.created)]
    for other in sorted(others, key=lambda stage: stage.created):  # trainings stand where they ran
        stages.insert(next((n for n, s in enumerate(stages) if s.created > other.created), len(stages)), other)
    used = {stage.folder.path for stage in stages}
    left_out = [stage.name for stage in found if stage.folder.path not in used]
    return Run(PurePosixPath(folder.path).name, uri, stages, left_out)


def stages_of_some(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """The kinds of stage that not all runs have: (kind, names of the runs that have it)."""
    having = {kind: [run.name for run in runs if kind in _kinds(run)] for kind in (PREPARE, GENERATE, EXPORT)}
    return [(kind, names) for kind, names in having.items() if 0 < len(names) < len(runs)]


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """What decides the output and is not the same in all runs: (key, one value per run), strings bare, others as JSON.

    A run without a stage does not make that stage's settings differ; `stages_of_some` names it.
    """
    flat = []
    for run in runs:
        of_run: dict[str, str] = {}
        for stage in run.stages:
            if stage.kind != OTHER:
                of_run |= {f"{stage.kind} {key}": _written(value) for key, value in flatten(stage.fingerprint)}
        flat.append(of_run)
    keys = [key for key in dict.fromkeys(key for of_run in flat for key in of_run) if not _is_digest(key)]
    rows = []
    for key in keys:
        having = [of_run for run, of_run in zip(runs, flat, strict=True) if key.partition(" ")[0] in _kinds(run)]
        if len({of_run.get(key, "–") for of_run in having}) > 1:
            rows.append((key, [of_run.get(key, "–") for of_run in flat]))
    return rows


def _kinds(run: Run) -> set[str]:
    return {stage.kind for stage in run.stages}


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_digest(key: str) -> bool:
    return key in ("generate input", "export input_data", "export generate")


def _stages_below(folder: Folder) -> list[Stage]:
    infos = folder.filesystem.get_file_info(fs.FileSelector(folder.path))
    names = sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)
    return [stage for name in names if (stage := _read(folder.below(name))) is not None]


def _read(folder: Folder) -> Stage | None:
    if not folder.exists(MANIFEST):
        return None
    manifest = folder.read_json(MANIFEST)
    if not isinstance(manifest, dict) or "fingerprint" not in manifest:
        return None
    stage = stage_of(manifest["fingerprint"])
    kind = stage if stage in (PREPARE, GENERATE, EXPORT) else OTHER
    summary = folder.read_json(SUMMARY) if folder.is_complete() and folder.exists(SUMMARY) else {}
    return Stage(PurePosixPath(folder.path).name, kind, folder, manifest, summary)


def _is_input(source: Stage, stage: Stage) -> bool:
    return source.has_rows and input_fingerprint(source.folder) == stage.input_digest


def _input_of(stage: Stage, found: list[Stage]) -> Stage | None:
    """The stage that this one read: among those found, beside it, or where its configuration says."""
    if stage.kind == PREPARE or stage.input_digest is None:
        return None
    for source in found:
        if source is not stage and _is_input(source, stage):
            return source
    given = stage.config.get("input")
    if not isinstance(given, str):
        return None
    for place in (Folder(given), stage.folder.beside(PurePosixPath(given.partition("?")[0]).name)):
        try:
            candidate = _read(place) if place.exists() else None
        except (KunError, OSError):  # a URI that this machine cannot reach: the report does without
            continue
        if candidate is not None and _is_input(candidate, stage):
            return candidate
    return None
