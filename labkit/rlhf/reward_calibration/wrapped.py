"""A reward model or reward function with its length bias taken out, for trainers and for best-of-n."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit.lab.cache import write_atomic
from labkit.rlhf.positions import check_length
from labkit.rlhf.reward_calibration import features as feature_functions
from labkit.rlhf.reward_calibration.checks import Array
from labkit.rlhf.reward_calibration.features import char_length, markdown_count, text_of, token_length
from labkit.rlhf.reward_calibration.online import RunningLowess
from labkit.rlhf.reward_calibration.saving import load_calibrator, save_calibrator

__all__ = ["CalibratedRewardModel"]

Feature = str | Callable[[Sequence[Any]], Any]
_SETTINGS, _CURVE, _MODEL = "calibrated_reward.json", "calibrator.json", "reward_model"


class CalibratedRewardModel:
    r"""Wrap a reward so that it no longer pays for length.

    An instance is itself a reward function as trl's GRPO and labkit's PPO call it:
    ``wrapped(prompts=..., completions=..., **columns) -> list[float]``. What is subtracted is
    :math:`\alpha(\hat b(c) - \overline{\hat b})`: the level of the reward stays.

    Parameters
    ----------
    rm : PreTrainedModel or callable
        A transformers sequence classifier with one label, or a reward function
        ``(prompts, completions, **columns) -> list[float]``.
    calibrator : calibrator or RunningLowess
        A calibrator of this package, fitted now or later by :meth:`fit`; or a :class:`RunningLowess`, which learns from
        every batch that is scored.
    feature : str or callable, or a list of these, default "char_length"
        ``"char_length"``, ``"markdown_count"``, ``"token_length"``, or a function from a list of completions to numbers.
        A list gives the columns of a :class:`MultiFeatureCalibrator`.
    tokenizer : PreTrainedTokenizerBase, optional
        Needed by a classifier that scores texts, and by ``"token_length"`` of texts.
    batch_size : int
        Texts that a classifier scores at a time.

    Attributes
    ----------
    last : dict
        ``features``, ``raw`` and ``calibrated`` of the last batch.

    Raises
    ------
    TypeError, ValueError
        For a model with another number of labels, a feature without a name here, or a missing tokenizer.

    Examples
    --------
    >>> from labkit.rlhf import CalibratedRewardModel, LinearCalibrator
    >>> def likes_length(prompts, completions, **columns):
    ...     return [0.1 * len(text) for text in completions]
    >>> texts = ["word " * n for n in range(1, 13)]
    >>> wrapped = CalibratedRewardModel(likes_length, LinearCalibrator()).fit([""] * 12, texts)
    >>> bool(np.ptp(wrapped([""] * 12, texts)) < 1e-9)
    True
    """

    def __init__(
        self,
        rm: Any,
        calibrator: Any,
        feature: Feature | Sequence[Feature] = "char_length",
        *,
        tokenizer: Any = None,
        batch_size: int = 16,
    ) -> None:
        self._classifier = _is_classifier(rm)
        if not self._classifier and not callable(rm):
            raise TypeError(
                f"rm must be a sequence classifier or a function (prompts, completions, **columns); got {type(rm).__name__}"
            )
        if not hasattr(calibrator, "transform"):
            raise TypeError(
                f"calibrator must be one such as LowessCalibrator(); got {type(calibrator).__name__}"
            )
        if self._classifier and rm.config.num_labels != 1:
            raise ValueError(
                f"the reward model has {rm.config.num_labels} labels; a reward model has num_labels=1"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} is not allowed; a whole number, 1 or more")
        if self._classifier and rm.config.pad_token_id is None and batch_size > 1:
            raise ValueError("the reward model's config has no pad_token_id; set it, or use batch_size=1")
        self.rm, self.calibrator, self.tokenizer, self.batch_size = rm, calibrator, tokenizer, batch_size
        self.feature = feature
        named: Any = feature if isinstance(feature, list | tuple) else [feature]
        self._features = [_resolved(one, tokenizer) for one in named]
        name = getattr(rm, "__name__", type(rm).__name__)
        self.__name__ = f"calibrated_{name}"  # trainers log rewards by this
        self.last: dict[str, Array] = {}
        self._gather: Callable[[Any], Any] | None = None
        self._device: Any = None

    def raw_scores(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Array:
        """The wrapped reward's own scores, of shape (N,).

        Raises
        ------
        ValueError
            If it returns another number of scores, or one that is not finite.
        """
        if self._classifier:
            scores = np.array(self._classify(prompts, completions), dtype=float)
        else:
            given = self.rm(prompts=prompts, completions=completions, **columns)
            given = given.tolist() if hasattr(given, "tolist") else given
            scores = np.array([np.nan if one is None else one for one in given], dtype=float)
        if scores.shape != (len(completions),):
            raise ValueError(
                f"the reward returned {scores.shape} scores for {len(completions)} completions; one each"
            )
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(
                f"the reward of completion {bad} is {scores[bad]}; it must be finite to be calibrated"
            )
        return scores

    def measure(self, completions: Sequence[Any], completion_ids: Sequence[Any] | None = None) -> Array:
        """The feature of each completion, (N,), or (N, F) for a list of features."""
        columns = []
        for name, count in self._features:
            known = completion_ids if name == "token_length" and completion_ids is not None else completions
            columns.append(np.asarray(count(known), dtype=float))
        return np.stack(columns, axis=1) if isinstance(self.feature, list | tuple) else columns[0]

    def fit(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> CalibratedRewardModel:
        """Score answers and fit the calibrator to them."""
        raw = self.raw_scores(prompts, completions, **columns)
        measured = self.measure(completions, columns.get("completion_ids"))
        if isinstance(self.calibrator, RunningLowess):
            self.calibrator.update(measured, raw)
        else:
            self.calibrator.fit(measured, raw)
        return self

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Calibrated rewards of completions.

        Parameters
        ----------
        prompts, completions : sequence of str, of chat messages, or (without a tokenizer) of lists of token ids
        **columns
            Handed on to the wrapped function; ``completion_ids`` is what ``"token_length"`` counts where it is given.

        Raises
        ------
        NotFittedError
            If the calibrator was never fitted.
        """
        raw = self.raw_scores(prompts, completions, **columns)
        measured = self.measure(completions, columns.get("completion_ids"))
        if isinstance(self.calibrator, RunningLowess):
            if self._gather is None:
                self.calibrator.update(measured, raw)
            calibrated = self.calibrator.transform(measured, raw)
        else:
            calibrated = (
                self.calibrator.transform(measured, raw) + self.calibrator.alpha * self.calibrator.level_
            )
        self.last = {"features": measured, "raw": raw, "calibrated": calibrated}
        return [float(value) for value in calibrated]

    # ---- what a trainer calls, if it knows of it: set-up, one call per rollout, checkpoints, metrics

    def setup(self, trainer: Any) -> None:
        """Put a classifier where the trainer is, and let a trainer that has ``gather`` give one common curve to all
        processes; updates then come from `update`."""
        if hasattr(self.rm, "setup"):
            self.rm.setup(trainer)
        self._device = getattr(trainer, "device", None) or getattr(
            getattr(trainer, "processes", None), "device", None
        )
        if self._classifier and self._device is not None and len(getattr(self.rm, "hf_device_map", ())) < 2:
            self.rm.to(self._device)
        if hasattr(trainer, "gather"):
            self._gather = trainer.gather

    def update(self, batch: Any) -> None:
        """Once per rollout: let the running curve learn from the last batch, of all processes."""
        if hasattr(self.rm, "update"):
            self.rm.update(batch)
        if self._gather is None or not self.last or not isinstance(self.calibrator, RunningLowess):
            return
        import torch

        both = torch.tensor(np.stack([self.last["features"], self.last["raw"]], axis=1), device=self._device)
        lengths, rewards = np.asarray(self._gather(both).cpu(), dtype=float).T
        self.calibrator.update(lengths, rewards)

    def state_dict(self) -> dict[str, Any]:
        """State of the running curve and of the wrapped reward, for a checkpoint."""
        state: dict[str, Any] = {}
        if isinstance(self.calibrator, RunningLowess):
            state["running"] = self.calibrator.state_dict()
        if not self._classifier and hasattr(self.rm, "state_dict"):
            state["rm"] = self.rm.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        if "running" in state:
            self.calibrator.load_state_dict(state["running"])
        if "rm" in state:
            self.rm.load_state_dict(state["rm"])

    def metrics(self) -> dict[str, float]:
        """Means over the last batch, and Spearman's correlation of reward and length before and after."""
        from labkit.rlhf.reward_calibration.report import length_correlation

        found: dict[str, float] = dict(self.rm.metrics()) if hasattr(self.rm, "metrics") else {}
        if self.last and self.last["features"].ndim == 1:
            length, raw, after = self.last["features"], self.last["raw"], self.last["calibrated"]
            found |= {
                "length": float(length.mean()),
                "raw_reward": float(raw.mean()),
                "length_correlation_raw": length_correlation(length, raw),
                "length_correlation": length_correlation(length, after),
            }
        return found

    # ---- files

    def save_pretrained(self, folder: str | Path) -> Path:
        """Save the curve's knots and the settings; a classifier and its tokenizer beside them.

        A reward *function* is not saved: hand it to `from_pretrained` again.

        Raises
        ------
        ValueError
            If the calibrator is not fitted.
        TypeError
            If the calibrator is a `RunningLowess`: its state belongs into the trainer's checkpoint.
        """
        if isinstance(self.calibrator, RunningLowess):
            raise TypeError(
                "a RunningLowess is saved with the trainer's checkpoint (state_dict); save a fitted LowessCalibrator"
            )
        names = [name for name, _ in self._features]
        settings = {
            "feature": names if isinstance(self.feature, list | tuple) else names[0],
            "batch_size": self.batch_size,
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_calibrator(self.calibrator, folder / _CURVE)
        if self._classifier:
            self.rm.save_pretrained(folder / _MODEL)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder / _MODEL)
        write_atomic(folder / _SETTINGS, json.dumps({**settings, "classifier": self._classifier}) + "\n")
        return folder

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        rm: Any = None,
        feature: Feature | Sequence[Feature] | None = None,
        tokenizer: Any = None,
    ) -> CalibratedRewardModel:
        """Load what `save_pretrained` wrote.

        Parameters
        ----------
        folder : path
        rm : PreTrainedModel or callable, optional
            Needed if a function was wrapped; replaces a saved classifier.
        feature : optional
            Needed if a feature of your own was used.
        tokenizer : optional
            Replaces the saved one.

        Raises
        ------
        FileNotFoundError, ValueError
            For a folder without these files, or a function or feature that has to be handed in.
        """
        folder = Path(folder)
        if not (folder / _SETTINGS).is_file():
            raise FileNotFoundError(f"{folder} holds no {_SETTINGS}; it was not written by save_pretrained")
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        if rm is None and not settings["classifier"]:
            raise ValueError("a reward function was wrapped, which files cannot hold; hand it in as rm=")
        if rm is None:
            from transformers import AutoModelForSequenceClassification

            rm = AutoModelForSequenceClassification.from_pretrained(folder / _MODEL)
        if tokenizer is None and any((folder / _MODEL).glob("tokenizer*")):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder / _MODEL)
        feature = settings["feature"] if feature is None else feature
        calibrator = load_calibrator(folder / _CURVE)
        return cls(rm, calibrator, feature, tokenizer=tokenizer, batch_size=settings["batch_size"])

    # ---- the classifier

    def _classify(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        import torch

        from labkit.rlhf.rewards import classifier_scores

        rows = [self._encoded(p, c) for p, c in zip(prompts, completions, strict=True)]
        # Longest first, so that a batch pads little; scores go back into their places.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        scores = [0.0] * len(rows)
        was_training = self.rm.training
        self.rm.eval()
        try:
            for begin in range(0, len(order), self.batch_size):
                chosen = order[begin : begin + self.batch_size]
                with torch.inference_mode():
                    found = classifier_scores(self.rm, [rows[row] for row in chosen])
                for row, value in zip(chosen, found.tolist(), strict=True):
                    scores[row] = value
        finally:
            self.rm.train(was_training)
        return scores

    def _encoded(self, prompt: Any, completion: Any) -> list[int]:
        """Token ids of a prompt with its completion."""
        if feature_functions._is_ids(completion) and feature_functions._is_ids(prompt):
            return [int(token) for token in (*prompt, *completion)]
        if self.tokenizer is None:
            raise ValueError("a sequence classifier needs its tokenizer to score texts; pass tokenizer=")
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt + text_of(completion))["input_ids"]
        else:
            answer = (
                [{"role": "assistant", "content": completion}]
                if isinstance(completion, str)
                else list(completion)
            )
            ids = self.tokenizer.apply_chat_template([*prompt, *answer], tokenize=True, return_dict=False)
        check_length(len(ids), self.rm, "a prompt with its answer", "shorten it")
        return list(ids)


def _is_classifier(rm: Any) -> bool:
    """Whether this is a transformers model, without importing transformers for what is a plain function."""
    return hasattr(rm, "config") and hasattr(rm, "forward") and hasattr(rm, "save_pretrained")


def _resolved(feature: Feature, tokenizer: Any) -> tuple[str, Callable[[Sequence[Any]], Any]]:
    """Name and function of a feature."""
    known: dict[str, Callable[[Sequence[Any]], Any]] = {
        "char_length": char_length,
        "markdown_count": markdown_count,
        "token_length": token_length(tokenizer),
    }
    if callable(feature):
        return getattr(feature, "__name__", type(feature).__name__), feature
    if feature not in known:
        raise ValueError(
            f"feature={feature!r} is not known; one of {', '.join(known)}, or a function of the completions"
        )
    return feature, known[feature]
