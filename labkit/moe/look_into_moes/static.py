"""What the weights alone say: similarity of matrices and of average neurons, routers against neurons, projections.

Pure functions of the weights of one layer. Matrices may be memory-mapped and in any float type: they are read in blocks
and turned into float32 block by block, so that no analysis here needs more than a few of them in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 22
"""Numbers that are turned into float32 at a time."""


def same_shapes(matrices: Sequence[Tensor], what: str = "matrices") -> None:
    """Raise ``ValueError`` unless there are matrices and all are of one shape."""
    shapes = {tuple(matrix.shape) for matrix in matrices}
    if not matrices or len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"{what} must be two-dimensional and of one shape; got {sorted(shapes) or 'none'}")


def _blocks(matrices: Sequence[Tensor]) -> Iterator[Tensor]:
    """The same rows of all matrices, (N, numbers) float32, a block at a time."""
    rows, columns = matrices[0].shape
    step = max(1, BLOCK // (columns * len(matrices)))
    for begin in range(0, rows, step):
        yield torch.stack([matrix[begin : begin + step].float().reshape(-1) for matrix in matrices])


def _cosines(gram: Tensor) -> Tensor:
    """Cosines from inner products; 0 for a vector of zeros, and exactly 1 of any other with itself."""
    norms = gram.diagonal().sqrt()
    scale = torch.where(norms > 0, 1 / norms.clamp(min=1e-300), 0.0)
    cosine = (gram * scale[:, None] * scale[None]).clamp(-1, 1)
    cosine.diagonal().copy_((norms > 0).to(cosine.dtype))
    return cosine.float()


def matrix_similarity(matrices: Sequence[Tensor]) -> Tensor:
    """Cosine of every two matrices, flattened (S1).

    Parameters
    ----------
    matrices : sequence of Tensor
        N matrices of one shape: one of the three of each expert, and the dense model's if wanted.

    Returns
    -------
    Tensor
        ``(N, N)`` float32.

    Raises
    ------
    ValueError
        If shapes differ.

    Examples
    --------
    >>> import torch
    >>> a = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    >>> matrix_similarity([a, torch.tensor([[4.0, 3.0], [0.0, 0.0]])])
    tensor([[1.0000, 0.9600],
            [0.9600, 1.0000]])
    """
    same_shapes(matrices)
    gram = torch.zeros(len(matrices), len(matrices), dtype=torch.float64)
    for block in _blocks(matrices):
        gram += (block @ block.T).double().cpu()
    return _cosines(gram)


def average_neuron(neurons: Tensor) -> Tensor:
    """Mean of an expert's neurons, ``(D,)`` float32 from ``(f, D)``."""
    total = torch.zeros(neurons.shape[1], dtype=torch.float64, device=neurons.device)
    step = max(1, BLOCK // neurons.shape[1])
    for begin in range(0, len(neurons), step):
        total += neurons[begin : begin + step].double().sum(0)
    return (total / len(neurons)).float()


def average_similarity(neurons: Sequence[Tensor]) -> Tensor:
    """Cosine of every two experts' average neurons (S2).

    Parameters
    ----------
    neurons : sequence of Tensor
        ``(f, D)`` each: rows of W_up or W_act, columns of W_down. The number of neurons may differ, so that shared
        experts can take part.

    Returns
    -------
    Tensor
        ``(N, N)`` float32.

    Examples
    --------
    >>> import torch
    >>> one = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> average_similarity([one, torch.tensor([[1.0, 0.0]])])[0, 1]
    tensor(0.7071)
    """
    if not neurons or len({matrix.shape[1] for matrix in neurons}) > 1:
        widths = sorted({matrix.shape[1] for matrix in neurons})
        raise ValueError(f"neurons must be matrices (f, D) of one width D; got widths {widths}")
    return row_similarity(torch.stack([average_neuron(matrix).cpu() for matrix in neurons]))


def row_similarity(rows: Tensor) -> Tensor:
    """Cosine of every two rows, such as the router's, one of which stands for an expert: ``(N, N)`` from ``(N, D)``."""
    rows = rows.detach().double().cpu()
    return _cosines(rows @ rows.T)


def below_diagonal(similarity: Tensor) -> Tensor:
    """The N(N-1)/2 entries below the diagonal of an ``(N, N)`` matrix, row by row.

    Examples
    --------
    >>> import torch
    >>> below_diagonal(torch.arange(9).view(3, 3)).tolist()
    [3, 6, 7]
    """
    row, column = torch.tril_indices(len(similarity), len(similarity), offset=-1)
    return similarity[row, column]


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation; NaN where one side does not vary at all.

    Raises
    ------
    ValueError
        For fewer than three pairs of numbers.

    Examples
    --------
    >>> import torch
    >>> round(pearson(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 3.0, 9.0])), 3)
    0.98
    """
    if x.shape != y.shape or x.numel() < 3:
        raise ValueError(
            f"a correlation needs two vectors of the same 3 or more numbers; got {tuple(x.shape)} and "
            f"{tuple(y.shape)} (3 pairs of experts take at least 3 experts)"
        )
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float(x.norm() * y.norm())
    return float((x @ y) / scale) if scale > 0 else float("nan")


@dataclass(frozen=True)
class Projection:
    """Points of a principal component analysis.

    Attributes
    ----------
    points : Tensor
        ``(N, dims)`` float32; of each component the largest entry is positive.
    share : Tensor
        ``(dims,)``, share of the variance that a component explains.
    """

    points: Tensor
    share: Tensor


def _project(gram: Tensor, dims: int) -> Projection:
    """Scores from the inner products of centred points."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:dims].clamp(min=0), vectors.flip(1)[:, :dims]
    points = vectors * values.sqrt()
    signs = points.gather(0, points.abs().argmax(0, keepdim=True)).sign()
    total = gram.diagonal().sum().clamp(min=1e-300)
    return Projection((points * torch.where(signs == 0, 1.0, signs)).float(), (values / total).float())


def _check_dims(dims: int, most: int) -> None:
    if not 1 <= dims <= most:
        raise ValueError(f"dims must be in 1..{most} for this many points and columns; got {dims}")


def matrix_pca(matrices: Sequence[Tensor], dims: int = 2) -> Projection:
    """Project whole matrices: flatten, standardise every column over the experts, take principal components (S5).

    Columns that are the same in all experts (freshly upcycled ones) count as 0 instead of NaN.

    Parameters
    ----------
    matrices : sequence of Tensor
        N matrices of one shape, N at least 3.
    dims : int, default 2
        Components, less than N.

    Returns
    -------
    Projection
        One point an expert.

    Examples
    --------
    >>> import torch
    >>> same = torch.ones(2, 2)
    >>> [round(x, 3) for x in matrix_pca([same, same, 2 * same], 1).points.flatten().tolist()]
    [-1.155, -1.155, 2.309]
    """
    same_shapes(matrices)
    _check_dims(dims, len(matrices) - 1)
    gram = torch.zeros(len(matrices), len(matrices), dtype=torch.float64)
    for block in _blocks(matrices):
        block = block - block.mean(0)
        deviation = block.std(0)  # over experts, with N - 1
        scale = torch.where(deviation > 0, 1 / deviation.clamp(min=1e-30), 0.0)
        block = block * scale
        gram += (block @ block.T).double().cpu()
    return _project(gram, dims)


def neuron_pca(neurons: Sequence[Tensor], dims: int = 2) -> Projection:
    """Project every neuron of every expert: standardise the D columns over all neurons, principal components (S5).

    Parameters
    ----------
    neurons : sequence of Tensor
        ``(f, D)`` each.
    dims : int, default 2
        Components, at most D.

    Returns
    -------
    Projection
        One point a neuron, expert after expert.
    """
    points = torch.cat([matrix.float().cpu() for matrix in neurons])
    _check_dims(dims, min(points.shape[1], len(points) - 1))
    points = points - points.mean(0)
    deviation = points.std(0)
    points = points * torch.where(deviation > 0, 1 / deviation.clamp(min=1e-30), 0.0)
    values, vectors = torch.linalg.eigh((points.T @ points).double())
    values, vectors = values.flip(0)[:dims].clamp(min=0), vectors.flip(1)[:, :dims]
    scores = points.double() @ vectors
    signs = scores.gather(0, scores.abs().argmax(0, keepdim=True)).sign()
    share = values / (points.double() ** 2).sum().clamp(min=1e-300)
    return Projection((scores * torch.where(signs == 0, 1.0, signs)).float(), share.float())


def noise_points(points: Tensor, eps: float, min_points: int = 5) -> Tensor:
    """Which points DBSCAN would call noise: no neighbour within `eps` has `min_points` neighbours, itself included.

    Parameters
    ----------
    points : Tensor
        ``(N, dims)``.
    eps : float
        Radius; the paper takes 50 for projections of whole matrices.
    min_points : int, default 5
        Points within the radius that make a core.

    Returns
    -------
    Tensor
        ``(N,)`` bool.

    Examples
    --------
    >>> import torch
    >>> noise_points(torch.tensor([[0.0], [0.1], [0.2], [9.0]]), eps=1, min_points=3).tolist()
    [False, False, False, True]
    """
    if eps <= 0:
        raise ValueError(f"eps must be positive, got {eps}")
    near = torch.cdist(points.double(), points.double()) <= eps
    core = near.sum(1) >= min_points
    return ~(near & core).any(1)
