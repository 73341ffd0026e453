"""Fitted calibrators as JSON: the settings, and the knots of the curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from labkit.lab.cache import write_atomic
from labkit.rlhf.reward_calibration import calibrators
from labkit.rlhf.reward_calibration.multi import MultiFeatureCalibrator

__all__ = ["load_calibrator", "save_calibrator"]

_CLASSES: dict[str, Any] = {name: getattr(calibrators, name) for name in calibrators.__all__}


def save_calibrator(calibrator: Any, path: str | Path) -> Path:
    """Write a fitted calibrator as one JSON file, whole or not at all.

    Raises
    ------
    TypeError
        For what is no calibrator of this module.
    ValueError
        If it is not fitted.

    Examples
    --------
    >>> import tempfile
    >>> from labkit.rlhf import LengthPenalty
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_calibrator(LengthPenalty(0.01).fit(range(10), range(10)), folder + "/calibrator.json")
    ...     load_calibrator(path)
    LengthPenalty(penalty=0.01)
    """
    return write_atomic(Path(path), json.dumps(_document(calibrator), separators=(",", ":")) + "\n")


def load_calibrator(path: str | Path) -> Any:
    """Read what `save_calibrator` wrote.

    Raises
    ------
    ValueError
        For a file that is none of these.

    Examples
    --------
    >>> import tempfile
    >>> from labkit.rlhf import LinearCalibrator
    >>> fitted = LinearCalibrator().fit(range(10), range(10))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load_calibrator(save_calibrator(fitted, f"{folder}/curve.json"))
    >>> again.transform([3, 7], [3, 7]).tolist() == fitted.transform([3, 7], [3, 7]).tolist()
    True
    """
    try:
        return _restored(json.loads(Path(path).read_text(encoding="utf-8")))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no calibrator ({type(error).__name__}: {error})") from None


def _document(calibrator: Any) -> dict[str, Any]:
    if isinstance(calibrator, MultiFeatureCalibrator):
        parts = [_document(part) for part in getattr(calibrator, "fitted_", [])]
        if not parts:
            raise ValueError("this MultiFeatureCalibrator is not fitted; fit it before saving")
        return {"class": "MultiFeatureCalibrator", "parts": parts, "level": calibrator.level_}
    name = type(calibrator).__name__
    if _CLASSES.get(name) is not type(calibrator):
        raise TypeError(
            f"cannot save a {name}; calibrators are {', '.join([*_CLASSES, 'MultiFeatureCalibrator'])}"
        )
    state = {key: value for key, value in vars(calibrator).items() if key.endswith("_") and key[0] != "_"}
    if "level_" not in state:
        raise ValueError(f"this {name} is not fitted; fit it before saving")
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in state.items()}
    return {"class": name, "params": calibrator.get_params(deep=False), "state": plain}


def _restored(document: dict[str, Any]) -> Any:
    name = document["class"]
    if name == "MultiFeatureCalibrator":
        parts = [_restored(part) for part in document["parts"]]
        whole = MultiFeatureCalibrator(parts)
        whole.fitted_, whole.level_ = parts, float(document["level"])
        return whole
    if name not in _CLASSES:
        raise ValueError(
            f"unknown calibrator {name!r}; there are {', '.join([*_CLASSES, 'MultiFeatureCalibrator'])}"
        )
    made = _CLASSES[name](**document["params"])
    for key, value in document["state"].items():
        setattr(made, key, np.asarray(value) if isinstance(value, list) else value)
    return made
