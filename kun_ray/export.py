"""The export stage: finished rows → Alpaca and ShareGPT jsonl, Parquet with full lineage, and a data card.

`jobs/export.py` and the pipeline call `export`. It reads the generate stage twice (`selection` decides, then the rows are
streamed into files), so memory does not grow with the text. It needs no Ray and never changes its input.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Final

import numpy as np
from omegaconf import MISSING

from kun_ray import card, checksums, formats, inspection, lease, selection
from kun_ray.card import SourceConfig
from kun_ray.checksums import CHECKSUMS
from kun_ray.config import ConfigError, KunError, one_of, require, show_config, to_dict
from kun_ray.formats import FORMATS
from kun_ray.lease import LEASE_S
from kun_ray.schema import STATUSES
from kun_ray.selection import SelectionConfig
from kun_ray.store import MANIFEST, SUMMARY, Folder, input_fingerprint, open_stage, require_complete

_OWN_FILES: Final = (*FORMATS, "README.md", "dataset_info.json", CHECKSUMS, SUMMARY)


@dataclasses.dataclass
class ExportConfig:
    """Turns one finished generate stage into a dataset."""

    input: str = MISSING
    """Folder of a finished generate stage."""
    output: str = MISSING
    """Folder to write: new, or this very export's own."""
    formats: list[str] = dataclasses.field(default_factory=lambda: list(FORMATS))
    """What to write: `alpaca` (instruction, input, output), `sharegpt` (conversations), `parquet` (every column)."""
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    """Which of the ok rows to take."""
    reply: str = "answer"
    """Column that becomes the response: `answer` (polished, as in Kun) or `text` (the document, as in Humpback)."""
    with_text_as_input: bool = False
    """Whether the document is given with the instruction (Alpaca's `input`; below the instruction in ShareGPT)."""
    valid_fraction: float = 0.0
    """Share of rows for the validation split, 0 to below 1, by a hash of doc_id: a document never changes sides."""
    dataset_name: str = "kun"
    """Name in the data card and in LLaMA-Factory's dataset_info.json."""
    licence: str = "other"
    """Licence of the dataset itself in the card's header, as a Hugging Face identifier such as `cc-by-nc-4.0`."""
    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
    """Full name and licence of each source, for the data card."""
    contamination: str | None = None
    """Folder of a jobs/evaluate.py whose `contamination.data` was this input: the data card then says in how many rows
    questions of examinations were found; null says that nobody looked."""
    drop_contaminated: bool = False
    """Whether the rows that `contamination` names are left out (`not_selected.contaminated`)."""
    lease_s: float = LEASE_S
    """A run that gave no sign of life for so many seconds counts as dead: another one may go on in its output."""

    def __post_init__(self) -> None:
        for name in self.formats:
            one_of("formats", name, FORMATS)
        require(bool(self.formats), f"`formats` is empty: choose from {', '.join(FORMATS)}")
        require(len(set(self.formats)) == len(self.formats), "`formats` names a format twice")
        one_of("reply", self.reply, ("answer", "text"))
        require(
            not (self.with_text_as_input and self.reply == "text"),
            "`with_text_as_input` would show the response: it needs reply=answer",
        )
        require(
            0 <= self.valid_fraction < 1,
            f"`valid_fraction` is {self.valid_fraction}, but must be at least 0 and below 1",
        )
        require(
            re.fullmatch(r"[\w.-]+", self.dataset_name) is not None,
            f"`dataset_name` is {self.dataset_name!r}, but may hold only letters, digits, `_`, `.` and `-`",
        )
        require(
            bool(self.contamination) or not self.drop_contaminated,
            "`drop_contaminated` needs contamination=<the folder of a jobs/evaluate.py that looked at this input>",
        )


def export(config: ExportConfig) -> None:
    """Exports one generate stage; does nothing when this very export is complete.

    Raises:
        ConfigError: the output lies in the input.
        KunError: the input is unfinished or lacks a column, the output holds something else, no row is left to export,
            or the files read back do not hold the rows that they should.
    """
    source = require_complete(config.input, "export reads what jobs/generate.py writes: give its output=")
    if f"{Folder(config.output).path}/".startswith(f"{source.path}/"):
        raise ConfigError(f"output={config.output} lies in the input: choose another folder")
    identity = fingerprint(config, source)
    if Folder(config.output).is_complete():
        summary = open_stage(config.output, identity, to_dict(config)).read_json(SUMMARY)
        print(
            f"{config.output} is complete ({summary['train']:,} train, {summary['valid']:,} valid rows): nothing to do",
            flush=True,
        )
        return

    columns = selection.column_names(source)
    _check_columns(config, columns)
    rows = selection.scan(source, config.reply, "score" in columns)
    questions = (
        inspection.read_contamination(config.contamination, config.input, len(rows.doc_id))
        if config.contamination
        else None
    )
    held = inspection.contaminated(questions, rows.doc_id) if questions else None
    fates = selection.choose(rows, config.selection, held if config.drop_contaminated else None)
    splits = selection.split(rows, fates, config.valid_fraction)
    stages = inspection.chain(source)
    summary = {
        **_summary(rows, fates, splits),
        "personal_data": {
            "actions": inspection.personal_data_actions(stages),
            "masked": inspection.count_kinds(rows.masked[fates == selection.EXPORTED]),
        },
        "contamination": questions
        and {**questions.counts, "exported": int(np.count_nonzero(held & (fates == selection.EXPORTED)))},
        "generate_digest": identity["generate"],
    }
    _require_rows(config, rows, summary)
    chosen = f"{summary['train']:,} train and {summary['valid']:,} valid rows chosen"
    print(f"{config.input}: {rows.num_rows:,} rows read, {chosen}", flush=True)

    with lease.opened(config.output, identity, to_dict(config), config.lease_s) as target:
        if target.is_complete():  # another run of this very export ended just now
            return
        show_config()
        _write(config, stages, target, splits, summary, identity)


def fingerprint(config: ExportConfig, source: Folder) -> dict[str, Any]:
    """What decides an export's files."""
    generate = formats.digest(source.read_json(MANIFEST)["fingerprint"])
    found = {**to_dict(config), "input_data": input_fingerprint(source), "generate": generate}
    left_out = {"input", "output", "lease_s"}
    if config.contamination:
        found["contamination"] = inspection.digest(config.contamination)
    else:
        left_out |= {"contamination", "drop_contaminated"}
    return {name: value for name, value in found.items() if name not in left_out}


def _write(
    config: ExportConfig,
    stages: list[Folder],
    target: Folder,
    splits: selection.Array,
    summary: dict[str, Any],
    identity: dict[str, Any],
) -> None:
    """The files of an export, their proof and the card; `stages` as inspection.chain gives them, the input first."""
    source, fingerprints = stages[0], [stage.read_json(MANIFEST)["fingerprint"] for stage in stages]
    for name in _left(target):  # of an interrupted export: starting anew is cheap
        (target.filesystem.delete_dir if name in FORMATS else target.filesystem.delete_file)(target.child(name))
    formats.write_rows(source, target, splits, config.formats, config.reply, config.with_text_as_input, fingerprints[0])
    summary["files"] = [
        formats.read_back(target, name, split)
        for name in config.formats
        for split in selection.SPLITS
        if summary[split]
    ]
    prove(summary)
    target.write_json("dataset_info.json", card.dataset_info(config.dataset_name, summary["files"]))
    settings = {key: identity[key] for key in ("selection", "reply", "with_text_as_input", "valid_fraction")}
    text = card.data_card(config.dataset_name, config.licence, config.sources, settings, summary, fingerprints)
    target.write_text("README.md", text)
    target.write_text(CHECKSUMS, checksums.write(_sums(target, summary)))
    target.finish(summary)
    print(
        f"{config.output}: written as {', '.join(config.formats)}, with README.md, dataset_info.json and {CHECKSUMS}",
        flush=True,
    )


def _sums(target: Folder, summary: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of every file that is shared: data files as they were read back, and what stands beside them."""
    beside = {name: checksums.digests(target, name).sha256 for name in ("README.md", "dataset_info.json")}
    return {**{file["path"]: file["sha256"] for file in summary["files"]}, **beside}


def prove(summary: dict[str, Any]) -> None:
    """Raises KunError unless rows read = train + valid + not selected, and every file holds its split's rows."""
    read, train, valid, behind = (summary[k] for k in ("rows", "train", "valid", "not_selected"))
    if not read == train + valid + sum(behind.values()) == sum(summary[status] for status in STATUSES):
        raise KunError(
            f"the counts do not add up: {read} rows read, {train} train, {valid} valid, not selected {behind}, "
            f"by status {[summary[s] for s in STATUSES]}. Nothing was published: please report this as a bug of kun_ray"
        )
    for file in summary["files"]:
        expected = summary[file["split"]]
        if file["rows"] != expected:
            raise KunError(
                f"{file['path']} holds {file['rows']} rows, but {expected} were chosen for {file['split']}. "
                "Nothing was published: did something else write here, or is the disk full? Run the same command again"
            )


def _check_columns(config: ExportConfig, columns: list[str]) -> None:
    if "instruction" not in columns:
        raise KunError(
            f"{config.input} has no `instruction` column: it must be a generate stage that ran the label step"
        )
    if "answer" not in columns and config.reply == "answer":
        raise KunError(
            f"{config.input} has no `answer` column: run the polish step, or set reply=text for the documents"
        )
    if "score" not in columns and config.selection.needs_score():
        raise KunError(
            f"{config.input} has no `score` column: run the score step, or set selection.threshold=null "
            "and selection.select=random"
        )


def _summary(rows: selection.Scan, fates: selection.Array, splits: selection.Array) -> dict[str, Any]:
    exported = fates == selection.EXPORTED
    statuses = {status: sum(n for (_, s, _), n in rows.counts.items() if s == status) for status in STATUSES}
    reasons: dict[str, int] = {}
    for (_, status, reason), count in rows.counts.most_common():
        if status != "ok":
            reasons[f"{status}/{reason}"] = reasons.get(f"{status}/{reason}", 0) + count
    per_source = np.bincount(rows.source[exported].astype(np.int64), minlength=len(rows.sources))
    return {
        "rows": rows.num_rows,
        **statuses,
        "reasons": reasons,
        **{split: int(np.count_nonzero(splits == code)) for split, code in selection.SPLITS.items()},
        "not_selected": selection.not_exported(rows, fates),
        "sources": {
            source: {
                "rows": sum(n for (s, _, _), n in rows.counts.items() if s == source),
                "exported": int(per_source[code]),
            }
            for code, source in enumerate(rows.sources)
        },
        "lengths": {
            "instruction": _lengths(rows.instruction_chars[exported]),
            "response": _lengths(rows.reply_chars[exported]),
        },
    }


def _lengths(num_chars: selection.Array) -> dict[str, int]:
    if not len(num_chars):
        return {}
    p5, p50, p95 = np.percentile(num_chars, (5, 50, 95))
    figures = {"mean": num_chars.mean(), "p5": p5, "p50": p50, "p95": p95, "max": num_chars.max()}
    return {name: round(float(figure)) for name, figure in figures.items()}


def _require_rows(config: ExportConfig, rows: selection.Scan, summary: dict[str, Any]) -> None:
    if summary["train"]:
        return
    if summary["valid"]:
        raise KunError(
            f"all {summary['valid']} chosen rows fall into the validation split, none is left to train on: "
            f"lower valid_fraction={config.valid_fraction}"
        )
    behind = ", ".join(f"{count} {reason}" for reason, count in summary["not_selected"].items() if count)
    reasons = ", ".join(f"{count} {reason}" for reason, count in list(summary["reasons"].items())[:5])
    best = f"; the best score is {np.nanmax(rows.score):.4g}" if np.isfinite(rows.score).any() else ""
    raise KunError(
        f"nothing to export: {summary['rows']} rows read from {config.input}, of these {behind or 'none'}{best}."
        + (f" Not ok in generate, most often: {reasons}." if reasons else "")
        + " Loosen selection.*, or look at that stage's summary.json"
    )


def _left(folder: Folder) -> list[str]:
    return [name for name in _OWN_FILES if folder.exists(name)]
