r"""NACL: evict once, after the prefill, by the attention of a few proxy tokens and by chance.

Chen, Wang, Shang et al., "NACL: A General and Effective KV Cache Eviction Framework for LLMs at Inference Time",
ACL 2024, arXiv 2408.03675.

The idea: a key is worth keeping if the tokens that stand where the question is look at it. So keys are scored by
the queries of a few *proxy tokens* P (``proxy_tokens``, by default the end of the prompt), once, when a layer has
read the whole prompt, and for each KV head apart. Part of the budget goes to tokens drawn at random, by score,
independently in every head and layer, so that what one head loses survives in another.

.. math::

    F_{hj} = \sum_{p \in P} \mathrm{softmax}_j\!\left(\frac{Q_{hp} \cdot K_{hj}}{\sqrt d}\right)
    \qquad
    \mathrm{keep}_h = \mathrm{sinks} \cup \mathrm{recent} \cup \mathrm{top}_{C_p}(F_h)
                      \cup \mathrm{draw}_{C_r}\!\left(\mathrm{softmax}(F_h / \tau)\right)

Symbols and arguments: n length of the prompt; sinks the first ``sink`` tokens, recent the last ``recent``; C_p
(``by_score``) and C_r (``by_random``) entries of the middle, C_r a ``random_share`` of the middle's budget; τ
``random_temperature``. Drawing C_r without replacement with weights softmax(F/τ) is taking the top C_r of
F/τ plus independent Gumbel noise, which is how it is done here, in float32 whatever the model's precision.

Where this differs from the authors' code (PaddlePaddle, a patch of Llama), and why:

* Proxies look at the past only (``causal=True``). The authors' call runs without a mask, so that proxies see the
  proxies behind them; ``causal=False`` does the same.
* With grouped queries a KV head is scored by the mean over its own query heads. The authors index the scores of the
  query heads with the number of the KV head, which for more than one query per group is another head;
  ``head_reduction="head_index"`` does the same.
* Budgets are rounded, where theirs are truncated, and are kept to where theirs crash: with their settings the
  recent part is negative below 25,600 tokens. :meth:`NACLPress.official` truncates as they do.
* Batches, with left padding: each prompt on its own. Theirs takes one prompt.

The paper's splits of the budget (its table 4) are :meth:`NACLPress.paper_table`.
"""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "config": ["NACLConfig"],
        "press": ["NACLPress"],
        "scores": ["proxy_scores", "resolve_proxies"],
        "select": ["nacl_priorities", "nacl_reasons", "nacl_select"],
        "split": ["PAPER_TABLE", "Split", "official_split", "paper_split", "split_budget"],
    },
)
