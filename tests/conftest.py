"""Parts that many tests share: a real tokenizer trained on the demo's own texts, and model folders without weights."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from kun_ray.prompts import CHATML

REPO = Path(__file__).parents[1]
CONTROL = ("<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """In a shell's background, processes begin with SIGINT ignored, and what the tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo_texts() -> list[str]:
    """Every string of the demo's corpora and seeds."""
    lines = [line for path in sorted((REPO / "kun_ray/demo").glob("*.jsonl")) for line in path.read_text().splitlines()]
    texts: list[str] = []
    for line in lines:
        try:
            texts += [value for value in json.loads(line).values() if isinstance(value, str)]
        except (ValueError, AttributeError):
            continue  # dirt.jsonl holds broken records on purpose
    return texts


@pytest.fixture(scope="session")
def tokenizer(demo_texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML control tokens. Shared: never change it."""
    from kun_ray.demo.tiny import build_tokenizer

    return build_tokenizer(demo_texts)


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, no merges: 好 (E5 A5 BD) and 差 (E5 B7 AE) begin with the same token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(CONTROL))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    wrapped.chat_template = CHATML
    return wrapped


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., str]:
    """Makes a model folder with a tokenizer and a config.json, but no weights."""

    def make(name: str = "model", context: int = 2048, chat_template: str | None = CHATML) -> str:
        folder = tmp_path / name
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, max_position_embeddings=context).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        template = folder / "chat_template.jinja"
        template.unlink() if chat_template is None else template.write_text(chat_template)
        return str(folder)

    return make
