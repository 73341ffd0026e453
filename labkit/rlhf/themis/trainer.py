"""Training with the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainingArguments

from labkit.rlhf.themis.collator import ThemisCollator
from labkit.rlhf.themis.model import ThemisRewardModel

_LOGGED = ("lm_loss", "rm_loss", "tool_loss", "observation_loss", "rationale_loss")


class ThemisTrainer(Trainer):
    """``Trainer`` for a `ThemisRewardModel`: pairs in, both losses out; the parts are logged beside the loss.

    Parameters
    ----------
    model : ThemisRewardModel
    args : TrainingArguments
        ``remove_unused_columns`` is switched off, since rows are nested.
    data_collator : ThemisCollator
        Its `ThemisCollator.repeatable` makes the batches, so that a resumed training is the uninterrupted one.
    **kwargs
        Further arguments of ``Trainer``.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import PrinterCallback, TrainingArguments
    >>> from labkit.testbeds.models import tiny
    >>> from labkit.testbeds.tokenizers import byte_tokenizer
    >>> from labkit.testbeds.tool_questions import rows
    >>> tokenizer = byte_tokenizer()
    >>> model = ThemisRewardModel.from_causal_lm(tiny("llama", vocab=len(tokenizer)), tokenizer)
    >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    >>> trainer = ThemisTrainer(model, args, ThemisCollator(tokenizer), train_dataset=rows("calendar", 8))
    >>> trainer.remove_callback(PrinterCallback)
    >>> trainer.train().global_step
    1
    """

    def __init__(
        self, model: ThemisRewardModel, args: TrainingArguments, data_collator: ThemisCollator, **kwargs: Any
    ) -> None:
        if not isinstance(model, ThemisRewardModel):
            raise TypeError(
                f"model must be a ThemisRewardModel, got {type(model).__name__}; "
                "ThemisRewardModel.from_causal_lm(model, tokenizer) makes one"
            )
        if not isinstance(data_collator, ThemisCollator):
            raise TypeError(f"data_collator must be a ThemisCollator, got {type(data_collator).__name__}")
        args.remove_unused_columns = False
        self._sums: dict[str, float] = {}
        self._seen = 0
        super().__init__(model=model, args=args, data_collator=data_collator.repeatable, **kwargs)
        # The loss is a mean of the batch: Trainer is to divide it by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False
        self._pairs = data_collator

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch of pairs, a mean over the batch."""
        out = model(**inputs)
        if model.training:
            half = len(out.rewards) // 2
            found = {name: float(out[name].detach()) for name in _LOGGED}
            found["accuracy"] = float((out.rewards[:half] > out.rewards[half:]).float().mean())
            for name, value in found.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
            self._seen += 1
        return (out.loss, out) if return_outputs else out.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the means of the parts since the last time."""
        if self._seen and "loss" in logs:
            logs.update({name: value / self._seen for name, value in self._sums.items()})
            self._sums, self._seen = {}, 0
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, self._pairs.tokenizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target = self.accelerator.unwrap_model(model or self.model)
        target.load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        # Trainer's own reads the file of weights into the whole model, whose names differ from those of the files.
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
