r"""Keys against values: train or edit only one side of the feed-forward memories.

Qiu, Huang, Huang, Fu, "Empirical Study on Updating Key-Value Memories in Transformer Feed-forward Layers", Tiny Papers
at ICLR 2024, arXiv 2402.12233.

The idea: a feed-forward network is a memory. Key i is matched against the input, value i is written to the residual
stream as far as key i fires. What a model says can be changed by writing something else (values) or by firing
something else (keys). The paper updates one side, freezes everything else, and compares.

.. math::

    \mathrm{FFN}(h) = f(h K^\top)\, V
    \qquad \text{or, gated,} \qquad
    \mathrm{FFN}(h) = \left(f(h G^\top) \odot (h U^\top)\right) V

Symbols and arguments: K, or G and U (``part="keys"``, or ``"key_gate"`` and ``"key_up"``), each m x D, with their
biases; V (``part="values"``), m x D, without a bias, since the second linear layer's bias belongs to no key. In
PyTorch key i is row i of the first linear layer and value i column i of the second; `labkit.finetuning.ffn_parts`
knows which is which, also for ``Conv1D`` and for fused gates and experts.

* Training: `train_only` for a loop of your own, `KeysOrValues` for a transformers or trl trainer, `lora_targets` for
  peft, with the paper's comparison at an equal number of parameters.
* Editing: `edit_by_gradient` lowers -log P(new object | prompt) with Adam on one side of chosen layers; `rome_edit` is
  the closed-form change of values that the paper compares with; `EditEvaluator` has the three measures.
* Looking: `memory_trace` lists the memories that fire for a prompt, `without_memory` takes one away.

Where this differs from the authors, and why. Their code has the LoRA experiments alone; editing follows the protocol
of the literature that the paper names. Their LoRA evaluation cuts the prompt off the generated text by its length in
characters, which is wrong where decoding does not give the prompt back verbatim; everything here counts tokens.
"""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "parts": ["KeysOrValues", "TrainedPart", "lora_targets", "target_modules", "train_only"],
        "requests": ["EditRequest", "as_pair", "target_log_probs", "token_ids"],
        "gradient": ["EditResult", "edit_by_gradient"],
        "rome": ["key_covariance", "rome_edit", "rome_update"],
        "evaluate": ["EditEvaluator", "EditScores", "harmonic_mean"],
        "trace": ["MemoryTrace", "memory_trace", "without_memory"],
    },
)
