"""Curiosity as a reward for each token of a rollout, and the controls that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from labkit.rlhf.cd_rlhf.module import CuriosityModule
from labkit.rlhf.logprobs import plain

if TYPE_CHECKING:
    from labkit.rlhf.rollout import RolloutBatch

Reduce = Callable[[Tensor], Tensor]


class TopKGate:
    """Open for tokens that are not among the k likeliest of the distribution that they were drawn from.

    Parameters
    ----------
    k : int
        The paper's best is 1: every token but the arg max.

    Raises
    ------
    ValueError
        When k is less than 1.

    Examples
    --------
    >>> TopKGate(2)(torch.tensor([[0, 1, 2, 9]])).tolist()       # how many tokens were likelier
    [[False, False, True, True]]
    """

    def __init__(self, k: int = 1) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be a whole number from 1, got {k!r}")
        self.k = k

    def __repr__(self) -> str:
        return f"TopKGate(k={self.k})"

    def __call__(self, ranks: Tensor | None) -> Tensor:
        """From ranks ``(B, T)``, 0 for the likeliest token, to ``(B, T)`` bool."""
        if ranks is None:
            raise ValueError(
                "the gate needs the rank of each sampled token, which this generation did not record: record it while "
                "sampling, or pass gate=None"
            )
        return ranks >= self.k

    def check(self, vocab: int) -> None:
        """Raise when no token of a vocabulary could ever pass."""
        if self.k >= vocab:
            raise ValueError(f"k = {self.k} never opens with {vocab} tokens: take k < {vocab}")


def whitened(x: Tensor, mask: Tensor, *, padding: bool = False, reduce: Reduce | None = None) -> Tensor:
    r"""Curiosity of mean 0 and variance 1: :math:`(x - \mu) / \sqrt{\sigma^2 + 10^{-8}}`, 0 on padding.

    Parameters
    ----------
    x, mask : Tensor
        ``(B, T)``; the mask is true on real tokens.
    padding : bool
        Let the zeros of the padding enter mean and variance, as in the authors' code.
    reduce : callable, optional
        Sums a tensor over processes.

    Returns
    -------
    Tensor
        ``(B, T)``; the variance is the biased one.

    Examples
    --------
    >>> mask = torch.tensor([[True, True, False]])
    >>> whitened(torch.tensor([[-1.0, -3.0, 9.0]]), mask).round(decimals=3).tolist()
    [[1.0, -1.0, 0.0]]
    """
    weight = torch.ones_like(x) if padding else mask.to(x.dtype)
    x = x * mask
    sums = torch.stack([weight.sum(), (x * weight).sum()])
    count, total = (reduce(sums) if reduce is not None else sums).unbind()
    mean = total / count.clamp(min=1)
    squares = ((x - mean).square() * weight).sum()
    variance = (reduce(squares) if reduce is not None else squares) / count.clamp(min=1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


class GateBonus:
    r"""A constant reward for each token that passes the gate: curiosity without the module.

    The control of CD-RLHF: what it wins is not due to prediction errors.

    Parameters
    ----------
    eta : float
        The reward.
    gate : TopKGate

    Raises
    ------
    ValueError
        When `eta` is negative.

    Examples
    --------
    >>> GateBonus(0.5).rewards(torch.tensor([[0, 3]]), torch.ones(1, 2, dtype=bool)).tolist()
    [[0.0, 0.5]]
    """

    def __init__(self, eta: float = 0.04, gate: TopKGate | None = None) -> None:
        check_eta(eta)
        check_gate(gate)
        self.eta, self.gate = float(eta), gate or TopKGate(1)
        self._metrics: dict[str, float] = {}

    def setup(self, trainer: Any) -> None:
        """Check the gate against the policy's vocabulary."""
        self.gate.check(trainer.policy.get_input_embeddings().weight.shape[0])

    def rewards(self, ranks: Tensor, mask: Tensor) -> Tensor:
        """``(B, T)`` float32 from ranks and mask of that shape."""
        return self.eta * (self.gate(ranks) & mask).float()

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """Token rewards ``(B, T)`` of a rollout."""
        mask = batch.mask.bool()
        sums = torch.stack([(self.gate(batch.ranks) & mask).sum(), mask.sum()])
        opened, count = batch.reduce(sums).tolist()
        self._metrics = {"curiosity/gate_open": opened / max(count, 1)}
        return self.rewards(batch.ranks, batch.mask)

    def metrics(self) -> dict[str, float]:
        """``curiosity/gate_open``: share of the last rollout's tokens that passed the gate."""
        return dict(self._metrics)


class CuriosityReward:
    r"""CD-RLHF's intrinsic reward for PPO: ``PPOTrainer(..., token_rewards=[CuriosityReward()])``.

    For token t, with the reference's last hidden states s and the policy's embedding a of the token,

    .. math:: r_t \mathrel{+}= \eta \, g_t \, \mathrm{whiten}(\tfrac12 e_t), \qquad
              e_t = \lVert f(\phi(s_t), a_t) - \phi(s_{t+1}) \rVert_2, \qquad L = \tfrac12 \overline{e}

    with the gate g. Whitening comes before the gate: a closed gate pays 0, which is what average curiosity pays, and an
    open one pays less than nothing where the error is below average. The module takes one step of AdamW on L for each of
    the policy's, with the same rows. It is thrown away in the end.

    Parameters
    ----------
    eta : float
        Weight; .04 to .08 in the paper. With 0 the run is plain RLHF, to the bit.
    gate : TopKGate or None
        None pays for every token.
    icm : CuriosityModule, optional
        One that fits the policy by default.
    lr : float
        Of the module; 1e-5 in the authors' scripts, which suits models of billions of parameters.
    whiten : bool
    whiten_padding : bool
        As the authors' code, see `whitened`.
    squared : bool
        Train on the squared error, as the paper writes it; the code takes the norm.
    schedule : callable, optional
        Factor of `lr` at each of its updates, such as the policy's own, ``PPOConfig.factor``, which the authors' code takes.
    betas, weight_decay
        Of AdamW.

    Raises
    ------
    ValueError
        When `eta` or `lr` is negative; at the trainer's start, when the widths of policy and reference differ or the
        gate could never open.

    Examples
    --------
    >>> CuriosityReward(eta=0.04)
    CuriosityReward(eta=0.04, gate=TopKGate(k=1), lr=1e-05)
    """

    needs_ref_hidden = True

    def __init__(
        self,
        eta: float = 0.04,
        gate: TopKGate | None = TopKGate(1),  # noqa: B008  (it has no state)
        icm: CuriosityModule | None = None,
        lr: float = 1e-5,
        *,
        whiten: bool = True,
        whiten_padding: bool = False,
        squared: bool = False,
        schedule: Callable[[int], float] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
    ) -> None:
        check_eta(eta)
        check_gate(gate)
        if icm is not None and not isinstance(icm, CuriosityModule):
            raise TypeError(
                f"icm must be a CuriosityModule, or None for one that fits the policy; got {icm!r}"
            )
        if not lr >= 0:
            raise ValueError(f"lr must be at least 0, got {lr!r}")
        self.eta, self.gate, self.icm, self.lr = float(eta), gate, icm, lr
        self.whiten, self.whiten_padding, self.squared = whiten, whiten_padding, squared
        self.betas, self.weight_decay, self.schedule = betas, weight_decay, schedule
        self.updates = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self._embed: nn.Module | None = None
        self._metrics: dict[str, float] = {}
        self._losses: list[float] = []

    def __repr__(self) -> str:
        return f"CuriosityReward(eta={self.eta}, gate={self.gate}, lr={self.lr})"

    def setup(self, trainer: Any) -> None:
        """Take the policy's embeddings, and make module and optimizer where there are none yet."""
        self.attach(trainer.policy)
        assert self.icm is not None
        width = plain(trainer.reference.model).config.get_text_config().hidden_size
        if width != self.icm.config.hidden_size:
            raise ValueError(
                f"the reference's hidden states have width {width}, the policy's token embeddings "
                f"{self.icm.config.hidden_size}: take a ref_model as wide as the policy"
            )

    def attach(self, policy: Any) -> None:
        """As `setup`, for a loop of one's own.

        Parameters
        ----------
        policy : PreTrainedModel
            Its input embeddings embed the tokens.
        """
        self._embed = policy.get_input_embeddings()
        weight: Tensor = self._embed.weight  # type: ignore[assignment]
        if self.gate is not None:
            self.gate.check(weight.shape[0])
        if self.icm is None:
            self.icm = CuriosityModule.from_config(policy.config)
        if weight.shape[1] != self.icm.config.hidden_size:
            raise ValueError(
                f"the policy's token embeddings have width {weight.shape[1]}, the curiosity module "
                f"{self.icm.config.hidden_size}: build it with CuriosityModule.from_model(policy)"
            )
        nn.Module.to(self.icm, weight.device)
        self.optimizer = torch.optim.AdamW(
            self.icm.parameters(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay
        )

    def error(self, ref_hidden: Tensor | None, tokens: Tensor) -> Tensor:
        """Prediction errors ``(B, T)`` from states ``(B, T + 1, D)`` and tokens ``(B, T)``; padding included."""
        return self._compare(ref_hidden, tokens)[0]

    def _compare(self, ref_hidden: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Errors, and the features of the states."""
        if self.icm is None or self._embed is None:
            raise RuntimeError("attach the policy first: CuriosityReward.attach(policy)")
        if ref_hidden is None:
            raise ValueError(
                "curiosity needs the reference's last hidden states, (B, T + 1, D): it takes a decoder-only reference "
                "that returns them"
            )
        actions = self._embed(tokens).detach()  # (B, T, D)
        return self.icm.compare(ref_hidden, actions)

    @torch.no_grad()
    def intrinsic(
        self,
        errors: Tensor,
        mask: Tensor,
        ranks: Tensor | None = None,
        *,
        reduce: Reduce | None = None,
    ) -> Tensor:
        """What each token is paid, before `eta`: halved, whitened, gated.

        Parameters
        ----------
        errors, mask, ranks : Tensor
            ``(B, T)``.
        reduce : callable, optional
            Sums over processes.

        Returns
        -------
        Tensor
            ``(B, T)``, 0 on padding and where the gate is closed.
        """
        mask = mask.bool()
        paid = 0.5 * errors.float() * mask
        if self.whiten:
            paid = whitened(paid, mask, padding=self.whiten_padding, reduce=reduce)
        if self.gate is not None:
            paid = paid * self.gate(ranks)
        return paid

    @torch.no_grad()
    def __call__(self, batch: RolloutBatch) -> Tensor:
        """Token rewards ``(B, T)`` of a rollout."""
        errors, features = self._compare(batch.ref_hidden, batch.tokens)
        paid = self.intrinsic(errors, batch.mask, batch.ranks, reduce=batch.reduce)
        mask = batch.mask.bool()
        open_ = mask if self.gate is None else self.gate(batch.ranks) & mask
        norms = features[:, 1:].float().norm(dim=-1)
        sums = torch.stack([x.sum().to(paid.dtype) for x in (mask, errors * mask, open_, paid, norms * mask)])
        count, error, opened, total, norm = batch.reduce(sums).tolist()
        self._metrics |= {
            "curiosity/error": error / max(count, 1),
            "curiosity/gate_open": opened / max(count, 1),
            "curiosity/paid": self.eta * total / max(count, 1),
            "curiosity/feature_norm": norm / max(count, 1),
        }
        return self.eta * paid

    def update(self, batch: RolloutBatch) -> None:
        """One step of the module on a minibatch of the rollout."""
        self.step(batch.ref_hidden, batch.tokens, batch.mask, reduce=batch.reduce)

    def step(
        self,
        ref_hidden: Tensor | None,
        tokens: Tensor,
        mask: Tensor,
        *,
        reduce: Reduce | None = None,
    ) -> float:
        """One optimizer step on half the mean error of the real tokens.

        Parameters
        ----------
        ref_hidden, tokens, mask : Tensor
            ``(B, T + 1, D)``, ``(B, T)``, ``(B, T)``.
        reduce : callable, optional
            Sums over processes, so that several equal one.

        Returns
        -------
        float
            The loss.
        """
        errors = self.error(ref_hidden, tokens)
        assert self.icm is not None
        assert self.optimizer is not None
        count = mask.sum()
        if reduce is not None:
            count = reduce(count)
        if not count:
            return 0.0
        errors = errors.square() if self.squared else errors
        loss = 0.5 * (errors * mask).sum() / count
        self.optimizer.zero_grad()
        loss.backward()
        shown = loss.detach()
        if reduce is not None:
            shown = reduce(shown)
            for parameter in self.icm.parameters():
                if parameter.grad is not None:
                    parameter.grad.copy_(reduce(parameter.grad))
        if self.schedule is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * self.schedule(self.updates)
        self.optimizer.step()
        self.updates += 1
        self._metrics["curiosity/loss"] = float(shown)
        return float(shown)

    def metrics(self) -> dict[str, float]:
        """Numbers of the last rollout.

        Returns
        -------
        dict
            ``curiosity/error`` (mean e), ``curiosity/gate_open`` (share of tokens), ``curiosity/paid`` (mean reward a
            token), ``curiosity/feature_norm`` (mean length of the features after a token), and ``curiosity/loss`` of the
            last step.
        """
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """Module, optimizer and the number of its updates."""
        assert self.icm is not None
        assert self.optimizer is not None
        return {
            "icm": self.icm.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        assert self.icm is not None
        assert self.optimizer is not None
        self.icm.load_state_dict(state["icm"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = int(state["updates"])


def check_gate(gate: Any) -> None:
    """Raise for a gate that cannot be asked."""
    if isinstance(gate, type) or (gate is not None and not callable(gate)):
        raise TypeError(f"gate must be a TopKGate, such as TopKGate(1), or None; got {gate!r}")


def check_eta(eta: float) -> None:
    """Raise for a negative weight, or none."""
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta < float("inf"):
        raise ValueError(f"eta must be a finite number from 0, got {eta!r}")
