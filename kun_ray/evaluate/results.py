"""Answers → accuracies with intervals, models side by side, as a table, results.json, a plot and C-Eval's submission file.

choice.evaluate calls it. It reads finished answers and runs nothing.
"""

from __future__ import annotations

import collections
import io
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kun_ray import store
from kun_ray.evaluate.statistics import macro_interval, paired_difference, wilson
from kun_ray.evaluate.subjects import subject
from kun_ray.schema import OK

RESULTS = "results.json"
PLOT = "results.png"
CHANCE = 0.25
OVERALL = "All"
NAMES = {
    OVERALL: "全部",
    "STEM": "理工",
    "Humanities": "人文",
    "Social Science": "社会科学",
    "Other": "其他",
    "Hard": "难题",
    "China specific": "中国特有",
}
Answer = dict[str, Any]
Key = tuple[str, str, str]
"""Subject, question id, doc_id."""


def summarise(
    answers: dict[str, store.Folder], suites: dict[str, str], dirty: set[tuple[str, str, str]]
) -> dict[str, Any]:
    """All figures.

    An answer that a model could not give (its prompt is too long, say) counts as wrong. A question without a published
    answer, or that its file holds only in part, does not count.

    Args:
        answers: model's name → its finished answers; the first model is what the others are compared with.
        suites: suite's name → `ceval` or `cmmlu`.
        dirty: questions that were found in training data; the rest are counted once more as `clean`.
    """
    found: dict[str, Any] = {"suites": {}, "submission": {}}
    read = {model: _read(folder) for model, folder in answers.items()}
    for name, format in suites.items():
        by_model = {model: {k: a for k, a in rows.items() if a["source"] == name} for model, rows in read.items()}
        first, *others = by_model
        found["suites"][name] = {
            "models": {model: _model(format, rows, dirty) for model, rows in by_model.items()},
            "comparisons": [
                {"model": other, "than": first, **difference}
                for other in others
                if (difference := _compare(by_model[first], by_model[other]))
            ],
        }
        for model, rows in by_model.items():
            if answered := [row for row in rows.values() if row["key"] is None and row["verdict"]]:
                found["submission"][f"{name}-{model}"] = _submission(answered)
    return found


def write(folder: store.Folder, found: dict[str, Any]) -> None:
    """results.json, results.png, and a submission file for each suite with unpublished answers."""
    for name, submission in found.pop("submission").items():
        folder.write_json(f"submission-{name}.json", submission)
    folder.write_json(RESULTS, found)
    picture = plot(found)
    if picture is None:
        print("no plot: matplotlib is not installed here, or no question has a published answer")
        return
    with folder.filesystem.open_output_stream(folder.child(PLOT)) as stream:
        stream.write(picture)


def show(found: dict[str, Any], subjects: bool, console: Console | None = None) -> None:
    """The table of each suite: groups (and subjects) down, models across, with 95 % intervals."""
    console = console or Console()
    for name, suite in found["suites"].items():
        models = list(suite["models"].values())
        if not models[0]["num"]:
            console.print(
                f"{name}: answers not published; submission-{name}-….json holds the models' own\n", markup=False
            )
            continue
        table = Table(title=f"{name}: accuracy in % [95 % interval]", title_justify="left", box=None, padding=(0, 2))
        for column in ("", "questions", *suite["models"]):
            table.add_column(Text(column), justify="right" if column else "left")
        for group, figures in models[0]["groups"].items():
            cells = (_cell(model["groups"][group]["micro"]) for model in models)
            table.add_row(Text(f"{group} {NAMES[group]}", "bold"), f"{figures['num']:,}", *cells)
        macro = (_cell(model["groups"][OVERALL]["macro"]) for model in models)
        table.add_row("mean of subjects", f"({len(models[0]['subjects'])})", *macro)
        if models[0]["clean"]["num"] < models[0]["num"]:
            clean = (_cell(model["clean"]["micro"]) for model in models)
            table.add_row("not found in data", f"{models[0]['clean']['num']:,}", *clean)
        for one, figures in models[0]["subjects"].items() if subjects else ():
            cells = (_cell(model["subjects"][one]["micro"]) for model in models)
            table.add_row(Text(f"  {figures['name']}"), f"{figures['num']:,}", *cells)
        console.print(table)
        for name_of_model, model in suite["models"].items():
            if model["failed"] or model["lost_shots"]:
                console.print(
                    f"{name_of_model}: {model['failed']:,} questions without an answer, counted as wrong; "
                    f"{model['lost_shots']:,} prompts lost examples to the context",
                    markup=False,
                )
        for pair in suite["comparisons"]:
            low, high = pair["micro"]["interval"]
            console.print(
                f"{pair['model']} − {pair['than']}: {100 * pair['micro']['difference']:+.1f} points "
                f"[{100 * low:+.1f}, {100 * high:+.1f}], p = {pair['p']:.2g} (paired by question)",
                markup=False,
                highlight=False,
            )
        console.print()


def plot(found: dict[str, Any]) -> bytes | None:
    """Accuracies with intervals per group as a PNG, or None without matplotlib or published answers."""
    try:
        from matplotlib.figure import Figure  # seconds to import, and no other part of the package needs it
    except ImportError:
        return None
    suites = {name: suite for name, suite in found["suites"].items() if any(m["num"] for m in suite["models"].values())}
    if not suites:
        return None
    heights = [len(next(iter(suite["models"].values()))["groups"]) for suite in suites.values()]
    figure = Figure(figsize=(8, 1.2 + 0.5 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(suites), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for ax, (name, suite) in zip(axes, suites.items(), strict=True):
        models = suite["models"]
        groups = list(next(iter(models.values()))["groups"])
        for number, (model, one) in enumerate(models.items()):
            offset = 0.6 * ((number + 0.5) / len(models) - 0.5)
            for row, group in enumerate(groups):
                cell = one["groups"][group]["micro"]
                low, high = cell["interval"]
                label = model if row == 0 else None
                ax.plot([100 * low, 100 * high], [row + offset] * 2, color=f"C{number}", lw=2, alpha=0.5)
                ax.plot(100 * cell["accuracy"], row + offset, "o", color=f"C{number}", label=label)
        ax.axvline(100 * CHANCE, color="gray", ls=":", lw=1)
        ax.set_yticks(range(len(groups)), groups)
        ax.invert_yaxis()
        ax.set_title(name, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=4)
    axes[-1].set_xlabel("accuracy in %, with 95 % interval; dotted: guessing")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    return buffer.getvalue()


def _read(folder: store.Folder) -> dict[Key, Answer]:
    columns = ["source", "subject", "question_id", "doc_id", "key", "verdict", "status", "num_shots"]
    table = store.require_complete(folder.uri).dataset().to_table(columns=columns)
    rows = sorted(table.to_pylist(), key=lambda row: (row["source"], row["subject"], row["doc_id"]))
    return {(row["subject"], row["question_id"], row["doc_id"]): row for row in rows}


def _model(format: str, rows: dict[Key, Answer], dirty: set[tuple[str, str, str]]) -> dict[str, Any]:
    keyed = [row for row in rows.values() if row["key"] is not None]
    clean = [row for row in keyed if (row["source"], row["subject"], row["question_id"]) not in dirty]
    by_subject = _by_subject(keyed)
    most = max((row["num_shots"] or 0 for row in rows.values()), default=0)
    return {
        "num": len(keyed),
        "failed": sum(row["status"] != OK for row in keyed),
        "lost_shots": sum((row["num_shots"] or 0) < most for row in keyed),
        "clean": {"num": len(clean), "micro": _micro([_is_right(row) for row in clean])},
        "groups": {
            group: _group([by_subject[one] for one in ids]) for group, ids in _groups(format, by_subject).items()
        },
        "subjects": {
            one: {"name": subject(format, one).name, "num": len(right), "micro": _micro(right)}
            for one, right in by_subject.items()
        },
    }


def _compare(before: dict[Key, Answer], after: dict[Key, Answer]) -> dict[str, Any] | None:
    better, worse, num = collections.Counter[str](), collections.Counter[str](), collections.Counter[str]()
    for key in before.keys() & after.keys():
        if before[key]["key"] is not None:
            was, now = _is_right(before[key]), _is_right(after[key])
            num[key[0]] += 1
            better[key[0]] += now and not was
            worse[key[0]] += was and not now
    ids = sorted(num)
    return paired_difference([better[i] for i in ids], [worse[i] for i in ids], [num[i] for i in ids]) if ids else None


def _groups(format: str, ids: dict[str, Any]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {OVERALL: list(ids)}
    for one in ids:
        for group in subject(format, one).groups:
            groups.setdefault(group, []).append(one)
    order = list(NAMES)
    return {group: groups[group] for group in sorted(groups, key=order.index)}


def _group(subjects: list[list[bool]]) -> dict[str, Any]:
    right, num = [sum(one) for one in subjects], [len(one) for one in subjects]
    macro: dict[str, Any] = {"accuracy": None, "interval": None}
    if num:
        accuracy = sum(r / n for r, n in zip(right, num, strict=True)) / len(num)
        macro = {"accuracy": accuracy, "interval": macro_interval(right, num)}
    return {"num": sum(num), "micro": _micro([answer for one in subjects for answer in one]), "macro": macro}


def _micro(right: list[bool]) -> dict[str, Any]:
    if not right:
        return {"right": 0, "accuracy": None, "interval": None}
    return {"right": sum(right), "accuracy": sum(right) / len(right), "interval": wilson(sum(right), len(right))}


def _by_subject(rows: list[Answer]) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = {}
    for row in rows:
        found.setdefault(row["subject"], []).append(_is_right(row))
    return found


def _is_right(row: Answer) -> bool:
    return bool(row["status"] == OK and row["verdict"] == row["key"])


def _submission(rows: list[Answer]) -> dict[str, dict[str, str]]:
    """What cevalbenchmark.com takes: subject → question id → option."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        found.setdefault(row["subject"], {})[row["question_id"]] = row["verdict"]
    return found


def _cell(figure: dict[str, Any]) -> Text:
    if figure["accuracy"] is None:
        return Text("–")
    low, high = figure["interval"]
    return Text(f"{100 * figure['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
