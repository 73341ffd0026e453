"""What a model's experts do on a text: recorded inputs and decisions, outputs computed when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from labkit.moe.adapters import BlockAdapter
from labkit.moe.capture import BlockInput, capture_inputs
from labkit.moe.look_into_moes.dynamic import (
    Kind,
    active_share,
    norm_score_counts,
    output_similarity,
    token_similarity,
    top_agreement,
)
from labkit.moe.look_into_moes.static import below_diagonal
from labkit.moe.look_into_moes.weights import check_layers

CHUNK = 256
"""Tokens whose outputs of all experts are in memory at a time."""


class CapturedExperts:
    """Inputs of a model's MoE layers on a text, and everything that follows from them.

    The experts are evaluated with k = E on those inputs, layer by layer and chunk by chunk; only results are kept.
    That equals a second forward pass for each layer with all experts switched on, without the pass.

    Parameters
    ----------
    records : mapping of int to BlockInput
        Layer to what its block was given, T tokens of all batches.

    Attributes
    ----------
    layers : list of int
        Layers recorded, ascending.
    tokens : int
        Real tokens of the first layer.
    """

    def __init__(self, records: Mapping[int, BlockInput]) -> None:
        self.records = dict(sorted(records.items()))
        self.layers = list(self.records)
        first = next(iter(self.records.values())).routing
        self.tokens = int(first.real().sum())
        if not self.tokens:
            raise ValueError("the batch holds no real token: its attention mask is 0 everywhere")

    def __repr__(self) -> str:
        return f"CapturedExperts(layers={self.layers}, tokens={self.tokens})"

    def _record(self, layer: int) -> BlockInput:
        check_layers([layer], self.layers, "recorded layer")
        return self.records[layer]

    def count(self, layer: int) -> int:
        """Real tokens of a layer; encoder and decoder of one model read texts of their own."""
        return int(self._record(layer).routing.real().sum())

    def _check_token(self, layer: int, token: int) -> None:
        if not 0 <= token < self.count(layer):
            raise ValueError(f"token must be in 0..{self.count(layer) - 1}, got {token}")

    def inputs(self, layer: int) -> Tensor:
        """What the layer's experts read: ``(T, D)``, real tokens only."""
        record = self._record(layer)
        return record.hidden[record.routing.real()]

    def scores(self, layer: int) -> Tensor:
        """The router's softmax over all experts, ``(T, E)`` float32."""
        record = self._record(layer)
        return record.routing.probs[record.routing.real()]

    def chosen(self, layer: int) -> Tensor:
        """The experts that the model chose, ``(T, k)``, best first."""
        record = self._record(layer)
        return record.routing.index[record.routing.real()]

    def _chunks(self, layer: int) -> Iterator[tuple[BlockAdapter, Tensor]]:
        block = self._record(layer).block
        device = block.matrices(0).down.device
        for hidden in self.inputs(layer).split(CHUNK):
            yield block, hidden.to(device)

    @torch.no_grad()
    def outputs(self, layer: int) -> Tensor:
        """Outputs of all experts, unweighted: ``(T, E, D)``. For long texts prefer the methods that chunk."""
        return torch.cat([block.expert_outputs(hidden) for block, hidden in self._chunks(layer)])

    @torch.no_grad()
    def norms(self, layer: int) -> Tensor:
        """L2 norm of each expert's output, ``(T, E)`` float32 (D2)."""
        found = [block.expert_outputs(hidden).float().norm(dim=-1) for block, hidden in self._chunks(layer)]
        return torch.cat(found).cpu()

    @torch.no_grad()
    def output_similarity(self, layer: int, kind: Kind = "angular") -> pd.DataFrame:
        """Mean similarity of the experts' outputs over the tokens (D1).

        Parameters
        ----------
        layer : int
        kind : {"angular", "cosine"}
            The paper takes cosine for short texts, token by token, and angular for long ones.

        Returns
        -------
        DataFrame
            ``(E, E)``.
        """
        total: Tensor | None = None
        for block, hidden in self._chunks(layer):
            part = output_similarity(block.expert_outputs(hidden), kind) * len(hidden)
            total = part if total is None else total + part
        assert total is not None
        mean = (total / self.count(layer)).cpu()
        mean.fill_diagonal_(1)
        return _square(mean, "expert")

    def mean_similarity(self, kind: Kind = "cosine") -> pd.Series:
        """Mean of :meth:`output_similarity` over pairs of different experts, a layer each."""
        means = {}
        for layer in self.layers:
            means[layer] = float(
                below_diagonal(torch.tensor(self.output_similarity(layer, kind).to_numpy())).mean()
            )
        return pd.Series(means, name="output_similarity").rename_axis("layer")

    @torch.no_grad()
    def token_similarity(self, layer: int, token: int, kind: Kind = "cosine") -> pd.DataFrame:
        """Similarity of the experts' outputs for one token (D1, short text)."""
        self._check_token(layer, token)
        record = self._record(layer)
        device = record.block.matrices(0).down.device
        outputs = record.block.expert_outputs(self.inputs(layer)[token : token + 1].to(device))
        return _square(token_similarity(outputs, kind)[0].cpu(), "expert")

    def norm_score_counts(self, layers: Sequence[int] | None = None) -> pd.DataFrame:
        """Tokens whose expert of a score rank has a norm rank, summed over layers (D2).

        Returns
        -------
        DataFrame
            ``(E, E)`` whole numbers; rows are ranks of the score, columns of the norm, 0 the smallest.

        Raises
        ------
        ValueError
            For an unknown layer, or layers of different numbers of experts.
        """
        total: Tensor | None = None
        for layer in check_layers(layers, self.layers, "recorded layer"):
            counts = norm_score_counts(self.norms(layer), self.scores(layer).cpu())
            if total is not None and counts.shape != total.shape:
                raise ValueError(
                    f"layers have {total.shape[0]} and {counts.shape[0]} experts; count them apart: layers=[...]"
                )
            total = counts if total is None else total + counts
        assert total is not None
        return _square(total, "norm rank", "score rank")

    def top_agreement(self) -> pd.Series:
        """Share of tokens whose best-scored expert has the largest output norm, a layer each; 1/E by chance."""
        shares = {n: top_agreement(torch.tensor(self.norm_score_counts([n]).to_numpy())) for n in self.layers}
        return pd.Series(shares, name="agreement").rename_axis("layer")

    @torch.no_grad()
    def activation_stats(self, threshold: float = 1e-3) -> pd.DataFrame:
        """How many activated states are above a threshold in size, and their mean size (D3).

        Returns
        -------
        DataFrame
            One row a layer: ``share``, ``mean_size``.
        """
        rows = {}
        for layer in self.layers:
            shares, sizes = [], []
            for block, hidden in self._chunks(layer):
                for expert in range(block.num_experts):
                    states = block.activated(expert, hidden).float()
                    shares.append(active_share(states, threshold) * len(hidden))
                    sizes.append(float(states.abs().mean()) * len(hidden))
            scale = self.count(layer) * self._record(layer).block.num_experts
            rows[layer] = {"share": sum(shares) / scale, "mean_size": sum(sizes) / scale}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")

    @torch.no_grad()
    def states(self, layer: int, token: int) -> pd.DataFrame:
        """Activated states act(W_act x) of all experts for one token, ``(E, f)`` (D3, for a heat map)."""
        self._check_token(layer, token)
        block = self._record(layer).block
        hidden = self.inputs(layer)[token : token + 1].to(block.matrices(0).down.device)
        values = torch.cat([block.activated(e, hidden) for e in range(block.num_experts)])
        return pd.DataFrame(values.float().cpu().numpy()).rename_axis("expert").rename_axis("neuron", axis=1)

    def chosen_scores(self, layer: int, tokens: int = 64) -> pd.DataFrame:
        """Scores of the chosen experts of the first tokens, NaN for the others (D4).

        Returns
        -------
        DataFrame
            ``(tokens, E)``.
        """
        scores, chosen = self.scores(layer)[:tokens].cpu(), self.chosen(layer)[:tokens].cpu()
        picked = torch.full_like(scores, torch.nan).scatter(1, chosen, scores.gather(1, chosen))
        return pd.DataFrame(picked.numpy()).rename_axis("token").rename_axis("expert", axis=1)

    def load(self) -> pd.DataFrame:
        """Share of the choices that fall on each expert, one row a layer."""
        rows = {}
        for layer in self.layers:
            chosen = self.chosen(layer)
            counts = torch.bincount(chosen.flatten().cpu(), minlength=self._record(layer).block.num_experts)
            rows[layer] = (counts / chosen.numel()).tolist()
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer").rename_axis("expert", axis=1)


def _square(values: Tensor, columns: str, rows: str | None = None) -> pd.DataFrame:
    return pd.DataFrame(values.numpy()).rename_axis(rows or columns).rename_axis(columns, axis=1)


def _as_inputs(batch: Any, device: torch.device) -> dict[str, Any]:
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping) or not any(isinstance(v, Tensor) for v in batch.values()):
        raise TypeError(
            "a batch is a tensor of token ids (B, T) or what a tokenizer returns with return_tensors='pt'; "
            f"got {type(batch).__name__}"
        )
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and (ids.ndim != 2 or not ids.numel()):
        raise ValueError(f"token ids must be (B, T) and not empty, got shape {tuple(ids.shape)}")
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def capture_experts(model: nn.Module, batches: Any, layers: Sequence[int] | None = None) -> CapturedExperts:
    """Run a text through a model once and keep what its MoE layers read.

    Parameters
    ----------
    model : nn.Module
        As for `labkit.moe.iter_moe_blocks`; it is put into evaluation mode meanwhile.
    batches : Tensor, mapping, or list of them
        Token ids ``(B, T)``, or keyword arguments of the model, such as a tokenizer returns.
    layers : sequence of int, optional
        Layers to keep; all by default. Memory is T·D numbers a layer.

    Returns
    -------
    CapturedExperts

    Raises
    ------
    TypeError, ValueError
        For batches of another kind, empty ones, or unknown layers.
    """
    listed = batches if isinstance(batches, list) else [batches]
    if not listed:
        raise ValueError("there is no batch")
    device = next(model.parameters()).device
    given = [_as_inputs(batch, device) for batch in listed]
    parts: dict[int, list[BlockInput]] = {}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for inputs in given:
            with capture_inputs(model, cpu=True) as forwards, torch.no_grad():
                model(**inputs)
            seen = {record.block.layer: record for record in forwards[0]}
            for layer in check_layers(layers, sorted(seen)):
                parts.setdefault(layer, []).append(seen[layer])
    finally:
        for module, mode in modes.items():
            module.training = mode
    return CapturedExperts({layer: _joined(records) for layer, records in parts.items()})


def _joined(records: list[BlockInput]) -> BlockInput:
    if len(records) == 1:
        return records[0]
    infos = [record.routing for record in records]
    routing = infos[0].replace(
        logits=torch.cat([i.logits for i in infos]),
        probs=torch.cat([i.probs for i in infos]),
        index=torch.cat([i.index for i in infos]),
        weights=torch.cat([i.weights for i in infos]),
        mask=torch.cat([i.real() for i in infos]),
        kept=None,
        pairs=None,
    )
    return BlockInput(records[0].block, torch.cat([record.hidden for record in records]), routing)
