"""What a judge would say at each stage of its trace, and figures of it. plotly is imported when the first one is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from labkit._plotly import graph_objects
from labkit.rlhf.themis.traces import OBSERVATION, TOOL, WORK, Trace

if TYPE_CHECKING:
    import plotly.graph_objects as go

STAGES = ("question and answer", "call", "observation", "rationale")
BETTER, WORSE = "#0072B2", "#D55E00"


def stage_texts(trace: Trace) -> list[str]:
    """The text up to each of `STAGES`; a stage that the trace does not have adds nothing to the one before.

    Examples
    --------
    >>> trace = Trace(text="Q A\\n<start_tool> call\\n<start_observation> Observation: 4\\n<start_work> Work: right")
    >>> stage_texts(trace)[1]
    'Q A\\n<start_tool> call\\n'
    """
    text = trace.text
    ends = []
    for mark, last in ((TOOL, False), (OBSERVATION, True), (WORK, True)):
        # With several calls the stage of the call ends where the last observation begins.
        place = text.rfind(mark) if last else text.find(mark)
        ends.append(place if place >= 0 else len(text))
    return [text[: min(ends[i:])] for i in range(3)] + [text]


def stage_rewards(model: Any, tokenizer: Any, traces: Sequence[Trace], batch_size: int = 128) -> torch.Tensor:
    """Rewards as if the judge had to stop after each of `STAGES`.

    The head was trained at the end of the rationale only; what it says before is what it says of a text that ends there.

    Parameters
    ----------
    model : ThemisRewardModel
    tokenizer
        Its tokenizer.
    traces : sequence of Trace
        N of them.
    batch_size : int
        Texts that are read at a time.

    Returns
    -------
    Tensor
        ``(N, 4)``, float32, on the CPU.
    """
    texts = [text for trace in traces for text in stage_texts(trace)]
    return model.score_texts(tokenizer, texts, batch_size).float().cpu().view(len(traces), len(STAGES))


def pairs_figure(better: Sequence[float], worse: Sequence[float], title: str, **layout: Any) -> go.Figure:
    """Rewards of pairs of answers, one column a pair: where the blue point is above the orange one, the judge is right.

    Parameters
    ----------
    better, worse : sequence of float
        Rewards of the better and the worse answer of each pair.
    title : str
    **layout
        Of the figure.

    Examples
    --------
    >>> figure = pairs_figure([1.0, 0.0], [0.0, 1.0], "Who wins?")
    >>> figure.layout.title.text
    '<b>Who wins?</b><br><span style="font-size:13px">50% of the pairs in the right order</span>'
    """
    go = graph_objects()
    if len(better) != len(worse) or not len(better):
        raise ValueError(
            f"{len(better)} rewards of better and {len(worse)} of worse answers; pairs are needed"
        )
    right = sum(a > b for a, b in zip(better, worse, strict=True)) / len(better)
    note = f"{right:.0%} of the pairs in the right order"
    defaults = {
        "title": f'<b>{title}</b><br><span style="font-size:13px">{note}</span>',
        "xaxis": {"title": "pair of answers"},
        "yaxis": {"title": "reward"},
        "height": 420,
    }
    figure = go.Figure(layout={**defaults, **layout})
    places = list(range(1, len(better) + 1))
    for name, values, colour in (("better answer", better, BETTER), ("worse answer", worse, WORSE)):
        figure.add_scatter(
            x=places,
            y=[round(float(value), 4) for value in values],
            mode="markers",
            name=name,
            marker={"size": 8, "color": colour},
        )
    return figure


def stages_figure(
    better: Sequence[float],
    worse: Sequence[float],
    title: str = "What would the judge say by then?",
    **layout: Any,
) -> go.Figure:
    """Rewards of two answers after each of `STAGES`, as bars side by side.

    Examples
    --------
    >>> len(stages_figure([0.1, 0.1, 0.9, 2.0], [0.1, 0.1, 0.2, -2.0]).data)
    2
    """
    go = graph_objects()
    defaults = {
        "title": f"<b>{title}</b>",
        "xaxis": {"title": "the trace up to"},
        "yaxis": {"title": "reward"},
        "height": 380,
        "barmode": "group",
    }
    figure = go.Figure(layout={**defaults, **layout})
    for name, values, colour in (("first answer", better, BETTER), ("second answer", worse, WORSE)):
        heights = [round(float(value), 4) for value in values]
        if len(heights) != len(STAGES):
            raise ValueError(f"{len(heights)} rewards; there are {len(STAGES)} stages: {', '.join(STAGES)}")
        figure.add_bar(x=list(STAGES), y=heights, name=name, marker={"color": colour})
    return figure
