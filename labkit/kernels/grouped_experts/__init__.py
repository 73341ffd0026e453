r"""Experts on the tokens that were routed to them.

.. math:: y_t = \sum_{(t, e, w)} w \left( W^{down}_e\, a(x_t) + b^{down}_e \right), \qquad
          a(x) = \phi(G_e x) \odot U_e x \ \text{ or } \ \phi(U_e x + b^{up}_e)

Four implementations agree: ``reference`` (the definition, a loop over experts), ``sorted`` (pairs sorted by expert, a
backward pass of its own; the fastest on the CPU), ``grouped_mm`` (torch's grouped product) and ``triton``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.kernels._dispatch import check_backend, check_triton
from labkit.kernels.grouped_experts.activations import ACTIVATIONS
from labkit.kernels.grouped_experts.reference import grouped_experts_reference
from labkit.kernels.grouped_experts.sorted import Plan, SortedExperts, grouped_mm_experts

__all__ = ["ACTIVATIONS", "BACKENDS", "grouped_experts", "grouped_experts_reference"]

BACKENDS = ("auto", "reference", "sorted", "grouped_mm", "triton")

# The rule of backend="auto":
#   1. biases, or rows that are no multiple of 16 bytes                       -> sorted
#   2. CUDA, bfloat16, compute capability 8 or more                           -> grouped_mm
#   3. CPU, and the products with the first matrix fit a core's cache         -> grouped_mm
#   4. otherwise                                                              -> sorted
# Rule 3: there the passes over memory that "sorted" saves cost nothing, and its loop over experts is in Python.
# The Triton kernels have not been timed against torch.compile on a GPU, so none of their shapes is a default yet.


SMALL_ELEMENTS = 1 << 18


def _check(
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    token: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    activation: str,
    gated: bool,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}")
    if x.ndim != 2 or up.ndim != 3 or down.ndim != 3:
        raise ValueError(
            "x must be (T, D), up (E, F, D) and down (E, D, f); got "
            f"{tuple(x.shape)}, {tuple(up.shape)} and {tuple(down.shape)}"
        )
    experts, inner = down.shape[0], down.shape[2]
    outer = 2 * inner if gated else inner
    if up.shape != (experts, outer, x.shape[1]) or down.shape[1] != x.shape[1]:
        raise ValueError(
            f"{'gated' if gated else 'ungated'} experts over width {x.shape[1]} need up (E, {outer}, "
            f"{x.shape[1]}) beside down (E, {x.shape[1]}, {inner}); got {tuple(up.shape)} and {tuple(down.shape)}"
        )
    for name, bias, columns in zip(("up_bias", "down_bias"), biases, (outer, x.shape[1]), strict=True):
        if bias is not None and bias.shape != (experts, columns):
            raise ValueError(f"{name} must be ({experts}, {columns}); got {tuple(bias.shape)}")
    if expert.dtype != torch.int64 or (token is not None and token.dtype != torch.int64):
        raise TypeError("expert and token must be int64; use .long()")
    if expert.shape != weight.shape:
        raise ValueError(
            f"expert and weight must have one shape; got {tuple(expert.shape)} and {tuple(weight.shape)}"
        )
    if token is None:
        if expert.ndim != 2 or expert.shape[0] != x.shape[0]:
            raise ValueError(
                f"without token, expert and weight must be ({x.shape[0]}, k); got {tuple(expert.shape)}"
            )
    elif expert.ndim != 1 or token.shape != expert.shape:
        raise ValueError(
            "with token, all of token, expert and weight must be (S,); got "
            f"{tuple(token.shape)} and {tuple(expert.shape)}"
        )
    if token is not None and token.device.type == "cpu" and token.numel():
        if bool((token[1:] < token[:-1]).any()):
            raise ValueError("token must not decrease: give the pairs in the order of their tokens")
        if int(token[0]) < 0 or int(token[-1]) >= x.shape[0]:
            raise ValueError(
                f"token must lie in 0..{x.shape[0] - 1}; got {int(token[0])} to {int(token[-1])}"
            )


def _grouped_mm_fits(x: Tensor, up: Tensor, down: Tensor) -> str | None:
    """None, or the reason why torch's grouped product cannot take these."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return "this torch has no torch.nn.functional.grouped_mm"
    if x.is_cuda and (x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return "on CUDA it takes bfloat16 and compute capability 8.0 or more"
    for name, width in (("D", x.shape[1]), ("f", down.shape[2]), ("F", up.shape[1])):
        if width * x.element_size() % 16:
            return f"a row of {name} = {width} elements of {x.dtype} is not a multiple of 16 bytes"
    return None


def grouped_experts(
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    token: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Run every expert on the tokens routed to it and add the weighted outputs of each token.

    Parameters
    ----------
    x : Tensor
        Tokens, ``(T, D)``.
    expert, weight : Tensor
        Experts of each token and their weights, ``(T, k)``; with ``token``, ``(S,)`` pairs. ``expert`` is int64.
    up : Tensor
        First matrices. Gated: ``(E, 2f, D)``, first the f rows of the gate, then the f rows that it multiplies.
        Otherwise ``(E, f, D)``.
    down : Tensor
        Second matrices, ``(E, D, f)``.
    token : Tensor, optional
        ``(S,)`` int64, not decreasing: the token of each pair, for a variable number of experts a token.
    up_bias, down_bias : Tensor, optional
        ``(E, 2f)`` or ``(E, f)``, and ``(E, D)``.
    activation : {"silu", "gelu", "gelu_tanh", "relu"}, default "silu"
    gated : bool, default True
        Whether ``up`` holds a gate (SwiGLU and its relatives) or one matrix.
    backend : {"auto", "reference", "sorted", "grouped_mm", "triton"}, default "auto"
        The rule of ``"auto"`` stands above ``_check`` in this module. The gradients of all but ``"reference"`` and
        ``"grouped_mm"`` cannot be differentiated again.

    Returns
    -------
    Tensor
        ``(T, D)`` in the dtype of x; zero for a token without experts. Deterministic, in eval and in training. Under
        autocast the products are in its dtype.

    Raises
    ------
    ValueError
        For shapes that do not fit together, an unknown activation or backend, an expert or token out of range (CPU), or
        a backend that cannot take these tensors.
    TypeError
        If ``expert`` or ``token`` is not int64.

    Examples
    --------
    >>> import torch
    >>> from labkit.kernels.grouped_experts import grouped_experts
    >>> up = torch.tensor([[[1.0], [1.0]], [[1.0], [2.0]]])             # two experts: gate, then value
    >>> down = torch.ones(2, 1, 1)
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> index, weights = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    >>> grouped_experts(x, index, weights, up, down, activation="relu")
    tensor([[ 1.5000],
            [18.0000]])
    """
    check_backend(backend, BACKENDS)
    _check(x, expert, weight, up, down, token, (up_bias, down_bias), activation, gated)
    out_dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, up, down = x.to(dtype), up.to(dtype), down.to(dtype)
        up_bias = None if up_bias is None else up_bias.to(dtype)
        down_bias = None if down_bias is None else down_bias.to(dtype)
    if x.dtype != up.dtype or up.dtype != down.dtype:
        raise ValueError(
            f"x, up and down must share a dtype; got {x.dtype}, {up.dtype} and {down.dtype} (use x.to(up.dtype))"
        )
    if expert.numel() == 0:
        # the product keeps the parameters in the graph, so that a step without tokens still has (zero) gradients
        return (x * (0.0 * (weight.sum() + up.sum() + down.sum())).to(x.dtype)).to(out_dtype)
    reason = None if backend not in ("auto", "grouped_mm") else _grouped_mm_fits(x, up, down)
    biased = up_bias is not None or down_bias is not None
    if backend == "auto":
        small = expert.numel() * max(up.shape[1:]) < SMALL_ELEMENTS
        backend = "grouped_mm" if reason is None and not biased and (x.is_cuda or small) else "sorted"
    plan = Plan.of(expert.reshape(-1), token, expert.shape[-1], down.shape[0])
    if backend == "reference":
        slots = expert.shape[-1]
        tokens = token
        if tokens is None:
            tokens = torch.arange(x.shape[0], device=x.device).repeat_interleave(slots)
        return grouped_experts_reference(
            x,
            tokens,
            expert.reshape(-1),
            weight.reshape(-1),
            up,
            down,
            up_bias=up_bias,
            down_bias=down_bias,
            activation=activation,
            gated=gated,
        ).to(out_dtype)
    if backend == "grouped_mm" and (reason is not None or biased):
        raise ValueError(
            f"backend='grouped_mm' cannot take these: {reason or 'it has no biases'}; use backend='sorted'"
        )
    if backend == "triton":
        check_triton(x.device, (x.dtype,))
        if biased:
            raise ValueError("backend='triton' has no biases: use backend='sorted'")
    starts = None
    if token is not None:
        per_token = torch.bincount(token, minlength=x.shape[0])
        starts = per_token.cumsum(0) - per_token
    weight = weight.reshape(-1)
    if backend == "triton":
        from labkit.kernels.grouped_experts.triton import grouped_experts_triton

        out = grouped_experts_triton(x, weight, up, down, plan, starts, activation=activation, gated=gated)
    elif backend == "grouped_mm":
        out = grouped_mm_experts(x, weight, up, down, plan, starts, activation=activation, gated=gated)
    else:
        # an in-place product of a narrow and a wide dtype is rounded once, at the end
        out = SortedExperts.apply(
            x, weight.to(x.dtype), up, down, up_bias, down_bias, plan, starts, activation, gated
        )
    return out.to(out_dtype)
