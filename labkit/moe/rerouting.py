"""How much depends on the router's choice: send tokens to other experts and see what the model loses.

``reroute`` overrides the choice for some tokens and leaves the rest. The other experts' weights are their probabilities,
scaled so that they sum to what the weights of the model's own choice sum to: 1 in Mixtral, the largest probability in
Switch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from labkit.moe.redirect import BlockCall, Redirect
from labkit.moe.routing import RoutingInfo
from labkit.moe.stats import router_entropy
from labkit.moe.uncertainty import EPS

__all__ = ["reroute"]

TOKENS = ("uncertain", "certain", "all")
HOW = ("random", "bottom", "worst")


@contextmanager
def reroute(
    model: nn.Module,
    tokens: str | Mapping[int, Tensor] = "uncertain",
    how: str = "random",
    *,
    threshold: float | None = None,
    seed: int = 0,
    layers: Sequence[int] | None = None,
) -> Iterator[dict[int, int]]:
    """Send tokens to other experts than the router chose.

    Parameters
    ----------
    model : nn.Module
        As for :class:`~labkit.moe.Redirect`, in training or evaluation.
    tokens : {"uncertain", "certain", "all"} or dict of int to Tensor, default "uncertain"
        Which tokens: those whose router entropy, in the model as it runs, reaches ``threshold``; those below it; all. Or
        masks ``(T,)`` by layer, such as :func:`uncertain_tokens` of another model, valid for one batch. Padding is left.
    how : {"random", "bottom", "worst"}, default "random"
        k experts drawn evenly (the router's own among them); the k with the smallest probabilities; the k whose
        outputs are the farthest from what the router's choice gives, which runs every expert on those tokens.
    threshold : float, optional
        In nats; needed for ``"uncertain"`` and ``"certain"``.
    seed : int, default 0
        Of the draws. They are made for all tokens, so that two models called alike get the same.
    layers : sequence of int, optional
        Layers concerned; all by default.

    Yields
    ------
    dict of int to int
        Tokens sent elsewhere in each layer, counted up over the calls.

    Raises
    ------
    ValueError
        For an unknown ``tokens`` or ``how``, a missing or superfluous threshold, unknown layers, or masks that do not fit
        the batch.
    RuntimeError
        In a forward pass, if another rule changes the same layers.

    Examples
    --------
    >>> import torch
    >>> from labkit.testbeds.models import tiny
    >>> model, ids = tiny("mixtral", width=16, heads=2, seed=0).eval(), torch.tensor([[1, 2, 3]])
    >>> before = model(ids).logits
    >>> with reroute(model, "all", "bottom") as sent:
    ...     during = model(ids).logits
    >>> sent, torch.equal(during, before), torch.equal(model(ids).logits, before)
    ({0: 3, 1: 3}, False, True)
    """
    if how not in HOW:
        raise ValueError(f"how must be one of {', '.join(map(repr, HOW))}; got {how!r}")
    if isinstance(tokens, str):
        if tokens not in TOKENS:
            raise ValueError(
                f"tokens must be one of {', '.join(map(repr, TOKENS))}, or masks by layer; got {tokens!r}"
            )
        if (tokens == "all") != (threshold is None):
            what = "takes no threshold" if tokens == "all" else "needs a threshold in nats"
            raise ValueError(f"tokens={tokens!r} {what}")
    elif not isinstance(tokens, Mapping):
        raise TypeError(f"tokens must be a name or a dict of masks by layer; got {type(tokens).__name__}")
    elif threshold is not None:
        raise ValueError("masks by layer take no threshold")
    elif layers is None:
        layers = sorted(tokens)
    elif set(layers) - set(tokens):
        raise ValueError(f"there is no mask for the layers {sorted(set(layers) - set(tokens))}")
    sent: dict[int, int] = {}
    generator = torch.Generator().manual_seed(seed)

    def rule(info: RoutingInfo, call: BlockCall) -> RoutingInfo:
        if info.pairs is not None:
            raise RuntimeError(
                f"another rule has decided what layer {info.layer} computes (GlobalWorkspace in training?): leave it, or "
                "call model.eval()"
            )
        draws = torch.rand(info.num_tokens, info.num_experts, generator=generator)
        concerned = _concerned(info, tokens, threshold) & info.real()
        sent[info.layer] = sent.get(info.layer, 0) + int(concerned.sum())
        if not concerned.any():
            return info
        if how == "worst":
            draws = _distance(info, call, concerned)
        elif how == "bottom":
            draws = -info.probs.detach()
        index = torch.where(
            concerned[:, None], draws.to(info.index.device).topk(info.top_k).indices, info.index
        )
        scores = info.probs.gather(1, index)
        mass = info.weights.sum(1, keepdim=True)
        weights = scores / scores.sum(1, keepdim=True).clamp(min=1e-30) * mass
        weights = torch.where(concerned[:, None], weights.to(info.weights.dtype), info.weights)
        return info.replace(index=index, weights=weights)

    with Redirect(model, rule, layers=layers):
        yield sent


def _concerned(info: RoutingInfo, tokens: str | Mapping[int, Tensor], threshold: float | None) -> Tensor:
    if not isinstance(tokens, str):
        mask = tokens[info.layer].reshape(-1).bool().to(info.logits.device)
        if mask.shape[0] != info.num_tokens:
            raise ValueError(
                f"the mask of layer {info.layer} has {mask.shape[0]} tokens and the batch {info.num_tokens}: masks hold "
                "for the batch that they were made on"
            )
        return mask
    if threshold is None:
        return info.real()
    reached = router_entropy(info.logits.detach(), eps=EPS) >= threshold
    return reached if tokens == "uncertain" else ~reached


def _distance(info: RoutingInfo, call: BlockCall, concerned: Tensor) -> Tensor:
    """Distance ``(T, E)`` of each expert's output from the mean that the router's choice gives; 0 elsewhere."""
    if call.hidden is None:
        raise RuntimeError("how='worst' reads the block's input: call the block as a module, not by run()")
    with torch.no_grad():
        outputs = call.block.expert_outputs(call.hidden[concerned]).float()  # (U, E, D)
        weights = info.weights[concerned].float()
        shares = weights / weights.sum(1, keepdim=True).clamp(min=1e-30)
        picked = info.index[concerned][..., None].expand(-1, -1, outputs.shape[-1])
        own = (outputs.gather(1, picked) * shares[..., None]).sum(1, keepdim=True)
        found = torch.zeros_like(info.probs)
        found[concerned] = (outputs - own).norm(dim=-1)
    return found
