"""Which samples make up a step, and how each rank computes its share of them. Pure functions of lengths and a seed.

A step is `batch_size` samples in an order that only the seed and the epoch decide. How they are spread over ranks and
micro-batches changes neither the loss nor the gradient, so that a run may go on with another number of ranks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Micro = list[list[int]]
"""One micro-batch: for each rank the samples that it computes at once; [] for a rank that has none left."""


def epoch_order(data: Array, weights: list[float], epoch: int, seed: int) -> Array:
    """Samples of one epoch in the order in which they are learnt, int64 [samples of the epoch].

    Args:
        data: entry of the configuration that each sample belongs to, int16 [samples].
        weights: how often each entry's samples are seen in an epoch.
        epoch: from 0. A weight below 1 takes other samples each epoch until all were seen.
    """
    chosen: list[Array] = []
    for entry, weight in enumerate(weights):
        own = np.flatnonzero(data == entry)
        start, stop = (round(len(own) * weight * n) for n in (epoch, epoch + 1))
        for lap in range(start // max(1, len(own)), math.ceil(stop / max(1, len(own)))):
            shuffled = np.random.default_rng([seed, entry, lap]).permutation(own)
            chosen.append(shuffled[max(0, start - lap * len(own)) : stop - lap * len(own)])
    whole = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
    return np.asarray(np.random.default_rng([seed, 0x5EED, epoch]).permutation(whole))


def steps_of(order: Array, batch_size: int) -> list[Array]:
    """The epoch cut into steps; the last one may hold fewer samples."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def micro_batches(samples: Array, lengths: Array, num_ranks: int, max_tokens: int, packing: bool) -> list[Micro]:
    """Spreads one step over ranks, every rank with the same number of micro-batches.

    Packed, samples go longest first into the emptiest of the fewest micro-batches that can hold them all, so that the
    ranks are about equally busy. Padded, samples of similar length go together, and each counts as the longest.

    Args:
        samples: indices of the step's samples.
        lengths: tokens of every sample.
        max_tokens: most tokens (with padding) of one rank's part of one micro-batch; no sample is longer.
    """
    by_length = samples[np.argsort(-lengths[samples], kind="stable")]
    bins = (_packed if packing else _padded)(by_length, lengths, num_ranks, max_tokens)
    cost = [sum(int(lengths[i]) for i in part) if packing else _padded_size(part, lengths) for part in bins]
    bins = [bins[i] for i in sorted(range(len(bins)), key=lambda i: -cost[i])]  # equal work side by side
    bins += [[] for _ in range(-len(bins) % num_ranks)]
    return [bins[start : start + num_ranks] for start in range(0, len(bins), num_ranks)]


def efficiency(micro: Micro, lengths: Array, packing: bool) -> float:
    """Useful tokens ÷ tokens that all ranks could have computed in the time of the busiest one: padding and waiting lower it."""
    sizes = [sum(int(lengths[i]) for i in part) if packing else _padded_size(part, lengths) for part in micro]
    useful = sum(int(lengths[i]) for part in micro for i in part)
    return useful / (max(sizes) * len(micro)) if useful else 0.0


def _packed(by_length: Array, lengths: Array, num_ranks: int, max_tokens: int) -> list[list[int]]:
    total = int(lengths[by_length].sum())
    num_bins = max(1, math.ceil(total / max_tokens))
    num_bins += -num_bins % num_ranks
    while True:
        bins: list[list[int]] = [[] for _ in range(min(num_bins, len(by_length)))]
        filled = np.zeros(len(bins), dtype=np.int64)
        for sample in by_length:
            emptiest = int(np.argmin(filled))
            if filled[emptiest] + lengths[sample] > max_tokens:
                break
            bins[emptiest].append(int(sample))
            filled[emptiest] += lengths[sample]
        else:
            return bins
        num_bins += num_ranks  # the emptiest is too full: one more micro-batch on every rank


def _padded(by_length: Array, lengths: Array, num_ranks: int, max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    most = math.ceil(len(by_length) / num_ranks)  # else one rank would take a small step alone
    for sample in by_length:
        last = bins[-1] if bins else None
        if last and len(last) < most and (len(last) + 1) * int(lengths[last[0]]) <= max_tokens:
            last.append(int(sample))
        else:
            bins.append([int(sample)])
    return bins


def _padded_size(part: list[int], lengths: Array) -> int:
    return len(part) * max((int(lengths[i]) for i in part), default=0)
