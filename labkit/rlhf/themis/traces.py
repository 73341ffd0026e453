"""Traces: what they hold, how they are written, and how they are read back.

The written form, with three tokens of its own::

    ### USER:
    [Context: {context}]
    Question: {question}
    Answer: {answer}
    ### ASSISTANT:
    <start_tool> Thought: {thought}
    Action: {name}
    Action Input: {input}
    <start_observation> Observation: {observation}
    [further <start_tool> ... <start_observation> ... blocks]
    <start_work> Work: {rationale}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SPECIAL_TOKENS = ("<start_tool>", "<start_observation>", "<start_work>")
TOOL, OBSERVATION, WORK = SPECIAL_TOKENS
Part = Literal["prompt", "answer", "tool", "observation", "rationale"]

# Possessive quantifiers: a model that repeats itself writes thousands of line ends, which must not be divided up in every
# possible way.
_ACTION = re.compile(r"Action\s*+\d*+\s*+:")
_INPUT = re.compile(r"Action\s*+\d*+\s*+Input\s*+\d*+\s*+:[ \t]*+")
_THOUGHT = re.compile(r"Thought\s*+\d*+\s*+:\s*+(.*?)(?=\n\s*+Action\s*+\d*+\s*+:|\nFinished|\Z)", re.DOTALL)
_MARK = re.compile("<(start_(?:tool|observation|work))>")
_BLOCK = re.compile(r"(?=^Thought\s*\d*\s*:)", re.MULTILINE)
_NO_TOOL = "Do I need to use a tool? No"


def token_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of the three tokens.

    Raises
    ------
    ValueError
        If the tokenizer lacks one.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(
            f"the tokenizer lacks {', '.join(missing)}; ThemisRewardModel.from_causal_lm(model, tokenizer) adds them to "
            "both"
        )
    return {token: vocabulary[token] for token in SPECIAL_TOKENS}


def unmarked(text: str) -> str:
    """A text without the three tokens, which only a judge may write.

    An answer, or an error message that an answer's code raises, could else hold a rationale of its own making.

    Examples
    --------
    >>> unmarked("42<start_work> Work: Quite right.")
    '42start_work Work: Quite right.'
    """
    return _MARK.sub(r"\1", text)


@dataclass(frozen=True)
class Step:
    """One call: a thought, the action with its input, and what came back.

    A step without an action is a thought that no tool is needed.
    """

    thought: str
    action: str = ""
    action_input: str = ""
    observation: str = ""


@dataclass(frozen=True)
class Example:
    """A question and an answer to be judged, with what tools may need besides.

    Raises
    ------
    TypeError
        If one is no text, or `test_list` is one.
    """

    question: str
    answer: str
    context: str | None = None
    test_list: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("question", "answer", "context"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "context" and value is None):
                raise TypeError(f"{name} must be a text, got {type(value).__name__}")
        if isinstance(self.test_list, str):
            raise TypeError(f"test_list must be a list of statements, got the text {self.test_list[:60]!r}")

    def state(self) -> dict[str, Any]:
        """As the tools receive it."""
        given = {"context": self.context, "test_list": self.test_list}
        return {
            "question": self.question,
            "answer": self.answer,
            **{k: v for k, v in given.items() if v is not None},
        }


@dataclass(frozen=True)
class Trace:
    """What a judge did before it judged, and its reward.

    Attributes
    ----------
    steps : tuple of Step
    rationale : str or None
        None when it ended without one.
    reward : float or None
    text : str
        The whole text, from the question to the rationale.
    finished : str
        ``work`` (with a rationale), ``malformed`` (neither an action nor an end could be read), ``rounds`` (all
        rounds were used for calls), or ``length`` (the model had no positions left; the reward is of the last tokens
        that it has positions for).
    """

    steps: tuple[Step, ...] = ()
    rationale: str | None = None
    reward: float | None = None
    text: str = field(default="", repr=False)
    finished: str = "work"


@dataclass(frozen=True)
class TraceFormat:
    """Write and read traces in the released form.

    Parameters
    ----------
    rationale : bool
        False leaves the rationale out (ω = 0).

    Examples
    --------
    >>> form = TraceFormat()
    >>> step = Step("I need to look it up.", "Calendar.week_day", "2015-03-24", "Tuesday")
    >>> print(form.prompt("Which day?", "Tuesday") + form.trace([step], "It is."))
    ### USER:
    Question: Which day?
    Answer: Tuesday
    ### ASSISTANT:
    <start_tool> Thought: I need to look it up.
    Action: Calendar.week_day
    Action Input: 2015-03-24
    <start_observation> Observation: Tuesday
    <start_work> Work: It is.
    >>> form.parse(form.trace([step], "It is.")) == ((step,), "It is.")
    True
    """

    rationale: bool = True

    def prompt(self, question: str, answer: str, context: str | None = None) -> str:
        """Everything before the trace."""
        return "".join(piece for _, piece in self._prompt_parts(question, answer, context))

    def plain(self, question: str, answer: str, context: str | None = None) -> str:
        """The input of a reward model without tools."""
        first = f"Context: {context}\n" if context else ""
        return f"{first}Question: {question}\nAnswer: {answer}"

    def trace(self, steps: Sequence[Step], rationale: str | None = None) -> str:
        """The trace alone."""
        return "".join(piece for _, piece in self._trace_parts(steps, rationale))

    def parts(
        self, example: Example, steps: Sequence[Step], rationale: str | None = None
    ) -> list[tuple[Part, str]]:
        """The whole text as pieces, each with the part of the loss that it belongs to."""
        prompt = self._prompt_parts(example.question, example.answer, example.context)
        return prompt + self._trace_parts(steps, rationale)

    def _prompt_parts(self, question: str, answer: str, context: str | None) -> list[tuple[Part, str]]:
        first = f"Context: {unmarked(context)}\n" if context else ""
        return [
            ("prompt", f"### USER:\n{first}Question: {unmarked(question)}\n"),
            ("answer", f"Answer: {unmarked(answer)}"),
            ("prompt", "\n### ASSISTANT:\n"),
        ]

    def _trace_parts(self, steps: Sequence[Step], rationale: str | None) -> list[tuple[Part, str]]:
        out: list[tuple[Part, str]] = []
        for step in steps or [Step(_NO_TOOL)]:
            if step.action:
                call = f"{TOOL} Thought: {step.thought}\nAction: {step.action}\nAction Input: {step.action_input}\n"
                out += [("tool", call), ("observation", self.observation(step.observation))]
            else:
                out.append(("tool", f"{TOOL} Thought: {step.thought or _NO_TOOL}\nFinished.\n"))
        if self.rationale and rationale is not None:
            out.append(("rationale", f"{WORK} Work: {rationale}"))
        return out

    def observation(self, text: str) -> str:
        """What a tool said, as a trace holds it."""
        return f"{OBSERVATION} Observation: {unmarked(text)}\n"

    def parse(self, text: str) -> tuple[tuple[Step, ...], str | None]:
        """Steps and rationale of a written trace (with or without what stands before it)."""
        body = text[text.index(TOOL) :] if TOOL in text else text  # nothing before it may hold a mark
        body = body.removesuffix("</s>")
        before, work, rationale = body.partition(WORK)
        steps = []
        for block in before.split(TOOL):
            if not block.strip():
                continue
            call, _, observation = block.partition(OBSERVATION)
            steps.append(_step(call, observation.strip().removeprefix("Observation:").strip()))
        done = rationale.strip().removeprefix("Work:").strip() if work else None
        return tuple(steps), done

    def read_call(self, text: str) -> tuple[str, str] | None:
        """Name and input of the action that a generated text asks for; None when it asks for none.

        Everything behind the first ``Action Input:`` is the input, as the authors' code reads it.
        """
        found = _call(text)
        return None if found is None else (found[0], found[1].strip("'\"").strip())


def _call(text: str) -> tuple[str, str] | None:
    """Name and input of the first action whose input begins a line."""
    named = _ACTION.search(text)
    if named is None:
        return None
    for given in _INPUT.finditer(text, named.end()):
        between = text[named.end() : given.start()]
        name = between.rstrip()
        if "\n" in between[len(name) :]:
            return name.strip(), text[given.end() :].strip()
    return None


def _step(call: str, observation: str) -> Step:
    thought = _THOUGHT.search(call)
    found = _call(call)
    said = thought.group(1).strip() if thought else ""
    return Step(said) if found is None else Step(said, *found, observation)


def parse_actions(actions: Mapping[str, str] | str) -> tuple[Step, ...]:
    """Steps of the released data's ``actions``: one call as a dict, or one or more as a text.

    Raises
    ------
    TypeError
        For anything else.

    Examples
    --------
    >>> parse_actions("Thought: Do I need to use a tool? No\\nFinished.")
    (Step(thought='Do I need to use a tool? No', action='', action_input='', observation=''),)
    """
    if isinstance(actions, Mapping):
        get = lambda key: str(actions.get(key, ""))  # noqa: E731
        return (Step(get("Thought"), get("Action"), get("Action Input"), get("Observation")),)
    if not isinstance(actions, str):
        raise TypeError(f"actions must be a dict or a text, got {type(actions).__name__}")
    out = []
    for block in _BLOCK.split(actions.strip()):
        if block.strip():
            call, _, observation = block.partition("\nObservation:")
            out.append(_step(call.rstrip(), observation.strip()))
    return tuple(out)
