"""The paper's ablations, one configuration each: every one loads, and differs from its other side in what it says alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kun_ray.config import load, to_dict
from kun_ray.export import ExportConfig
from kun_ray.generate import GenerateConfig
from kun_ray.steps import build_step

CONF = Path(__file__).parents[2] / "conf"
PLACES = ["input=in", "output=out"]
MODEL = ["pools.chat.model=chat"]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in flat(item, f"{prefix}.{name}").items()}
    return {prefix.strip("."): value}


def differences(schema: type, one: str, other: str, *more: str) -> dict[str, tuple[Any, Any]]:
    a, b = (flat(to_dict(load(schema, [str(CONF / path), *PLACES, *more]))) for path in (one, other))
    return {key: (a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)}


def test_scoring_the_pair_changes_the_score_step_alone(tokenizer):
    found = differences(GenerateConfig, "ablations/score_instruction.yaml", "ablations/score_pair.yaml", *MODEL)
    assert {key.split(".")[2] for key in found} == {"input", "candidates", "values", "threshold", "tag", "prompt"}
    assert all(key.startswith("steps.score.") for key in found)
    assert found["steps.score.input"] == ("instruction", "pair")
    for side, fields in (("instruction", {"instruction"}), ("pair", {"instruction", "text"})):
        config = load(GenerateConfig, [str(CONF / f"ablations/score_{side}.yaml"), *PLACES, *MODEL])
        step = build_step("score", config.steps, tokenizer)
        assert {piece for piece in step.prompt.pieces if isinstance(piece, str)} == fields
        assert config.pools["chat"].steps == ["score", "polish"]
    assert len(step.candidates) == 5


def test_the_instruction_side_asks_what_the_full_chain_asks():
    ours = load(GenerateConfig, [str(CONF / "ablations/score_instruction.yaml"), *PLACES, *MODEL])
    chain = load(GenerateConfig, [str(CONF / "generate.yaml"), *PLACES, *MODEL, "pools.label.model=label"])
    assert to_dict(ours)["steps"] == to_dict(chain)["steps"]
    assert to_dict(ours)["pools"]["chat"] == to_dict(chain)["pools"]["chat"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("ablations/polish_none.yaml", {"reply": ("answer", "text")}),
        ("ablations/select_random.yaml", {"selection.select": ("top", "random")}),
    ],
)
def test_an_ablation_of_the_export_changes_one_key(path, expected):
    assert differences(ExportConfig, "export.yaml", path) == expected
