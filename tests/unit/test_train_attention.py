"""Packed attention against transformers' own: the same logits and gradients, and no sample sees another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralConfig

from kun_ray.demo import tiny
from kun_ray.train.attention import NAME, borders, register

LENGTHS = [5, 1, 9, 17]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    register()
    return tiny.build_model(layers=2)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, tiny.VOCABULARY, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    return ids, torch.cat([torch.arange(n) for n in LENGTHS])[None]


def logits(model: Any, attention: str, ids: torch.Tensor, positions: torch.Tensor, mask: Any = None) -> torch.Tensor:
    model.set_attn_implementation(attention)
    return model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits


def test_each_sample_is_as_if_alone(model: LlamaForCausalLM) -> None:
    ids, positions = rows()
    assert borders(positions)[0].tolist() == [0, 5, 6, 15, 32] and borders(positions)[1] == 17
    found = logits(model, NAME, ids, positions)
    start = 0
    for length in LENGTHS:
        part = slice(start, start + length)
        alone = logits(model, "sdpa", ids[:, part], positions[:, part])
        torch.testing.assert_close(found[:, part], alone, atol=1e-5, rtol=1e-4)
        start += length


def test_gradients_are_those_of_the_dense_mask(model: LlamaForCausalLM) -> None:
    ids, positions = rows()
    gradients = []
    for attention in (NAME, "sdpa"):
        model.zero_grad()
        logits(model, attention, ids, positions).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-4, rtol=1e-3)


def test_padded_rows_and_sliding_windows_get_their_mask(model: LlamaForCausalLM) -> None:
    ids = torch.randint(0, tiny.VOCABULARY, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    positions = torch.arange(8).expand(2, 8)
    padded = [logits(model, attention, ids, positions, mask)[mask.bool()] for attention in (NAME, "sdpa")]
    torch.testing.assert_close(*padded)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=tiny.VOCABULARY, num_key_value_heads=1, sliding_window=3, **sizes)
    sliding = AutoModelForCausalLM.from_config(config)
    ids, positions = rows()
    torch.testing.assert_close(*(logits(sliding, attention, ids, positions) for attention in (NAME, "sdpa")))
