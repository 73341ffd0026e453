"""The mathematics of MIGU: from magnitudes to masks, and how two tasks' magnitudes and masks compare."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Signature = Mapping[str, Tensor]


def check_threshold(threshold: float) -> float:
    """Return the threshold, or raise ``ValueError`` when it lies outside [0, 1]."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ValueError(
            f"threshold must lie in [0, 1], got {threshold!r}: it is the share of rows that is masked "
            "(0 masks nothing, 0.7 is the paper's)"
        )
    return float(threshold)


def magnitude_mask(magnitudes: Tensor, threshold: float = 0.7) -> Tensor:
    r"""Mark the rows that may learn: :math:`M_i = [n_i \ge \mathrm{quantile}(n, T)]`.

    Parameters
    ----------
    magnitudes : (d_out,) or (L, d_out) tensor
        n of one layer, or of L layers of one size; any positive scale.
    threshold : float
        T in [0, 1], about the share that is masked. The quantile interpolates linearly, and ties with it stay:
        T=0 and equal magnitudes mask nothing, T=1 leaves the largest.

    Returns
    -------
    bool tensor
        Of the same shape; True may learn.

    Raises
    ------
    ValueError
        When T lies outside [0, 1].

    Examples
    --------
    >>> magnitude_mask(torch.tensor([1.0, 5.0, 3.0, 2.0]), 0.5).tolist()
    [False, True, True, False]
    """
    check_threshold(threshold)
    n = magnitudes.float()
    return n >= torch.quantile(n, threshold, dim=-1, keepdim=True)


def _same_layers(one: Signature, other: Signature) -> list[str]:
    differing = sorted(set(one) ^ set(other))
    if differing or not one:
        raise ValueError(
            f"both must hold the same layers, at least one; they differ in {', '.join(differing[:5]) or 'nothing'}"
        )
    return list(one)


def signature_distance(one: Signature, other: Signature) -> float:
    """L1 distance of two sets of normalised magnitudes, mean over layers: 0 is equal, 2 is disjoint.

    Parameters
    ----------
    one, other : mapping of str to (d_out,) tensor
        As `MIGU.magnitudes` gives them; they are normalised again.

    Raises
    ------
    ValueError
        When they do not hold the same layers.

    Examples
    --------
    >>> signature_distance({"layer": torch.tensor([1.0, 3.0])}, {"layer": torch.tensor([3.0, 1.0])})
    1.0
    """
    gaps = [
        (one[name].float() / one[name].float().sum() - other[name].float() / other[name].float().sum())
        for name in _same_layers(one, other)
    ]
    return float(torch.stack([gap.abs().sum().cpu() for gap in gaps]).mean())


def mask_overlap(one: Signature, other: Signature) -> float:
    """Jaccard overlap of the rows that two masks leave to learn, mean over layers: 1 is equal, 0 disjoint.

    Parameters
    ----------
    one, other : mapping of str to (d_out,) bool tensor
        As `MIGU.masks` gives them.

    Raises
    ------
    ValueError
        When they do not hold the same layers.

    Examples
    --------
    >>> a, b = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    >>> round(mask_overlap({"layer": a}, {"layer": b}), 3)
    0.333
    """
    names = _same_layers(one, other)
    return sum(
        float((one[name] & other[name]).sum() / (one[name] | other[name]).sum()) for name in names
    ) / len(names)
