"""Attention over packed rows that computes only the pairs within each sample; transformers knows it as `packed`.

transformers' `sdpa` treats a packed row as one sequence under a dense mask: of a row of 2,048 tokens in ten samples it
computes ten times too much. Here each sample is a call of its own on CPUs, and all go into torch's variable-length kernel
on GPUs (torch ≥ 2.11). Where a row has a mask (padding) or a model looks back only so far, it is `sdpa` after all.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed"


def register() -> None:
    """From now on models of this process may be built with `attn_implementation="packed"`."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask_of)


def mask_of(*given: Any, attention_mask: torch.Tensor | None = None, config: Any = None, **more: Any) -> Any:
    """None for a packed row, whose borders `attend` finds itself; else sdpa's mask."""
    looks_back = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if attention_mask is None and not looks_back:
        return None
    return sdpa_mask(*given, attention_mask=attention_mask, config=config, **more)


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **more: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample.

    Args:
        query, key, value: [rows, heads, tokens, head_dim]; one row unless there is a mask.
        more: `position_ids`, int64 [1, tokens], 0 where a sample begins; `scaling`.
    Returns:
        [rows, tokens, heads, head_dim]
    """
    if mask is not None:
        return sdpa_attention_forward(module, query, key, value, mask, **more)  # type: ignore[no-any-return]
    positions = more.get("position_ids")
    if positions is None or len(query) != 1:
        raise ValueError("this model does not tell its attention where samples begin: set attention: sdpa")
    key, value = (repeat_kv(tensor, module.num_key_value_groups) for tensor in (key, value))
    starts, longest = borders(positions)
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        flat = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
        found = varlen_attn(*flat, starts, starts, longest, longest, scale=more["scaling"], window_size=(-1, 0))
        return found[None], None
    attention = torch.nn.functional.scaled_dot_product_attention
    parts = [
        attention(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=more["scaling"])
        for a, b in itertools.pairwise(starts.tolist())
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def borders(positions: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(where each sample begins and the last one ends, int32 [samples + 1]; tokens of the longest one).

    Kept with the tensor: all layers ask, and on a GPU each answer would wait for it.
    """
    found: tuple[torch.Tensor, int] | None = getattr(positions, "borders", None)
    if found is None:
        begins = (positions[0] == 0).nonzero().flatten().to(torch.int32)
        starts = torch.cat([begins, begins.new_tensor([positions.shape[1]])])
        found = starts, int(starts.diff().max())
        positions.borders = found  # type: ignore[attr-defined]
    return found
