"""report.html: one or several runs on one page that opens offline: funnel, reasons, distributions, speed, samples.

jobs/report.py calls report(); stages may call write_report() at their end. Reads stage folders, complete or not, in one
streaming pass each; writes nothing but the page, and needs neither Ray nor a GPU.
"""

from __future__ import annotations

import dataclasses

from kun_ray.changes import PREPARE
from kun_ray.config import KunError, require, without_credentials
from kun_ray.report import cards, excerpts
from kun_ray.report.page import render
from kun_ray.report.runs import Run, find_runs
from kun_ray.report.sample import fetch_rows
from kun_ray.report.survey import PREPARE_STEPS, survey
from kun_ray.report.tables import Measured
from kun_ray.report.throughput import read_throughput
from kun_ray.store import Folder


@dataclasses.dataclass
class ReportConfig:
    """jobs/report.py: shows runs, side by side if there are several."""

    runs: list[str] = dataclasses.field(default_factory=list)
    """Folders that hold stages (prepare, generate, export), or single stage folders; complete or still running. May be
    given without `runs=`: `python jobs/report.py runs/a runs/b`."""
    output: str | None = None
    """File to write; null is `report.html` in the run's folder, or `compare.html` in the first of several."""
    samples: int = 400
    """Documents in the sample browser: half of them ok, the others spread evenly over the reasons. Every reason is
    there, even if that makes more. Several runs share them."""
    find: list[str] = dataclasses.field(default_factory=list)
    """Documents that must be among the samples: a doc_id, or anything that stands in title, meta (file, offset, id, url),
    text, instruction or answer. At most 50 documents each."""
    excerpts: bool = True
    """Whether the beginning of rejected documents is read from the corpus again, where it lies on this machine."""

    def __post_init__(self) -> None:
        require(self.samples >= 1, f"`samples` is {self.samples}, but must be at least 1")


def report(config: ReportConfig) -> str:
    """Writes the page and returns where.

    Raises:
        ConfigError: no run is given.
        KunError: a folder holds no stage with rows, or the page cannot be written.
    """
    require(bool(config.runs), "give at least one run: python jobs/report.py runs/demo")
    folder, name = _target(config)
    runs = find_runs(config.runs)
    surveys = [survey(run.rows, config.samples, config.find) for run in runs]
    share = max(1, config.samples // len(runs))
    ids = list(dict.fromkeys(doc_id for one in surveys for doc_id in [*one.found, *one.sample.take(share)]))
    sampled = [_sampled(run, one.steps, ids, config.excerpts) for run, one in zip(runs, surveys, strict=True)]
    measured = [
        Measured(run, one, {stage.name: read_throughput(stage.folder) for stage in run.chain})
        for run, one in zip(runs, surveys, strict=True)
    ]
    page = render(measured, cards.cards(sampled))
    written = without_credentials(folder.below(name).uri)
    try:
        folder.filesystem.create_dir(folder.path, recursive=True)
        folder.write_text(name, page)
    except OSError as error:
        raise KunError(f"cannot write {written}: {error}; choose another output=") from None
    print(f"written to {written}", flush=True)
    return written


def write_report(runs: list[str], output: str | None = None) -> str:
    """The report of `runs` with every default, for a stage's end: seconds for 100,000 rows. Raises KunError."""
    return report(ReportConfig(runs=runs, output=output))


def _target(config: ReportConfig) -> tuple[Folder, str]:
    if config.output is None:
        return Folder(config.runs[0]), "report.html" if len(config.runs) == 1 else "compare.html"
    parent, _, name = config.output.rpartition("/")
    return Folder(parent or "."), name


def _sampled(run: Run, steps: list[str], ids: list[str], with_excerpts: bool) -> cards.Sampled:
    """The sample's rows of one run, and their texts: from the stage, the stages before it, or the corpus."""
    rows = fetch_rows(run.rows.folder, ids)
    texts: dict[str, str] = {}
    for stage in reversed(run.chain[:-1]):
        lacking = [doc_id for doc_id, row in rows.items() if row["text"] is None and doc_id not in texts]
        found = fetch_rows(stage.folder, lacking, ["text"])
        texts |= {doc_id: row["text"] for doc_id, row in found.items() if row["text"] is not None}
    first = run.chain[0]
    lacking_rows = [row for row in rows.values() if row["text"] is None and row["doc_id"] not in texts]
    found_excerpts = (
        excerpts.read_excerpts(first, lacking_rows) if with_excerpts and first.kind == PREPARE and lacking_rows else {}
    )
    return cards.Sampled(rows, texts, found_excerpts, [step for step in steps if step not in PREPARE_STEPS])
