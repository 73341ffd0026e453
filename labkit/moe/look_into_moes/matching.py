r"""Are two experts the same up to the order of their neurons? (S3)

The neurons of one expert are matched with those of another so that the sum of cosines is greatest. Two numbers follow:
how much more alike the flattened matrices are once the second is reordered, and Kendall's :math:`\tau` between the
matching and the original order (1 where the order is kept, 0 where it is arbitrary).

A gain alone says little: matching picks the best of many, so that *random* matrices gain too.
:func:`random_gain` gives that baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["exact", "greedy", "auto"]
METHODS = ("exact", "greedy", "auto")
EXACT_UP_TO = 2048
"""Neurons up to which ``method="auto"`` solves the assignment exactly; it costs their third power."""


@dataclass(frozen=True)
class NeuronMatch:
    """The neurons of expert a matched with those of expert b.

    Attributes
    ----------
    rows, columns : Tensor
        ``(M,)`` int64 each: neuron ``rows[i]`` of a goes with neuron ``columns[i]`` of b; rows ascend.
    before : float
        Cosine of the flattened neurons ``rows`` of a and ``rows`` of b.
    similarity : float
        Cosine of the flattened neurons ``rows`` of a and ``columns`` of b.
    tau : float
        Kendall's tau-b between the matching and the original order; NaN for fewer than two matched neurons.
    method : str
        "exact" or "greedy".
    neurons : int
        f, of which M were matched.
    """

    rows: Tensor
    columns: Tensor
    before: float
    similarity: float
    tau: float
    method: str
    neurons: int

    @property
    def gain(self) -> float:
        """How much reordering raises the similarity."""
        return self.similarity - self.before

    @property
    def matched(self) -> float:
        """Share M/f of the neurons that were matched."""
        return len(self.rows) / self.neurons


def kendall_tau(order: Tensor) -> float:
    """Kendall's tau between a matching's columns and their rows' order.

    Examples
    --------
    >>> import torch
    >>> kendall_tau(torch.tensor([0, 1, 2, 3])), kendall_tau(torch.tensor([3, 2, 1, 0]))
    (1.0, -1.0)
    """
    from scipy.stats import kendalltau

    if len(order) < 2:
        return float("nan")
    return float(kendalltau(range(len(order)), order.tolist()).statistic)


def _flat_cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    scale = float(a.norm() * b.norm())
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def _unit(neurons: Tensor) -> Tensor:
    return torch.nn.functional.normalize(neurons.float(), dim=-1, eps=1e-30)


def mutual_nearest(a: Tensor, b: Tensor, block: int = 2048) -> tuple[Tensor, Tensor]:
    """Neurons that are each other's most similar one.

    Parameters
    ----------
    a, b : Tensor
        ``(M, D)`` and ``(f, D)``.
    block : int
        Rows of a whose similarities are in memory at a time.

    Returns
    -------
    rows, columns : Tensor
        int64, rows ascending.

    Examples
    --------
    >>> import torch
    >>> rows, columns = mutual_nearest(torch.eye(3), torch.eye(3)[[2, 0, 1]])
    >>> rows.tolist(), columns.tolist()
    ([0, 1, 2], [1, 2, 0])
    """
    a, b = _unit(a), _unit(b)
    nearest = torch.empty(len(a), dtype=torch.long, device=a.device)
    best = torch.full((len(b),), -torch.inf, device=a.device)
    owner = torch.zeros(len(b), dtype=torch.long, device=a.device)
    for begin in range(0, len(a), block):
        cosine = a[begin : begin + block] @ b.T
        nearest[begin : begin + block] = cosine.argmax(1)
        high, place = cosine.max(0)
        better = high > best
        best, owner = torch.where(better, high, best), torch.where(better, place + begin, owner)
    rows = torch.arange(len(a), device=a.device)
    mutual = owner[nearest] == rows
    return rows[mutual].cpu(), nearest[mutual].cpu()


def match_neurons(
    a: Tensor, b: Tensor, method: Method = "auto", *, max_neurons: int | None = None, seed: int = 0
) -> NeuronMatch:
    """Match the neurons of two experts.

    Parameters
    ----------
    a, b : Tensor
        ``(f, D)`` each: rows of W_up or W_act, columns of W_down.
    method : {"auto", "exact", "greedy"}
        "exact" is the assignment of greatest total cosine (time f³), "greedy" keeps the mutually nearest pairs only
        (time f²); "auto" is exact up to `EXACT_UP_TO` neurons (of the sample, if there is one).
    max_neurons : int, optional
        Take at most so many neurons of a, drawn at random, and match them with all of b. Kendall's tau is then estimated
        without bias where matches are clear; the similarity is that of the sample, and is higher than for all neurons
        where they are not, because there is less competition for the best partners.
    seed : int
        Of the sample.

    Returns
    -------
    NeuronMatch

    Raises
    ------
    ValueError
        For shapes that differ, an unknown method, or `max_neurons` below 2.

    Examples
    --------
    >>> import torch
    >>> a = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    >>> found = match_neurons(a, a.flip(0))
    >>> found.columns.tolist(), round(found.similarity, 4), round(found.tau, 4)
    ([5, 4, 3, 2, 1, 0], 1.0, -1.0)
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(
            f"experts of other shapes cannot be matched neuron by neuron: {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}; got {method!r}")
    if max_neurons is not None and max_neurons < 2:
        raise ValueError(f"max_neurons must be at least 2, got {max_neurons}")
    neurons = len(a)
    sample = torch.arange(neurons)
    if max_neurons is not None and max_neurons < neurons:
        drawn = torch.randperm(neurons, generator=torch.Generator().manual_seed(seed))[:max_neurons]
        sample = drawn.sort().values
    if method == "auto":
        method = "exact" if len(sample) <= EXACT_UP_TO else "greedy"
    part = a[sample.to(a.device)]
    if method == "exact":
        from scipy.optimize import linear_sum_assignment

        found, matched = linear_sum_assignment((_unit(part) @ _unit(b).T).cpu().numpy(), maximize=True)
        rows, columns = torch.as_tensor(found), torch.as_tensor(matched)
    else:
        rows, columns = mutual_nearest(part, b)
    rows = sample[rows]
    at, to = rows.to(a.device), columns.to(b.device)
    before = _flat_cosine(a[at], b[at]) if len(rows) else 0.0
    after = _flat_cosine(a[at], b[to]) if len(rows) else 0.0
    return NeuronMatch(rows, columns, before, after, kendall_tau(columns), method, neurons)


def random_gain(
    neurons: int,
    width: int,
    draws: int = 8,
    seed: int = 0,
    method: Method = "auto",
    *,
    max_neurons: int | None = None,
) -> float:
    """Mean gain of similarity from matching two matrices of independent Gaussian numbers: the baseline of a gain.

    Parameters
    ----------
    neurons, width : int
        f and D.
    draws : int
        Pairs that the mean is taken over.
    seed : int
        Of the numbers.
    method, max_neurons
        As in `match_neurons`; a gain must be compared with a baseline of the same kind.

    Examples
    --------
    >>> round(random_gain(32, 48), 1), round(random_gain(32, 4096), 2)
    (0.3, 0.03)
    """
    if min(neurons, width, draws) < 1:
        raise ValueError(f"neurons, width and draws must be positive; got {neurons}, {width} and {draws}")
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(draws):
        a, b = torch.randn(2, neurons, width, generator=generator)
        total += match_neurons(a, b, method, max_neurons=max_neurons, seed=seed).gain
    return total / draws


def rotated_gain(a: Tensor, b: Tensor, seed: int = 0, method: Method = "auto") -> float:
    """Gain from matching after a random rotation of the second expert's neurons: a baseline with the same norms.

    The rotation keeps each expert's own geometry (norms of the neurons, angles between them) and destroys what the two
    have in common.

    Parameters
    ----------
    a, b : Tensor
        ``(f, D)``.
    seed : int
        Of the rotation.
    method
        As in `match_neurons`.
    """
    draw = torch.randn(a.shape[1], a.shape[1], generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(draw)
    rotation = (q * r.diagonal().sign()).to(b.device)  # without the signs, rotations are not uniform
    return match_neurons(a, b.float() @ rotation, method).gain
