r"""What a causal model says about given tokens, without the logits of a whole batch in memory.

With the hidden state h before a token y and the head's rows W,

.. math:: l = W h / \tau, \qquad \log p(y) = l_y - \mathrm{logsumexp}(l), \qquad
          H = \mathrm{logsumexp}(l) - \textstyle\sum_v p_v l_v, \qquad \mathrm{rank}(y) = \#\{v : l_v > l_y\}.

Only the states of real response tokens go through the head. A linear head goes through `labkit.kernels.linear_logprob`;
any other is called on a chunk of states at a time, whose logits are made again for the backward pass. The rank answers
any top-k question later: y is among the k most probable iff ``rank < k``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from labkit.kernels.linear_logprob import linear_logprob

CHUNK = 1 << 24
"""Logits that are in memory at a time, by default: 64 MB in float32."""

Head = Callable[[Tensor], Tensor]

# Of Gemma and its kin, of RecurrentGemma, of xLSTM. A cap does little to the small logits of a new model, so that logits
# that agree at the start would not show one whose name is unknown.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LinearHead:
    """A layer, a factor and a soft cap, which together make logits."""

    layer: Callable[[Tensor], Tensor]
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """Logits of hidden states."""
        logits = self.layer(states)
        if self.scale != 1:
            logits = logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


class TokenStats(NamedTuple):
    """Facts about tokens under a model; all have the shape of the tokens.

    Attributes
    ----------
    logprobs : Tensor
        In nats.
    entropy : Tensor
        Of the distribution that the token was drawn from, in nats.
    ranks : Tensor
        int64: how many tokens are more probable.
    hidden : Tensor or None
        ``(B, T + 1, D)`` states before each token and after the last, where asked for.
    """

    logprobs: Tensor
    entropy: Tensor
    ranks: Tensor
    hidden: Tensor | None = None


def token_logprobs(
    hidden: Tensor,
    head: Head,
    tokens: Tensor,
    temperature: float = 1.0,
    *,
    chunk: int = CHUNK,
    vocab: int | None = None,
    entropy_grad: bool = False,
) -> TokenStats:
    """Log-probability, entropy and rank of tokens from the hidden states before them.

    Parameters
    ----------
    hidden : Tensor
        ``(N, D)``.
    head : callable
        Hidden states ``(n, D)`` to logits ``(n, V)``, such as ``model.lm_head``.
    tokens : Tensor
        ``(N,)`` ids.
    temperature : float
        Logits are divided by it.
    chunk : int
        Largest number of logits in memory, where the head is more than a linear layer (the kernel sees to it itself).
    vocab : int, optional
        V, where the head does not say so.
    entropy_grad : bool
        Whether gradients flow through the entropy.

    Returns
    -------
    TokenStats
        Each ``(N,)``, in float32. Log-probabilities are differentiable.

    Raises
    ------
    ValueError
        When shapes do not fit or a number is not positive.

    Examples
    --------
    >>> head = nn.Linear(2, 4)
    >>> hidden, tokens = torch.randn(5, 2), torch.tensor([0, 1, 2, 3, 0])
    >>> found = token_logprobs(hidden, head, tokens, chunk=8)  # two tokens at a time
    >>> whole = head(hidden).log_softmax(-1)
    >>> torch.allclose(found.logprobs, whole[range(5), tokens], atol=1e-6)
    True
    """
    if hidden.ndim != 2 or tokens.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden must be (N, D) and tokens (N,); got {tuple(hidden.shape)}, {tuple(tokens.shape)}"
        )
    if not temperature > 0 or chunk < 1:
        raise ValueError(f"temperature and chunk must be positive, got {temperature} and {chunk}")
    linear = _fusible(head)
    if linear is not None:
        states = hidden if linear.scale == 1 else hidden * linear.scale
        found = linear_logprob(
            states,
            linear.layer.weight,  # type: ignore[attr-defined]
            tokens,
            bias=linear.layer.bias,  # type: ignore[attr-defined]
            temperature=temperature,
            softcap=linear.softcap,
        )
        entropy = found.entropy if entropy_grad else found.entropy.detach()
        return TokenStats(found.logprob, entropy, found.rank)
    vocab = vocab or getattr(head, "out_features", None) or hidden.shape[1]
    rows = max(1, chunk // vocab)

    def facts(states: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = head(states).float() / temperature  # (n, V)
        own = logits.gather(1, chosen[:, None])
        normaliser = logits.logsumexp(1)
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            finite = logits.masked_fill(logits == -torch.inf, 0)  # a token without probability adds nothing
            entropy = normaliser - ((logits - normaliser[:, None]).exp() * finite).sum(1)
        return own[:, 0] - normaliser, entropy, (logits > own).sum(1)

    if len(hidden) <= rows:
        return TokenStats(*facts(hidden, tokens))
    parts = []
    for states, chosen in zip(hidden.split(rows), tokens.split(rows), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(facts, states, chosen, use_reentrant=False))
        else:
            parts.append(facts(states, chosen))
    return TokenStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _fusible(head: Head) -> LinearHead | None:
    """A head that is a plain linear layer of this process, unlike one with adapters, hooks or quantised weights."""
    whole = head if isinstance(head, LinearHead) else LinearHead(head)
    layer = whole.layer
    if type(layer) is not nn.Linear or layer._forward_hooks or hasattr(layer, "_hf_hook"):
        return None
    return None if layer.bias is not None and whole.scale != 1 else whole


class Anatomy(NamedTuple):
    """A causal model in two parts: ``head(body(ids))`` are its logits."""

    body: Callable[..., Tensor]
    head: Head
    vocab: int


def plain(model: Any) -> Any:
    """The transformers model inside a peft wrapper (its adapters stay in place), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_causal(model: Any, what: str = "model") -> None:
    """Raise unless a model is a decoder that generates.

    Raises
    ------
    TypeError
        Naming the class and what is asked for.
    """
    inner = plain(model)
    config = getattr(inner, "config", None)
    if config is None or not hasattr(inner, "get_output_embeddings"):
        raise TypeError(f"{what} must be a transformers causal language model, got {type(inner).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{what} is {type(inner).__name__}, an encoder-decoder: PPO here takes decoder-only models "
            f"(AutoModelForCausalLM)"
        )
    if inner.get_output_embeddings() is None:
        raise TypeError(
            f"{what} is {type(inner).__name__}, which has no language-model head: load it with AutoModelForCausalLM"
        )


def anatomy(model: Any) -> Anatomy:
    """Take a causal model apart into what makes hidden states and what makes logits of them.

    Prompt tuning and the like need the wrapper's own forward pass, and a head that does more than a layer, a factor and a
    soft cap can't be split off: then the "hidden states" are the logits themselves.
    """
    check_causal(model)
    inner = plain(model)
    config = inner.config.get_text_config() if hasattr(inner.config, "get_text_config") else inner.config
    body, layer = inner.base_model, inner.get_output_embeddings()
    vocab = int(getattr(layer, "out_features", 0) or config.vocab_size)
    learning_prompts = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    if body is inner or learning_prompts:
        return Anatomy(lambda **inputs: _logits(model, inputs), nn.Identity(), vocab)
    caps = (getattr(config, name, None) for name in _CAPS)
    cap = next((found for found in caps if found), None)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)

    def states(**inputs: Tensor) -> Tensor:
        found: Tensor = body(**inputs, use_cache=False).last_hidden_state
        return found

    parts = Anatomy(states, LinearHead(layer, scale, cap), vocab)
    if _agree(inner, parts):
        return parts
    return Anatomy(lambda **inputs: _logits(model, inputs), nn.Identity(), vocab)


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs, use_cache=False).logits
    length = inputs["input_ids"].shape[1]
    return found[:, -length:]


@torch.no_grad()
def _agree(model: Any, parts: Anatomy) -> bool:
    """Whether head after body gives the model's own logits, on three tokens."""
    training = model.training
    model.eval()
    try:
        ids = torch.tensor([[0, 1, min(2, parts.vocab - 1)]], device=next(model.parameters()).device)
        inputs = model_inputs(model, ids, torch.ones_like(ids))
        own = model(**inputs, use_cache=False).logits
        return bool(torch.allclose(parts.head(parts.body(**inputs)), own, rtol=1e-3, atol=1e-4))
    finally:
        model.train(training)


def model_inputs(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Arguments of a forward pass over padded rows; positions count real tokens, wherever the padding is."""
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if "position_ids" in _accepted(type(plain(model))):
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return inputs


_ARGUMENTS: dict[type, frozenset[str]] = {}


def _accepted(kind: type) -> frozenset[str]:
    if kind not in _ARGUMENTS:
        _ARGUMENTS[kind] = frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]
    return _ARGUMENTS[kind]


def sequence_stats(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    tokens: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    *,
    parts: Anatomy | None = None,
    chunk: int = CHUNK,
    entropy_grad: bool = False,
    return_hidden: bool = False,
) -> TokenStats:
    """Log-probability, entropy and rank of each response token under a causal model.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    prompt_ids, prompt_mask : Tensor
        ``(B, P)``, padded on the left.
    tokens, mask : Tensor
        ``(B, T)``, padded on the right.
    temperature, chunk, entropy_grad
        See `token_logprobs`.
    parts : Anatomy, optional
        The model's, when called often.
    return_hidden : bool
        Whether to return the last hidden states as well.

    Returns
    -------
    TokenStats
        Each ``(B, T)``, 0 on padding.

    Raises
    ------
    ValueError
        When hidden states are asked of a model that can't be split into body and head.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> model = tiny("llama", vocab=50, seed=0)
    >>> prompt, response = torch.tensor([[3, 4]]), torch.tensor([[5, 6, 7]])
    >>> found = sequence_stats(model, prompt, prompt > 0, response, response > 0)
    >>> own = model(torch.tensor([[3, 4, 5, 6, 7]])).logits.log_softmax(-1)
    >>> torch.allclose(found.logprobs[0], own[0, [1, 2, 3], [5, 6, 7]], atol=1e-5)
    True
    """
    parts = parts or anatomy(model)
    split = not isinstance(parts.head, nn.Identity)
    ids, attend = torch.cat([prompt_ids, tokens], 1), torch.cat([prompt_mask.bool(), mask.bool()], 1)
    states = parts.body(**model_inputs(model, ids, attend))  # (B, P + T, D)
    return stats_of_states(
        parts,
        states,
        prompt_ids.shape[1],
        tokens,
        mask,
        temperature,
        chunk,
        entropy_grad,
        return_hidden and split,
    )


def stats_of_states(
    parts: Anatomy,
    states: Tensor,
    prompt: int,
    tokens: Tensor,
    mask: Tensor,
    temperature: float,
    chunk: int = CHUNK,
    entropy_grad: bool = False,
    return_hidden: bool = False,
) -> TokenStats:
    """As `sequence_stats`, from the states ``(B, P + T, D)`` of the whole rows."""
    mask = mask.bool()
    before = states[:, prompt - 1 : -1]  # (B, T, D)
    flat = token_logprobs(
        before[mask],
        parts.head,
        tokens[mask],
        temperature,
        chunk=chunk,
        vocab=parts.vocab,
        entropy_grad=entropy_grad,
    )

    def padded(facts: Tensor) -> Tensor:
        return torch.zeros(mask.shape, dtype=facts.dtype, device=facts.device).masked_scatter(mask, facts)

    shown = states[:, prompt - 1 :] if return_hidden else None
    return TokenStats(padded(flat.logprobs), padded(flat.entropy), padded(flat.ranks), shown)
