"""What a training step needs from the processes it runs in: one alone, or several through accelerate.

`OneProcess` is plain torch. `ManyProcesses` hands wrapping, mixed precision and collective operations to
`accelerate.Accelerator`, with three corrections that were needed on a CPU or for a common data order:

* accelerate (1.15) started by ``torchrun`` on a machine without an accelerator believes that it is alone unless it
  is told ``cpu=True``: each process would train its own model. The number of processes is checked here.
* accelerate takes an FSDP configuration on a CPU for DDP. Here such a model is sharded by
  `torch.distributed.fsdp.fully_shard` itself, in the same places.
* neither data nor schedule is prepared by accelerate: it would advance a schedule once a process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["no", "bf16", "fp16"]


class OneProcess:
    """A single process: everything is what torch does by itself.

    Parameters
    ----------
    device : torch.device, optional
        Where batches go; the CPU by default.

    Attributes
    ----------
    rank, world : int
        0 and 1.
    device : torch.device
    sharded : bool
        Whether parameters are split over the processes.
    """

    rank = 0
    world = 1
    sharded = False

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device if device is not None else torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this process writes the logs and the checkpoints."""
        return self.rank == 0

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Model and optimizer as the loop has to use them."""
        return model, optimizer

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model that was given to `prepare`."""
        return model

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a loss, added to those that are there."""
        loss.backward()

    def clip(self, parameters: Sequence[nn.Parameter], norm: float) -> torch.Tensor:
        """Scale gradients down to a common norm; returns the norm before."""
        return torch.nn.utils.clip_grad_norm_(parameters, norm)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Context in which gradients stay in this process (all micro-batches but the last)."""
        return nullcontext()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process; also the point where they wait for each other."""
        if self.world == 1:
            return flag
        return bool(self.total(torch.tensor(float(flag), device=self.device)).item())

    def from_main(self, value: int) -> int:
        """The main process's value, in every process."""
        if self.world == 1:
            return value
        mine = torch.tensor([value if self.is_main else 0], dtype=torch.long, device=self.device)
        return int(self.total(mine).item())

    def scaler(self) -> Any:
        """Loss scaler of fp16 training, or None."""
        return None

    def close(self) -> None:
        """Wait for the others and leave the process group; the last thing that a script does."""


class ManyProcesses(OneProcess):
    """Processes, devices and precision as an `accelerate.Accelerator` sees them.

    Parameters
    ----------
    accelerator : accelerate.Accelerator

    Raises
    ------
    ValueError
        When the accelerator would accumulate gradients as well, which the loop does itself.
    RuntimeError
        When more processes were started than the accelerator knows of.
    """

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator.device)
        self.accelerator = accelerator
        self.rank = accelerator.process_index
        self.world = accelerator.num_processes
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != self.world:
            raise RuntimeError(
                f"{started} processes were started, but accelerate sees {self.world}: each would train a model of "
                f"its own. On a machine without GPUs pass device='cpu', or make the Accelerator with cpu=True."
            )
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                f"the accelerator accumulates over {accelerator.gradient_accumulation_steps} steps; leave that at 1 "
                f"and set TrainingConfig.accumulate, which keeps the global batch fixed"
            )
        wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        self._shard_here = wanted and self.device.type == "cpu" and self.world > 1
        self.sharded = self._shard_here or getattr(accelerator, "is_fsdp2", False)
        if wanted and os.environ.get("FSDP_VERSION", "2") == "1":
            raise ValueError(
                "FSDP1 is not supported: set fsdp_version: 2, as `python -m labkit.training fsdp2` has it"
            )
        if self._shard_here and accelerator.mixed_precision != "no":
            raise ValueError(
                f"FSDP2 on the CPU is there to try a script out, in float32; got mixed_precision="
                f"{accelerator.mixed_precision!r}. Set it to 'no'."
            )

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Move, wrap or shard the model, and point the optimizer at what became of its parameters."""
        if self._shard_here:
            _shard(model, optimizer)
            return model, optimizer
        prepared, wrapped = self.accelerator.prepare(model, optimizer)
        return prepared, wrapped

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model without the wrappers of DDP and of torch.compile."""
        unwrapped = self.accelerator.unwrap_model(model)
        inner: nn.Module = getattr(unwrapped, "_orig_mod", unwrapped)
        return inner

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients, scaled where fp16 needs it."""
        self.accelerator.backward(loss)

    def clip(self, parameters: Sequence[nn.Parameter], norm: float) -> torch.Tensor:
        """Norm over all shards, after unscaling."""
        if self._shard_here:
            found = torch.nn.utils.clip_grad_norm_(parameters, norm)
        else:
            found = self.accelerator.clip_grad_norm_(parameters, norm)
        full: torch.Tensor = found.full_tensor() if hasattr(found, "full_tensor") else found
        return full

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Context in which gradients stay in this process."""
        if hasattr(model, "set_requires_gradient_sync"):
            return _unsynchronised(model)
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        summed = values.detach().clone()
        if self.world > 1:
            torch.distributed.all_reduce(summed)
        return summed

    def scaler(self) -> Any:
        """Loss scaler of fp16 training, or None."""
        return self.accelerator.scaler

    def close(self) -> None:
        """Wait for the others and leave the process group."""
        self.accelerator.free_memory()  # drops its references to the model: DDP holds on to the group
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            # gloo's threads let go of the last tensors only after the exchange, and need the interpreter for it. If it
            # is already shutting down by then the process aborts or hangs; asleep, it lets them finish.
            time.sleep(0.2)
            torch.distributed.destroy_process_group()


def choose(
    precision: Precision | None = None,
    device: str | None = None,
    find_unused_parameters: bool = False,
    model: nn.Module | None = None,
) -> OneProcess:
    """Plain torch for one process in float32, else accelerate.

    Parameters
    ----------
    precision : {"no", "bf16", "fp16"}, optional
        By default what the launcher says.
    device : {"cpu"}, optional
        ``"cpu"`` keeps several processes off the GPUs.
    find_unused_parameters : bool
        Of DDP.
    model : torch.nn.Module, optional
        A single process trains it where it is.

    Raises
    ------
    ImportError
        When accelerate is needed and missing.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    asked = precision if precision is not None else launched
    if started == 1 and asked == "no" and not sharded:
        weight = next(iter(model.parameters()), None) if model is not None else None
        return OneProcess(weight.device if weight is not None else None)
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError:
        what = f"{started} processes" if started > 1 else f"precision {asked!r}" if asked != "no" else "FSDP"
        raise ImportError(
            f"training with {what} goes through accelerate: pip install 'labkit[train]'"
        ) from None
    on_cpu = (
        device == "cpu"
        or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
        or not torch.accelerator.is_available()
    )
    wrapping = DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)
    return ManyProcesses(Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[wrapping]))


@contextmanager
def _unsynchronised(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _shard(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Shard a model over all processes, block by block, and give the optimizer the new parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")
    blocks = {name for name in named if name} or set(getattr(model, "_no_split_modules", None) or ())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    new = dict(model.named_parameters())
    for group in optimizer.param_groups:
        unknown = [p for p in group["params"] if id(p) not in names]
        if unknown:
            raise ValueError(
                f"the optimizer holds {len(unknown)} parameters that the model does not: a sharded run can train only "
                f"what is inside the model; make them a submodule of it"
            )
        group["params"] = [new[names[id(parameter)]] for parameter in group["params"]]
