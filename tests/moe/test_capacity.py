from __future__ import annotations

import pytest
import torch

from labkit.moe import expert_capacity, within_capacity


def by_counting(index, experts, capacity, sequences, order, mask):
    """First come first served, one choice at a time."""
    tokens, k = index.shape
    length = tokens // sequences
    kept = torch.zeros(tokens, k, dtype=torch.bool)
    for s in range(sequences):
        taken = [0] * experts
        span = range(s * length, (s + 1) * length)
        visits = [(t, j) for t in span for j in range(k)]
        if order == "slot":
            visits = [(t, j) for j in range(k) for t in span]
        for t, j in visits:
            if mask is not None and not mask[t]:
                continue
            e = int(index[t, j])
            if taken[e] < capacity:
                taken[e] += 1
                kept[t, j] = True
    return kept


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", ["token", "slot"])
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("capacity", [0, 1, 3, 100])
def test_first_come_first_served(capacity, sequences, order, masked):
    generator = torch.Generator().manual_seed(capacity)
    index = torch.rand(24, 4, generator=generator).topk(2).indices
    mask = torch.rand(24, generator=generator) > 0.3 if masked else None
    found = within_capacity(index, 4, capacity, sequences=sequences, order=order, mask=mask)
    assert torch.equal(found, by_counting(index, 4, capacity, sequences, order, mask))


def test_no_tokens():
    assert within_capacity(torch.zeros(0, 2, dtype=torch.long), 4, 3).shape == (0, 2)


def test_capacity_rounds_up():
    assert expert_capacity(10, 4, 1, 1.0) == 3
    assert expert_capacity(10, 4, 2, 1.25) == 7
    with pytest.raises(ValueError, match="positive; got 0"):
        expert_capacity(10, 4, 2, 0)


def test_bad_input():
    index = torch.zeros(6, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="not be negative; got -1"):
        within_capacity(index, 2, -1)
    with pytest.raises(ValueError, match="order must be"):
        within_capacity(index, 2, 1, order="random")
    with pytest.raises(ValueError, match="6 tokens are no 4 sequences"):
        within_capacity(index, 2, 1, sequences=4)
