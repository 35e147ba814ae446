"""What a reason means and which setting decides it: one sentence each, for the page (docs/architecture.md, "The row")."""

from __future__ import annotations

from typing import Final

from kun_ray.changes import EXPORT

REASONS: Final = {
    "bad_json": "the record is not valid JSON",
    "bad_encoding": "the record is not valid UTF-8",
    "missing_field": "the record has no text where its format has one",
    "record_too_large": "the record is larger than 64 MB",
    "empty_file": "the file holds no record",
    "unreadable_file": "the file could not be read",
    "file_changed": "the file became another one while it was read",
    "truncated_archive": "the archive ends too early; what is before that was read",
    "bad_archive": "the archive is damaged, or unpacks to absurdly much",
    "bad_archive_member": "an archive member that is no data file",
    "bad_parquet": "the Parquet file, or a part of it, is damaged",
    "markup": "mostly HTML or other markup (filters.max_markup_share)",
    "too_short": "fewer characters than filters.min_chars",
    "too_long": "more than filters.max_tokens or max_chars",
    "garbled": "wrongly decoded or unreadable characters (filters.max_garbled_share, max_symbol_share)",
    "not_chinese": "too few Chinese characters, or another language (filters.min_chinese_share, language)",
    "boilerplate": "mostly navigation, notices and advertising (filters.max_boilerplate_share)",
    "repetition": "repeats lines, phrases or units (filters.max_*_repetition; after polish: steps.polish.max_repeats)",
    "perplexity": "outside the limits of perplexity",
    "duplicate": "the same text as another document; meta.duplicate_of names the one kept",
    "near_duplicate": "nearly the same text as another document (dedup.threshold); meta.duplicate_of names the one kept",
    "instruction_short": "the instruction has fewer characters than steps.label.min_chars",
    "instruction_long": "the instruction has more characters than steps.label.max_chars",
    "verdict_bad": "the model judged the instruction bad",
    "below_threshold": "the score is below steps.score.threshold",
    "answer_short": "the answer has fewer characters than steps.polish.min_chars",
    "over_context": "the prompt does not fit the model's context",
    "truncated": "the reply reached sampling.max_tokens",
    "unparsable": "the reply does not hold what the step asks for",
    "quarantined": "engines died whenever they took this row",
    "engine_error": "the engine refused the request; the log names the error",
}
NOT_SELECTED: Final = {
    "empty": "ok, but its instruction or its reply is blank: there is nothing to train on",
    "below_threshold": "ok, but its score is below selection.threshold",
    "over_quota": "ok, but its source has given all that selection.quotas allows it; better rows, or those drawn, came first",
    "beyond_top_k": "ok, but selection.top_k rows came before it, by score or by chance (selection.select)",
    "contaminated": "ok, but it shares words with a question of an examination (drop_contaminated)",
}
"""What an export counts in `not_selected`: why it left out a row that generate had called ok."""


def explain(reason: str, step: str = "") -> str:
    """The sentence for a reason; "" for one that this version does not know."""
    if step == EXPORT:
        return NOT_SELECTED.get(reason, "")
    kind, _, detail = reason.partition(":")
    if kind == "keyword":
        return f"holds 「{detail}」, one of the step's reject_words"
    if reason.startswith("pii_"):
        return "holds personal data of this kind (filters.pii)"
    return REASONS.get(reason, "")
