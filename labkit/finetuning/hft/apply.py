"""Half fine-tuning in a loop of one's own, and in transformers' and trl's trainers."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback

from labkit.finetuning.hft.mask import HalfMask
from labkit.finetuning.hft.select import HalfSelector, check_model, check_stage

_STAGES: weakref.WeakKeyDictionary[nn.Module, set[tuple[HalfSelector, int]]] = weakref.WeakKeyDictionary()


@contextmanager
def half_finetuning(
    model: nn.Module, selector: HalfSelector | HalfMask, stage: int = 0
) -> Iterator[HalfMask]:
    """Within the context only the stage's half of a model requires a gradient.

    Make the optimizer inside, from ``mask.parameters(model)``, and wrap or prepare the model inside.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model. What was frozen before stays frozen.
    selector : HalfSelector or HalfMask
        What draws the half, or a mask that was drawn before.
    stage : int
        Number of the stage; not used with a mask.

    Yields
    ------
    HalfMask

    Raises
    ------
    ValueError
        As `HalfSelector.select`; also when a mask is of another model.

    Warns
    -----
    UserWarning
        When the same stage is entered on a model again, and when gradient checkpointing meets a frozen embedding.

    Examples
    --------
    >>> import torch
    >>> from labkit.testbeds.models import tiny
    >>> model = tiny("llama", layers=2)
    >>> with half_finetuning(model, HalfSelector(), stage=0) as mask:
    ...     optimizer = torch.optim.AdamW(mask.parameters(model), lr=2e-5)
    ...     loss = model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    ...     loss.backward()
    ...     print(all((p.grad is None) != mask[name] for name, p in model.named_parameters()))
    True
    >>> all(p.requires_grad for p in model.parameters())
    True
    """
    mask = _mask(model, selector, stage)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        _apply(model, mask, before)
        _warn_of_checkpointing(
            model, any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        )
        yield mask
    finally:
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.requires_grad_(before[name])


def check_optimizer(optimizer: Any) -> None:
    """Raise when an optimizer holds frozen parameters, which its weight decay or old momenta would move.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer

    Raises
    ------
    ValueError

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.AdamW(layer.parameters())
    >>> _ = layer.weight.requires_grad_(False)
    >>> check_optimizer(optimizer)
    Traceback (most recent call last):
        ...
    ValueError: the optimizer already holds 1 frozen parameters (4 numbers): ...
    """
    held = [p for group in optimizer.param_groups for p in group["params"] if not p.requires_grad]
    if held:
        raise ValueError(
            f"the optimizer already holds {len(held)} frozen parameters ({sum(p.numel() for p in held)} numbers): they "
            f"cost memory, and weight decay or old momenta could move them. Choose the half first, then make the "
            f"optimizer from mask.parameters(model), or let the Trainer make it"
        )


class HalfFineTuningCallback(TrainerCallback):
    """Half fine-tuning of one stage in a `transformers.Trainer`, or trl's ``SFTTrainer`` and ``DPOTrainer``.

    Give it to the trainer's constructor: the half is chosen when the trainer is complete, before it makes its
    optimizer, which then holds the trained half alone. One trainer trains one stage; the next gets a callback with
    the next number. When the training ends, what required a gradient before does so again.

    Parameters
    ----------
    selector : HalfSelector or HalfMask, optional
        ``HalfSelector()`` by default.
    stage : int
        Number of the stage.

    Attributes
    ----------
    mask : HalfMask or None
        The half, once the trainer is made.

    Raises
    ------
    ValueError
        From the trainer's constructor, as `half_finetuning`, and when the trainer was given an optimizer that holds
        parameters which are to be frozen. From ``train()``, when the callback was added too late or the trainer has
        been trained before.

    Notes
    -----
    DPO needs a reference model that is a copy of its own, as trl makes without adapters.

    Examples
    --------
    >>> HalfFineTuningCallback(HalfSelector(seed=3), stage=1)  # Trainer(..., callbacks=[this])
    HalfFineTuningCallback(HalfSelector(level='category', ratio=0.5, train_embeddings=True, seed=3), stage=1)
    """

    def __init__(self, selector: HalfSelector | HalfMask | None = None, stage: int = 0) -> None:
        check_stage(stage)
        self.selector = selector if selector is not None else HalfSelector()
        if not isinstance(self.selector, HalfSelector | HalfMask):
            raise TypeError(f"selector must be a HalfSelector or a HalfMask, got {selector!r}")
        self.stage = stage
        self.mask: HalfMask | None = None
        self._before: dict[str, bool] = {}
        self._done = False

    def __repr__(self) -> str:
        return f"HalfFineTuningCallback({self.selector!r}, stage={self.stage})"

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freeze the half; the optimizer does not exist yet."""
        model = kwargs["model"]
        self.mask = _mask(model, self.selector, self.stage)
        self._before = {name: p.requires_grad for name, p in model.named_parameters()}
        self._done = False
        _apply(model, self.mask, self._before)
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            try:
                check_optimizer(optimizer)
            except ValueError:
                self._restore(model)
                raise
        _warn_of_checkpointing(model, getattr(args, "gradient_checkpointing", False))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the optimizer holds nothing frozen."""
        if self.mask is None:
            raise ValueError(
                "HalfFineTuningCallback came too late: the optimizer is made. Give it to the trainer's constructor, "
                "callbacks=[HalfFineTuningCallback(...)], instead of add_callback"
            )
        if self._done:
            raise ValueError(
                f"this trainer has trained stage {self.stage}: make a new trainer for the next stage, with "
                f"HalfFineTuningCallback(selector, stage={self.stage + 1})"
            )
        if kwargs.get("optimizer") is not None:
            check_optimizer(kwargs["optimizer"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let everything require a gradient that did before."""
        self._restore(kwargs["model"])
        self._done = True

    def _restore(self, model: nn.Module) -> None:
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        for name, parameter in inner.named_parameters():
            if name in self._before:
                parameter.requires_grad_(self._before[name])


def _mask(model: nn.Module, selector: HalfSelector | HalfMask, stage: int) -> HalfMask:
    if isinstance(selector, HalfMask):
        check_model(model)
        selector._of(model)
        return selector
    mask = selector.select(model, stage)
    seen = _STAGES.setdefault(model, set())
    if (selector, stage) in seen:
        warnings.warn(
            f"stage {stage} was trained on this model before, so the same half is trained again: number the stages, "
            f"for example stage={stage + 1}",
            stacklevel=5,
        )
    seen.add((selector, stage))
    return mask


def _apply(model: nn.Module, mask: HalfMask, before: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(mask[name] and before[name])
        if not parameter.requires_grad:
            parameter.grad = None  # an optimizer made from all parameters would still apply an old one
    if not any(p.requires_grad for p in model.parameters()):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
        raise ValueError("the half that was drawn was frozen before: nothing would be trained")


def _warn_of_checkpointing(model: Any, checkpointing: bool) -> None:
    if not checkpointing or not hasattr(model, "get_input_embeddings"):
        return
    embedding = model.get_input_embeddings()
    hooked = getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None)
    if embedding is not None and not embedding.weight.requires_grad and not hooked:
        warnings.warn(
            "gradient checkpointing with a frozen input embedding can leave the first layers without gradients: call "
            "model.enable_input_require_grads(), or checkpoint with use_reentrant=False",
            stacklevel=5,
        )
