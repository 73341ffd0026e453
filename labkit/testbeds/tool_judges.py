"""Small judges that call tools: their base, their training, and what they get right.

The questions ask for a weekday or for the sky over a place on a day, and the answer is one word. The base stands in for
the pretrained language model that a reward model usually starts from: it has begun to say whether two words agree, and knows
nothing else. Questions about one day in eleven are kept for the tests; no training row names such a day.
"""

from __future__ import annotations

import copy
import datetime
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from labkit.lab.cache import cached
from labkit.rlhf import (
    Calendar,
    ThemisCollator,
    ThemisLoss,
    ThemisRewardModel,
    ToolBank,
    TraceFormat,
    WeatherCache,
    run_traces,
    tool,
)
from labkit.rlhf.themis.losses import ranking_loss
from labkit.rlhf.themis.replaying import ANSWERS
from labkit.rlhf.themis.traces import Example, Trace, parse_actions
from labkit.testbeds import tool_questions
from labkit.testbeds.models import tiny
from labkit.testbeds.shipped import restore, state
from labkit.testbeds.training import TrainingLog, train_steps

# Of the seeds 0 to 3, by prototypes: a base that already compares well was slower to learn to copy dates.
BASE_SEED = 3
ACTIONS = ("Calendar.week_day", "history_weather")
UNSURE = "The tool says nothing: I cannot tell."
_SAID = " The tool says {} and the answer says {}: they {}."
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_PLAIN = TraceFormat()


def held_out(row: Mapping[str, Any]) -> bool:
    """Whether a question belongs to the tests: its day is one of every eleven.

    Eleven, since every seventh day is the same weekday.
    """
    found = _DATE.search(row["question"])
    if found is None:
        raise ValueError(f"no date in {row['question']!r}")
    return datetime.date.fromisoformat(found.group()).toordinal() % 11 == 0


def questions(count: int, seed: int, test: bool = False) -> list[dict[str, Any]]:
    """Rows of both tasks, mixed, for training or for the test; no two of the test ask for the same.

    Raises
    ------
    ValueError
        For more than 800 of the test: there are not many more days.

    Examples
    --------
    >>> rows = questions(2, seed=0, test=True)
    >>> [held_out(row) for row in rows]
    [True, True]
    """
    if test and count > 800:
        raise ValueError(f"there are days for 800 questions of the test, got {count}")
    rng = random.Random(f"{seed} {test}")
    store = tool_questions.sky_store()
    out: list[dict[str, Any]] = []
    asked: set[str] = set()
    while len(out) < count:
        row = tool_questions.sky(rng, store) if rng.random() < 0.5 else tool_questions.week_day(rng)
        call = str(row["pos_answer"]["actions"])
        if held_out(row) == test and not (test and call in asked):
            asked.add(call)
            out.append(row)
    return out


def examples(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Two examples a row, the better answer first."""
    return [Example(row["question"], row[which]["answer"]) for row in rows for which in ANSWERS]


def bank() -> ToolBank:
    """The two tools, at work."""
    return ToolBank([Calendar(), WeatherCache(tool_questions.sky_store())])


def failing_bank(share: float, seed: int = 0) -> ToolBank:
    """The two tools, of whose calls a share fails, each answer's for itself."""
    whole = bank()

    def failing(action: str) -> Any:
        @tool(name=action)
        def call(text: str, state: Mapping[str, Any]) -> str:
            asked = f"{seed} {state['question']} {state['answer']}"
            if random.Random(asked).random() < share:
                raise RuntimeError("out of order")
            return whole.call(action, text)

        return call

    return ToolBank([failing(action) for action in ACTIONS])


def contradicting_bank(rows: Sequence[Mapping[str, Any]]) -> ToolBank:
    """Tools that lie: what they say supports the worse answer of the row that they are asked about."""
    lies: dict[tuple[str, str], str] = {}
    for row in rows:
        step = parse_actions(row["pos_answer"]["actions"])[0]
        right, wrong = (row[which]["answer"].removeprefix("It is ").removesuffix(".") for which in ANSWERS)
        lies[step.action, step.action_input] = step.observation.replace(right, wrong)

    def lying(action: str) -> Any:
        @tool(name=action)
        def call(text: str) -> str:
            return lies[action, text]

        return call

    return ToolBank([lying(action) for action in ACTIONS])


def saying_bank(words: str) -> ToolBank:
    """Tools that say the same whatever they are asked."""

    def saying(action: str) -> Any:
        return tool(name=action)(lambda text: words)

    return ToolBank([saying(action) for action in ACTIONS])


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words and digits of the questions and their traces."""
    texts = [_SAID.format("Sunny", "Mist", verdict) for verdict in ("agree", "differ")]
    texts += [UNSURE, *(f" {word}" for word in (*tool_questions.DAYS, *tool_questions.SKIES))]
    texts.append("An error occurred during the tool invoke, so no result was returned. 0123456789")
    for row in questions(400, seed=0):
        for which in ANSWERS:
            pieces = _PLAIN.parts(
                Example(row["question"], row[which]["answer"]), parse_actions(row[which]["actions"]), ""
            )
            texts.append(re.sub(r"<start_\w+>", "", "".join(piece for _, piece in pieces)))
    return tool_questions.word_tokenizer(texts)


def base(
    seed: int = BASE_SEED, *, width: int = 64, layers: int = 2, steps: int = 240, rebuild: bool = False
) -> PreTrainedModel:
    """A small Llama that has begun to say whether two words agree: about ten processor seconds, then cached.

    Parameters
    ----------
    seed : int
    width, layers : int
    steps : int
        Of 196 sentences each; with 0 the weights are random.
    rebuild : bool
        Train anew even if it is cached.
    """
    words = tokenizer()
    blank = tiny(
        "llama", width=width, layers=layers, heads=4, vocab=len(words), seed=seed, max_position_embeddings=512
    )
    if steps == 0:
        return blank
    key = {"seed": seed, "width": width, "layers": layers, "steps": steps, "torch": torch.__version__}
    key |= {"sentence": _SAID, "words": sorted(words.get_vocab())}

    def train() -> dict[str, torch.Tensor]:
        model = copy.deepcopy(blank)
        for _ in train_steps(model, _sentences(words, seed), steps, loss=_sentence_loss, weight_decay=0.01):
            pass
        return state(model)

    code = [base, _sentences, _sentence_loss, tool_questions.word_tokenizer, tokenizer]
    return restore(blank, cached("tool-judge-base", key, train, kind="tensors", code=code, rebuild=rebuild))


def _sentences(words: PreTrainedTokenizerFast, seed: int, batch: int = 196) -> Iterator[torch.Tensor]:
    rng = random.Random(seed)
    names = [*tool_questions.DAYS, *tool_questions.SKIES]
    while True:
        said = []
        for _ in range(batch):
            first = rng.choice(names)
            same = rng.random() < 0.5
            second = first if same else rng.choice([name for name in names if name != first])
            said.append(_SAID.format(first, second, "agree" if same else "differ"))
        yield words(said, return_tensors="pt", add_special_tokens=False)["input_ids"]


def _sentence_loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    # The verdict, last but one, is one token among ten and the only one that needs thought.
    return each.mean() + each[:, -2].mean()


@dataclass
class Judge:
    """A trained judge with its tokenizer and the course of its training."""

    model: ThemisRewardModel
    tokenizer: PreTrainedTokenizerFast
    log: TrainingLog
    rationale: bool = True

    def trace(self, asked: Sequence[Example], tools: ToolBank) -> list[Trace]:
        """The trace of each example, one call at most."""
        return run_traces(
            self.model,
            self.tokenizer,
            tools,
            asked,
            max_rounds=1,
            max_new_tokens=64,
            batch_size=256,
            rationale=self.rationale,
        )

    def judge(
        self, rows: Sequence[Mapping[str, Any]], tools: ToolBank | None = None
    ) -> list[tuple[Trace, Trace]]:
        """Traces of the better and the worse answer of each row, with tools at work unless others are given."""
        found = self.trace(examples(rows), tools or bank())
        return list(zip(found[::2], found[1::2], strict=True))

    def score_plain(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
        """Rewards of the better and the worse answer from question and answer alone."""
        texts = [_PLAIN.plain(item.question, item.answer) for item in examples(rows)]
        found = self.model.score_texts(self.tokenizer, texts).tolist()
        return list(zip(found[::2], found[1::2], strict=True))


def _fresh(
    seed: int, device: str, loss: ThemisLoss, **shape: Any
) -> tuple[ThemisRewardModel, PreTrainedTokenizerFast]:
    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ThemisRewardModel.from_causal_lm(copy.deepcopy(base(**shape)), words, loss=loss)
    return model.to(device).train(), words


def train_judge(
    seed: int,
    *,
    steps: int = 600,
    pairs: int = 8,
    loss: ThemisLoss | None = None,
    drop_observation: float = 0.0,
    lr: float = 3e-3,
    device: str = "cpu",
    base_steps: int = 240,
    **shape: Any,
) -> Judge:
    """Train a judge that calls tools: about 23 processor seconds.

    Parameters
    ----------
    seed : int
        Of the questions, their order and the head. The base is the same for all seeds.
    steps, pairs : int
        Steps, and pairs a step.
    loss : ThemisLoss, optional
        By default the paper's form; ω = 0 leaves the rationale out of the text, too.
    drop_observation : float
        Share of the calls that fail in the last two fifths of the training, when the judge can read what tools say; the
        rationale then says that nothing can be told.
    base_steps : int
        Of the `base`; 0 begins from random weights.
    **shape
        Width and layers of the `base`.
    """
    rule = loss or ThemisLoss(form="paper")
    model, words = _fresh(seed, device, rule, steps=base_steps, **shape)
    rationale = rule.omega > 0
    collate = ThemisCollator(
        words,
        imitate=False,
        form=TraceFormat(rationale),
        failed_rationale=UNSURE,
        seed=seed,
    )
    rows = questions(steps * pairs, seed)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for begin in range(0, len(rows), pairs):
            collate.drop_observation = drop_observation if begin >= 0.6 * len(rows) else 0.0
            yield {name: value.to(device) for name, value in collate(rows[begin : begin + pairs]).items()}

    def both(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        out = model(**batch)
        parts = ("tool_loss", "observation_loss", "rationale_loss", "rm_loss")
        return out.loss, {name: float(out[name].detach()) for name in parts}

    log = TrainingLog(notes={"parts": []})
    course = train_steps(model, batches(), steps, lr=lr, warmup=0.3, weight_decay=0.01, loss=both)  # type: ignore[arg-type]
    for step in course:
        log.losses.append(step.loss)
        log.notes["parts"].append(step.extra)
    model.eval()
    return Judge(model, words, log, rationale)


def train_plain(
    seed: int,
    *,
    steps: int = 600,
    pairs: int = 8,
    lr: float = 3e-3,
    device: str = "cpu",
    base_steps: int = 240,
    rows: Sequence[Mapping[str, Any]] | None = None,
    **shape: Any,
) -> Judge:
    """Train a reward model without tools, from the same base on the same pairs (or on `rows`): question and answer in,
    number out.
    """
    model, words = _fresh(seed, device, ThemisLoss(), steps=base_steps, **shape)
    rows = rows or questions(steps * pairs, seed)
    end = words.eos_token

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for begin in range(0, len(rows), pairs):
            some = rows[begin : begin + pairs]
            texts = [_PLAIN.plain(row["question"], row[w]["answer"]) + end for w in ANSWERS for row in some]
            batch = words(
                texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
            )
            yield batch["input_ids"].to(device), batch["attention_mask"].to(device)

    def ranking(model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        rewards = model(*batch).rewards
        return ranking_loss(rewards[: len(rewards) // 2], rewards[len(rewards) // 2 :])

    log = TrainingLog()
    for step in train_steps(model, batches(), steps, lr=lr, warmup=0.3, weight_decay=0.01, loss=ranking):  # type: ignore[arg-type]
        log.losses.append(step.loss)
    model.eval()
    return Judge(model, words, log)


def exact_calls(rows: Sequence[Mapping[str, Any]], judged: Sequence[tuple[Trace, Trace]]) -> float:
    """Share of traces whose call is the right one, action and input to the letter."""
    right = 0
    for row, pair in zip(rows, judged, strict=True):
        step = parse_actions(row["pos_answer"]["actions"])[0]
        right += sum(
            bool(trace.steps)
            and (trace.steps[0].action, trace.steps[0].action_input) == (step.action, step.action_input)
            for trace in pair
        )
    return right / (2 * len(rows))


def accuracy(judged: Sequence[tuple[Trace, Trace]] | Sequence[tuple[float, float]]) -> float:
    """Share of pairs whose better answer gets the higher reward; a tie is wrong.

    Examples
    --------
    >>> accuracy([(1.0, 0.0), (0.0, 0.0)])
    0.5
    """
    right = 0
    for better, worse in judged:
        high = better.reward if isinstance(better, Trace) else better
        low = worse.reward if isinstance(worse, Trace) else worse
        right += high is not None and low is not None and high > low
    return right / len(judged)
