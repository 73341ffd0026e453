"""Proxy column sums in plain PyTorch: the definition, and a form that never holds the attention matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible_keys(positions: Tensor, n_keys: int, key_mask: Tensor | None, causal: bool) -> Tensor:
    """Which key each proxy may look at.

    Parameters
    ----------
    positions : Tensor
        Integer positions, ``(B, P)``; negative ones are no proxies.
    n_keys : int
        Number of keys, S.
    key_mask : Tensor, optional
        ``(B, S)`` bool, False at padding.
    causal : bool
        Whether a proxy at position p sees the keys 0..p only.

    Returns
    -------
    Tensor
        Bool, ``(B, P, S)``.

    Examples
    --------
    >>> visible_keys(torch.tensor([[1, -1]]), 3, None, causal=True).int()
    tensor([[[1, 1, 0],
             [0, 0, 0]]], dtype=torch.int32)
    """
    keys = torch.arange(n_keys, device=positions.device)
    visible = (positions >= 0)[..., None].expand(*positions.shape, n_keys)
    if causal:
        visible = visible & (keys <= positions[..., None])
    if key_mask is not None:
        visible = visible & key_mask[:, None, :]
    return visible


def proxy_column_sums_reference(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    key_mask: Tensor | None,
    causal: bool,
    scale: float,
    head_reduction: str,
) -> Tensor:
    """Compute the definition: softmax over the keys, then the sum over the proxies. Differentiable.

    Arguments are those of :func:`labkit.kernels.proxy_column_sums.proxy_column_sums`, with ``positions`` of
    shape ``(B, P)`` and every default filled in. It holds the attention matrix, ``(B, H, P, S)``, several
    times.
    """
    batch, heads, n_proxies, width = q.shape
    kv_heads, n_keys = k.shape[1], k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).reshape(batch, kv_heads, heads // kv_heads, n_proxies, width)
    logits = torch.einsum("bkgpd,bksd->bkgps", grouped, k.to(dtype)) * scale  # (B, K, g, P, S)
    hidden = ~visible_keys(positions, n_keys, key_mask, causal)[:, None, None]
    # A row with no visible key is 0/0 in the softmax; it counts as no attention at all.
    probabilities = logits.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)
    sums = probabilities.sum(-2)  # (B, K, g, S)
    return sums.mean(2) if head_reduction == "mean" else sums.reshape(batch, heads, n_keys)


# Logits held at once by the chunked form. On the CPU 1 MiB in float32, which stays in a core's cache; on a
# GPU, where a block costs some ten launches, 64 MiB.
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}


def block_elements(device: torch.device) -> int:
    """Logits that the chunked form holds at once on a device."""
    return BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cpu"])


# Largest logit, in base 2, that is exponentiated as it is.
SAFE_LOGIT = 80.0


def _longest(rows: Tensor) -> float:
    """Length of the longest of the rows; 0 for none."""
    return float(torch.linalg.vector_norm(rows, dim=-1).amax()) if rows.numel() else 0.0


def proxy_column_sums_chunked(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    key_mask: Tensor | None,
    causal: bool,
    scale: float,
    head_reduction: str,
) -> Tensor:
    """Compute the same sums from blocks of proxy rows; additional memory is O(S), and no gradient.

    A block holds the rows of a few proxies for the query heads of one KV head, so that one matrix product
    serves the group; its size is chosen so that the logits stay in cache. Logits are in base 2, as torch's
    ``exp2`` takes a third of the time of its ``exp`` on the CPU. Under ``causal`` a block stops at
    the last key that any of its proxies sees.
    """
    batch, heads, n_proxies, width = q.shape
    kv_heads, n_keys = k.shape[1], k.shape[2]
    group = heads // kv_heads
    dtype = torch.promote_types(q.dtype, torch.float32)
    kept = group if head_reduction == "none" else 1
    out = torch.zeros(batch, kv_heads, kept, n_keys, dtype=dtype, device=k.device)
    rows = max(1, min(n_proxies, block_elements(k.device) // max(1, group * n_keys)))
    if k.device.type == "cpu":  # more rows gain nothing there, and their logits would leave the cache
        rows = min(rows, -(-128 // group))
    buffer = torch.empty(rows * group * n_keys, dtype=dtype, device=k.device)

    with torch.no_grad():
        for b in range(batch):
            live = torch.nonzero(positions[b] >= 0).squeeze(1)
            if causal:  # neighbours in position share a block, so that a block's last visible key is near
                live = live[torch.argsort(positions[b, live])]
            order = positions[b, live]
            for kv in range(kv_heads):
                keys = k[b, kv].to(dtype)
                queries = q[b, kv * group : (kv + 1) * group].transpose(0, 1)[live].to(dtype)
                queries = queries * (scale / math.log(2.0))
                # |logit| is at most |q||k|. Where that is small, powers of 2 stay well inside float32
                # (2^-126 to 2^127, with room for the sum), and the passes that subtract each row's maximum
                # are not needed.
                small = bool(_longest(queries) * _longest(keys) <= SAFE_LOGIT)
                for start in range(0, len(live), rows):
                    where = order[start : start + rows]
                    n = len(where)
                    stop, clear = n_keys, n_keys
                    if causal:
                        stop, clear = min(n_keys, int(where[-1]) + 1), min(n_keys, int(where[0]) + 1)
                    logits = buffer[: n * group * stop].view(n * group, stop)
                    torch.mm(queries[start : start + n].reshape(n * group, width), keys[:stop].T, out=logits)
                    if clear < stop:  # from here on, only some of the rows see a key
                        later = torch.arange(clear, stop, device=k.device) > where[:, None]
                        logits.view(n, group, stop)[..., clear:].masked_fill_(later[:, None], float("-inf"))
                    if key_mask is not None:
                        logits.masked_fill_(~key_mask[b, :stop], float("-inf"))
                    if not small:
                        peak = logits.amax(1, keepdim=True)
                        logits.sub_(peak.masked_fill_(peak == float("-inf"), 0.0))
                    logits.exp2_()
                    total = logits.sum(1)
                    weight = torch.where(total > 0, total.reciprocal(), torch.zeros_like(total))
                    if head_reduction == "none":
                        part = torch.einsum("ng,ngs->gs", weight.view(n, group), logits.view(n, group, stop))
                        out[b, kv, :, :stop] += part
                    else:
                        out[b, kv, 0, :stop].addmv_(logits.T, weight, alpha=1.0 / group)
    return out.squeeze(2) if head_reduction == "mean" else out.reshape(batch, heads, n_keys)
