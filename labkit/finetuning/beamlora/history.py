"""Gates over time: logged while training, looked at and judged by other rules afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from labkit.finetuning.beamlora.rule import Scope, beam_scores, beam_threshold, prune_counts
from labkit.finetuning.beamlora.schedule import BeamEvent, beam_layers

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class RankHistory:
    """Log of the gates of a BeamLoRA adapter.

    Parameters
    ----------
    model : torch.nn.Module
        With `BeamLinear` layers.
    adapter : str

    Attributes
    ----------
    gates : dict of int to dict of str to tensor
        g (r,) by step and module, on the CPU.
    temperature : float
        Of the softmax, as the adapter has it.

    Raises
    ------
    ValueError
        If the model has no BeamLoRA adapter of that name.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from labkit.finetuning import BeamLoraConfig
    >>> from labkit.testbeds.models import tiny
    >>> model = get_peft_model(tiny("llama", layers=1, seed=0), BeamLoraConfig(r=4, target_modules=["q_proj"]))
    >>> history = RankHistory(model)
    >>> history.record(8)
    >>> history.replay(p0=0.5, every=8, end=20, total_steps=24)
       step                           module  count
    0     8  model.layers.0.self_attn.q_proj      2
    """

    def __init__(self, model: nn.Module, adapter: str = "default") -> None:
        self._layers = dict(beam_layers(model, adapter))
        if not self._layers:
            raise ValueError(f"the model has no BeamLoRA adapter called {adapter!r}")
        self._adapter = adapter
        self.temperature: float = next(iter(self._layers.values())).beam_temperature[adapter]
        self.gates: dict[int, dict[str, torch.Tensor]] = {}

    def record(self, step: int) -> None:
        """Log the gates as they are, as those of `step`."""
        self.gates[step] = {
            name: layer.lora_gate[self._adapter].detach().cpu().clone()
            for name, layer in self._layers.items()
        }

    def scores(self, step: int, temperature: float | None = None) -> dict[str, torch.Tensor]:
        """Scores s (r,) of every module at a logged step, by any temperature."""
        if step not in self.gates:
            raise ValueError(
                f"step {step} was not logged; there are {', '.join(map(str, self.gates)) or 'none'}"
            )
        tau = self.temperature if temperature is None else temperature
        return {name: beam_scores(gate, tau) for name, gate in self.gates[step].items()}

    def replay(
        self,
        *,
        p0: float,
        every: int,
        end: int,
        total_steps: int,
        temperature: float | None = None,
        scope: Scope = "global",
        cap: float | None = 0.5,
    ) -> pd.DataFrame:
        """How many ranks another rule would prune, given the gates that were logged.

        Only what the rule says of these gates: had it been in force, they would have gone another way.

        Parameters
        ----------
        p0, every, end, total_steps, temperature, scope, cap
            As `BeamScheduler`. Events fall on logged steps alone.

        Returns
        -------
        pandas.DataFrame
            ``step``, ``module`` and ``count``, a row for each event and module.
        """
        import pandas as pd

        rows = []
        for step in sorted(self.gates):
            if step == 0 or step % every or total_steps - step < every:
                continue
            scores = self.scores(step, temperature)
            counts = prune_counts(list(scores.values()), beam_threshold(step - 1, p0, end), scope, cap)
            rows += [
                {"step": step, "module": name, "count": k} for name, k in zip(scores, counts, strict=True)
            ]
        return pd.DataFrame(rows, columns=["step", "module", "count"])

    def bars(self, step: int, events: Sequence[BeamEvent] = (), only: str = "") -> go.Figure:
        """A bar per rank at a logged step; at an event, what falls, what is copied, and from where to where.

        Parameters
        ----------
        step : int
        events : sequence of BeamEvent
            Of the run.
        only : str
            Part that a module's name must contain.
        """
        import plotly.graph_objects as go

        event = next((e for e in events if e.step == step), None)
        states: dict[str, Any] = {"stays": [], "is copied": [], "falls": []}
        places: list[int] = []
        ranks, notes, names = [], [], []
        for name, scores in self.scores(step).items():
            if only not in name:
                continue
            start = places[-1] + 2 if places else 0  # a gap between modules
            names.append((start + (len(scores) - 1) / 2, name.split(".")[-1].removesuffix("_proj")))
            filled = (
                dict(zip(event.pruned.get(name, []), event.sources.get(name, []), strict=True))
                if event
                else {}
            )
            for rank, score in enumerate(scores.tolist()):
                state = "falls" if rank in filled else "is copied" if rank in filled.values() else "stays"
                for label, heights in states.items():
                    heights.append(round(score, 3) if label == state else None)
                places.append(start + rank)
                ranks.append(str(rank + 1))
                notes.append(f"←{filled[rank] + 1}" if rank in filled else "")
        inks = {"stays": "#8FA9C4", "is copied": "#0072B2", "falls": "#D55E00"}
        figure = go.Figure(
            [
                go.Bar(
                    x=places, y=heights, name=label, marker_color=inks[label], cliponaxis=False,
                    text=notes if label == "falls" else None, textposition="outside", textfont={"size": 11},
                    constraintext="none", textangle=0,
                )
                for label, heights in states.items()
            ]
        )  # fmt: skip
        for place, name in names:
            figure.add_annotation(
                x=place, y=-0.09, yref="paper", yanchor="top", text=f"<b>{name}</b>", showarrow=False
            )
        note = f": {event.count} ranks of the model fall, p = {event.p:.3f}" if event else ""
        return figure.update_layout(
            barmode="overlay",
            title={"text": f"<b>Which ranks matter at step {step}?</b>{note}"},
            yaxis={"title": {"text": "score s"}},
            xaxis={
                "title": {"text": "rank, by matrix", "standoff": 30},
                "tickvals": places,
                "ticktext": ranks,
                "tickfont": {"size": 9},
            },
            height=400,
            legend={"orientation": "h", "y": 1.1},
        )
