r"""What may be added to plain fine-tuning in sequence: the protocol of a method, replay and GEM.

Replay stores a share of each task's rows and mixes them into the stages that follow.

GEM (Lopez-Paz and Ranzato 2017) lets no update raise the loss on what it stored, to first order. With the gradient g
of the batch and g_k of the memory of each earlier task k, it takes the nearest vector that goes uphill on none:

.. math::

    \min_{x} \|x - g\|^2 \;\text{with}\; \langle x, g_k\rangle \ge 0
    \qquad\Leftrightarrow\qquad
    x = g + G^\top v,\quad \min_{v \ge 0} \tfrac12 v^\top G G^\top v + (G g)^\top v,

the rows of G being the g_k. The dual is a non-negative least-squares problem in as many unknowns as there are
earlier tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from labkit.finetuning.sequential.data import Batch, Task, first_rows, joined
from labkit.training.data import GlobalBatches, map_tensors, mixed_seed
from labkit.training.update import Loss


@dataclass(frozen=True)
class Course:
    """What a method may want to know before the first stage.

    Parameters
    ----------
    model : torch.nn.Module
    tasks : sequence of Task
    data : sequence of GlobalBatches
        Of each task.
    steps : sequence of int
        Of each stage.
    loss : callable
        ``loss(model, batch)``.
    seed : int
    """

    model: nn.Module
    tasks: Sequence[Task]
    data: Sequence[GlobalBatches]
    steps: Sequence[int]
    loss: Loss
    seed: int


class Method:
    """Base with every hook of a method; a class of yours may have any of them and need not derive from it.

    Examples
    --------
    >>> class OnlyNorms(Method):
    ...     @contextmanager
    ...     def stage(self, model, index, task):
    ...         for name, parameter in model.named_parameters():
    ...             parameter.requires_grad_("norm" in name)
    ...         yield
    """

    def begin(self, course: Course) -> None:
        """Called once, before the first stage, also where a run resumes."""

    def stage(self, model: nn.Module, index: int, task: Task) -> AbstractContextManager[Any]:
        """Context of stage `index` from 0; entered before its optimizer is made."""
        return ExitStack()

    def data(self, index: int, data: GlobalBatches) -> GlobalBatches:
        """What stage `index` trains on, given its task's own batches."""
        return data

    def before_step(self, model: nn.Module) -> None:
        """Change gradients, when those of the whole update are there, before they are clipped."""

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called after each update."""


class combine(Method):
    """Several methods as one; their hooks run in the order given.

    Parameters
    ----------
    *methods
        None is left out.

    Examples
    --------
    >>> combine(Replay(0.1), GEM(16))
    combine(Replay(fraction=0.1), GEM(memory=16, margin=0.0))
    """

    def __init__(self, *methods: Any) -> None:
        self.methods = [method for method in methods if method is not None]
        for method in self.methods:
            check_method(method)

    def __repr__(self) -> str:
        return f"combine({', '.join(map(repr, self.methods))})"

    def _each(self, hook: str) -> list[Callable[..., Any]]:
        return [getattr(method, hook) for method in self.methods if hasattr(method, hook)]

    def begin(self, course: Course) -> None:
        for call in self._each("begin"):
            call(course)

    @contextmanager
    def stage(self, model: nn.Module, index: int, task: Task) -> Iterator[None]:
        with ExitStack() as stack:
            for call in self._each("stage"):
                stack.enter_context(call(model, index, task))
            yield

    def data(self, index: int, data: GlobalBatches) -> GlobalBatches:
        for call in self._each("data"):
            data = call(index, data)
        return data

    def before_step(self, model: nn.Module) -> None:
        for call in self._each("before_step"):
            call(model)

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for call in self._each("after_step"):
            call(model, optimizer)


HOOKS = ("begin", "stage", "data", "before_step", "after_step")


def check_method(method: Any) -> None:
    """Raise unless `method` has at least one hook.

    Raises
    ------
    TypeError
        Naming the hooks.
    """
    if isinstance(method, type) or not any(callable(getattr(method, hook, None)) for hook in HOOKS):
        raise TypeError(
            f"a method is an object with some of the hooks {', '.join(HOOKS)}; got {method!r}"
            + (": make an instance of it" if isinstance(method, type) else "")
        )


class Replay(Method):
    """Mix stored rows of the earlier tasks into each later stage.

    Of each task as many rows are kept as `fraction` of what its stage trained on. In stage i every update takes its
    own rows and ``round(fraction * i * rows)`` stored ones more (at least one), so that a stage sees each stored row
    about once and all of its own rows.

    Parameters
    ----------
    fraction : float, default 0.1
        Share of each task's rows, in (0, 1].

    Raises
    ------
    ValueError
        When the fraction lies outside.
    """

    def __init__(self, fraction: float = 0.1) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {fraction!r}; leave Replay out for none")
        self.fraction = fraction

    def __repr__(self) -> str:
        return f"Replay(fraction={self.fraction})"

    def begin(self, course: Course) -> None:
        self._course = course

    def data(self, index: int, data: GlobalBatches) -> GlobalBatches:
        if index == 0:
            return data
        course = self._course
        kept = [
            first_rows(old, max(1, round(self.fraction * steps * old.batch)))
            for old, steps in zip(course.data[:index], course.steps[:index], strict=True)
        ]
        extra = max(1, round(self.fraction * index * data.batch))
        return _Mixed(data, joined(kept), extra, mixed_seed(course.seed, index))


class _Mixed(GlobalBatches):
    """A task's batches, each with rows of a store appended."""

    def __init__(self, own: GlobalBatches, store: Batch, extra: int, seed: int) -> None:
        super().__init__(own.batch + extra, seed)
        self.own, self.store, self.extra = own, store, extra
        self._size = len(next(iter(store.values())))

    def rows(self, step: int, first: int, last: int) -> Batch:
        places = []
        for position in range(step * self.extra, (step + 1) * self.extra):
            epoch, place = divmod(position, self._size)
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            places.append(int(torch.randperm(self._size, generator=generator)[place]))
        old = {name: tensor[places] for name, tensor in self.store.items()}
        whole = joined([self.own.rows(step, 0, self.own.batch), old])
        return {name: tensor[first:last] for name, tensor in whole.items()}


class GEM(Method):
    """Gradient episodic memory: no update may raise the loss on stored rows of an earlier task, to first order.

    Parameters
    ----------
    memory : int, default 64
        Rows stored of each task.
    margin : float, default 0.0
        Added to each dual variable of a violated problem; it favours backward transfer (γ of the paper's code).

    Raises
    ------
    ValueError
        When a value is out of range.

    Notes
    -----
    The memories' gradients are taken in evaluation mode, so that every process computes the same. Each update costs
    a backward pass per earlier task.
    """

    def __init__(self, memory: int = 64, margin: float = 0.0) -> None:
        if memory < 1:
            raise ValueError(f"memory must be at least 1 row a task, got {memory!r}; leave GEM out for none")
        if margin < 0:
            raise ValueError(f"margin must not be negative, got {margin!r}")
        self.memory, self.margin = memory, margin
        self._memories: list[Batch] = []
        self.projected = 0

    def __repr__(self) -> str:
        return f"GEM(memory={self.memory}, margin={self.margin})"

    def begin(self, course: Course) -> None:
        self._course = course

    @contextmanager
    def stage(self, model: nn.Module, index: int, task: Task) -> Iterator[None]:
        device = next(model.parameters()).device
        self._memories = [
            map_tensors(lambda tensor: tensor.to(device), first_rows(old, self.memory))
            for old in self._course.data[:index]
        ]
        try:
            yield
        finally:
            self._memories = []

    def before_step(self, model: nn.Module) -> None:
        if not self._memories:
            return
        trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
        was_training = model.training
        model.eval()
        rows = []
        for batch in self._memories:
            result = self._course.loss(model, batch)
            value = result[0] if isinstance(result, tuple) else result
            found = torch.autograd.grad(value, trained, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).flatten()
                        for p, g in zip(trained, found, strict=True)
                    ]
                )
            )
        model.train(was_training)
        g = torch.cat([p.grad.flatten() for p in trained])  # type: ignore[union-attr]
        change = gem_projection(g, torch.stack(rows), self.margin)
        if change is g:
            return
        self.projected += 1
        for p, part in zip(trained, change.split([p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)


def gem_projection(g: torch.Tensor, memories: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """Nearest vector to g that has no negative product with any memory's gradient.

    Parameters
    ----------
    g : (P,) tensor
        Gradient of the batch.
    memories : (k, P) tensor
        Gradients of the memories, G.
    margin : float
        Added to each dual variable.

    Returns
    -------
    (P,) tensor
        ``g`` itself when no product is negative.

    Examples
    --------
    >>> gem_projection(torch.tensor([1.0, -1.0]), torch.tensor([[0.0, 2.0]]))
    tensor([1., 0.])
    """
    from scipy.optimize import nnls

    products = (memories @ g).double().cpu().numpy()  # (k,)
    if (products >= 0).all():
        return g
    gram = (memories @ memories.T).double().cpu().numpy()  # (k, k)
    values, vectors = np.linalg.eigh(gram)
    real = values > 1e-10 * values.max()
    root = np.sqrt(values[real])
    # ½ vᵀ G Gᵀ v + (G g)ᵀ v and ½ |A v - b|² differ by a constant
    a = root[:, None] * vectors[:, real].T
    b = -(vectors[:, real].T @ products) / root
    v = nnls(a, b)[0] + margin
    return g + torch.as_tensor(v, dtype=g.dtype, device=g.device) @ memories
