"""Rewards from tools, with the call signature of trl's ``reward_funcs``: a judge's after its trace, or a tool's verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from labkit.rlhf.themis.traces import Example, Trace

_COLUMNS = ("context", "test_list")
_COUNTED = ("called", "failed", "unknown", "malformed")


class Tools(Protocol):
    """What rewards and traces need of a bank of tools."""

    counts: Any

    def call(self, action: str, text: str, state: Mapping[str, Any] | None = None) -> str:
        """Carry out an action; the observation, whatever happens."""

    def verdict(self, action: str, text: str, state: Mapping[str, Any] | None = None) -> float:
        """Carry out an action; its observation as a number."""


class JudgeReward:
    """A judge's reward of each completion, after a trace with tools.

    Made by `ToolBank.as_reward_fn`.

    Attributes
    ----------
    traces : list of Trace
        Of the last batch, to look into.
    """

    def __init__(self, bank: Tools, model: Any, tokenizer: Any, tracing: Mapping[str, Any]) -> None:
        if not callable(getattr(model, "judge", None)):
            raise TypeError(
                f"model must be a ThemisRewardModel, got {type(model).__name__}; "
                "ThemisRewardModel.from_causal_lm(model, tokenizer) makes one"
            )
        model.check_tokenizer(tokenizer)
        if hasattr(model, "check_tracing"):
            model.check_tracing(**tracing)
        self.bank, self.model, self.tokenizer, self.tracing = bank, model, tokenizer, dict(tracing)
        self.__name__ = "themis_reward"  # trainers log rewards by this
        self.traces: list[Trace] = []
        self._counts: dict[str, int] = {}

    def setup(self, trainer: Any) -> None:
        """Move the judge to where labkit's trainer is; other trainers leave it where it is."""
        if self.model.device != trainer.processes.device:
            self.model.to(trainer.processes.device)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Judge each completion as the answer to its prompt."""
        examples = read_examples(prompts, completions, columns)
        before = dict(self.bank.counts)
        self.traces = self.model.judge(self.tokenizer, self.bank, examples, **self.tracing)
        self._counts = {name: self.bank.counts[name] - before.get(name, 0) for name in _COUNTED}
        for name, value in self.metrics().items() if log_metric else ():
            log_metric(f"{self.__name__}/{name}", value)  # type: ignore[misc]
        return [float(trace.reward or 0.0) for trace in self.traces]

    def metrics(self) -> dict[str, float]:
        """Of the last batch, a trace: calls that were ``called``, calls that ``failed``, calls of ``unknown`` tools, and
        ``malformed`` ends."""
        return {name: count / len(self.traces) for name, count in self._counts.items() if self.traces}


class VerdictReward:
    """A tool's verdict on each completion, as a number.

    Made by `ToolBank.as_reward_fn`.
    """

    def __init__(
        self,
        bank: Tools,
        action: str,
        action_input: Callable[[str, str], str] | None,
        needs: Sequence[str] = (),
    ) -> None:
        self.bank, self.action, self.action_input, self.needs = bank, action, action_input, tuple(needs)
        self.__name__ = f"{action}_reward"
        self._failed = 0.0

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """The verdict on each completion."""
        for name in self.needs:
            if columns.get(name) is None:
                # Else each call would fail, and a run would learn from zeros.
                raise ValueError(f"{self.action} needs the column {name!r}; add it to the data set")
        out: list[float] = []
        before = self.bank.counts["failed"]
        for example in read_examples(prompts, completions, columns):
            given = (
                self.action_input(example.question, example.answer) if self.action_input else example.answer
            )
            out.append(self.bank.verdict(self.action, given, example.state()))
        self._failed = (self.bank.counts["failed"] - before) / max(1, len(out))
        return out

    def metrics(self) -> dict[str, float]:
        """Share of calls in the last batch that ``failed``, for which the reward was 0."""
        return {"failed": self._failed}


def read_examples(
    prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
) -> list[Example]:
    """Prompts, completions and the columns that tools may see, one example each.

    Raises
    ------
    ValueError
        If there are not as many of each.
    TypeError
        For something other than texts and lists of chat messages.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions; there must be as many")
    given = {name: columns[name] for name in _COLUMNS if columns.get(name) is not None}
    for name, column in given.items():
        if len(column) != len(prompts):
            raise ValueError(f"column {name!r} has {len(column)} entries for {len(prompts)} prompts")
    return [
        Example(_text(prompt), _text(completion), **{name: column[place] for name, column in given.items()})
        for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    several = isinstance(value, Sequence)
    if several and value and all(isinstance(message, Mapping) for message in value):
        return "\n".join(str(message.get("content") or "") for message in value)
    if several and all(isinstance(token, int) for token in value):
        raise TypeError(
            "prompts and completions are token ids, and tools read texts: give the trainer its tokenizer "
            "(processing_class)"
        )
    raise TypeError(
        f"prompts and completions must be texts or lists of chat messages, got {type(value).__name__}"
    )
