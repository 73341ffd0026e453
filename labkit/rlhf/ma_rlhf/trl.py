r"""Macro actions in trl's GRPO: one importance ratio for each group of tokens.

GRPO clips the ratio of each token, GSPO that of the whole answer, the geometric mean of its tokens' ratios. Between the two
lies the geometric mean over a macro action :math:`\omega`,

.. math:: \rho_\omega = \exp\Bigl(\frac{1}{|\omega|} \sum_{t \in \omega} \log\frac{\pi(y_t)}{\pi_{old}(y_t)}\Bigr),

which each of its tokens carries. Groups of one token are GRPO, one group for everything is GSPO.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from labkit.rlhf.segments import broadcast_segments, check_segments, segment_reduce

try:
    from trl import GRPOTrainer
except ImportError:
    raise ImportError("MacroGRPOTrainer needs trl: pip install 'labkit[rlhf]'") from None


class MacroGRPOTrainer(GRPOTrainer):
    """trl's ``GRPOTrainer`` with the importance ratio of macro actions.

    Losses, KL penalty, metrics and generation are trl's own, of whatever ``loss_type``.

    Parameters
    ----------
    *args, **kwargs
        Of ``trl.GRPOTrainer``.
    segmenter : callable
        As in `PPOConfig`, such as `FixedNgram`. One that reads the reference's log-probabilities needs ``beta > 0``.

    Raises
    ------
    TypeError
        Without a segmenter.
    ValueError
        For settings of trl that leave no room for it: another ``importance_sampling_level`` than ``"token"``, the loss of
        Liger's kernel, or no reference where the segmenter reads it; for a segmenter with ``phantom=True``.

    Examples
    --------
    >>> import tempfile
    >>> from datasets import Dataset
    >>> from transformers import PrinterCallback
    >>> from trl import GRPOConfig
    >>> from labkit.rlhf import FixedNgram
    >>> from labkit.testbeds.models import tiny
    >>> from labkit.testbeds.tool_questions import word_tokenizer
    >>> words = word_tokenizer(["0123456789+="])
    >>> rows = Dataset.from_list([{"prompt": "1+2="}] * 2)
    >>> args = GRPOConfig(tempfile.mkdtemp(), max_steps=1, num_generations=2, per_device_train_batch_size=2,
    ...                   max_completion_length=4, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True)
    >>> policy, reward = tiny("llama", vocab=len(words)), lambda completions, **_: [float(len(c)) for c in completions]
    >>> trainer = MacroGRPOTrainer(policy, reward, args, rows, processing_class=words, segmenter=FixedNgram(2))
    >>> trainer.remove_callback(PrinterCallback)
    >>> trainer.train().global_step
    1
    """

    def __init__(self, *args: Any, segmenter: Callable[..., Tensor], **kwargs: Any) -> None:
        if not callable(segmenter):
            raise TypeError(f"segmenter must be a callable such as FixedNgram(5), got {segmenter!r}")
        if getattr(segmenter, "phantom", False):
            raise ValueError(
                f"{segmenter!r} skips an id for an empty group, which only PPO knows; groups of ratios hold "
                f"tokens: leave phantom=False"
            )
        super().__init__(*args, **kwargs)
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r} leaves no ratios to groups: leave it at "
                f"'token', or take WholeResponse(last_alone=False) as segmenter for one ratio an answer"
            )
        if getattr(self.args, "use_liger_kernel", False):
            raise ValueError(
                "Liger's loss makes the ratios itself: set use_liger_kernel=False for macro actions"
            )
        if getattr(segmenter, "needs_reference", False) and self.beta == 0:
            raise ValueError(
                f"{type(segmenter).__name__} reads the reference's log-probabilities, which trl makes only with beta > 0"
            )
        self.segmenter = segmenter
        self._present: dict[str, Any] | None = None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._present = dict(inputs)  # trl keeps its own for further passes over the batch
        try:
            loss: Tensor = super()._compute_loss(model, self._present)
        finally:
            self._present = None
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._present is not None:
            self._present["old_per_token_logps"] = self._old(found[0], self._present)
        return found

    def _old(self, new: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Log-probabilities that leave each token its group's mean log-ratio when trl subtracts them, gradient included."""
        tokens, real = inputs["completion_ids"], inputs["completion_mask"].bool()
        old = inputs.get("old_per_token_logps")
        ratio = new - (new.detach() if old is None else old)
        segments = self.segmenter(
            tokens,
            real,
            ref_logprobs=inputs.get("ref_per_token_logps"),
            tokenizer=getattr(self.processing_class, "tokenizer", self.processing_class),
        )
        check_segments(segments, real)
        counted = real if "tool_mask" not in inputs else real & inputs["tool_mask"].bool()
        sums = segment_reduce(torch.where(counted, ratio, 0), segments)
        counts = segment_reduce(counted.to(ratio.dtype), segments)
        return new - broadcast_segments(sums / counts.clamp(min=1), segments)
