r"""MA-RLHF (Chai et al., ICLR 2025, arXiv 2410.02743): PPO whose actions are groups of tokens.

PPO for language models is paid once, at the end of the answer, and GAE has to carry that credit back token by token;
after :math:`1/(1-\lambda)` steps little is left. With macro actions a step is a group of about n tokens, so the same
:math:`\lambda` reaches n times as many tokens. The policy still emits single tokens; nothing is added to it, and nothing
changes at inference. A *segmenter* says, for each sampled answer, which tokens form a group:

=========================  ========================================================================================
`FixedNgram`               n tokens each
`RandomNgram`              lengths drawn anew for each answer
`PerplexityRise`           a group ends where the next token would raise the reference's perplexity
`ConstituencyCutoff`       constituents of a parse tree below a size
`RegexBoundary`            a group ends where a pattern does (not in the paper)
`WholeResponse`            everything
=========================  ========================================================================================

Give one to ``PPOConfig(segmenter=...)``; ``value_pooling``, ``macro_reward`` and ``ratio`` there are the paper's other
choices, `labkit.rlhf.macro_gae` and `labkit.rlhf.policy_loss` their mathematics. ``FixedNgram(1)`` is token PPO. For
trl's GRPO there is `labkit.rlhf.MacroGRPOTrainer`.

Where we differ from the authors' code: it works for one row a device, ours for batches. It always puts the last token
in a group of its own, and so do we by default (``last_alone``). Where a boundary falls on the last token anyway it has an
empty group before it, with value and reward 0; we have that with ``phantom=True`` alone. Its reward of a group is a mean
where the paper has a sum; ours is ``macro_reward="sum"`` by default. Its ``unit`` value rule crashes; ours does not.
"""

from labkit.rlhf.ma_rlhf.segmenters import (
    FixedNgram,
    PerplexityRise,
    RandomNgram,
    Segmenter,
    WholeResponse,
)
from labkit.rlhf.ma_rlhf.text import ConstituencyCutoff, RegexBoundary, constituents

__all__ = [
    "ConstituencyCutoff",
    "FixedNgram",
    "PerplexityRise",
    "RandomNgram",
    "RegexBoundary",
    "Segmenter",
    "WholeResponse",
    "constituents",
]
