r"""ROME's closed-form change of values, the reference for editing by gradient.

The second linear layer W of a feed-forward network maps a hidden vector k (how strongly each key fires) to what is
written. One new pair k* -> v* is inserted while as little as possible changes for the keys seen in text, whose second
moment is C = E[k k^T]:

.. math::

    \min_{W'} \mathrm{tr}\left[(W'-W)\, C\, (W'-W)^\top\right] \;\text{ s.t. }\; W' k^* = v^*
    \quad\Rightarrow\quad
    W' = W + \Lambda\,(C^{-1}k^*)^\top, \qquad \Lambda = \frac{v^* - W k^*}{(C^{-1}k^*)^\top k^*}.

k* is the hidden vector at the last token of the subject, averaged over prefixes; v* is found by gradient descent on a
change of what the layer writes there, until the model says the new object.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from labkit.finetuning.anatomy import FFNMemory
from labkit.finetuning.keys_values.gradient import EditResult
from labkit.finetuning.keys_values.parts import choose, refuse_quantised
from labkit.finetuning.keys_values.requests import (
    EditRequest,
    Pair,
    Text,
    as_pair,
    check_model,
    target_log_probs,
    token_ids,
)


def rome_update(
    weight: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cov: torch.Tensor, *, ridge: float = 1e-2
) -> torch.Tensor:
    """The change of W that inserts key -> value at the least cost under C.

    Parameters
    ----------
    weight : (D, m) tensor
        Second linear layer W, stored (out, in).
    key : (m,) tensor
        k*.
    value : (D,) tensor
        v*, without a bias.
    cov : (m, m) tensor
        C, symmetric.
    ridge : float
        Added to the diagonal as a share of its mean where C is singular.

    Returns
    -------
    (D, m) tensor
        Λ (C⁻¹ k*)ᵀ, of rank one, computed in float64.

    Raises
    ------
    ValueError
        If shapes do not fit, C is not finite, or the key is zero.

    Examples
    --------
    >>> weight, key, value = torch.eye(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    >>> weight + rome_update(weight, key, value, torch.eye(2))
    tensor([[0., 0.],
            [3., 1.]])
    """
    m = weight.shape[1]
    if key.shape != (m,) or value.shape != (weight.shape[0],) or cov.shape != (m, m):
        raise ValueError(
            f"shapes do not fit: weight {tuple(weight.shape)} wants key ({m},), value ({weight.shape[0]},) and "
            f"cov ({m}, {m}); got {tuple(key.shape)}, {tuple(value.shape)} and {tuple(cov.shape)}"
        )
    if not torch.isfinite(cov).all():
        raise ValueError("cov holds values that are not finite: was it measured with another model?")
    k, c = key.double(), cov.double()
    if not k.any():
        raise ValueError("the key is zero: no value is written there, so none can be edited")
    spectrum = torch.linalg.eigvalsh(c)
    if spectrum[0] <= 1e-9 * spectrum[-1]:
        c = c + ridge * c.diagonal().mean() * torch.eye(m, dtype=c.dtype, device=c.device)
    solved = torch.linalg.solve(c, k)
    step = (value.double() - weight.double() @ k) / (solved @ k)
    return torch.outer(step, solved).to(weight.dtype)


def _memory(model: PreTrainedModel, layer: int) -> FFNMemory:
    """The one memory of a layer, or an error that says why it has no closed form."""
    chosen = [one for one in choose(model, "values", [layer]) if one.memory.stack == "decoder"]
    if not chosen or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is no decoder-only model: use edit_by_gradient")
    if len(chosen) > 1 or chosen[0].memory.experts:
        raise ValueError(
            f"layer {layer} of {type(model).__name__} has experts, which write together: the closed form needs one "
            f"matrix of values. Use edit_by_gradient"
        )
    refuse_quantised(chosen)
    return chosen[0].memory


def _second(model: nn.Module, memory: FFNMemory) -> nn.Module:
    return model.get_submodule(memory.values.name.removesuffix(".weight"))


def hidden(output: torch.Tensor, rows: int) -> torch.Tensor:
    """(B, T, m) of what some models flatten to (B T, m)."""
    return output if output.dim() == 3 else output.unflatten(0, (rows, -1))


@torch.no_grad()
def key_covariance(
    model: PreTrainedModel, layer: int, batches: Iterable[Mapping[str, torch.Tensor] | torch.Tensor]
) -> torch.Tensor:
    """Second moment C = E[k k^T] of a layer's hidden vectors over text.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder-only language model.
    layer : int
        Layer.
    batches : iterable
        ``input_ids`` as tensors (B, T), or mappings with ``input_ids`` and, where there is padding on either side,
        ``attention_mask``: padding does not count.

    Returns
    -------
    (m, m) tensor
        float64, on the CPU. For a big model compute it once and keep it.

    Raises
    ------
    ValueError
        As `rome_edit`, and for no tokens.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> key_covariance(tiny("gpt_neox", width=16, heads=2), 1, [torch.arange(12).view(2, 6)]).shape
    torch.Size([64, 64])
    """
    check_model(model)
    memory = _memory(model, layer)
    total: torch.Tensor | float = 0.0
    count = 0
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
            inputs = {n: inputs[n].to(model.device) for n in ("input_ids", "attention_mask") if n in inputs}
            with _listening(model, memory) as heard:
                model(**inputs, use_cache=False)
            k = hidden(heard[0], len(inputs["input_ids"])).flatten(0, 1).double()  # (B T, m)
            if "attention_mask" in inputs:
                k = k[inputs["attention_mask"].flatten().bool()]
            total = total + (k.T @ k).cpu()
            count += len(k)
    finally:
        model.train(was_training)
    if not count or not isinstance(total, torch.Tensor):
        raise ValueError("batches holds no tokens to measure the covariance on")
    return total / count


@contextmanager
def _listening(model: nn.Module, memory: FFNMemory) -> Iterator[list[torch.Tensor]]:
    heard: list[torch.Tensor] = []
    handle = _second(model, memory).register_forward_pre_hook(lambda _, args: heard.append(args[0].detach()))
    try:
        yield heard
    finally:
        handle.remove()


@contextmanager
def _writing(
    model: nn.Module, memory: FFNMemory, places: Sequence[int], change: torch.Tensor
) -> Iterator[None]:
    """Add `change` to what the layer writes at one place of each row."""

    def add(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        rows = hidden(output, len(places))
        at = torch.zeros(rows.shape[:2], dtype=rows.dtype, device=rows.device)
        at[torch.arange(len(places)), torch.tensor(places)] = 1
        return (rows + at[..., None] * change).view_as(output)

    handle = _second(model, memory).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def last_subject_token(prompt: Sequence[int], subject: Sequence[int]) -> int:
    """Where the subject's last token stands in a prompt; of several places the last.

    Raises
    ------
    ValueError
        If the prompt does not hold the subject.

    Examples
    --------
    >>> last_subject_token([1, 30, 31, 20, 2], [30, 31])
    2
    """
    n, wanted = len(subject), list(subject)
    for begin in range(len(prompt) - n, -1, -1):
        if list(prompt[begin : begin + n]) == wanted:
            return begin + n - 1
    raise ValueError(
        f"the subject {wanted} does not occur in the prompt {list(prompt)}: give it as it stands there"
    )


def _subject_place(request: EditRequest, prompt: list[int], tokenizer: Any) -> int:
    if request.subject is None:
        raise ValueError("rome_edit needs the request's subject, EditRequest(subject=...), or place='last'")
    if isinstance(request.subject, str) and isinstance(request.prompt, str):
        cut = request.prompt.rfind(request.subject)
        if cut < 0:
            raise ValueError(
                f"the subject {request.subject!r} does not occur in the prompt {request.prompt!r}: give it as it "
                f"stands there"
            )
        head = token_ids(request.prompt[: cut + len(request.subject)], tokenizer)
        shared = 0
        while shared < min(len(head), len(prompt)) and head[shared] == prompt[shared]:
            shared += 1
        return max(shared - 1, 0)
    return last_subject_token(prompt, token_ids(request.subject, tokenizer, special=False))


def rome_edit(
    model: PreTrainedModel,
    request: EditRequest,
    layer: int,
    cov: torch.Tensor,
    *,
    tokenizer: Any = None,
    prefixes: Sequence[Text] = (),
    place: str = "subject",
    lr: float = 0.5,
    max_steps: int = 25,
    tol: float = 0.05,
    decay: float = 1e-3,
    ridge: float = 1e-2,
) -> EditResult:
    """Edit one fact in place by a rank-one change of a layer's values.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder-only language model whose layer has one matrix of values.
    request : EditRequest
        With its subject, unless `place` is "last".
    layer : int
        Layer to edit.
    cov : (m, m) tensor
        C, from `key_covariance`.
    tokenizer : transformers tokenizer, optional
        Needed for requests that are texts.
    prefixes : sequence of texts or token ids
        Texts put before the prompt, behind a first token that opens every text; k* is the mean over them and the bare
        prompt, and v* has to work after all of them.
    place : {"subject", "last"}
        Token whose value is rewritten: the subject's last one, as ROME does because big models look a subject's facts
        up there, or the prompt's last one, for models that look them up when subject and relation have been read.
    lr, max_steps, tol
        Of Adam on v*, and the loss in nats at which it stops.
    decay : float
        Weight of the squared length of the change, relative to that of what the layer wrote.
    ridge : float
        See `rome_update`.

    Returns
    -------
    EditResult
        ``losses`` are those of the search for v*; its ``undo(model)`` takes the edit back.

    Raises
    ------
    ValueError
        For a request without subject, a subject that is not in the prompt, or a model without a closed form.

    Examples
    --------
    >>> from labkit.testbeds.facts import FactsWorld, facts_model
    >>> model, world = facts_model(0), FactsWorld(0)
    >>> cov = key_covariance(model, 2, [world.prompts()])
    >>> request = EditRequest(world.prompts()[7], new=[150])
    >>> result = rome_edit(model, request, 2, cov, place="last")
    >>> int(model(world.prompts()[7:8]).logits[0, -1].argmax())
    150
    """
    check_model(model)
    for name, number in (("lr", lr), ("tol", tol)):
        if not number > 0 or not math.isfinite(number):
            raise ValueError(f"{name} must be a positive number, got {number!r}")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps must be a whole number of at least 1, got {max_steps!r}")
    if place not in ("subject", "last"):
        raise ValueError(f"place must be 'subject' or 'last', got {place!r}")
    memory = _memory(model, layer)
    bare = as_pair(request.prompt, request.new, tokenizer)
    at = len(bare.prompt) - 1 if place == "last" else _subject_place(request, bare.prompt, tokenizer)
    before = [[], *(token_ids(text, tokenizer, special=False) for text in prefixes)]
    # What opens every text (BOS) stays in front of a prefix.
    opening = 1 if prefixes and bare.prompt[0] == getattr(model.config, "bos_token_id", None) else 0
    rows = [Pair([*bare.prompt[:opening], *head, *bare.prompt[opening:]], bare.target) for head in before]
    places = [at + len(head) for head in before]

    start = time.process_time()
    was_training = model.training
    flags = [(p, p.requires_grad) for p in model.parameters()]
    name, param = memory.values
    weight = param.detach().T if memory.transposed else param.detach()  # (D, m)
    model.eval()
    losses: list[float] = []
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        with _listening(model, memory) as heard, torch.no_grad():
            target_log_probs(model, rows)
        inside = hidden(heard[0], len(rows))
        key = torch.stack([inside[i, spot] for i, spot in enumerate(places)]).double().mean(0)  # (m,)
        written = weight.double() @ key
        scale = float(written.square().sum().clamp_min(1e-12))
        change = torch.zeros_like(weight[:, 0]).requires_grad_(True)  # (D,)
        adam = torch.optim.Adam([change], lr)
        while True:
            with _writing(model, memory, places, change):
                loss = -target_log_probs(model, rows)[0].mean()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"the loss is {losses[-1]} after {len(losses) - 1} steps: lower lr ({lr})"
                )
            if losses[-1] < tol or len(losses) > max_steps:
                break
            adam.zero_grad()
            (loss + decay * change.square().sum() / scale).backward()
            adam.step()
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        model.train(was_training)
    update = rome_update(weight, key, written + change.detach().double(), cov.to(weight.device), ridge=ridge)
    saved = {name: param.detach().clone()}
    with torch.no_grad():
        param.add_(update.T if memory.transposed else update)
    steps = len(losses) - 1
    return EditResult("values", [name], losses, steps, losses[-1] < tol, time.process_time() - start, saved)
