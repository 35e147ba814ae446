"""A candidate for packed attention on GPUs without flash-attn: torch's own variable-length kernel (torch ≥ 2.11).

`sdpa` computes a packed row as one sequence under a dense mask: all pairs of 4,096 tokens, most of them masked. This one
computes only the pairs within each sample. bench/training.py --gpu measures both; on CPUs the same borders go through sdpa
sample by sample, so that the smoke run compares the losses.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import flash_attention_mask


def register() -> None:
    """From now on transformers knows `varlen`; for packed rows only."""
    AttentionInterface.register("varlen", attend)
    AttentionMaskInterface.register("varlen", flash_attention_mask)


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **more: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample: query [1, heads, tokens, head_dim] → [1, tokens, heads, head_dim]."""
    if mask is not None:
        raise ValueError("varlen attends to packed rows only")
    key, value = (repeat_kv(tensor, module.num_key_value_groups) for tensor in (key, value))
    starts, longest = borders(more["position_ids"])
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        flat = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        out = varlen_attn(*flat, starts, starts, longest, longest, scale=more["scaling"], window_size=(-1, 0))
        return out[None], None
    attention, spans = torch.nn.functional.scaled_dot_product_attention, itertools.pairwise(starts.tolist())
    pieces = [[tensor[:, :, a:b] for tensor in (query, key, value)] for a, b in spans]
    parts = [attention(*piece, is_causal=True, scale=more["scaling"]) for piece in pieces]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def borders(positions: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(where samples begin and the last ends, int32 [samples + 1]; longest) of [1, tokens]; found once for all layers."""
    found: tuple[torch.Tensor, int] | None = getattr(positions, "borders", None)
    if found is None:
        begins = (positions[0] == 0).nonzero().flatten().to(torch.int32)
        starts = torch.cat([begins, begins.new_tensor([positions.shape[1]])])
        found = starts, int(starts.diff().max())
        positions.borders = found  # type: ignore[attr-defined]
    return found
