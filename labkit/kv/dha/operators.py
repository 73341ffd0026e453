"""Fusion operators: the matrices that mix the heads of a layer, their loss, and the schedule that merges them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.kv.dha.groups import group_of


def _group_means(omega: Tensor, member: Tensor) -> Tensor:
    """Mean row of each row's group; member (G, K) is one-hot over groups."""
    return member.T @ ((member @ omega) / member.sum(1, keepdim=True))


def fusion_loss(omega: Tensor, groups: Iterable[Iterable[int]]) -> Tensor:
    r"""How far the heads of a layer are from being merged, before the division by its value at the identity.

    .. math:: \sum_c \sum_{i \in c} \lVert \omega_i - \bar\omega^c \rVert^2

    Parameters
    ----------
    omega : Tensor
        Fusion operators, ``(K, K)``: row i makes head i.
    groups : partition of 0..K-1

    Returns
    -------
    Tensor
        Scalar. The sum of (\|c\| - 1) over groups at the identity, 0 where all rows of a group are equal.

    Examples
    --------
    >>> fusion_loss(torch.eye(4), [[0, 1, 2], [3]])
    tensor(2.)
    """
    parts = [list(group) for group in groups]
    label = torch.tensor(group_of(parts, omega.shape[0]), device=omega.device)
    member = nn.functional.one_hot(label, len(parts)).T.to(omega.dtype)
    return (omega - _group_means(omega, member)).square().sum()


@dataclass(frozen=True)
class FusionSchedule:
    """How fast the heads are merged.

    Parameters
    ----------
    steps : int, default 100
        Steps of the fusion, n.
    fall : float, default 0.7
        Share of the steps after which the target is zero.
    contract : float, default 0.15
        Share of the steps, at the end, that draw the operators to their mean. At 0 the collapse is not exact.
    penalty : float, default 5.0
        Weight of the quadratic term at the start.
    dual_rate : float, default 0.05
        Rate of the multiplier.

    Raises
    ------
    ValueError
        For a value outside its range.

    Examples
    --------
    >>> schedule = FusionSchedule(steps=100)
    >>> [round(schedule.target(k), 2) for k in (0, 35, 70)], schedule.contraction(84), schedule.contraction(99)
    ([1.0, 0.25, 0.0], 0.0, 1.0)
    """

    steps: int = 100
    fall: float = 0.7
    contract: float = 0.15
    penalty: float = 5.0
    dual_rate: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be an int of at least 1; got {self.steps!r}")
        if not 0 < self.fall <= 1:
            raise ValueError(f"fall is a share of the steps in (0, 1]; got {self.fall!r}")
        if not 0 <= self.contract <= 1:
            raise ValueError(f"contract is a share of the steps in [0, 1]; got {self.contract!r}")
        for name in ("penalty", "dual_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)!r}")

    def target(self, step: int) -> float:
        """Target t_k of the fusion loss."""
        return max(0.0, 1 - step / (self.fall * self.steps)) ** 2

    def weight(self, step: int) -> float:
        """Weight of the quadratic term, rho_k."""
        return self.penalty * (1 + step / 5)

    def contraction(self, step: int) -> float:
        """Share of the way to the mean that the operators are drawn after this step."""
        count = math.ceil(self.contract * self.steps)
        left = self.steps - 1 - step
        if left >= count:
            return 0.0
        return 1.0 if left <= 0 else 0.3 + 0.7 * (1 - left / max(1, count - 1))


class FusedProjection(nn.Module):
    """A key or value projection whose heads are combinations of those of the checkpoint.

    The weights are mixed, not the outputs: biases mix alike, and rotary embedding comes after.
    """

    member: Tensor

    def __init__(self, linear: nn.Linear, groups: Iterable[Iterable[int]], heads: int) -> None:
        super().__init__()
        self.linear = linear
        self.groups = [list(group) for group in groups]
        label = torch.tensor(group_of(self.groups, heads))
        weight = linear.weight
        member = nn.functional.one_hot(label, len(self.groups)).T.to(weight.device, torch.float32)
        self.register_buffer("member", member)
        self.omega = nn.Parameter(torch.eye(heads, device=weight.device))

    def operators(self) -> Tensor:
        """The fusion operators, ``(K, K)``, zero between groups."""
        return self.omega * (self.member.T @ self.member)

    def distance(self) -> Tensor:
        """The fusion loss of this projection, not normalised."""
        omega = self.operators()
        return (omega - _group_means(omega, self.member)).square().sum()

    @torch.no_grad()
    def contract(self, share: float) -> None:
        """Draw the operators to the mean of their group."""
        omega = self.operators()
        self.omega.copy_(omega + share * (_group_means(omega, self.member) - omega))

    @torch.no_grad()
    def mix(self) -> Tensor:
        """The mean operators, ``(G, K)``."""
        return (self.member @ self.operators()) / self.member.sum(1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.linear.weight
        bias: Tensor | None = self.linear.bias
        omega = self.operators().to(weight.dtype)
        mixed = (omega @ weight.view(len(omega), -1)).view_as(weight)
        if bias is not None:
            bias = (omega @ bias.view(len(omega), -1)).view_as(bias)
        return nn.functional.linear(x, mixed, bias)
