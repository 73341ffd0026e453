"""The score matrix of a sequence of tasks, and what continual learning reads from it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from labkit.lab.cache import write_atomic

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class ScoreMatrix:
    """Scores R[i][j] on task j after stage i, and the usual summaries.

    Parameters
    ----------
    names : sequence of str
        Names of the n tasks, in the order in which they were trained.
    scores : sequence of sequences of float
        One row per stage that is done, up to n; each row has n numbers. NaN is "not measured".

    Raises
    ------
    ValueError
        When the names repeat or the rows do not fit them.

    Examples
    --------
    >>> matrix = ScoreMatrix(["a", "b"], [[0.9, 0.2], [0.5, 0.8]])
    >>> round(matrix.op(), 2), round(matrix.bwt(), 2), round(matrix.forgetting(), 2), round(matrix.learned(), 2)
    (0.65, -0.4, 0.4, 0.85)
    """

    def __init__(self, names: Sequence[str], scores: Sequence[Sequence[float]] = ()) -> None:
        self.names = [str(name) for name in names]
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"names must be one or more different names of tasks, got {list(names)}")
        self._rows: list[list[float]] = []
        for row in scores:
            self.append(row)

    def append(self, row: Sequence[float]) -> None:
        """Add the scores on all tasks after the next stage."""
        if len(row) != len(self.names):
            raise ValueError(
                f"a row has one score for each of the {len(self.names)} tasks ({', '.join(self.names)}), got "
                f"{len(row)}"
            )
        if len(self._rows) == len(self.names):
            raise ValueError(f"all {len(self.names)} stages have their row already")
        self._rows.append([float(score) for score in row])

    @property
    def scores(self) -> np.ndarray:
        """R as an array, (stages done, n)."""
        return np.array(self._rows, dtype=float).reshape(len(self._rows), len(self.names))

    @property
    def stages(self) -> int:
        """Stages done."""
        return len(self._rows)

    def __repr__(self) -> str:
        if self.stages < len(self.names):
            return f"ScoreMatrix({self.stages} of {len(self.names)} stages)"
        text = f"ScoreMatrix({len(self.names)} tasks, OP {self.op():.3f}"
        return text + (f", BWT {self.bwt():+.3f})" if len(self.names) > 1 else ")")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ScoreMatrix)
            and self.names == other.names
            and np.array_equal(self.scores, other.scores, equal_nan=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def _whole(self, what: str, least: int = 1) -> np.ndarray:
        if self.stages < len(self.names):
            raise ValueError(
                f"{what} needs all {len(self.names)} stages, and {self.stages} are done: finish the sequence first"
            )
        if len(self.names) < least:
            raise ValueError(f"{what} needs at least {least} tasks, there is {len(self.names)}")
        return self.scores

    def op(self) -> float:
        """Overall performance: the mean score on all tasks after the last stage."""
        return float(self._whole("overall performance")[-1].mean())

    def bwt(self, divide_by: Literal["earlier", "tasks"] = "earlier") -> float:
        """Backward transfer: how the scores changed since each task was learned; negative is forgetting.

        Parameters
        ----------
        divide_by : {"earlier", "tasks"}
            The sum over the n - 1 earlier tasks is divided by n - 1, or by n.
        """
        if divide_by not in ("earlier", "tasks"):
            raise ValueError(f'divide_by must be "earlier" (n - 1) or "tasks" (n), got {divide_by!r}')
        scores = self._whole("backward transfer", 2)
        n = len(self.names)
        change = scores[-1, : n - 1] - scores.diagonal()[: n - 1]
        return float(change.sum() / (n - 1 if divide_by == "earlier" else n))

    def forgetting(self) -> float:
        """Mean fall of the earlier tasks from their best score since they were learned to the last one."""
        scores = self._whole("forgetting", 2)
        falls = [scores[j:-1, j].max() - scores[-1, j] for j in range(len(self.names) - 1)]
        return float(np.mean(falls))

    def learned(self) -> float:
        """Mean score on each task right after its own stage (the diagonal)."""
        return float(self._whole("the mean of the diagonal").diagonal().mean())

    def to_frame(self) -> pd.DataFrame:
        """R as a table: a row per stage, named after the task that it trained, a column per task."""
        import pandas as pd

        index = pd.Index([f"after {name}" for name in self.names[: self.stages]], name="stage")
        return pd.DataFrame(self.scores, index=index, columns=pd.Index(self.names, name="task"))

    def plot(self, title: str = "What is left of each task?", value_format: str = ".2f") -> go.Figure:
        """Heat map of R; needs plotly."""
        import plotly.graph_objects as go

        scores = self.scores.round(4)
        # a plain list: plotly would store an array as base64, and NaN is no JSON
        cells = [[None if math.isnan(value) else value for value in row] for row in scores.tolist()]
        text = [["" if value is None else format(value, value_format) for value in row] for row in cells]
        stages = [f"{i}. {name}" for i, name in enumerate(self.names[: self.stages], 1)]
        figure = go.Figure(
            go.Heatmap(
                z=cells,
                x=self.names,
                y=stages,
                text=text,
                texttemplate="%{text}",
                colorscale="Blues",
                zmin=0,
                zmax=max(1.0, float(np.nanmax(scores)) if scores.size else 1.0),
                xgap=2,
                ygap=2,
                colorbar={"title": "score"},
            )
        )
        figure.update_layout(
            title=title,
            height=110 + 60 * len(self.names),
            xaxis={"title": "score on task"},
            yaxis={"title": "after stage", "autorange": "reversed"},
        )
        return figure

    def save(self, path: Path | str) -> Path:
        """Write the matrix as JSON."""
        rows = [[None if math.isnan(value) else value for value in row] for row in self._rows]
        return write_atomic(Path(path), json.dumps({"names": self.names, "scores": rows}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> ScoreMatrix:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            When the file is not such a matrix.
        """
        try:
            found: Any = json.loads(Path(path).read_text())
            rows = [[math.nan if value is None else value for value in row] for row in found["scores"]]
            return cls(found["names"], rows)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no score matrix ({type(error).__name__}: {error})") from None
