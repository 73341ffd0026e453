"""Row masks on a model: MIGU, and the random control with as many rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from labkit.finetuning.migu.layers import RowLayer, row_layers
from labkit.finetuning.migu.masks import check_threshold, magnitude_mask
from labkit.finetuning.migu.padding import RealPositions

MaskMode = Literal["gradient", "update"]


class RowMasking:
    """Mask rows of weights between backward and the optimizer; `MIGU` and `RandomRowMask` choose the rows.

    The parameters are those of `MIGU`. A sequence of tasks (`labkit.finetuning.sequential_finetune`) takes it as a
    method: the first task is trained without masks unless `mask_first_task`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        threshold: float = 0.7,
        skip: Sequence[str] = (),
        *,
        mask: MaskMode = "gradient",
        combined: bool = True,
        mask_first_task: bool = False,
        process_group: Any = None,
    ) -> None:
        self.threshold = check_threshold(threshold)
        if mask not in ("gradient", "update"):
            raise ValueError(
                f'mask must be "gradient" (the optimizer may still move masked rows by momentum and weight decay) or '
                f'"update" (they stay), got {mask!r}'
            )
        self.model = model
        self.skip = tuple(skip) if not isinstance(skip, str) else skip
        self.mask, self.combined = mask, combined
        self.mask_first_task, self.process_group = mask_first_task, process_group
        self.active = True
        self._layers: list[RowLayer] = []
        self._handles: list[Any] = []
        self._last: dict[str, Tensor] = {}
        self._kept: list[tuple[RowLayer, Tensor, Tensor]] = []
        if model is not None:
            row_layers(model, self.skip, combined)

    def _settings(self) -> dict[str, Any]:
        found = {
            "threshold": self.threshold,
            "skip": self.skip,
            "mask": self.mask,
            "combined": self.combined,
            "mask_first_task": self.mask_first_task,
        }
        plain = {"skip": (), "mask": "gradient", "combined": True, "mask_first_task": False}
        return {name: value for name, value in found.items() if name not in plain or value != plain[name]}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"{type(self).__name__}({settings})"

    # Being on a model.

    @property
    def attached(self) -> bool:
        """Whether it is on a model now."""
        return bool(self._layers)

    def attach(self, model: nn.Module | None = None) -> Self:
        """Look for the layers of a model (by default the one given first) and watch them.

        Raises
        ------
        ValueError
            Without a model, or when it has no linear layer.
        RuntimeError
            When it is on a model already.
        """
        model = model if model is not None else self.model
        if model is None:
            raise ValueError(f"{type(self).__name__} needs a model: give it one, or call attach(model)")
        if self.attached:
            raise RuntimeError(f"{type(self).__name__} is on a model already: leave that context first")
        self._layers = row_layers(model, self.skip, self.combined)
        self.model = model
        self._forget()
        self._watch(model)
        return self

    def detach(self) -> None:
        """Remove all hooks; does nothing where there are none."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._layers, self._kept = [], [], []

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def on_task_begin(self, first: bool = False) -> None:
        """Say whether the task that begins is the first of its sequence, which is trained without masks."""
        self.active = not first or self.mask_first_task
        self._forget()
        self._kept = []

    @contextmanager
    def stage(self, model: nn.Module, index: int, task: Any = None) -> Iterator[Self]:
        """Context of a stage of `labkit.finetuning.sequential_finetune`."""
        self.attach(model)
        self.on_task_begin(first=index == 0)
        try:
            yield self
        finally:
            self.detach()

    # One optimizer step.

    def apply(self) -> dict[str, Tensor]:
        """Mask the gradients, once per optimizer step: after the last backward, before clipping.

        A collective operation where several processes train: all must call it.

        Returns
        -------
        dict of str to (d_out,) bool tensor
            The masks used, by layer; empty during a first task.

        Raises
        ------
        RuntimeError
            Off a model, before a forward pass in training mode, twice for one step, or when no weight has a gradient.
        """
        if not self.attached:
            raise RuntimeError(
                f"{type(self).__name__} is on no model: use `with {type(self).__name__}(model):` around the training"
            )
        if not self.active:
            self._forget()
            return {}
        if self._kept:
            raise RuntimeError('mask="update" needs restore() after every optimizer.step()')
        masks = self._choose()
        self._last = masks
        self._forget()
        masked = 0
        for layer in self._layers:
            weight, chosen = layer.weight, masks.get(layer.name)
            if chosen is None or weight.grad is None:
                continue
            masked += 1
            _mask_rows(weight.grad, chosen, layer.dim)
            if self.mask == "update":
                if hasattr(weight, "device_mesh"):
                    raise ValueError(
                        'mask="update" does not work with sharded weights (FSDP2): use mask="gradient" or DDP'
                    )
                rows = (~chosen).nonzero().squeeze(1)
                self._kept.append((layer, rows, weight.detach().index_select(layer.dim, rows)))
        if not masked:
            raise RuntimeError(
                "no linear weight has a gradient: call apply() after backward() and before zero_grad(). DeepSpeed's "
                "ZeRO and FSDP1 hand gradients over during backward, so that they can't be masked there: use DDP or "
                "FSDP2"
            )
        return masks

    def restore(self) -> None:
        """Put masked rows back after ``optimizer.step()``; does nothing with ``mask="gradient"``."""
        for layer, rows, values in self._kept:
            with torch.no_grad():
                layer.weight.index_copy_(layer.dim, rows, values)
        self._kept = []

    def masks(self) -> dict[str, Tensor]:
        """Masks that the last `apply` used, by layer, ``(d_out,)`` each; True may learn."""
        return dict(self._last)

    def before_step(self, model: nn.Module) -> None:
        """`apply`, as a method of a sequence of tasks."""
        self.apply()

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """`restore`, as a method of a sequence of tasks."""
        self.restore()

    # What the two rules fill in.

    def _watch(self, model: nn.Module) -> None: ...

    def _forget(self) -> None: ...

    def _choose(self) -> dict[str, Tensor]:
        raise NotImplementedError


def _mask_rows(gradient: Tensor, chosen: Tensor, dim: int) -> None:
    factor = chosen.to(gradient.device, gradient.dtype)
    factor = factor[:, None] if dim == 0 else factor[None, :]
    if hasattr(gradient, "device_mesh"):  # FSDP2: each process holds some of the rows
        from torch.distributed.tensor import DTensor, Replicate

        mesh = gradient.device_mesh
        factor = DTensor.from_local(factor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    gradient.mul_(factor)


class MIGU(RowMasking):
    """Let only those rows of linear weights learn whose outputs are large in this step.

    Parameters
    ----------
    model : torch.nn.Module, optional
        Any model with ``torch.nn.Linear`` layers, also with peft's LoRA. May be given later: `attach`, `stage`.
    threshold : float
        T in [0, 1], about the share of rows that is masked. The paper's: 0.7; 0.4 with LoRA and replay, 0.1 with
        O-LoRA.
    skip : sequence of str
        Layers to leave alone, by name or by a part of it between dots: ``("lm_head",)``, ``("lora_B",)``.
    ignore_padding : bool
        Count real positions alone; needs ``attention_mask``. False counts all, as the authors do.
    mask : {"gradient", "update"}
        What is masked. With "gradient" Adam's momentum and weight decay still move a masked row, as in the
        authors' code; with "update" it is put back after the step, see `restore`.
    combined : bool
        Rows of LoRA's B by the output of the whole layer, or (False) by B's own.
    mask_first_task : bool
        Whether a sequence's first task is masked too.
    process_group : torch.distributed.ProcessGroup, optional
        Whose processes share one batch; all by default.

    Raises
    ------
    ValueError
        For a threshold outside [0, 1], an unknown mode, a name in `skip` that fits no layer, a model without linear
        layers.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> model = tiny("llama", seed=0)
    >>> ids = torch.arange(12)[None]
    >>> with MIGU(model, threshold=0.75, skip=("lm_head",)) as migu:
    ...     model(input_ids=ids, labels=ids).loss.backward()
    ...     masks = migu.apply()
    >>> mask, gradient = masks["model.layers.0.mlp.up_proj"], model.model.layers[0].mlp.up_proj.weight.grad
    >>> int(mask.sum()), torch.equal(gradient.abs().sum(1) > 0, mask)
    (40, True)
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        threshold: float = 0.7,
        skip: Sequence[str] = (),
        ignore_padding: bool = False,
        mask: MaskMode = "gradient",
        *,
        combined: bool = True,
        mask_first_task: bool = False,
        process_group: Any = None,
    ) -> None:
        self.ignore_padding = ignore_padding
        self._sums: dict[str, Tensor] = {}
        self._last_sums: dict[str, Tensor] = {}
        self._always = False
        super().__init__(
            model,
            threshold,
            skip,
            mask=mask,
            combined=combined,
            mask_first_task=mask_first_task,
            process_group=process_group,
        )

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | ({"ignore_padding": True} if self.ignore_padding else {})

    def magnitudes(self, normalize: bool = True) -> dict[str, Tensor]:
        """Magnitudes of this step so far, or after `apply` those that it used.

        Of this process alone before `apply`, of all processes after it.

        Parameters
        ----------
        normalize : bool
            Divide by the layer's sum, or give the sums of absolute outputs.

        Returns
        -------
        dict of str to (d_out,) tensor
            float32, by layer.
        """
        found = self._sums or self._last_sums
        return {name: n / n.sum() if normalize else n.clone() for name, n in found.items()}

    def masks(self) -> dict[str, Tensor]:
        """Masks of this step so far, or after `apply` those that it used; ``(d_out,)`` each, True may learn."""
        return _masks(self._sums, self.threshold) if self._sums else dict(self._last)

    def _watch(self, model: nn.Module) -> None:
        real = None
        if self.ignore_padding:
            real = RealPositions(model)
            self._handles.append(model.register_forward_pre_hook(real.read, with_kwargs=True))
        by_source: dict[int, list[RowLayer]] = {}
        for layer in self._layers:
            by_source.setdefault(id(layer.source), []).append(layer)
        for layers in by_source.values():
            self._handles.append(layers[0].source.register_forward_hook(self._counter(layers, real)))

    def _counter(self, layers: list[RowLayer], real: RealPositions | None) -> Any:
        """Forward hook that adds up the absolute outputs of the layers with this source."""

        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if not (self._always or (self.active and module.training and torch.is_grad_enabled())):
                return
            wanted = [layer for layer in layers if self._always or layer.weight.requires_grad]
            if not wanted:
                return
            output = output.detach()
            flat = output.flatten(0, -2) if real is None else real.select(layers[0].name, module, output)
            n = flat.abs().sum(0, dtype=torch.float32)  # (d_out,)
            for layer in wanted:
                before = self._sums.get(layer.name)
                self._sums[layer.name] = n if before is None else before + n

        return count

    def _forget(self) -> None:
        self._sums = {}

    def _choose(self) -> dict[str, Tensor]:
        sums = self._over_processes(self._sums)
        if not sums:
            raise RuntimeError(
                "no forward pass in training mode since the last apply(): call it once per optimizer step, after "
                "forward and backward with model.train()"
            )
        self._last_sums = sums
        return _masks(sums, self.threshold)

    def _over_processes(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean over the processes, of the layers that ran in any of them."""
        group = torch.distributed
        if not (group.is_available() and group.is_initialized()):
            return dict(sums)
        world = group.get_world_size(self.process_group)
        if world == 1:
            return dict(sums)
        device = self._layers[0].weight.device
        parts = []
        for layer in self._layers:
            n = sums.get(layer.name)
            parts.append(torch.zeros(layer.size, device=device) if n is None else n.to(device))
        ran = torch.tensor([float(layer.name in sums) for layer in self._layers], device=device)
        whole = torch.cat([*parts, ran])
        group.all_reduce(whole, group=self.process_group)
        *totals, anywhere = whole.split([*(layer.size for layer in self._layers), len(self._layers)])
        return {
            layer.name: total / world
            for layer, total, times in zip(self._layers, totals, anywhere.tolist(), strict=True)
            if times
        }


def _masks(sums: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Masks of all layers; those of one size share one call."""
    sizes: dict[tuple[int, torch.device], list[str]] = {}
    for name, n in sums.items():
        sizes.setdefault((len(n), n.device), []).append(name)
    found: dict[str, Tensor] = {}
    for names in sizes.values():
        together = magnitude_mask(torch.stack([sums[name] for name in names]), threshold)
        found.update(zip(names, together, strict=True))
    return {name: found[name] for name in sums}


class RandomRowMask(RowMasking):
    """The control: in each step ``int(d_out * T)`` random rows of every linear weight are masked.

    Parameters
    ----------
    model, threshold, skip, mask, combined, mask_first_task, process_group
        As for `MIGU`.
    seed : int
        Of the draws; they are the same in every process.

    Examples
    --------
    >>> model = nn.Linear(3, 10)
    >>> with RandomRowMask(model, threshold=0.75, seed=0) as control:
    ...     model(torch.randn(4, 3)).sum().backward()
    ...     int(control.apply()[""].sum())
    3
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        threshold: float = 0.7,
        skip: Sequence[str] = (),
        *,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.seed, self._step = seed, 0
        super().__init__(model, threshold, skip, **settings)

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"seed": self.seed}

    def state_dict(self) -> dict[str, int]:
        """Number of the next draw."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with the draws of another run."""
        self._step = int(state["step"])

    def _choose(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self._step) % 2**63)
        self._step += 1
        found: dict[str, Tensor] = {}
        for layer in self._layers:
            if layer.weight.grad is None:
                continue
            chosen = torch.ones(layer.size, dtype=torch.bool)
            chosen[torch.randperm(layer.size, generator=generator)[: int(layer.size * self.threshold)]] = (
                False
            )
            found[layer.name] = chosen.to(layer.weight.device)
        return found


@torch.no_grad()
def signature(
    model: nn.Module, batch: Mapping[str, Any], skip: Sequence[str] = (), **settings: Any
) -> dict[str, Tensor]:
    """Normalised magnitudes of a batch in every linear layer, without training.

    Parameters
    ----------
    model : torch.nn.Module
        In the mode that it is in.
    batch : mapping
        Keyword arguments of the model.
    skip, **settings
        As for `MIGU`.

    Returns
    -------
    dict of str to (d_out,) tensor
        Each sums to 1.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> found = signature(tiny("llama", seed=0), {"input_ids": torch.arange(9)[None]})
    >>> found["lm_head"].shape, round(float(found["lm_head"].sum()), 5)
    (torch.Size([256]), 1.0)
    """
    with MIGU(model, skip=skip, **settings) as migu:
        migu._always = True
        model(**batch)
        return migu.magnitudes()
