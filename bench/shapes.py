"""Model shapes, random texts and the card's measured limits, for the benchmarks."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kun_ray.demo import tiny
from kun_ray.prompts import CHATML


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-architecture model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 64_000
    context: int = 4096

    def num_parameters(self) -> int:
        """All weights, embeddings and head included."""
        return self.num_matmul_parameters() + self.vocabulary * self.hidden

    def num_matmul_parameters(self) -> int:
        """Weights that every token is multiplied with."""
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocabulary * self.hidden

    def kv_bytes_per_token(self, width: int = 2) -> int:
        """Keys and values of one token, each number `width` bytes."""
        return 2 * self.layers * self.kv_heads * (self.hidden // self.heads) * width

    def floor_seconds(self, turn: dict[str, Any], batch: int, limits: dict[str, Any], width: int = 2) -> float:
        """Least seconds for a turn on this card: what it must compute, or what decoding must read, whichever takes longer.

        t = max(2·((N − head)·computed prompt tokens + N·output tokens) / FLOPs,
                (steps·width·N + output tokens·mean context·kv) / bandwidth), steps = output tokens / batch:
        each step of decoding reads the weights once for a full batch, and every sequence's keys and values. The head is
        computed for a prompt's last token alone, and cached tokens are not computed.
        """
        weights = self.num_matmul_parameters()
        computed = turn["prompt_tokens"] - turn["cached_tokens"]
        flops = 2 * ((weights - self.vocabulary * self.hidden) * computed + weights * turn["output_tokens"])
        mean_context = (turn["prompt_tokens"] + turn["output_tokens"] / 2) / turn["rows"]
        read = turn["output_tokens"] / batch * width * weights + turn[
            "output_tokens"
        ] * mean_context * self.kv_bytes_per_token(width)
        return float(max(flops / limits["matmul_flops_per_s"], read / limits["copy_bytes_per_s"]))


SHAPES = {
    "tiny": Shape(128, 3, 4, 2, 384, tiny.VOCABULARY, 2048),
    "29m": Shape(512, 8, 8, 4, 1536, tiny.VOCABULARY, 2048),
    "0.1b": Shape(768, 12, 12, 4, 2048),
    "0.5b": Shape(1024, 24, 16, 8, 3072),
    "1.5b": Shape(2048, 24, 16, 8, 6144),
    "3b": Shape(3072, 28, 24, 8, 8192),
    "7b": Shape(4096, 32, 32, 8, 14_336),
    "34b": Shape(7168, 60, 56, 8, 20_480),
}
"""34b is Yi-34B's; the others are Llama shapes of about that many parameters with Yi's vocabulary."""


DECILES = {
    "instruction": [2, 10, 12, 14, 15, 17, 19, 22, 27, 38, 181],
    "output": [3, 26, 46, 79, 115, 161, 215, 277, 346, 405, 1200],
}
"""Characters of alpaca_zh_demo.json (1,000 pairs; llamafactory 0.9.5's source distribution): least, deciles, most."""


def save_shape(name: str, folder: Path) -> None:
    """A model folder without weights: config.json and a tokenizer of the right size."""
    shape = SHAPES[name]
    LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=1,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    _tokenizer(shape.vocabulary).save_pretrained(folder)


def save_random(shape: str, folder: Path, device: str) -> None:
    """A model folder with random weights in bf16."""
    if (folder / "config.json").is_file():
        return
    save_shape(shape, folder)
    with torch.device(device):
        network = LlamaForCausalLM._from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    network.save_pretrained(folder)


def texts(num: int, seed: int) -> list[str]:
    """Distinct texts of about 300 characters: sentences of the demo's documents, shuffled."""
    rng = random.Random(seed)
    fields = ("content", "text")
    lines = [json.loads(line) for name in ("wudao.jsonl", "skypile.jsonl") for line in tiny.read(name)]
    whole = [line[field] for line in lines for field in fields if field in line]
    sentences = [sentence + "。" for text in whole for sentence in text.split("。") if len(sentence) > 5]
    found = []
    for _ in range(num):
        text = ""
        while len(text) < 280:
            text += rng.choice(sentences)
        found.append(text[:340])
    return found


def drawn(num: int) -> list[dict[str, str]]:
    """Instruction pairs whose lengths in characters follow DECILES; their words are the demo's."""
    rng = random.Random(0)
    words = "".join(texts(200, seed=0))

    def piece(deciles: list[int]) -> str:
        length = round(float(np.interp(rng.random() * 10, range(11), deciles)))
        start = rng.randrange(len(words) - length)
        return words[start : start + length]

    return [{name: piece(deciles) for name, deciles in DECILES.items()} for _ in range(num)]


def card_limits(cpu: bool) -> dict[str, Any]:
    """Measured matmul rate (bf16, 8192³; float32, 1024³ on CPUs) and copy bandwidth (bytes read + written) of this machine."""
    import os
    import platform
    import time

    device = torch.device("cpu" if cpu else "cuda")
    size = 1024 if cpu else 8192
    dtype = torch.float32 if cpu else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    block = torch.empty(2**26 if cpu else 2**32, device=device, dtype=torch.uint8)
    other = torch.empty_like(block)

    def best(work: Any) -> float:
        times = []
        for _ in range(12):
            if not cpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
            work()
            if not cpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return sorted(times[2:])[5]

    matmul, copy = best(lambda: a @ b), best(lambda: other.copy_(block))
    name = platform.processor() or platform.machine() if cpu else torch.cuda.get_device_name()
    found = {"device": name, "matmul_flops_per_s": 2 * size**3 / matmul, "copy_bytes_per_s": 2 * block.numel() / copy}
    import transformers
    import vllm

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if cpu else torch.cuda.mem_get_info()[1]
    found["memory_bytes"] = memory
    return {**found, "torch": torch.__version__, "vllm": vllm.__version__, "transformers": transformers.__version__}


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """The demo's tokenizer, filled up with tokens that no text makes but random weights may sample."""
    small = tiny.build_tokenizer(texts(300, seed=0))
    parts = json.loads(small.backend_tokenizer.to_str())["model"]
    vocab = {**parts["vocab"], **{f"x{index}": index for index in range(len(parts["vocab"]), vocabulary)}}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in parts["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tiny.SPECIAL)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=tiny.SPECIAL[0], eos_token=tiny.SPECIAL[3], pad_token=tiny.SPECIAL[1]
    )
    wrapped.chat_template = CHATML
    return wrapped
