"""MIGU in other people's training loops: an optimizer wrapper and a callback of the transformers ``Trainer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from labkit.finetuning.migu.method import MIGU, RowMasking


class MIGUOptimizer(torch.optim.Optimizer):
    """An optimizer whose ``step`` masks rows first; for plain loops and ``accelerate``.

    Everything else is the wrapped optimizer's: parameter groups, state, ``state_dict``, schedulers.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    migu : MIGU or RandomRowMask
        On the model that is trained.
    clip : float, optional
        Largest norm of the gradient, after the masks, as the authors have it. Leave your own clipping out then: it
        would stand before the masks.

    Raises
    ------
    TypeError
        When the arguments are of another kind.
    ValueError
        When `clip` is not positive.

    Examples
    --------
    >>> model = torch.nn.Linear(4, 8)
    >>> with MIGU(model, threshold=0.5) as migu:
    ...     optimizer = MIGUOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), migu, clip=1.0)
    ...     before = model.weight.detach().clone()
    ...     model(torch.randn(16, 4)).square().mean().backward()
    ...     optimizer.step()
    >>> int((model.weight != before).any(1).sum())
    4
    """

    def __init__(self, optimizer: torch.optim.Optimizer, migu: RowMasking, clip: float | None = None) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not isinstance(migu, RowMasking):
            raise TypeError(f"migu must be a MIGU or RandomRowMask, got {type(migu).__name__}")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive, or None for no clipping, got {clip!r}")
        # No super().__init__(): there is one set of groups and state, the wrapped optimizer's.
        self.optimizer, self.migu, self.clip = optimizer, migu, clip

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __repr__(self) -> str:
        return f"MIGUOptimizer({self.optimizer!r}, {self.migu!r}, clip={self.clip})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def _mask(self) -> None:
        self.migu.apply()
        if self.clip is not None:
            held = [p for group in self.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(held, self.clip)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Mask, clip, update, and with ``mask="update"`` put masked rows back."""
        if closure is None:
            self._mask()
            result = self.optimizer.step()
        else:
            given = closure

            def masked() -> Any:
                with torch.enable_grad():
                    loss = given()
                self._mask()
                return loss

            result = self.optimizer.step(masked)
        self.migu.restore()
        return result


class MIGUCallback(TrainerCallback):
    """Masks rows in the ``Trainer`` of transformers, and in those of trl.

    The ``Trainer`` clips before it tells its callbacks, and masks belong before clipping. So the callback takes the
    clipping over: it sets ``max_grad_norm`` to 0 while it trains, clips itself after the masks, and puts the value
    back at the end. The norm in the log is that of the whole gradient.

    Parameters
    ----------
    migu : MIGU or RandomRowMask, optional
        By default ``MIGU(**settings)``; the model is the trainer's.
    first : bool
        Whether the task is the first of a sequence, which is trained without masks.
    **settings
        Of `MIGU`.

    Raises
    ------
    ValueError
        At the start of training under DeepSpeed or ``DataParallel``.

    Examples
    --------
    >>> callback = MIGUCallback(threshold=0.7, skip=("lm_head",))
    >>> callback.on_task_begin(first=True)
    """

    def __init__(self, migu: RowMasking | None = None, *, first: bool = False, **settings: Any) -> None:
        if migu is not None and settings:
            raise ValueError(f"give either migu or its settings, got both ({', '.join(settings)})")
        if migu is not None and not isinstance(migu, RowMasking):
            raise TypeError(f"migu must be a MIGU or RandomRowMask, got {type(migu).__name__}")
        self.migu = migu if migu is not None else MIGU(**settings)
        self.max_grad_norm: float | None = None
        self._first = first

    def on_task_begin(self, first: bool = False) -> None:
        """Say whether the next training is on the first task of a sequence."""
        self._first = first

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if getattr(args, "deepspeed", None):
            raise ValueError(
                "MIGU can't see gradients under DeepSpeed, which hands them over during backward: train with DDP or "
                "FSDP2"
            )
        if getattr(args, "n_gpu", 1) > 1:
            raise ValueError(
                "MIGU does not work with torch's DataParallel: start one process per GPU (torchrun or accelerate "
                "launch)"
            )
        self.migu.detach()  # a training that an error ended leaves its hooks
        self.migu.attach(model)
        self.migu.on_task_begin(first=self._first)
        if args.max_grad_norm:
            self.max_grad_norm = args.max_grad_norm
            args.max_grad_norm = 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.migu.apply()
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.migu.restore()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close(args)

    def close(self, args: Any = None) -> None:
        """Remove the hooks and give ``max_grad_norm`` back; for a training that an error ended."""
        self.migu.detach()
        if args is not None and self.max_grad_norm is not None:
            args.max_grad_norm = self.max_grad_norm
            self.max_grad_norm = None
