"""Which rows an export takes: threshold, top k, quotas, splits."""

from __future__ import annotations

from pathlib import Path

import pytest
from example_export import exported, ids, lines, row, run, stage, summary_of

from kun_ray.config import KunError
from kun_ray.selection import SelectionConfig


def test_threshold_keeps_scores_equal_to_it(tmp_path: Path) -> None:
    rows = [row(0, score=0.9), row(1, score=0.8999), row(2, score=None), row(3, score=float("nan"))]
    out = run(tmp_path, rows, selection=SelectionConfig(threshold=0.9))
    assert exported(out) == ids(rows[:1])


def test_top_k_takes_the_best_and_breaks_ties_by_doc_id_whatever_the_order(tmp_path: Path) -> None:
    rows = [row(n, score=0.9 if n < 3 else 0.5) for n in range(20)]
    expected = ids(rows[:3]) | set(sorted(ids(rows[3:]))[:4])
    for name, ordered, num_parts in (("a", rows, 2), ("b", rows[::-1], 3)):
        given = stage(tmp_path / f"generate-{name}", ordered, num_parts=num_parts)
        config = {"input": given, "output": str(tmp_path / name), "selection": SelectionConfig(top_k=7)}
        assert exported(run(tmp_path, [], **config)) == expected


def test_random_selection_depends_on_the_seed_and_not_on_the_score(tmp_path: Path) -> None:
    rows = [row(n, score=n / 200) for n in range(200)]
    taken = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = SelectionConfig(top_k=50, select="random", seed=seed)
        taken[name] = exported(run(tmp_path, rows, output=str(tmp_path / name), selection=config))
    assert taken["a"] == taken["b"] != taken["c"]
    assert 0.25 < sum(entry["score"] for entry in rows if entry["doc_id"] in taken["a"]) / 50 < 0.75


@pytest.mark.parametrize(
    ("quotas", "top_k", "expected"),
    [
        ({"wudao": 0.25}, 40, {"wudao": 10, "skypile": 30}),
        ({"wudao": 0.25}, None, {"wudao": 25, "skypile": 50}),
        ({"wudao": 3, "skypile": 0}, None, {"wudao": 3, "skypile": 0}),
        ({"wudao": 1}, None, {"wudao": 50, "skypile": 50}),
    ],
)
def test_quotas_are_shares_or_counts(
    tmp_path: Path, quotas: dict[str, float], top_k: int | None, expected: dict[str, int]
) -> None:
    rows = [row(n, source=("wudao", "skypile")[n % 2], score=n / 100) for n in range(100)]
    out = run(tmp_path, rows, selection=SelectionConfig(quotas=quotas, top_k=top_k))
    assert {source: counts["exported"] for source, counts in summary_of(out)["sources"].items()} == expected
    best_wudao = [entry for entry in rows if entry["source"] == "wudao"][50 - expected["wudao"] :]
    assert {i for i in exported(out) if i in ids([r for r in rows if r["source"] == "wudao"])} == ids(best_wudao)


def test_a_quota_for_an_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KunError, match="wanjun.*the input are wudao"):
        run(tmp_path, [row(0)], selection=SelectionConfig(quotas={"wanjun": 5}))


def test_a_document_never_changes_its_split(tmp_path: Path) -> None:
    rows = [row(n, score=n / 300) for n in range(300)]
    valid = {}
    for name, top_k, fraction in (("all", None, 0.2), ("some", 100, 0.2), ("more", None, 0.5)):
        out = run(
            tmp_path, rows, output=str(tmp_path / name), valid_fraction=fraction, selection=SelectionConfig(top_k=top_k)
        )
        valid[name] = {entry["id"] for entry in lines(out / "sharegpt/valid.jsonl")}
    assert 30 < len(valid["all"]) < 90
    assert valid["some"] == valid["all"] & ids(rows[200:])
    assert valid["all"] < valid["more"]
