r"""What MIGU is compared and combined with: EWC, LoRA for one task after another, and O-LoRA.

All are methods of `labkit.finetuning.sequential_finetune`. With MIGU behind them, as in ``combine(OLoRA(), MIGU())``,
the masks fall on the whole gradient, penalty included.

EWC (Kirkpatrick et al. 2017) holds each weight at its value :math:`\theta^*` after an earlier task, by how much that
task's likelihood depends on it: :math:`\tfrac\lambda2 \sum F (\theta - \theta^*)^2` with the diagonal F of the Fisher
information, one term for each earlier task.

O-LoRA keeps the input directions of a new adapter away from those of the old ones with
:math:`\lambda \sum |A A_\text{old}^\top|`. Penalties enter as gradients, after backward: the loss that is logged is
the task's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from labkit.finetuning.sequential import Method, Task
from labkit.finetuning.sequential.data import first_rows
from labkit.finetuning.sequential.methods import Course

ADAPTER = "default"


class EWC(Method):
    """Elastic weight consolidation; with ``importance="none"`` plain L2 towards the earlier weights.

    Parameters
    ----------
    penalty : float
        λ.
    rows : int
        Training rows per task that the Fisher information is estimated from, one gradient each, with the data's own
        labels.
    importance : {"fisher", "none"}
        "none" takes F = 1.

    Raises
    ------
    ValueError
        When a value is out of range.
    RuntimeError
        When a run is resumed: what earlier tasks left in memory is gone.
    """

    def __init__(
        self, penalty: float = 100.0, rows: int = 128, importance: Literal["fisher", "none"] = "fisher"
    ) -> None:
        if not penalty >= 0:
            raise ValueError(f"penalty must not be negative, got {penalty!r}")
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows!r}")
        if importance not in ("fisher", "none"):
            raise ValueError(f'importance must be "fisher" or "none", got {importance!r}')
        self.penalty, self.rows, self.importance = penalty, rows, importance

    def __repr__(self) -> str:
        return f"EWC(penalty={self.penalty}, rows={self.rows}, importance={self.importance!r})"

    def begin(self, course: Course) -> None:
        self._course, self._tasks = course, 0
        self._weights: dict[str, Tensor] = {}  # sum of F over tasks
        self._targets: dict[str, Tensor] = {}  # sum of F θ*

    @contextmanager
    def stage(self, model: nn.Module, index: int, task: Task) -> Iterator[None]:
        _check_memory(self, self._tasks, index)
        yield
        batch = first_rows(self._course.data[index], self.rows)
        for name, value in self._fisher(model, batch).items():
            anchor = value * dict(model.named_parameters())[name].detach()
            self._weights[name] = self._weights[name] + value if name in self._weights else value
            self._targets[name] = self._targets[name] + anchor if name in self._targets else anchor
        self._tasks += 1

    def _fisher(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.importance == "none":
            return {name: torch.ones_like(p) for name, p in trained.items()}
        found = {name: torch.zeros_like(p) for name, p in trained.items()}
        device = next(model.parameters()).device
        count = len(next(iter(batch.values())))
        was_training = model.training
        model.eval()
        for row in range(count):
            one = {field: values[row : row + 1].to(device) for field, values in batch.items()}
            result = self._course.loss(model, one)
            value = result[0] if isinstance(result, tuple) else result
            gradients = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
            for name, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    found[name] += gradient.square() / count
        model.train(was_training)
        return found

    def before_step(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            if name in self._weights and p.grad is not None:
                p.grad += self.penalty * (self._weights[name] * p.detach() - self._targets[name])


class IncLoRA(Method):
    """A new LoRA for every task; the ones before are frozen in the base weights.

    The model is changed in place (peft's ``inject_adapter_in_model``). Folding an old adapter into the base weights
    leaves the function as it was, and costs nothing per step.

    Parameters
    ----------
    r, alpha, dropout
        Rank, scale (the adapter's output is multiplied by alpha / r) and dropout.
    targets : sequence of str, optional
        Names of layers; by default peft's for the model's family.
    seed : int
        Of the adapters' initial weights.

    Raises
    ------
    ImportError
        Without peft.
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float = 32,
        dropout: float = 0.1,
        targets: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        if r < 1:
            raise ValueError(f"r must be at least 1, got {r!r}")
        self.r, self.alpha, self.dropout, self.targets, self.seed = r, alpha, dropout, targets, seed

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(r={self.r}, alpha={self.alpha}, dropout={self.dropout}, seed={self.seed})"
        )

    def begin(self, course: Course) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ImportError("LoRA comes from peft: pip install 'labkit[finetuning]'") from None
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=list(self.targets) if self.targets is not None else None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            inject_adapter_in_model(config, course.model, adapter_name=ADAPTER)

    @contextmanager
    def stage(self, model: nn.Module, index: int, task: Task) -> Iterator[None]:
        if index:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed + index)
                for layer in _lora_layers(model):
                    self._fold(layer)
        yield

    def _fold(self, layer: Any) -> None:
        with torch.no_grad():
            layer.get_base_layer().weight += layer.get_delta_weight(ADAPTER)
        layer.reset_lora_parameters(ADAPTER, True)


class OLoRA(IncLoRA):
    """`IncLoRA` with adapters that are pushed to be orthogonal to the earlier ones.

    Parameters
    ----------
    r, alpha, dropout, targets, seed
        As for `IncLoRA`.
    orthogonality : float
        λ of :math:`\\lambda \\sum |A A_\\text{old}^\\top|`.

    Raises
    ------
    RuntimeError
        When a run is resumed: the earlier adapters are gone.
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float = 32,
        dropout: float = 0.1,
        targets: Sequence[str] | None = None,
        seed: int = 0,
        *,
        orthogonality: float = 0.5,
    ) -> None:
        if not orthogonality >= 0:
            raise ValueError(f"orthogonality must not be negative, got {orthogonality!r}")
        super().__init__(r, alpha, dropout, targets, seed)
        self.orthogonality = orthogonality

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, orthogonality={self.orthogonality})"

    def begin(self, course: Course) -> None:
        super().begin(course)
        self._tasks = 0
        self._old: dict[int, list[Tensor]] = {}

    @contextmanager
    def stage(self, model: nn.Module, index: int, task: Task) -> Iterator[None]:
        _check_memory(self, self._tasks, index)
        with super().stage(model, index, task):
            yield
        for place, layer in enumerate(_lora_layers(model)):
            self._old.setdefault(place, []).append(layer.lora_A[ADAPTER].weight.detach().clone())
        self._tasks += 1

    def penalty(self, model: nn.Module) -> Tensor:
        """The sum that is penalised, without λ."""
        parts = [
            (layer.lora_A[ADAPTER].weight @ torch.cat(self._old[place]).T).abs().sum()
            for place, layer in enumerate(_lora_layers(model))
            if place in self._old
        ]
        return torch.stack(parts).sum() if parts else torch.zeros(())

    def before_step(self, model: nn.Module) -> None:
        for place, layer in enumerate(_lora_layers(model)):
            a = layer.lora_A[ADAPTER].weight
            if place in self._old and a.grad is not None:
                old = torch.cat(self._old[place])  # (old r, d_in)
                a.grad += self.orthogonality * (a.detach() @ old.T).sign() @ old


def _lora_layers(model: nn.Module) -> list[Any]:
    return [
        module for module in model.modules() if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)
    ]


def _check_memory(method: Method, known: int, index: int) -> None:
    if known != index:
        raise RuntimeError(
            f"{type(method).__name__} starts at task {index + 1} and remembers {known} earlier tasks: it can't be "
            "resumed at a stage, start anew in another directory"
        )
