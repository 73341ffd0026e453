r"""A router's softmax over experts, its choice of k, and the sums that its losses need, in one call.

.. math:: p = \mathrm{softmax}(l), \quad i_1..i_k = \text{the k largest}, \quad
          w_j = p_{i_j} \big/ \textstyle\sum_j p_{i_j} \ \text{(or } p_{i_j}\text{)}

The balance loss needs :math:`\sum_t p_{te}` and the number of choices of each expert, the z-loss the logsumexp; with them
neither the probabilities nor one-hot choices of all layers need to be kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.kernels._dispatch import check_backend, check_triton
from labkit.kernels.router_topk.reference import router_topk_reference

__all__ = ["BACKENDS", "RouterTopK", "router_topk", "router_topk_reference"]

# "auto" is the reference everywhere: the kernel has not yet been timed against torch.compile of it on a GPU.
BACKENDS = ("auto", "reference", "triton")
TRITON_MAX_EXPERTS = 1024


@dataclass(frozen=True)
class RouterTopK:
    """Decision of a router for T tokens over E experts.

    Attributes
    ----------
    weights : Tensor
        ``(T, k)`` float32.
    index : Tensor
        ``(T, k)`` int64, best first.
    logsumexp : Tensor
        ``(T,)`` float32.
    probability_sums : Tensor
        ``(E,)`` float32, probabilities added over the tokens that the mask keeps.
    counts : Tensor
        ``(E,)`` float32, choices of each expert by those tokens; no gradient.
    """

    weights: Tensor
    index: Tensor
    logsumexp: Tensor
    probability_sums: Tensor
    counts: Tensor


def router_topk(
    logits: Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> RouterTopK:
    """Choose k experts for each token and sum what the auxiliary losses need.

    Parameters
    ----------
    logits : Tensor
        ``(T, E)``, any floating dtype; computed in float32. Not NaN.
    top_k : int
        k.
    renormalize : bool, default True
        Whether a token's weights sum to 1, or are its probabilities.
    mask : Tensor, optional
        ``(T,)`` bool, False for tokens that the sums leave out.
    backend : {"auto", "reference", "triton"}, default "auto"

    Returns
    -------
    RouterTopK
        Weights, logsumexp and probability sums are differentiable (once, with ``"triton"``).

    Raises
    ------
    ValueError
        For shapes that do not fit, ``top_k`` outside 1..E, an unknown backend, or more experts than the kernel takes.
    TypeError
        If ``mask`` is not bool.

    Examples
    --------
    >>> import torch
    >>> from labkit.kernels.router_topk import router_topk
    >>> found = router_topk(torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]), top_k=1)
    >>> found.index.tolist(), found.counts.tolist()
    ([[1], [0]], [1.0, 1.0, 0.0])
    """
    check_backend(backend, BACKENDS)
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be (T, E) of a floating dtype; got {tuple(logits.shape)}, {logits.dtype}"
        )
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k must be in 1..{logits.shape[1]}; got {top_k}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool with False at padding; got {mask.dtype} (use mask.bool())")
        if mask.shape != logits.shape[:1]:
            raise ValueError(f"mask must be ({logits.shape[0]},); got {tuple(mask.shape)}")
    if backend == "triton":
        check_triton(logits.device, (logits.dtype,))
        if logits.shape[1] > TRITON_MAX_EXPERTS:
            raise ValueError(
                f"backend='triton' takes up to {TRITON_MAX_EXPERTS} experts; got {logits.shape[1]}"
            )
        from labkit.kernels.router_topk.triton import router_topk_triton

        return RouterTopK(*router_topk_triton(logits, top_k, renormalize=renormalize, mask=mask))
    return RouterTopK(*router_topk_reference(logits, top_k, renormalize=renormalize, mask=mask))
