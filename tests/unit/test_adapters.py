"""LoRA adapters of single steps: what the engine is told, and which folders are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kun_ray.adapters import check_adapter, with_absolute_adapters, with_adapters
from kun_ray.config import ConfigError
from kun_ray.engine import EngineConfig
from kun_ray.prompts import PromptConfig
from kun_ray.steps import LabelConfig, StepsConfig


def adapter(folder: Path, rank: int) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "target_modules": ["q_proj"]}))
    return str(folder)


def test_the_engine_is_told_how_many_adapters_of_which_rank(tmp_path: Path) -> None:
    small, large = adapter(tmp_path / "small", 8), adapter(tmp_path / "large", 24)
    engine = with_adapters(EngineConfig(model="m"), [small, None, large, small]).engine
    assert engine == {"enable_lora": True, "max_loras": 2, "max_lora_rank": 32}
    own = EngineConfig(model="m", engine={"max_loras": 4, "dtype": "bfloat16"})
    assert with_adapters(own, [small]).engine == {
        "enable_lora": True,
        "max_loras": 4,
        "max_lora_rank": 8,
        "dtype": "bfloat16",
    }
    assert with_adapters(own, [None]) is own


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="holds no adapter_config.json: it is not a LoRA adapter"):
        check_adapter(str(tmp_path / "model"), "steps.label.adapter")
    with pytest.raises(ConfigError, match=r"steps.label.adapter: there is no folder .*/none"):
        check_adapter(str(tmp_path / "none"), "steps.label.adapter")
    with pytest.raises(ConfigError, match=r"rank 1024 of .* is above vLLM's 512"):
        check_adapter(adapter(tmp_path / "huge", 1024), "steps.label.adapter")


def test_workers_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(tmp_path / "small", 8)
    monkeypatch.chdir(tmp_path)
    steps = StepsConfig(label=LabelConfig(prompt=PromptConfig(user="{text}"), adapter="small"))
    found = with_absolute_adapters(steps)
    assert found.label is not None and found.label.adapter == str(tmp_path / "small") and found.score is None
