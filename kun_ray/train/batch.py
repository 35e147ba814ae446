"""What one optimizer step computes with: the tensors of a rank's part of a micro-batch, and the learning rate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from kun_ray.train.config import TrainConfig
from kun_ray.train.data import Samples


def collate(samples: Samples, part: list[int], packing: bool, device: torch.device) -> dict[str, Any]:
    """The tensors of one rank's part of a micro-batch: one row of samples end to end, or one padded row for each."""
    if not part:  # this rank has nothing left: two tokens that count for nothing
        blank = torch.zeros((1, 2), dtype=torch.int64, device=device)
        return {"ids": blank, "targets": blank - 100, "positions": torch.arange(2, device=device)[None], "mask": None}
    pieces = [samples.sample(index) for index in part]
    longest = max(len(ids) for ids, _ in pieces)
    rows = []
    for ids, said in pieces:
        targets = np.full(len(ids), -100, dtype=np.int64)
        targets[:-1][said[1:]] = ids[1:][said[1:]]
        rows.append((ids.astype(np.int64), targets, np.arange(len(ids)), np.ones(len(ids), dtype=np.int64)))
    if packing:
        joined = [np.concatenate(column)[None] for column in zip(*rows, strict=True)]
    else:
        fill = (0, -100, 0, 0)
        joined = [
            np.stack([np.pad(row[n], (0, longest - len(row[n])), constant_values=fill[n]) for row in rows])
            for n in range(4)
        ]
    ids, targets, positions, mask = (torch.from_numpy(array).to(device) for array in joined)
    return {"ids": ids, "targets": targets, "positions": positions, "mask": None if packing else mask}


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Rate of step `step` (from 0) out of `num_steps`: linear warm-up, then cosine, linear or constant."""
    warm = math.ceil(config.warmup * num_steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    left = 1 - (step - warm) / max(1, num_steps - warm)
    share = {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}[config.schedule]
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
