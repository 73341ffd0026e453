r"""MIGU: update only the rows of a weight whose outputs are large (Du et al., arXiv 2406.17245, EMNLP Findings 2024).

Tasks that are learned one after another overwrite each other. MIGU needs neither old data nor task labels: the outputs
of a linear layer are large in other places for other tasks, so in each step it lets only the rows with large outputs
learn. For a layer :math:`y = x W^\top + b` and the N input vectors of one optimizer step (all micro-batches, all
positions, all processes),

.. math::

    n_i = \sum_{\text{N vectors}} |y_i|, \qquad
    \theta = \mathrm{quantile}(n, T), \qquad
    M_i = [n_i \ge \theta], \qquad
    \nabla W \leftarrow \mathrm{diag}(M)\, \nabla W .

T is ``threshold``, about the share of rows that is *masked*; n is ``magnitudes(normalize=False)`` and M ``masks()``.
The L1 normalisation :math:`n_i / \sum_j n_j` changes no quantile rule: it is there for plots and comparisons. The first
task of a sequence is trained without masks.

Order of a step: backward, mean of n over processes, mask, clip, optimizer. Three doors, one object each::

    with MIGU(model) as migu:                           # 1. a plain loop (accelerate too)
        optimizer = MIGUOptimizer(AdamW(model.parameters()), migu, clip=1.0)
        ...                                             #    loss.backward(); optimizer.step(); optimizer.zero_grad()
    Trainer(..., callbacks=[MIGUCallback()])            # 2. transformers and trl
    sequential_finetune(model, tasks, MIGU())           # 3. a sequence of tasks, the first without masks

What is masked, as in the authors' code: ``weight`` of every ``nn.Linear`` that ran, the head included (with a tied
head therefore rows of the embedding; ``skip=("lm_head",)`` leaves it out). Biases, embeddings, norms and fused expert
tensors are not. The mask acts on gradients: momentum and weight decay still move a masked row; ``mask="update"`` keeps
it where it was.

Where we differ from the authors' code:

* LoRA. The released code never masks there (it compares the method's name with an old one, and the call would fail).
  What it means to do is done here: rows of A by the outputs of A, rows of B by the output of the whole layer, base
  and adapter together (``combined=False``: by B's own).
* Forward passes in evaluation mode or without gradients are not counted.
* ``Conv1D`` of GPT-2, whose weight is the transpose, is masked by columns.
* A frozen weight is skipped; if no weight at all has a gradient (DeepSpeed's ZeRO hands gradients over during backward)
  there is an error instead of silence.
* The older variant with clusters of rows is left out.
"""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "baselines": ["EWC", "IncLoRA", "OLoRA"],
        "masks": ["magnitude_mask", "mask_overlap", "signature_distance"],
        "method": ["MIGU", "RandomRowMask", "signature"],
        "plug": ["MIGUCallback", "MIGUOptimizer"],
    },
)
