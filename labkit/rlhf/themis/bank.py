"""Tools and the bank that calls them: a failing tool is an observation, never a crash."""

from __future__ import annotations

import collections
import difflib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from labkit.rlhf.themis.verdicts import JudgeReward, VerdictReward

FAILED = "An error occurred during the tool invoke, so no result was returned."


class ToolUnavailable(RuntimeError):
    """A tool cannot work here: what it needs is not installed or not given."""


class Tool:
    """A tool: text in, text out, the same for the same input.

    Subclasses set `name` and `description` and define ``__call__(text, state)``. ``state`` holds what the tool may know
    besides its input: ``question``, ``answer``, ``context``, ``test_list``, as far as there are any. A tool that offers
    several actions lists them in `actions`. Whatever it raises becomes an observation in the bank.
    """

    name: str = ""
    description: str = ""
    max_seconds: float | None = None
    """Seconds after which the bank goes on without the tool; None waits for ever (a tool of this package that takes
    any time, `CodeRunner`, ends by itself)."""
    needs: tuple[str, ...] = ()
    """Columns that the state must hold for a verdict."""

    @property
    def available(self) -> bool:
        """Whether the tool can work here."""
        return True

    @property
    def actions(self) -> Mapping[str, Callable[[str, Mapping[str, Any]], str]]:
        """Name of each action to what carries it out."""
        return {self.name: self}

    def __call__(self, text: str, state: Mapping[str, Any]) -> str:
        raise NotImplementedError

    def score(self, observation: str) -> float:
        """An observation as a number, for tools whose observation is a verdict on the answer.

        Raises
        ------
        TypeError
            If this tool gives none.
        """
        raise TypeError(
            f"{self.name} gives no verdict on an answer; use a tool that does, such as calculator or code_run"
        )


class _FunctionTool(Tool):
    def __init__(
        self, function: Callable[..., str], name: str, description: str, timeout: float | None
    ) -> None:
        self.function, self.name, self.description, self.max_seconds = function, name, description, timeout
        code = getattr(function, "__code__", None)
        self._takes_state = code is not None and code.co_argcount > 1

    def __call__(self, text: str, state: Mapping[str, Any] | None = None) -> str:
        return str(self.function(text, state or {}) if self._takes_state else self.function(text))


def tool(
    name: str, description: str = "", timeout: float | None = None
) -> Callable[[Callable[..., str]], Tool]:
    """Make a function of the input (and, if it takes a second argument, of the state) a tool.

    Parameters
    ----------
    name, description : str
        The description defaults to the function's docstring.
    timeout : float, optional
        Seconds that a call may take.

    Examples
    --------
    >>> @tool(name="shout", description="Say it louder.")
    ... def shout(text):
    ...     return text.upper() + "!"
    >>> ToolBank([shout]).call("shout", "hello")
    'HELLO!'
    """
    if not isinstance(name, str) or not name.strip() or "\n" in name:
        raise ValueError(f"name must be one line of text, got {name!r}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be above 0 seconds, got {timeout!r}")

    def decorate(function: Callable[..., str]) -> Tool:
        return _FunctionTool(function, name, description or (function.__doc__ or "").strip(), timeout)

    return decorate


class ToolBank:
    """Tools by the names of their actions.

    Parameters
    ----------
    tools : iterable of Tool
        No two may share the name of an action.

    Attributes
    ----------
    counts : collections.Counter
        Calls so far, by outcome: ``called``, ``failed`` (the tool raised), ``unknown`` (no such action), ``malformed``
        (counted by the trace loop: neither an action nor an end could be read).

    Examples
    --------
    >>> from labkit.rlhf import Calculator, Calendar
    >>> bank = ToolBank([Calculator(), Calendar()])
    >>> bank.call("Calendar.target_day", "2023-03-04, 64")
    '2023-05-07'
    >>> bank.call("Calendar.week_day", "2023-02-30") == FAILED
    True
    >>> bank.call("calender", "2023-02-30")
    "There is no tool 'calender'. Tools: calculator, Calendar.week_day, Calendar.day_difference, Calendar.target_day."
    """

    def __init__(self, tools: Iterable[Tool]) -> None:
        self.tools = list(tools)
        self._actions: dict[str, tuple[Tool, Callable[[str, Mapping[str, Any]], str]]] = {}
        for item in self.tools:
            if not isinstance(item, Tool):
                raise TypeError(
                    f"a bank holds Tools, got {type(item).__name__}; wrap a function with @tool(name=...)"
                )
            for name, call in item.actions.items():
                if name in self._actions:
                    raise ValueError(f"two tools have an action {name!r}; give one another name")
                self._actions[name] = (item, call)
        self.counts: collections.Counter[str] = collections.Counter()

    @property
    def names(self) -> list[str]:
        """Names of all actions."""
        return list(self._actions)

    def describe(self) -> str:
        """One line a tool, for a prompt."""
        return "\n".join(f"{', '.join(item.actions)}: {item.description}" for item in self.tools)

    def tool_of(self, action: str) -> Tool:
        """The tool of an action.

        Raises
        ------
        ValueError
            If there is none of that name.
        """
        if action not in self._actions:
            near = difflib.get_close_matches(action, self._actions, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ValueError(f"no tool has an action {action!r}{hint} known are {', '.join(self.names)}")
        return self._actions[action][0]

    def call(self, action: str, text: str, state: Mapping[str, Any] | None = None) -> str:
        """Carry out an action; the observation, whatever happens."""
        if action not in self._actions:
            self.counts["unknown"] += 1
            return f"There is no tool {action!r}. Tools: {', '.join(self.names)}."
        self.counts["called"] += 1
        try:
            item, carry_out = self._actions[action]
            return _in_time(lambda: str(carry_out(text, state or {})), item.max_seconds)
        except ToolUnavailable as error:
            self.counts["failed"] += 1
            return f"The tool is not available: {error}"
        except Exception:
            # Anything at all: a tool is other people's code, and what it raised must not end a training run.
            self.counts["failed"] += 1
            return FAILED

    def verdict(self, action: str, text: str, state: Mapping[str, Any] | None = None) -> float:
        """Carry out an action; its observation as a number (`Tool.score`), 0 when the call failed.

        Raises
        ------
        ValueError
            If there is no such action.
        TypeError
            If its tool gives no verdicts.
        """
        item = self.tool_of(action)
        observation = self.call(action, text, state)
        return 0.0 if observation == FAILED else float(item.score(observation))

    def as_reward_fn(
        self,
        model: Any = None,
        tokenizer: Any = None,
        *,
        action: str | None = None,
        action_input: Callable[[str, str], str] | None = None,
        **tracing: Any,
    ) -> Callable[..., list[float]]:
        """A reward function with the signature of trl's ``reward_funcs``: ``(prompts, completions, **columns)``.

        Parameters
        ----------
        model, tokenizer : optional
            A `ThemisRewardModel` and its tokenizer: the reward is the model's after a trace with this bank's tools.
        action : str, optional
            Without a model: the reward is that tool's verdict on the completion, as a number (`Tool.score`).
        action_input : callable, optional
            With `action`: the tool's input from question and answer; by default the answer.
        **tracing
            Further arguments of `run_traces`.

        Returns
        -------
        callable
            Prompts and completions may be texts or lists of chat messages; the columns ``context`` and ``test_list``
            are handed to the tools. With a model its attribute ``traces`` holds those of the last batch, and
            ``metrics()`` how many calls were made, failed or named no tool and how many traces could not be read, each a
            trace; labkit's and trl's trainers log them.

        Raises
        ------
        ValueError
            For neither or both of model and action, an unknown action, a tokenizer without the three tokens, or numbers
            and options that `run_traces` refuses; at a call, for texts and columns that do not belong together or a
            column that the tool needs and misses.
        TypeError
            For a model that is no judge, an argument that `run_traces` does not know, or a tool that gives no verdict; at
            a call, for token ids.
        ToolUnavailable
            If the action's tool cannot work here.

        Examples
        --------
        >>> from labkit.rlhf import Calculator
        >>> reward = ToolBank([Calculator()]).as_reward_fn(action="calculator")
        >>> reward(["6 times 7?"] * 2, ["<<6*7=42>>42 #### 42", "<<6*7=41>>41 #### 41"])
        [1.0, 0.0]
        """
        if (model is None) == (action is None):
            raise ValueError(
                "give either a model with its tokenizer or the action whose verdict is the reward"
            )
        if action is None:
            if tokenizer is None:
                raise ValueError("a model needs its tokenizer too")
            if action_input is not None:
                raise ValueError("action_input goes with an action; a model writes its inputs itself")
            return JudgeReward(self, model, tokenizer, tracing)
        if tracing:
            raise TypeError(f"with an action there is no trace to set {', '.join(tracing)} of")
        item = self.tool_of(action)
        if type(item).score is Tool.score:
            item.score("")  # says that it gives no verdict
        if not item.available:
            raise ToolUnavailable(f"{action} cannot work here, so every verdict would be 0")
        return VerdictReward(self, action, action_input, item.needs)


def _in_time(call: Callable[[], str], timeout: float | None) -> str:
    """What `call` returns, or TimeoutError; a call that is late is left to itself, in a thread that ends with Python."""
    if timeout is None:
        return call()
    outcome: list[str | BaseException] = []

    def work() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise TimeoutError(f"no result after {timeout:g} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
