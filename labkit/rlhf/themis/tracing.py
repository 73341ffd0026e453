"""The judge at work: generate, call, read, repeat, then score; many answers at a time."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from labkit.rlhf.logprobs import plain
from labkit.rlhf.themis.reading import Judge, Reader
from labkit.rlhf.themis.traces import (
    OBSERVATION,
    TOOL,
    WORK,
    Example,
    Step,
    Trace,
    TraceFormat,
    _step,
)
from labkit.rlhf.themis.verdicts import Tools

_TAKEN = {"attention_mask", "eos_token_id", "input_ids", "num_return_sequences", "past_key_values"}
_TAKEN |= {"return_dict_in_generate"}
_OWN = ("max_rounds", "max_new_tokens", "batch_size", "rationale", "reuse_cache")


def run_trace(
    model: Judge,
    tokenizer: Any,
    bank: Tools,
    question: str,
    answer: str,
    context: str | None = None,
    max_rounds: int = 3,
    test_list: Sequence[str] | None = None,
    **options: Any,
) -> Trace:
    """Judge one answer: see `run_traces`."""
    example = Example(question, answer, context, test_list)
    return run_traces(model, tokenizer, bank, [example], max_rounds=max_rounds, **options)[0]


class _Running:
    """One trace on its way."""

    def __init__(self, example: Example, form: TraceFormat) -> None:
        self.example, self.form = example, form
        self.prompt = form.prompt(example.question, example.answer, example.context)
        # No space behind the token: it is part of the next word's token, in training as here.
        self.text = f"{self.prompt}{TOOL}"
        self.steps: list[Step] = []
        self.rationale: str | None = None
        self.finished = ""
        self.working = False  # only the rationale is missing

    def hear(self, said: str, bank: Tools) -> None:
        """Take what the model has written and, if it is a call, carry it out."""
        if self.working:
            self._work(said)
            return
        call_text = said.partition(OBSERVATION)[0].partition("\nObservation:")[0]
        called = (
            None
            if WORK in call_text.partition("Action")[0]
            else self.form.read_call(call_text.partition(WORK)[0])
        )
        if called is not None:
            written = call_text.partition(WORK)[0].rstrip()
            observation = bank.call(called[0], called[1], self.example.state())
            self.steps.append(Step(_step(written, "").thought, called[0], called[1], observation))
            self.text += f"{written}\n{self.form.observation(observation)}"
        elif WORK in said or "Work:" in said:
            before = said.partition(WORK)[0].partition("Work:")[0].rstrip()
            thought = _step(before, "").thought
            if thought:
                self.steps.append(Step(thought))
            self.text += f"{before}\n{WORK}" if before else WORK
            self._work(said.partition(WORK)[2] or said.partition("Work:")[2])
        elif "Finished" in said:
            before = said.rstrip()
            self.steps.append(Step(_step(before, "").thought))
            self.text += f"{before}\n{WORK}"
            self.working = True
        else:
            bank.counts["malformed"] += 1
            self.text += said.rstrip()
            self.finished = "malformed"
        if not self.form.rationale and self.steps and not self.finished and not self.steps[-1].action:
            self.finished = "work"

    def hear_nothing(self) -> None:
        """The model cannot read or write on."""
        self.finished = "length"

    def stop_calling(self) -> None:
        """All rounds are used: only the rationale may follow."""
        if not self.form.rationale:
            self.finished = "rounds"
        elif not self.working:
            self.text += WORK
            self.working = True

    def _work(self, said: str) -> None:
        self.rationale = said.strip().removeprefix("Work:").strip()
        self.text += f" Work: {self.rationale}"
        self.finished = "work"


def _as_example(given: Example | tuple[str, str]) -> Example:
    if isinstance(given, Example):
        return given
    if isinstance(given, str) or len(given) != 2:
        raise TypeError(f"examples must be Examples or pairs of question and answer, got {given!r}")
    return Example(*given)


@contextlib.contextmanager
def _judging(model: Judge, tokenizer: Any) -> Iterator[None]:
    # Module by module: parts of a model may be held in another mode than the whole.
    side, modes = tokenizer.padding_side, [(module, module.training) for module in model.modules()]
    tokenizer.padding_side = "left"
    model.eval()
    try:
        yield
    finally:
        tokenizer.padding_side = side
        for module, training in modes:
            module.training = training


def check_tracing(
    model: Any, *, max_rounds: int = 3, max_new_tokens: int = 256, batch_size: int = 16, **more: Any
) -> None:
    """Raise for arguments that `run_traces` would not take with this model, before any trace is begun.

    Raises
    ------
    TypeError
        For a name that neither it nor ``generate`` of the model knows.
    ValueError
        For a number below 1, or an option of ``generate`` that traces need for themselves.
    """
    if max_rounds < 1 or max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"max_rounds, max_new_tokens and batch_size must be at least 1, got {max_rounds}, {max_new_tokens} and "
            f"{batch_size}"
        )
    names = set(more) - set(_OWN)
    taken = sorted(_TAKEN & names)
    if taken:
        raise ValueError(
            f"{', '.join(taken)} cannot be set: each answer gets one trace, read on round by round"
        )
    inner = getattr(model, "causal_lm", None)
    if inner is None or "custom_generate" in more:
        return  # a generate of one's own takes what it takes
    inner = plain(inner)
    known = {*_OWN, *vars(GenerationConfig()), "assistant_tokenizer"}
    known |= {*inspect.signature(inner.generate).parameters, *inspect.signature(inner.forward).parameters}
    for name in sorted(names - known):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"its own are {', '.join(_OWN)}"
        raise TypeError(
            f"{name!r} is no argument of run_traces, nor of generate of {type(inner).__name__}; {hint}"
        )


def _check_bank(bank: Any) -> None:
    if not hasattr(bank, "counts") or not callable(getattr(bank, "call", None)):
        raise TypeError(
            f"bank must be a ToolBank, got {type(bank).__name__}; ToolBank([Calculator(), ...]) makes one"
        )


@torch.no_grad()
def run_traces(
    model: Judge,
    tokenizer: Any,
    bank: Tools,
    examples: Sequence[Example | tuple[str, str]],
    *,
    max_rounds: int = 3,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    rationale: bool = True,
    reuse_cache: bool = True,
    **generation: Any,
) -> list[Trace]:
    """Judge answers with tools, a batch at a time.

    In each round every unfinished trace of the batch is continued up to the next observation or the end; calls are
    carried out in between. A trace that has used its rounds is asked for its rationale only. One that outgrows the
    model's positions ends there (``finished="length"``).

    Parameters
    ----------
    model, tokenizer : ThemisRewardModel and its tokenizer
        As `ThemisRewardModel.from_causal_lm` left them.
    bank : ToolBank
    examples : sequence of Example or (question, answer)
    max_rounds : int
        Calls at most.
    max_new_tokens : int
        Of one round.
    batch_size : int
    rationale : bool
        False for a model that was trained without: a trace ends with its calls.
    reuse_cache : bool
        Keep keys and values from round to round and for the reward, so that only what is new is read. The same tokens
        are read either way, so results differ by rounding at most (in half precision a near tie between two tokens can
        fall the other way); False keeps no memory while tools run. Models whose cache cannot be continued (recurrent
        layers, windows that have slid, beams) read everything again in any case.
    **generation
        For ``generate``; decoding is greedy by default.

    Returns
    -------
    list of Trace
        In the order of `examples`, each with its reward.

    Raises
    ------
    ValueError
        For fewer than one round, options of ``generate`` that traces need for themselves, a question with its answer
        that fills the model's positions, or a tokenizer that lacks the three tokens or does not belong to the model.
    TypeError
        For an example that is neither, a bank that is none, or an argument that neither this nor ``generate`` knows.

    Examples
    --------
    >>> from labkit.rlhf import Calendar, ThemisRewardModel, ToolBank
    >>> from labkit.testbeds.models import tiny
    >>> from labkit.testbeds.tokenizers import byte_tokenizer
    >>> tokenizer = byte_tokenizer()
    >>> model = ThemisRewardModel.from_causal_lm(tiny("llama", vocab=len(tokenizer)), tokenizer)
    >>> asked = [("Which weekday is 2016-05-22?", answer) for answer in ("Sunday.", "Friday.")]
    >>> traces = run_traces(model, tokenizer, ToolBank([Calendar()]), asked, max_new_tokens=8)
    >>> [isinstance(trace.reward, float) for trace in traces]
    [True, True]
    """
    _check_bank(bank)
    special = model.check_tokenizer(tokenizer)
    check_tracing(
        model, max_rounds=max_rounds, max_new_tokens=max_new_tokens, batch_size=batch_size, **generation
    )
    given = [_as_example(example) for example in examples]
    form = TraceFormat(rationale)
    out: list[Trace] = []
    stops = [special[OBSERVATION]] + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
    options = {
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": stops,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[-1],
        **generation,
    }
    with _judging(model, tokenizer):
        for begin in range(0, len(given), batch_size):
            batch = [_Running(example, form) for example in given[begin : begin + batch_size]]
            reader = Reader(model, tokenizer, reuse_cache, options)
            reader.check({begin + place: item.text for place, item in enumerate(batch)})
            rewards = _run(reader, batch, bank, max_rounds)
            for number, item in enumerate(batch):
                out.append(
                    Trace(tuple(item.steps), item.rationale, rewards[number], item.text, item.finished)
                )
    return out


def _run(reader: Reader, batch: Sequence[_Running], bank: Tools, max_rounds: int) -> dict[int, float]:
    """Take a batch to its end; the rewards by place."""
    rewards: dict[int, float] = {}
    going = dict(enumerate(batch))
    for round_number in range(max_rounds + 1):
        if round_number == max_rounds:
            for item in going.values():
                item.stop_calling()
        open_ones = {place: item.text for place, item in going.items() if not item.finished}
        for place, said in (reader.write(open_ones) if open_ones else {}).items():
            if said is None:
                going[place].hear_nothing()
            else:
                going[place].hear(said, bank)
        # A trace is scored while what was read of it is still kept.
        ended = {place: item.text for place, item in going.items() if item.finished}
        rewards |= reader.score(ended)
        going = {place: item for place, item in going.items() if place not in ended}
    return rewards
