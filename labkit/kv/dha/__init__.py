r"""DHA: decoupled-head attention, made from a trained checkpoint by merging its key and its value heads.

Chen, Zhang, Shang et al., "DHA: Learning Decoupled-Head Attention from Transformer Checkpoints via Adaptive Heads
Fusion", NeurIPS 2024, arXiv 2406.06567.

The idea: many key heads of a layer are alike, and so are many value heads, but not the same ones, and not equally
many in each layer. So key heads and value heads are grouped apart, under one budget of heads for the whole model,
and each group is turned into one head while the model trains on, instead of being averaged at once.

.. math::

    o_i = \mathrm{softmax}\!\left(\frac{x W_Q^i\,(x \hat W_K^{\kappa(i)})^\top}{\sqrt d}\right)
          x \hat W_V^{\nu(i)}
    \qquad
    \tilde W^i = \sum_{j \in c} \omega^c_{ij} W^j
    \qquad
    L_{\mathrm{fusion}} = \frac{\sum_c \sum_{i \in c} \lVert \omega^c_i - \bar\omega^c \rVert^2}
                               {\sum_c (|c| - 1)}

Symbols and arguments: κ and ν map query heads to key and value heads (``key_map``, ``value_map`` of
:class:`DHALlamaConfig`); c is a group of :class:`HeadGroups`; ω are the fusion operators, the identity at the
start, so that the function is that of the checkpoint; L_fusion is 1 there and 0 once the rows of every group
coincide, when the group is one head, :math:`\hat W^c = \sum_j \bar\omega^c_j W^j`, and :meth:`DHAConverter.collapse`
changes nothing. Rotary embedding is linear and the same in all heads, so fusing weights is fusing rotated keys.

The steps: :func:`head_similarity` (linear CKA), :func:`search_groups`, :class:`DHAConverter` (fusion, by an augmented
Lagrangian), ``collapse()``, and training on, which is the caller's. Baselines: :func:`convert_to_gqa` and
:func:`pool_heads`.

Where this differs from the paper, whose code is not published, and why:

* Groups come from clustering the similarity (agglomerative, over all layers at once, or per layer, adjacent, or
  annealed), where the paper optimises the fusion loss over 240 steps of its own.
* The pull of the constraint is one-sided and has a schedule that reaches zero early; in the last steps the operators
  are also drawn to their mean, so that the collapse is exact. With what is left at the end of a plain schedule the
  loss jumps at the collapse.
* ``align=True`` first turns the heads of a group into a common basis, without changing the function: scalar weights
  cannot make two heads alike that say the same in two bases. The paper does not.
* A checkpoint with grouped queries is accepted: what is fused are its key-value heads.
"""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "align": ["align_heads"],
        "convert": ["convert_to_gqa", "export_to_llama", "pool_heads"],
        "fusion": ["DHAConverter", "FusionStep"],
        "groups": ["HeadGroups"],
        "model": [
            "DHALlamaAttention",
            "DHALlamaConfig",
            "DHALlamaForCausalLM",
            "DHALlamaModel",
            "register",
        ],
        "operators": ["FusionSchedule", "fusion_loss"],
        "search": ["search_groups"],
        "trainer": ["FusionCallback"],
        "similarity": ["HeadMoments", "head_moments", "head_similarity", "linear_cka"],
    },
)
