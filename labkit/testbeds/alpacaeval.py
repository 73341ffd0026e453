"""AlpacaEval's leaderboard, a GPT-4 judge's preferences, and arena scores: real data that labkit does not ship.

The files are found by :func:`labkit.testbeds.data.find` under the name ``reward_calibration``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import spearmanr

from labkit.testbeds import data

__all__ = [
    "ALPHAS",
    "Judge",
    "gains",
    "judge",
    "leaderboard",
    "locate",
    "measure",
    "reference_correlations",
    "triples",
]

Array = npt.NDArray[np.float64]
LC = "AlpacaEval LC"
#: Strengths that `measure` sweeps.
ALPHAS = tuple(round(0.1 * step, 1) for step in range(16))


@dataclass(frozen=True, eq=False)
class Judge:
    """GPT-4's probabilities that a model beats the baseline, and both answers' lengths, of shape (models, prompts)."""

    models: list[str]
    probabilities: Array
    lengths: Array
    baseline_lengths: Array


def locate(file: str) -> Path:
    """One file of the data.

    Raises
    ------
    FileNotFoundError
        Without the data; the message says where to get it, and that the notebook runs without.
    """
    try:
        return data.find(f"reward_calibration/{file}")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f'{error} Or do without it: lengths="synthetic" draws stand-ins, and in the notebook data="synthetic" '
            "shows the recorded leaderboard beside them."
        ) from None


def leaderboard() -> pd.DataFrame:
    """The 223 models, indexed by name: win_rate in (0, 1), average length, and the four references (NaN where unknown).

    Raises
    ------
    FileNotFoundError
        Without the data.
    """
    files = ("alpacaeval2_leaderboard", "arena_2024_feb_apr", "arena_2024_aug")
    board, early, late = (pd.read_csv(locate(f"{file}.csv")).set_index("model") for file in files)
    table = pd.DataFrame({"win_rate": board.win_rate / 100, "length": board.avg_length})
    table[LC] = board.length_controlled_winrate
    table["Arena, Feb 2024"] = early.arena_elo_2024_02_02
    table["Arena, Aug 2024"] = late.arena_score_2024_08_28
    table["Arena, length-controlled"] = late.arena_score_length_controlled
    return table


def judge() -> Judge:
    """GPT-4-Turbo's preferences on 805 prompts, of the 57 models that are also on the leaderboard.

    Raises
    ------
    FileNotFoundError
        Without the data.
    """
    with np.load(locate("alpacaeval_gpt4turbo_preferences.npz")) as file:
        names = [str(name) for name in file["models"]]
        known = set(leaderboard().index)
        rows = [row for row, name in enumerate(names) if name in known]
        arrays = (
            file[key][rows].astype(float)
            for key in ("prob_model_beats_baseline", "len_char", "baseline_len_char")
        )
        return Judge([names[row] for row in rows], *arrays)


def triples(names: pd.Index) -> list[tuple[str, str, str]]:
    """Models that were also prompted to be concise and to be verbose."""
    return [
        (name, f"{name}_concise", f"{name}_verbose")
        for name in names
        if {f"{name}_concise", f"{name}_verbose"} <= set(names)
    ]


def reference_correlations(table: pd.DataFrame, rates: Array) -> dict[str, float]:
    """Spearman's correlation of some win rates with each reference, over the models that it knows."""
    found = {}
    for name in table.columns[2:]:
        known = table[name].notna().to_numpy()
        found[name] = float(spearmanr(rates[known], table[name][known]).statistic)
    return found


def measure(tools: Any) -> dict[str, Any]:
    """What calibration does on the real data, as numbers that can be recorded.

    Parameters
    ----------
    tools : module
        :mod:`labkit.rlhf`, or anything with its ``calibrate_leaderboard``, ``calibrate_judge``, ``logit_gameability`` and
        ``LowessCalibrator``.

    Returns
    -------
    dict
        ``leaderboard``: by window, for each of the `ALPHAS`, the correlations and the gameability. ``judge``: correlation
        with `LC` raw, and after calibration answer by answer, by window. ``length_controlled``: those of LC itself.
    """
    table = leaderboard()
    rates, lengths = table.win_rate.to_numpy(), table.length.to_numpy()
    groups = triples(table.index)
    swept: dict[str, dict[str, list[float]]] = {}
    for frac in (0.7, 1.0):
        rows = [tools.calibrate_leaderboard(rates, lengths, frac=frac, alpha=alpha) for alpha in ALPHAS]
        each = [reference_correlations(table, row) for row in rows]
        columns = {name: [round(found[name], 4) for found in each] for name in table.columns[2:]}
        games = [
            round(tools.logit_gameability(dict(zip(table.index, row, strict=True)), groups), 4)
            for row in rows
        ]
        swept[f"{frac:g}"] = {**columns, "gameability": games}
    seen = judge()
    wanted = table[LC][seen.models].to_numpy()
    step = 0.01 * float(np.ptp(seen.lengths))
    found = {"raw": float(spearmanr(np.nanmean(seen.probabilities, axis=1), wanted).statistic)}
    for frac in (0.1, 0.3, 0.9, 1.0):
        fit = tools.LowessCalibrator(frac=frac, delta=step)
        after = tools.calibrate_judge(seen.probabilities, seen.lengths, seen.baseline_lengths, fit)
        found[f"{frac:g}"] = float(spearmanr(after, wanted).statistic)
    control = reference_correlations(table, table[LC].to_numpy())
    return {
        "alphas": list(ALPHAS),
        "leaderboard": swept,
        "judge": {name: round(value, 4) for name, value in found.items()},
        "length_controlled": {name: round(value, 4) for name, value in control.items()},
        "models": {"leaderboard": len(table), "judge": len(seen.models), "triples": len(groups)},
    }


def gains(measured: Mapping[str, Any]) -> dict[str, float]:
    """What calibration changes on the real data, as one number a claim.

    Parameters
    ----------
    measured : mapping
        As `measure` returns it, or as it was recorded.

    Returns
    -------
    dict
        ``judge``: rise of the correlation with `LC` when a judge is calibrated answer by answer, window 0.1. ``half``:
        third largest of the four rises of a leaderboard's correlations at strength 0.5, window 0.7. ``full``: the largest of
        them at strength 1.

    Examples
    --------
    >>> board = {name: [0.5, 0.5 + rise, 0.4] for name, rise in zip("abcd", (0.1, 0.2, 0.3, -0.1))}
    >>> board["gameability"] = [1.0, 0.5, 0.7]
    >>> record = {"alphas": [0.0, 0.5, 1.0], "leaderboard": {"0.7": board}, "judge": {"raw": 0.75, "0.1": 1.0}}
    >>> {name: round(value, 6) for name, value in gains(record).items()}
    {'judge': 0.25, 'half': 0.1, 'full': -0.1}
    """
    none, half, full = (list(measured["alphas"]).index(alpha) for alpha in (0.0, 0.5, 1.0))
    board = [row for name, row in measured["leaderboard"]["0.7"].items() if name != "gameability"]
    rises = [sorted((row[at] - row[none] for row in board), reverse=True) for at in (half, full)]
    judged = measured["judge"]
    return {"judge": judged["0.1"] - judged["raw"], "half": rises[0][2], "full": rises[1][0]}
