"""ExpertAtlas: the analyses of the paper as methods of one object, on a model or on a checkpoint that is never loaded."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from labkit.moe.look_into_moes import static
from labkit.moe.look_into_moes.captured import CapturedExperts, capture_experts
from labkit.moe.look_into_moes.checkpoint import Checkpoint
from labkit.moe.look_into_moes.dynamic import Kind
from labkit.moe.look_into_moes.matching import Method, NeuronMatch, match_neurons
from labkit.moe.look_into_moes.weights import (
    MATRICES,
    Matrix,
    ModelSource,
    WeightSource,
    check_layers,
    neurons,
)

Level = Literal["matrix", "average", "reorder"]
LEVELS = ("matrix", "average", "reorder")
DENSE, SHARED = "dense", "shared"


class ExpertAtlas:
    """Look into the experts of a model.

    Parameters
    ----------
    model : nn.Module or WeightSource
        A mixture of experts of any form that `labkit.moe.iter_moe_blocks` knows. For a folder or hub id use
        :meth:`from_checkpoint`.
    dense_reference : nn.Module, str, Path or WeightSource, optional
        The dense model that the mixture may come from; its feed-forward layers become the row "dense".

    Attributes
    ----------
    layers : list of int
        MoE layers.
    captured : CapturedExperts or None
        What :meth:`outputs` recorded last.

    Raises
    ------
    ValueError
        If the model has no MoE block, or the reference has no feed-forward layer of the same index or other shapes.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> atlas = ExpertAtlas(tiny("mixtral", width=16, heads=2, seed=0))
    >>> atlas
    ExpertAtlas(MixtralForCausalLM: 2 layers of 4 experts)
    >>> atlas.weight_similarity(0, "up").shape
    (4, 4)
    """

    def __init__(self, model: nn.Module | WeightSource, dense_reference: Any = None) -> None:
        if isinstance(model, str | Path):
            raise TypeError(f"for a folder or hub id use ExpertAtlas.from_checkpoint({str(model)!r})")
        self.source: WeightSource = ModelSource(model) if isinstance(model, nn.Module) else model
        self.model = model if isinstance(model, nn.Module) else None
        self.layers = self.source.layers
        self.reference: WeightSource | None = None
        if isinstance(dense_reference, nn.Module):
            self.reference = ModelSource(dense_reference, mixture=False)
        elif isinstance(dense_reference, str | Path):
            self.reference = Checkpoint(dense_reference, mixture=False)
        elif dense_reference is not None:
            self.reference = dense_reference
        if self.reference is not None:
            self._check_reference(self.reference)
        self.captured: CapturedExperts | None = None

    @classmethod
    def from_checkpoint(
        cls,
        place: str | Path,
        dense_reference: Any = None,
        *,
        names: Mapping[str, str] | None = None,
        revision: str | None = None,
    ) -> ExpertAtlas:
        """Look into a checkpoint without loading the model: memory-mapped, one layer and matrix at a time.

        Parameters
        ----------
        place : str or Path
            Folder with safetensors files, or id of a hub repository (shards are fetched as layers are asked for).
        dense_reference
            As above.
        names, revision
            As for :class:`~labkit.moe.look_into_moes.checkpoint.Checkpoint`.
        """
        return cls(Checkpoint(place, names=names, revision=revision), dense_reference)

    def __repr__(self) -> str:
        counts = sorted({self.source.num_experts(layer) for layer in self.layers})
        experts = " or ".join(map(str, counts))
        return f"ExpertAtlas({self.source.name}: {len(self.layers)} layers of {experts} experts)"

    def _check_reference(self, reference: WeightSource) -> None:
        missing = [layer for layer in self.layers if layer not in reference.dense_layers]
        if missing:
            raise ValueError(
                f"the dense reference has no feed-forward layer {missing}; it has {reference.dense_layers}"
            )
        layer = self.layers[0]
        for matrix in self.source.matrices(layer):
            ours = tuple(self.source.stored(layer, matrix)[0].shape)
            theirs = tuple(reference.dense(layer, matrix).shape)
            if ours != theirs:
                raise ValueError(
                    f"the dense reference has another shape: its {matrix} matrix is {theirs}, an expert's {ours}. Only a "
                    "model of the same width and number of neurons can be the origin of the experts"
                )

    def _check(self, layer: int, matrix: str) -> Matrix:
        check_layers([layer], self.layers)
        there = self.source.matrices(layer)
        if matrix not in there:
            raise ValueError(f"matrix must be one of {', '.join(map(repr, there))} here; got {matrix!r}")
        return matrix  # type: ignore[return-value]

    # ------------------------------------------------------------------------------------------- weights

    def weight_similarity(
        self, layer: int, matrix: Matrix, level: Level = "matrix", **matching: Any
    ) -> pd.DataFrame:
        """How alike the experts' weights are.

        Parameters
        ----------
        layer : int
            A MoE layer.
        matrix : {"up", "act", "down"}
        level : {"matrix", "average", "reorder"}
            "matrix" compares flattened matrices (S1); "average" the mean neurons, shared experts included (S2);
            "reorder" flattened matrices after matching neurons (S3, see :meth:`reorder`).
        **matching
            Of "reorder", as for `match_neurons`.

        Returns
        -------
        DataFrame
            Square, labelled by expert, "dense" for the reference and "shared 0", ... for shared experts.
        """
        matrix = self._check(layer, matrix)
        if level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(map(repr, LEVELS))}; got {level!r}")
        if matching and level != "reorder":
            raise TypeError(f"{', '.join(matching)} belong to level='reorder', not to {level!r}")
        experts: list[Any] = list(range(self.source.num_experts(layer)))
        if level == "reorder":
            pairs = self.reorder(layer, matrix, **matching)
            names = [*experts, *([DENSE] if self.reference is not None else [])]
            place = {name: i for i, name in enumerate(names)}
            values = np.ones((len(names), len(names)))
            for a, b, similarity in zip(pairs.a, pairs.b, pairs.similarity, strict=True):
                values[place[a], place[b]] = values[place[b], place[a]] = similarity
            return pd.DataFrame(values, index=names, columns=names)
        stored = self.source.stored(layer, matrix)
        if self.reference is not None:
            stored, experts = [*stored, self.reference.dense(layer, matrix)], [*experts, DENSE]
        if level == "matrix":
            similarity = static.matrix_similarity(stored)
        else:
            shared = self.source.shared(layer, matrix)
            experts += [f"{SHARED} {i}" for i in range(len(shared))]
            similarity = static.average_similarity([neurons(matrix, w) for w in [*stored, *shared]])
        return pd.DataFrame(similarity.numpy(), index=experts, columns=experts)

    def match(
        self,
        layer: int,
        matrix: Matrix,
        a: int | str,
        b: int | str,
        method: Method = "auto",
        *,
        max_neurons: int | None = None,
        seed: int = 0,
    ) -> NeuronMatch:
        """Match the neurons of two experts; ``b`` may be "dense". See `match_neurons`."""
        matrix = self._check(layer, matrix)
        found = []
        for expert in (a, b):
            if expert == DENSE and self.reference is not None:
                found.append(self.reference.dense(layer, matrix))
            elif isinstance(expert, int) and 0 <= expert < self.source.num_experts(layer):
                found.append(self.source.stored(layer, matrix)[expert])
            else:
                raise ValueError(
                    f"{expert!r} is no expert of layer {layer}: 0..{self.source.num_experts(layer) - 1}"
                    + (", or 'dense'" if self.reference is not None else "")
                )
        one, two = (neurons(matrix, weight) for weight in found)
        return match_neurons(one, two, method, max_neurons=max_neurons, seed=seed)

    def reorder(
        self,
        layer: int,
        matrix: Matrix,
        method: Method = "auto",
        *,
        max_neurons: int | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Match the neurons of every two experts, each matrix on its own (S3).

        Parameters
        ----------
        layer, matrix
            As for :meth:`weight_similarity`.
        method, max_neurons, seed
            As for `match_neurons`.

        Returns
        -------
        DataFrame
            One row a pair: ``a``, ``b``, ``before``, ``similarity``, ``gain``, ``tau``, ``matched``, ``method``.
        """
        matrix = self._check(layer, matrix)
        weights: dict[Any, Tensor] = dict(enumerate(self.source.stored(layer, matrix)))
        if self.reference is not None:
            weights[DENSE] = self.reference.dense(layer, matrix)
        rows = []
        for a, b in itertools.combinations(weights, 2):
            one, two = neurons(matrix, weights[a]), neurons(matrix, weights[b])
            found = match_neurons(one, two, method, max_neurons=max_neurons, seed=seed)
            rows.append(
                {
                    "a": a,
                    "b": b,
                    "before": found.before,
                    "similarity": found.similarity,
                    "gain": found.gain,
                    "tau": found.tau,
                    "matched": found.matched,
                    "method": found.method,
                }
            )
        return pd.DataFrame(rows)

    def router_pairs(self, layer: int) -> pd.DataFrame:
        """Similarities of every two experts: of their router rows, and of their average neurons (S4).

        Returns
        -------
        DataFrame
            One row a pair: ``a``, ``b``, ``router``, and a column for each matrix.

        Raises
        ------
        ValueError
            If the router is not linear.
        """
        check_layers([layer], self.layers)
        weight = self.source.router(layer)
        if weight is None:
            raise ValueError(f"layer {layer} has no linear router whose rows could stand for its experts")
        a, b = torch.tril_indices(len(weight), len(weight), offset=-1)
        table = pd.DataFrame({"a": b.tolist(), "b": a.tolist()})
        table["router"] = static.below_diagonal(static.row_similarity(weight.float())).tolist()
        for matrix in self.source.matrices(layer):
            stored = [neurons(matrix, w) for w in self.source.stored(layer, matrix)]
            table[matrix] = static.below_diagonal(static.average_similarity(stored)).tolist()
        return table

    def router_correlation(self, layers: Sequence[int] | None = None) -> pd.DataFrame:
        """Pearson's r between the similarity of router rows and of average neurons (S4).

        The paper reports the square, averaged over layers: ``(atlas.router_correlation() ** 2).mean()``.

        Returns
        -------
        DataFrame
            One row a layer, one column a matrix. NaN where similarities do not vary.

        Raises
        ------
        ValueError
            For fewer than three experts, since two points make no correlation.
        """
        rows = {}
        for layer in check_layers(layers, self.layers):
            experts = self.source.num_experts(layer)
            if experts < 3:
                raise ValueError(
                    f"layer {layer} has {experts} experts, hence fewer than 3 pairs: no correlation. It takes 3 experts"
                )
            pairs = self.router_pairs(layer)
            router = torch.tensor(pairs["router"].to_numpy())
            rows[layer] = {
                matrix: static.pearson(router, torch.tensor(pairs[matrix].to_numpy()))
                for matrix in self.source.matrices(layer)
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")

    def output_correlation(self, layers: Sequence[int] | None = None, kind: Kind = "angular") -> pd.Series:
        """Pearson's r, over pairs of experts, of the similarity of weights and of outputs.

        Weights are whole matrices (S1, mean of the matrices), outputs those of the text of :meth:`outputs` (D1). A high
        r makes the cheap comparison of weights a stand-in for the costly one of outputs.

        Returns
        -------
        Series
            One value a layer.
        """
        captured, found = self._captured(), {}
        for layer in check_layers(layers, captured.layers, "recorded layer"):
            matrices = self.source.matrices(layer)
            weights = torch.stack([static.matrix_similarity(self.source.stored(layer, m)) for m in matrices])
            outputs = torch.tensor(captured.output_similarity(layer, kind).to_numpy())
            found[layer] = static.pearson(
                static.below_diagonal(weights.mean(0)), static.below_diagonal(outputs)
            )
        return pd.Series(found, name="output_correlation").rename_axis("layer")

    def pca(
        self,
        layer: int,
        matrix: Matrix,
        level: Literal["matrix", "neuron"] = "matrix",
        dims: int = 2,
        *,
        noise_eps: float | None = None,
    ) -> pd.DataFrame:
        """Principal components of the experts' weights (S5).

        Parameters
        ----------
        layer, matrix
            As for :meth:`weight_similarity`.
        level : {"matrix", "neuron"}
            Whether a point is a whole matrix, or one neuron.
        dims : int, default 2
            Components.
        noise_eps : float, optional
            Drop what DBSCAN with this radius calls noise among the projected matrices (the paper: 50, for DeepSeekMoE).

        Returns
        -------
        DataFrame
            Columns ``expert``, ``pc1``, ...; ``attrs["share"]`` is the explained variance of each component.
        """
        matrix = self._check(layer, matrix)
        stored = self.source.stored(layer, matrix)
        experts: list[Any] = list(range(len(stored)))
        if level == "matrix":
            if self.reference is not None:
                stored, experts = [*stored, self.reference.dense(layer, matrix)], [*experts, DENSE]
            found = static.matrix_pca(stored, dims)
        elif level == "neuron":
            found = static.neuron_pca([neurons(matrix, w) for w in stored], dims)
            experts = [e for e, w in enumerate(stored) for _ in range(neurons(matrix, w).shape[0])]
        else:
            raise ValueError(f"level must be 'matrix' or 'neuron', got {level!r}")
        table = pd.DataFrame(found.points.numpy(), columns=[f"pc{i + 1}" for i in range(dims)])
        table.insert(0, "expert", experts)
        if noise_eps is not None:
            table = table[(~static.noise_points(found.points, noise_eps)).numpy()]
        table.attrs["share"] = found.share.tolist()
        return table

    # ------------------------------------------------------------------------------------------- outputs

    def outputs(self, batches: Any, layers: Sequence[int] | None = None) -> CapturedExperts:
        """Run a text through the model and record what its experts read; see `capture_experts`.

        Raises
        ------
        ValueError
            If the atlas looks at a checkpoint, which cannot run.
        """
        if self.model is None:
            raise ValueError(
                "a checkpoint that is not loaded computes no outputs: load it with from_pretrained and make "
                "ExpertAtlas(model)"
            )
        self.captured = capture_experts(self.model, batches, layers)
        return self.captured

    def _captured(self) -> CapturedExperts:
        if self.captured is None:
            raise ValueError("no text was run yet: call outputs(batches) first")
        return self.captured

    def output_similarity(self, layer: int, kind: Kind = "angular") -> pd.DataFrame:
        """D1 on the text of :meth:`outputs`; see :meth:`CapturedExperts.output_similarity`."""
        return self._captured().output_similarity(layer, kind)

    def norm_score_counts(self, layers: Sequence[int] | None = None) -> pd.DataFrame:
        """D2 on the text of :meth:`outputs`; see :meth:`CapturedExperts.norm_score_counts`."""
        return self._captured().norm_score_counts(layers)

    def activation_stats(self, threshold: float = 1e-3) -> pd.DataFrame:
        """D3 on the text of :meth:`outputs`; see :meth:`CapturedExperts.activation_stats`."""
        return self._captured().activation_stats(threshold)

    # ------------------------------------------------------------------------------------------- all of it

    def summary(self, layers: Sequence[int] | None = None, **matching: Any) -> pd.DataFrame:
        """Means over pairs of experts, one row a layer and matrix.

        Parameters
        ----------
        layers : sequence of int, optional
            All by default.
        **matching
            As for `match_neurons`. ``reorder=False`` leaves the matching out.

        Returns
        -------
        DataFrame
            Columns ``layer``, ``matrix``, ``similarity`` (S1), ``absolute`` (of its absolute values), ``average`` (S2),
            ``gain`` and ``tau`` (S3), and with a dense reference ``to_dense`` and ``tau_to_dense``.
        """
        reorder = matching.pop("reorder", True)
        rows = []
        for layer in check_layers(layers, self.layers):
            if self.source.shared(layer, self.source.matrices(layer)[0]):
                note = "shared experts have another width and are left out of whole-matrix similarity"
                warnings.warn(note, stacklevel=2)
            for matrix in self.source.matrices(layer):
                row: dict[str, Any] = {"layer": layer, "matrix": matrix}
                for name, level in (("similarity", "matrix"), ("average", "average")):
                    square = self.weight_similarity(layer, matrix, level)  # type: ignore[arg-type]
                    experts = [e for e in square.index if isinstance(e, int)]
                    inner = torch.tensor(square.loc[experts, experts].to_numpy())
                    cosines = static.below_diagonal(inner)
                    row[name] = float(cosines.mean())
                    if level == "matrix":
                        row["absolute"] = float(cosines.abs().mean())
                        if self.reference is not None:
                            row["to_dense"] = float(square.loc[experts, DENSE].mean())
                if reorder:
                    pairs = self.reorder(layer, matrix, **matching)
                    inside = pairs[pairs.b != DENSE]
                    row |= {"gain": inside.gain.mean(), "tau": inside.tau.mean()}
                    if self.reference is not None:
                        row["tau_to_dense"] = pairs[pairs.b == DENSE].tau.mean()
                rows.append(row)
        return pd.DataFrame(rows)

    def report(self, batches: Any = None, **options: Any) -> Any:
        """Everything in one: see :meth:`labkit.moe.MoEReport.of`."""
        from labkit.moe.look_into_moes.report import MoEReport

        return MoEReport.of(self, batches, **options)


__all__ = ["DENSE", "LEVELS", "MATRICES", "ExpertAtlas"]
