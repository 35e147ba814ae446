"""Schedules, checkpoints on disk, DeepSpeed's configuration, memory, admission's comparisons."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kun_ray.config import ConfigError, KunError, load
from kun_ray.cost import cost_of, peak_flops
from kun_ray.train import checkpoint
from kun_ray.train.admission import compare
from kun_ray.train.batch import learning_rate
from kun_ray.train.config import LoraConfig, TrainConfig
from kun_ray.train.dry import cheapest_change, dry_run, validate
from kun_ray.train.fingerprint import _content
from kun_ray.train.memory import memory_of
from kun_ray.train.zero import deepspeed_config

REPO = Path(__file__).parents[2]
PROFILES = [("yi-34b-8xa100", "yi-34b"), ("yi-34b-16xa100", "yi-34b"), ("yi-6b-8xa100", "yi-6b")]


def configured(*argv: str) -> TrainConfig:
    return load(TrainConfig, ["model=m", "output=o", "data=[{path: x.jsonl}]", *argv])


@pytest.mark.parametrize(("profile", "shape"), PROFILES)
def test_profiles_pass_a_dry_run_without_a_gpu(profile, shape, capsys):
    argv = [str(REPO / f"conf/train/{profile}.yaml"), "data=[{path: x.jsonl}]", "output=o", "dry_run=true"]
    config = load(TrainConfig, [*argv, f"model_config={REPO}/conf/shapes/{shape}.json"])
    found = dry_run(config)
    assert found["parameters"] == {"yi-34b": 34_388_917_248, "yi-6b": 6_061_035_520}[shape]
    assert 0 < found["memory_gb"]["gpu"] < 80
    assert "sum" in capsys.readouterr().out


def test_a_run_that_does_not_fit_is_refused_with_the_change_that_makes_it_fit():
    argv = [str(REPO / "conf/train/yi-34b-8xa100.yaml"), "data=[{path: x.jsonl}]", "output=o", "dry_run=true"]
    config = load(TrainConfig, [*argv, f"model_config={REPO}/conf/shapes/yi-34b.json", "zero.offload_optimizer=none"])
    with pytest.raises(ConfigError, match=r"81.0 GB on each GPU, of 80: set tokens_per_micro_batch=2048"):
        dry_run(config)


def test_what_the_optimizer_takes_of_the_host_is_counted_too():
    argv = [str(REPO / "conf/train/yi-34b-8xa100.yaml"), "data=[{path: x.jsonl}]", "output=o", "dry_run=true"]
    argv.append(f"model_config={REPO}/conf/shapes/yi-34b.json")
    memory = dry_run(load(TrainConfig, argv))["memory_gb"]
    assert memory["host"] * 8 == pytest.approx(18 * 34.389, rel=1e-3) and memory["gradients"] == 0
    with pytest.raises(ConfigError, match=r"619 GB of host memory on each node, of 512"):
        dry_run(load(TrainConfig, [*argv, "host_memory_gb=512"]))


def test_the_cheapest_change_is_tried_first():
    config = configured(
        "num_workers=8", "max_tokens=2048", "tokens_per_micro_batch=4096", "gradient_checkpointing=false"
    )
    cost = cost_of(str(REPO / "conf/shapes/yi-6b.json"), config.lora)
    assert cheapest_change(config, cost, 30) == "set gradient_checkpointing=true"
    kept = dataclasses.replace(config, gradient_checkpointing=True)
    assert cheapest_change(kept, cost, memory_of(cost, kept)["gpu"] - 1) == "set tokens_per_micro_batch=2048"


def test_lora_trains_little():
    config = dataclasses.replace(configured(), lora=LoraConfig(rank=16))
    cost = cost_of(str(REPO / "conf/shapes/yi-6b.json"), config.lora)
    assert cost.num_trained < cost.num_parameters / 100
    assert memory_of(cost, config)["optimizer"] == pytest.approx(12 * cost.num_trained / 1e9)


def test_flops_follow_the_formula_and_mfu_their_share_of_the_peak():
    cost = cost_of(str(REPO / "conf/shapes/yi-34b.json"))
    assert cost.flops([2048]) / 2048 == pytest.approx(6 * 33.93e9 + 12 * 60 * 7168 * 2048, rel=1e-3)
    assert cost.mfu([2048], 1.0, 2, cost.flops([2048])) == 0.5
    assert cost.mfu([2048], 1.0, 2, None) is None
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("cpu") is None


def test_deepspeed_reads_the_configuration_and_keeps_rope_in_float32():
    config = configured("zero.offload_optimizer=cpu", "num_workers=16", "zero.hpz_partition_size=8")
    validate(config)
    settings = deepspeed_config(config)
    assert settings["data_types"]["keep_in_fp32_modules"] == ["inv_freq"]
    assert settings["managed_gradient_accumulation"] is False
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    with pytest.raises(ConfigError, match="hpz_partition_size"):
        validate(configured("num_workers=6", "zero.hpz_partition_size=4"))


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)])
def test_the_rate_rises_to_its_peak_and_falls_as_scheduled(schedule, last):
    config = configured("lr=1.0", "warmup=0.1", f"schedule={schedule}")
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(last)
    assert sorted(rates[9:], reverse=True) == rates[9:]


def saved(folder: Path, step: int, num_ranks: int = 2) -> Path:
    target = folder / checkpoint.tag(step)
    target.mkdir(parents=True)
    (target / "shard").write_bytes(b"x" * 10)
    checkpoint.mark_complete(target, step, num_ranks)
    return target


def test_the_newest_whole_checkpoint_is_chosen_and_a_torn_one_never(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    saved(tmp_path, 10)
    torn = saved(tmp_path, 20)
    (torn / "shard").write_bytes(b"x")
    unfinished = saved(tmp_path, 30)
    (unfinished / checkpoint.COMPLETE).unlink()
    found = checkpoint.newest(tmp_path)
    assert found is not None and (found["step"], found["num_ranks"]) == (10, 2)


def test_prune_keeps_the_newest_whole_ones_and_what_is_newer(tmp_path):
    for step in (10, 20, 30):
        saved(tmp_path, step)
    (saved(tmp_path, 5) / checkpoint.COMPLETE).unlink()
    (saved(tmp_path, 40) / checkpoint.COMPLETE).unlink()  # another rank may still be writing it
    checkpoint.prune(tmp_path, 2)
    assert sorted(int(p.name[-7:]) for p in tmp_path.iterdir()) == [20, 30, 40]


def test_admission_says_where_the_difference_lies():
    rng = np.random.default_rng(0)
    trained = [rng.normal(-3, 1, 400)]
    figures = compare("m", trained, [trained[0] + rng.normal(0, 0.01, 400)], 0.05)
    assert figures["mean_abs_diff"] < 0.02 and figures["num_tokens"] == 400
    with pytest.raises(KunError, match="RoPE"):
        compare("m", trained, [trained[0] + np.linspace(0, 2, 400)], 0.05)
    with pytest.raises(KunError, match="the same all along"):
        compare("m", trained, [trained[0] + 1.0], 0.05)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data=[]", "data: give at least one"),
        ("tokens_per_micro_batch=100", "must hold the longest sample"),
        ("data=[{path: x, task: label}]", "steps.label has no prompt"),
        ("schedule=step", "cosine, linear, constant"),
        ("data=[{path: x, task: pretrain}]", "chat, label, score, polish"),
    ],
)
def test_wrong_values_are_refused(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(argument)


def test_shapes_are_readable_by_transformers() -> None:
    for file in (REPO / "conf/shapes").glob("*.json"):
        shape: dict[str, Any] = json.loads(file.read_text())
        assert shape["model_type"] == "llama"


def test_the_digest_of_data_is_that_of_its_files(tmp_path: Path) -> None:
    """An export, its published copy, which has no _SUCCESS, and a changed one."""
    for name in ("export", "copy", "changed"):
        (tmp_path / name / "sharegpt").mkdir(parents=True)
        (tmp_path / name / "sharegpt/train.jsonl").write_text(f'{{"id": "{name == "changed"}"}}\n')
        (tmp_path / name / "dataset_info.json").write_text("{}")
    (tmp_path / "export/_SUCCESS").touch()
    export, copy, changed = (_content(str(tmp_path / name)) for name in ("export", "copy", "changed"))
    assert export == copy != changed
