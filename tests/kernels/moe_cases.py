"""Cases on which every implementation of the experts and of the router must agree with its definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labkit.kernels.grouped_experts import grouped_experts
from labkit.kernels.router_topk import router_topk

# tokens, experts, experts that get tokens, width, inner width, k, gated, activation
EXPERT_CASES = [
    (5, 3, 2, 7, 5, 2, True, "silu"),
    (70, 2, 2, 40, 33, 1, True, "gelu"),  # an expert's rows fill more than a tile
    (9, 4, 4, 8, 8, 4, False, "relu"),  # k = E
    (3, 1, 1, 16, 70, 1, True, "gelu_tanh"),  # a single expert
    (130, 5, 1, 65, 9, 1, True, "relu"),  # one expert takes all
    (1, 6, 6, 3, 1, 1, False, "gelu"),
    (0, 3, 3, 8, 8, 2, True, "silu"),
    (17, 4, 3, 12, 6, 3, False, "silu"),
]


def expert_inputs(case: tuple[Any, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """Tokens, weights and matrices (leaves), the choice, and the options of a case."""
    tokens, experts, used, width, inner, k, gated, activation = case
    generator = torch.Generator().manual_seed(tokens + experts)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()

    probs, index = torch.randn(tokens, used, generator=generator).softmax(-1).topk(min(k, used))
    weight = probs.detach().requires_grad_()
    outer = 2 * inner if gated else inner
    # tokens as a view with a stride, as a slice of a wider tensor
    x = draw(tokens, width + 3)
    leaves = [x, weight, draw(experts, outer, width, scale=0.3), draw(experts, width, inner, scale=0.3)]
    return leaves, index, {"gated": gated, "activation": activation}


def expert_results(
    case: tuple[Any, ...], dtype: torch.dtype, backend: str, *, pairs: bool = False
) -> list[Tensor]:
    """Output and gradients of one backend; with ``pairs``, some of the choices are left out."""
    leaves, index, options = expert_inputs(case, dtype)
    x, weight, up, down = leaves
    x = x[:, : up.shape[2]]
    if pairs:
        keep = torch.rand(index.shape, generator=torch.Generator().manual_seed(3)) < 0.6
        token = torch.arange(len(index))[:, None].expand_as(index)[keep]
        y = grouped_experts(x, index[keep], weight[keep], up, down, token=token, backend=backend, **options)
    else:
        y = grouped_experts(x, index, weight, up, down, backend=backend, **options)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    return [y, *torch.autograd.grad((y.float() * direction).sum(), leaves)]


def assert_experts_agree(
    case: tuple[Any, ...], dtype: torch.dtype, backend: str, *, pairs: bool = False
) -> None:
    """Compare a backend's output and gradients with the definition's, on the same (already rounded) inputs."""
    expected = expert_results(case, dtype, "reference", pairs=pairs)
    actual = expert_results(case, dtype, backend, pairs=pairs)
    assert actual[0].dtype == dtype
    for a, b in zip(expected, actual, strict=True):
        scale = float(a.detach().abs().max()) if a.numel() else 0.0
        tolerance = {"atol": (1e-5 if dtype == torch.float32 else 2e-2) * max(scale, 1.0), "rtol": 1e-4}
        torch.testing.assert_close(b.float(), a.float(), **tolerance)


# tokens, experts, k, renormalize, masked
ROUTER_CASES = [
    (5, 3, 2, True, True),
    (37, 8, 8, False, False),
    (37, 8, 8, True, True),
    (1, 1, 1, True, False),
    (0, 4, 2, True, False),
    (70, 64, 8, True, True),
    (9, 129, 5, False, True),
]


def assert_router_agrees(case: tuple[Any, ...], dtype: torch.dtype, backend: str) -> None:
    """Compare a backend's results, and the gradient through all of them, with the definition's."""
    tokens, experts, k, renormalize, masked = case
    generator = torch.Generator().manual_seed(tokens + experts)
    # distinct in either dtype: the order among ties is nobody's promise
    ranks = torch.rand(tokens, experts, generator=generator).argsort(1)
    logits = ((ranks - experts / 2) / 8).to(dtype).requires_grad_()
    mask = torch.rand(tokens, generator=generator) > 0.3 if masked else None
    results = []
    for name in ("reference", backend):
        found = router_topk(logits, k, renormalize=renormalize, mask=mask, backend=name)
        directions = torch.Generator().manual_seed(1)
        loss = sum(
            (part * torch.randn(part.shape, generator=directions)).sum()
            for part in (found.weights, found.logsumexp, found.probability_sums)
        )
        results.append((found, torch.autograd.grad(loss, logits)[0]))
    (expected, gradient), (actual, own_gradient) = results
    assert torch.equal(actual.index, expected.index)
    assert torch.equal(actual.counts, expected.counts)
    for name in ("weights", "logsumexp", "probability_sums"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), atol=2e-6, rtol=1e-5)
    tolerance = (1e-6, 1e-5) if dtype == torch.float32 else (1e-2, 1e-2)
    torch.testing.assert_close(own_gradient, gradient, atol=tolerance[0], rtol=tolerance[1])
