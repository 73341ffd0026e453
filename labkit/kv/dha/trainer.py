"""Fusion inside transformers' ``Trainer``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from labkit.kv.dha.fusion import DHAConverter


class FusionCallback(TrainerCallback):
    """Add the fusion's Lagrangian to the loss that the model returns, and advance it with every optimiser step.

    Give the trainer ``converter.prepare()`` as its model, this as a callback, and an optimiser on
    ``converter.parameter_groups(lr)``, so that the operators have their own learning rate. Train for
    ``schedule.steps`` steps, then ``converter.collapse()``. Batches must hold labels.

    Parameters
    ----------
    converter : DHAConverter

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from labkit.kv.dha import DHAConverter, FusionCallback, HeadGroups
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32,
    ...     num_hidden_layers=1, num_attention_heads=4))
    >>> callback = FusionCallback(DHAConverter(model, HeadGroups.adjacent(1, 4, 2)))
    """

    def __init__(self, converter: DHAConverter) -> None:
        self.converter = converter
        self._accumulated = 1
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._accumulated = args.gradient_accumulation_steps
        self._handle = self.converter.prepare().register_forward_hook(self._add, with_kwargs=True)

    def _add(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        schedule = self.converter.schedule
        if module.training and output.loss is not None and self.converter.step < schedule.steps:
            # With num_items_in_batch the trainer leaves the division by the parts of a batch to the model.
            parts = self._accumulated if kwargs.get("num_items_in_batch") is not None else 1
            output.loss = output.loss + self.converter.penalty() / parts

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.converter.step < self.converter.schedule.steps:
            self.converter.advance()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._handle is not None:
            self._handle.remove()
