"""Figures of the analyses. plotly is imported when the first one is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from labkit._plotly import graph_objects

if TYPE_CHECKING:
    import plotly.graph_objects as go


def _figure(title: str, x: str, y: str, **layout: Any) -> go.Figure:
    go = graph_objects()
    return go.Figure(layout={"title": title, "xaxis": {"title": x}, "yaxis": {"title": y}, **layout})


def similarity_map(square: pd.DataFrame, title: str = "How alike are the experts?") -> go.Figure:
    """Heat map of a square table of similarities, such as `ExpertAtlas.weight_similarity` returns.

    Colours leave the diagonal out, which is 1.
    """
    names = [str(name) for name in square.index]
    values = square.to_numpy(dtype=float)
    beside = values[~np.eye(len(values), dtype=bool)]
    top = max(float(np.abs(beside).max()), 1e-6) if len(beside) else 1.0
    figure = _figure(
        title, "expert", "expert", yaxis={"title": "expert", "autorange": "reversed", "type": "category"}
    )
    figure.update_xaxes(type="category")
    figure.add_heatmap(
        x=names, y=names, z=values.round(4).tolist(), zmin=-top, zmax=top, colorscale="RdBu", zmid=0
    )
    return figure


def norm_score_map(counts: pd.DataFrame, title: str = "Do large outputs get high scores?") -> go.Figure:
    """Heat map of `CapturedExperts.norm_score_counts`, as shares of the tokens."""
    values = counts.to_numpy(dtype=float)
    share = values / max(values[0].sum(), 1)
    figure = _figure(title, "rank of the output's norm", "rank of the score")
    figure.add_heatmap(z=share.round(4).tolist(), colorscale="Blues", zmin=0)
    return figure


def router_scatter(
    pairs: pd.DataFrame, matrix: str, title: str = "Do router and neurons agree?"
) -> go.Figure:
    """Similarity of router rows against similarity of average neurons, from `ExpertAtlas.router_pairs`."""
    if matrix not in pairs:
        raise ValueError(f"matrix must be one of {', '.join(pairs.columns[3:])}; got {matrix!r}")
    x, y = pairs["router"].to_numpy(), pairs[matrix].to_numpy()
    figure = _figure(
        title, "similarity of the router's rows", f"similarity of the average neurons ({matrix})"
    )
    names = [f"experts {a} and {b}" for a, b in zip(pairs.a, pairs.b, strict=True)]
    figure.add_scatter(x=x.tolist(), y=y.tolist(), mode="markers", text=names, showlegend=False)
    if np.ptp(x) > 0:
        slope, height = np.polyfit(x, y, 1)
        ends = np.array([x.min(), x.max()])
        line = (slope * ends + height).tolist()
        figure.add_scatter(x=ends.tolist(), y=line, mode="lines", name="regression", showlegend=False)
    return figure


def pca_scatter(points: pd.DataFrame, title: str = "Where do the experts lie?") -> go.Figure:
    """First two components of `ExpertAtlas.pca`, one colour an expert."""
    figure = _figure(title, "first component", "second component")
    whole = points.expert.is_unique
    for expert, part in points.groupby("expert", sort=False):
        figure.add_scatter(
            x=part.pc1.tolist(),
            y=(part.pc2 if "pc2" in part else part.pc1 * 0).tolist(),
            mode="markers+text" if whole else "markers",
            text=[str(expert)] * len(part) if whole else None,
            textposition="top center",
            name=str(expert),
            showlegend=not whole,
        )
    return figure


def figures(tables: Mapping[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Figures of the tables of a report, by name."""
    weights, found = tables["weights"], {}
    columns = [c for c in ("similarity", "tau", "to_dense") if c in weights]
    for column in columns:
        figure = _figure(
            f"{column} over depth", "layer", f"mean {column.replace('_', ' ')} over pairs of experts"
        )
        for matrix, part in weights.groupby("matrix", sort=False):
            figure.add_scatter(
                x=part.layer.tolist(), y=part[column].tolist(), name=str(matrix), mode="lines+markers"
            )
        found[column] = figure
    if "norm_score_counts" in tables:
        found["norm_score"] = norm_score_map(tables["norm_score_counts"].set_index("score rank"))
    if "load" in tables:
        load = tables["load"].set_index("layer")
        figure = _figure("Which experts are chosen?", "expert", "layer")
        figure.add_heatmap(
            x=list(load), y=load.index.tolist(), z=load.to_numpy().tolist(), colorscale="Blues"
        )
        found["load"] = figure
    return found
