"""What replicas and ranks will hold of a card, said and checked before anything is loaded."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_input import PROMPTS, configured, finished, row

from kun_ray.config import ConfigError, load
from kun_ray.headroom import check_pools, check_training
from kun_ray.store import Folder
from kun_ray.train.config import TrainConfig


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., Folder]:
    return functools.partial(finished, tmp_path)


def with_weights(folder: str, sizes: str = "conf/shapes/yi-34b.json", **more: Any) -> str:
    """Gives a model folder the configuration of another, and weights of that size: a sparse file, which takes no disk."""
    config = json.loads((Path(PROMPTS).parents[1] / sizes).read_text()) | more
    (Path(folder) / "config.json").write_text(json.dumps(config))
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    rest = round((34.39e9 - 2 * vocabulary * hidden) / hidden)
    shapes = {
        "model.embed_tokens.weight": [vocabulary, hidden],
        "model.layers.0.mlp.up_proj.weight": [rest, hidden],
        "lm_head.weight": [vocabulary, hidden],
    }
    heads, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        heads[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(heads).encode()
    with (Path(folder) / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + end)
    return folder


def test_a_pool_says_what_it_will_hold(
    stage: Callable[..., Folder], model_folder: Callable[..., str], capsys: Any
) -> None:
    source, path = stage([row(0, tokens=300)]), with_weights(model_folder(), max_position_embeddings=4096)
    started = time.monotonic()
    check_pools(configured(source, path, "label, score, polish", "pools.p.tensor_parallel_size=2"), {"A100"})
    assert time.monotonic() - started < 10
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("pool p: 34.4 billion parameters, 34.4 GB of weights per GPU, ")
    tokens = int(line.split("per GPU, ")[1].split()[0].replace(",", ""))
    assert tokens == pytest.approx(273_000, rel=0.02)  # docs/operations.md, Sizing
    assert "256 rows at once" in line
    check_pools(configured(source, path, "label", "pools.p.accelerator=cpu", "pools.p.cpu_kv_cache_gb=3"), set())
    assert "68.8 GB of weights per engine" in (said := capsys.readouterr().out)
    assert int(said.split("per engine, ")[1].split()[0].replace(",", "")) == pytest.approx(3e9 / 245_760, rel=0.01)


@pytest.mark.parametrize(
    ("cards", "more", "advice"),
    [
        ({"L40S"}, [], "set pools.p.tensor_parallel_size=2"),
        (
            {"L40S"},
            ["tensor_parallel_size=2", "engine.gpu_memory_utilization=0.6"],
            "set pools.p.tensor_parallel_size=4",
        ),
        ({"H200", "A100-40G"}, ["accelerator_type=A100-40G"], "set pools.p.tensor_parallel_size=4"),
        ({"A100"}, ["engine.gpu_memory_utilization=0.7"], "set pools.p.tensor_parallel_size=2"),
    ],
)
def test_weights_that_no_card_holds(
    stage: Callable[..., Folder], model_folder: Callable[..., str], cards: set[str], more: list[str], advice: str
) -> None:
    source, path = stage([row(0)]), with_weights(model_folder(), max_position_embeddings=4096)
    with pytest.raises(ConfigError) as caught:
        check_pools(configured(source, path, "label", *(f"pools.p.{setting}" for setting in more)), cards)
    assert "pools.p: its weights take" in str(caught.value) and advice in str(caught.value)


def test_what_may_just_fit_gets_a_note(
    stage: Callable[..., Folder], model_folder: Callable[..., str], capsys: Any
) -> None:
    source, path = stage([row(0)]), with_weights(model_folder(), max_position_embeddings=4096)
    check_pools(configured(source, path, "label"), {"A100"})  # 68.8 of 72 GB, or of 77 where a GB is a GiB
    assert "if it does not start, set pools.p.tensor_parallel_size=2" in capsys.readouterr().out.splitlines()[1]


def test_nothing_is_refused_that_is_not_known(
    stage: Callable[..., Folder], model_folder: Callable[..., str], capsys: Any
) -> None:
    source, path = stage([row(0)]), with_weights(model_folder(), max_position_embeddings=4096)
    for cards in (set(), {"RTX-9090"}, {"A100", "RTX-9090"}, {"A100", "H200"}):
        check_pools(configured(source, path, "label"), cards)
    check_pools(configured(source, path, "label", "pools.p.engine.cpu_offload_gb=40"), {"A100"})
    said = capsys.readouterr().out.splitlines()
    assert [line.endswith("68.8 GB of weights per GPU") for line in said] == [True, True, True, False, False]
    with_weights(path, max_position_embeddings=4096, quantization_config={"quant_method": "awq"})
    check_pools(configured(source, path, "label"), {"A100"})
    check_pools(configured(source, model_folder("no_weights"), "label"), {"A100"})
    check_pools(configured(source, "nobody/nothing", "label"), {"A100"})
    assert capsys.readouterr().out == ""


def test_a_training_says_what_a_card_will_hold(model_folder: Callable[..., str], capsys: Any) -> None:
    path = with_weights(model_folder(), max_position_embeddings=4096)

    def training(*more: str) -> TrainConfig:
        given = [f"model={path}", "output=out", "data=[{path: seeds.jsonl, task: chat}]", "epochs=1", "max_tokens=2048"]
        return load(TrainConfig, [*given, "accelerator=gpu", "num_workers=8", *more])

    offloaded = ["zero.offload_optimizer=cpu", "tokens_per_micro_batch=4096"]
    with pytest.raises(ConfigError, match=r"take 68\.8 GB on each GPU, of 4[23]: set zero\.offload_optimizer=cpu"):
        check_training(training("accelerator_type=A100-40G"), {"A100-40G"})
    capsys.readouterr()
    check_training(training(*offloaded), {"A100"})
    assert "of these 8.6 of weights, gradients and optimizer (computed)" in (said := capsys.readouterr().out)
    assert "note" not in said
    check_training(training(*offloaded, "gpu_memory_gb=20"), set())
    assert "note: a GPU has 20 GB; if this runs out of memory: " in capsys.readouterr().out
    check_training(training(), {"RTX-9090"})
    check_training(training("accelerator=cpu"), {"A100-40G"})
    assert capsys.readouterr().out == ""
