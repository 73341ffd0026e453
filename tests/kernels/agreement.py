"""Cases on which every implementation of an operation must agree with its definition."""

from __future__ import annotations

from typing import Any

import torch

from labkit.kernels.compact_kv import compact_kv
from labkit.kernels.proxy_column_sums import proxy_column_sums

# keys, proxies, width, KV heads, group, causal, mask, head_reduction
PROXY_CASES = [
    (63, 3, 60, 2, 1, True, False, "mean"),
    (63, 1, 80, 1, 7, True, True, "mean"),
    (63, 17, 60, 1, 7, False, False, "none"),
    (129, 17, 80, 2, 2, True, True, "mean"),
    (129, 17, 60, 2, 2, False, True, "none"),
    (129, 3, 60, 1, 7, True, True, "none"),
    (129, 1, 80, 2, 1, False, False, "mean"),
    (257, 70, 16, 1, 2, True, False, "mean"),
    (1, 1, 16, 1, 1, True, False, "mean"),
]


def proxy_inputs(
    case: tuple[Any, ...], dtype: torch.dtype, device: str = "cpu"
) -> tuple[Any, dict[str, Any]]:
    """Queries, keys and positions of a case: unsorted, one of them absent, one past the end, one row masked."""
    n_keys, n_proxies, width, kv_heads, group, causal, masked, reduction = case
    generator = torch.Generator().manual_seed(n_keys + n_proxies)
    q = torch.randn(2, kv_heads * group, n_proxies, width, generator=generator)
    # a cache as attention layers leave it: tokens before heads, seen through a transpose
    k = torch.randn(2, n_keys, kv_heads, width, generator=generator).transpose(1, 2)
    positions = torch.randint(0, n_keys, (2, n_proxies), generator=generator)
    if n_proxies >= 3:
        positions[0, 1], positions[1, 0] = -1, n_keys + 5
    mask = None
    if masked:
        mask = torch.rand(2, n_keys, generator=generator) > 0.4
        mask[1, : n_keys // 2] = False  # left padding: some proxies see nothing at all
        mask = mask.to(device)
    arguments = {"key_mask": mask, "causal": causal, "head_reduction": reduction}
    return (q.to(device, dtype), k.to(device, dtype), positions.to(device)), arguments


def assert_proxy_agrees(case: tuple[Any, ...], dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Compare a backend with the reference on the same (already rounded) inputs."""
    inputs, arguments = proxy_inputs(case, dtype, device)
    expected = proxy_column_sums(*inputs, **arguments, backend="reference")
    actual = proxy_column_sums(*inputs, **arguments, backend=backend)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


# batch, KV heads, keys, kept, width of K, width of V
COMPACT_CASES = [
    (1, 1, 63, 5, 60, 60),
    (2, 3, 129, 77, 80, 60),
    (2, 2, 17, 17, 16, 128),
    (1, 2, 300, 1, 1, 3),
    (1, 2, 9, 0, 8, 8),
]


def compact_inputs(case: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Any:
    """A contiguous K, a transposed V, and ascending positions."""
    batch, heads, n_keys, kept, k_width, v_width = case
    generator = torch.Generator().manual_seed(n_keys)
    k = torch.randn(batch, heads, n_keys, k_width, generator=generator)
    v = torch.randn(batch, n_keys, heads, v_width, generator=generator).transpose(1, 2)
    keep = torch.rand(batch, heads, n_keys, generator=generator).topk(kept, -1).indices.sort(-1).values
    return k.to(device, dtype), v.to(device, dtype), keep.to(device)


def assert_compact_agrees(
    case: tuple[int, ...], dtype: torch.dtype, backend: str, device: str = "cpu"
) -> None:
    """Compare a backend bit for bit with the reference."""
    k, v, keep = compact_inputs(case, dtype, device)
    expected = compact_kv(k, v, keep, backend="reference")
    for got, wanted, source in zip(compact_kv(k, v, keep, backend=backend), expected, (k, v), strict=True):
        assert torch.equal(got, wanted)
        assert got.is_contiguous()
        assert got.untyped_storage().nbytes() == got.numel() * got.element_size()
        assert got.numel() == 0 or got.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()
