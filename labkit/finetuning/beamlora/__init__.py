r"""BeamLoRA: give the slots of weak LoRA ranks to copies of strong ones, while training.

Gu, Zhang, Liu et al., "BeamLoRA: Beam-Constraint Low-Rank Adaptation", ACL 2025, arXiv 2502.13604.

A LoRA update is a sum of r rank-one pieces b_i a_i. Some do most of the work, yet all get the same room. BeamLoRA
takes the pieces for the candidates of a beam search: a learned score per piece says how much it matters, and every
few thousand steps the weak are dropped and their slots go to copies of the strong. Rank, parameters and the cost of
inference stay those of LoRA.

.. math::

    s = r \cdot \mathrm{softmax}(g / \tau) \qquad
    y = W_0 x + \frac{\alpha}{r} B \, (s \odot A x) \qquad
    \Delta W = \frac{\alpha}{r} B \,\mathrm{diag}(s)\, A

With T = ``beam_every`` (even), S the run's steps, p0 = ``beam_p0``, T_end = ``beam_end`` and n finished steps:

* *Remember*, in the step that begins with n a multiple of T/2 but not of T: copies of A, B and of their Adam moments.
* *Reallocate*, at the end of a step that makes n a multiple of T, while S - n >= T. With k = n - 1,
  p = 1 - (1 - p0)(1 + cos(pi k / T_end)) / 2 up to T_end, then 1. The scores of all modules are sorted; those past
  a share p of their sum are pruned (``scope="module"``: for each module apart). A module with K pruned ranks P takes
  its K best, in random order ``top``:
  A[P] = A_remembered[top], B[:, P] = B_remembered[:, top], g[P] = g[top] = (g[P] + g[top]) / 2.
  Old values make the copy differ from its original. Adam's moments of P come along; those of the gate become 0.
* *Fold* at the end: A <- diag(s) A, g <- 0, and the adapter is a plain LoRA that stock peft loads.

Symbols: g ``lora_gate`` (r,), one a module and adapter, 0 at first, so that training starts as LoRA; tau
``beam_temperature``; A ``lora_A`` (r, D_in), B ``lora_B`` (D_out, r). Adam moves g by about the learning rate a step,
so g / tau by lr / tau: unless lr T / tau is of the order of 1 or more, the scores say little when they are first used.

Where this differs from the authors' code, and why:

* Their copy of Adam's moments writes into a temporary and changes nothing. ``optimizer_state="copy"`` does what was
  meant, ``"keep"`` what was released, ``"zero"`` forgets them.
* A module that loses more than half of its ranks would copy pruned ones. ``cap=0.5`` keeps the pruned to the lowest
  half; ``cap=None`` is the released behaviour.
* Equal scores: their sort is not stable, so that which of them are pruned is arbitrary; here it is reproducible.
* At p = 1 rounding can prune one rank there; here the event is skipped.
* The permutation is drawn from (seed, step, module), so that all processes draw the same, and a resumed run too.
* The gate stays in float32: in bfloat16 its small updates are lost.
"""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adapters": [
            "fold_",
            "importances",
            "load_beam_adapter",
            "rank_importance",
            "save_beam_adapter",
            "silenced",
        ],
        "callback": ["BeamSearchCallback"],
        "config": ["BeamLoraConfig"],
        "history": ["RankHistory"],
        "layer": ["BeamLinear", "BeamVariant"],
        "rule": ["beam_scores", "beam_threshold", "expand", "prune_counts", "pruned_and_top"],
        "schedule": ["BeamEvent", "BeamScheduler"],
    },
)
