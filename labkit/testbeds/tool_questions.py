"""Questions that a tool answers, by rule: pairs of a right and a wrong answer with the trace that decides, without end.

Calendar, weather, calendar then weather, and arithmetic, in the form of the released tool-augmented reward data (rows
with ``question``, ``pos_answer`` and ``neg_answer``), but with our own wording and facts: dates are drawn, weather is
invented. Right and wrong answers are worded alike, so that the text alone tells nothing.
"""

from __future__ import annotations

import datetime
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PLACES = ("Oslo", "Lima", "Cairo", "Perth", "Quito", "Turin", "Accra", "Hanoi")
SKIES = ("Sunny", "Cloudy", "Mist")
TASKS = ("calendar", "weather", "multi_tools", "calculator", "week_day", "sky")
_WEEK_DAY = (
    "Which day of the week is {day}?",
    "What weekday does {day} fall on?",
    "Tell me the weekday of {day}.",
)
_TARGET = (
    "Which date is {n} days after {day}?",
    "What day comes {n} days after {day}?",
    "Add {n} days to {day}.",
)
_DIFFERENCE = ("How many days lie between {day} and {other}?", "Count the days from {day} to {other}.")
_WEATHER = ("How humid was it in {place} on {day}?", "What was the humidity in {place} on {day}?")
_MULTI = (
    "How humid was it in {place} {n} days after {day}?",
    "What was the humidity in {place} {n} days after {day}?",
)
_SKY = ("Which sky did {place} have on {day}?", "What was the sky over {place} on {day}?")
_PIECE = r"<[a-z_/]+>| ?[A-Za-z]+|[0-9]|[^A-Za-z0-9]"


def _date(rng: random.Random) -> datetime.date:
    return datetime.date(2000, 1, 1) + datetime.timedelta(days=rng.randrange(10_000))


def _side(answer: str, steps: Sequence[Mapping[str, str]], rationale: str, score: float) -> dict[str, Any]:
    written = "\n".join("\n".join(f"{key}: {value}" for key, value in step.items()) for step in steps)
    actions: Any = steps[0] if len(steps) == 1 else written
    return {"answer": answer, "score": score, "actions": actions, "score_agent": {"explanation": rationale}}


def _step(thought: str, action: str, given: str, observation: str) -> dict[str, str]:
    return {"Thought": thought, "Action": action, "Action Input": given, "Observation": observation}


def _pair(
    question: str, wording: str, right: str, wrong: str, steps: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    sides = {}
    for which, said, score in (("pos_answer", right, 1.0), ("neg_answer", wrong, -1.0)):
        verdict = "agree" if said == right else "differ"
        rationale = f"The tool says {right} and the answer says {said}: they {verdict}."
        sides[which] = _side(wording.format(said), steps, rationale, score)
    return {"question": question, **sides}


def week_day(rng: random.Random) -> dict[str, Any]:
    """Which day of the week is a date?"""
    day = _date(rng)
    right = DAYS[day.weekday()]
    wrong = rng.choice([name for name in DAYS if name != right])
    step = _step("I need the weekday.", "Calendar.week_day", f"{day}", right)
    return _pair(rng.choice(_WEEK_DAY).format(day=day), "It is {}.", right, wrong, [step])


def target_day(rng: random.Random) -> dict[str, Any]:
    """Which date comes some days after another?"""
    day, n = _date(rng), rng.randrange(1, 200)
    right = day + datetime.timedelta(days=n)
    wrong = right + datetime.timedelta(days=rng.choice([-1, 1]) * rng.randrange(1, 40))
    step = _step("I need to add days.", "Calendar.target_day", f"{day}, {n}", f"{right}")
    return _pair(rng.choice(_TARGET).format(day=day, n=n), "It is {}.", f"{right}", f"{wrong}", [step])


def day_difference(rng: random.Random) -> dict[str, Any]:
    """How many days lie between two dates?"""
    day, n = _date(rng), rng.randrange(1, 900)
    other = day + datetime.timedelta(days=n)
    wrong = max(1, n + rng.choice([-1, 1]) * rng.randrange(1, 90))
    wrong = wrong if wrong != n else n + 1
    step = _step("I need to count days.", "Calendar.day_difference", f"{day}, {other}", f"{n}")
    question = rng.choice(_DIFFERENCE).format(day=day, other=other)
    return _pair(question, "It is {}.", f"{n}", f"{wrong}", [step])


def weather_store(seed: int = 0, days: int = 60) -> dict[str, str]:
    """Invented weather for every place of `PLACES` on the first days of 2023, as ``WeatherCache`` takes it."""
    rng = random.Random(seed)
    store = {}
    for place in PLACES:
        for number in range(days):
            day = datetime.date(2023, 1, 1) + datetime.timedelta(days=number)
            sky, heat, humid = (
                rng.choice(SKIES),
                rng.randrange(-5, 35),
                rng.randrange(15, 96),
            )
            told = f"overall weather: {sky}; temperature: {heat}.0(C); humidity: {humid}.0; UV index: {rng.randrange(9)}.0."
            store[f"{place}, {day}"] = f"The weather for {place} on {day} is: \n{told}"
    return store


def sky_store(seed: int = 0, days: int = 60) -> dict[str, str]:
    """An invented sky for every place of `PLACES` on the first days of 2023; the answer is one word."""
    rng = random.Random(seed)
    first = datetime.date(2023, 1, 1)
    keys = [f"{place}, {first + datetime.timedelta(days=n)}" for place in PLACES for n in range(days)]
    return {key: f"{key}: overall weather: {rng.choice(SKIES)};" for key in keys}


def sky(rng: random.Random, store: Mapping[str, str]) -> dict[str, Any]:
    """Which sky had a place on a day?"""
    key = rng.choice(sorted(store))
    place, _, day = key.partition(", ")
    right = next(name for name in SKIES if name in store[key])
    wrong = rng.choice([name for name in SKIES if name != right])
    step = _step("I need the weather.", "history_weather", key, store[key])
    return _pair(rng.choice(_SKY).format(place=place, day=day), "It is {}.", right, wrong, [step])


def _humidity(observation: str) -> str:
    found = re.search(r"humidity: ([\d.]+?);", observation)
    if found is None:
        raise ValueError(f"no humidity in {observation!r}")
    return found.group(1)


def weather(rng: random.Random, store: Mapping[str, str], multi: bool = False) -> dict[str, Any]:
    """How humid was it somewhere on a day, or some days after a day?"""
    key = rng.choice(sorted(store))
    place, _, day = key.partition(", ")
    right = _humidity(store[key])
    wrong = f"{rng.choice([n for n in range(15, 96) if f'{n}.0' != right])}.0"
    steps = [_step("I need the weather.", "history_weather", key, store[key])]
    question = rng.choice(_WEATHER).format(place=place, day=day)
    if multi:
        n = rng.randrange(1, 200)
        first = datetime.date.fromisoformat(day) - datetime.timedelta(days=n)
        steps.insert(0, _step("I need to add days.", "Calendar.target_day", f"{first}, {n}", day))
        question = rng.choice(_MULTI).format(place=place, n=n, day=first)
    return _pair(question, "The humidity was {}.", right, wrong, steps)


def calculator(rng: random.Random) -> dict[str, Any]:
    """A price for some of a thing and some of another; the wrong answer has a slip in one product or in the sum."""
    a, b, c, d = (rng.randrange(2, 40) for _ in range(4))
    thing, other = rng.sample(["pens", "cups", "nails", "apples"], 2)
    question = f"{a} {thing} cost ${b} each and {c} {other} ${d} each. What is the total?"
    shown = [a * b, c * d]
    sides = {}
    for which, score in (("pos_answer", 1), ("neg_answer", 0)):
        first, second = shown
        total = first + second
        if not score:
            slip = rng.choice([-10, -2, -1, 1, 2, 10])
            place = rng.randrange(3)
            first, second = first + slip * (place == 0), second + slip * (place == 1)
            total = first + second + slip * (place == 2)
        marks = (
            f"<<{a}*{b}={first}>>{first}, <<{c}*{d}={second}>>{second}, <<{first}+{second}={total}>>{total}"
        )
        answer = f"{a} {thing} cost {a} * {b}, {c} {other} {c} * {d}: {marks}.\n#### {total}"
        step = _step("I need to check the calculation.", "calculator", marks, "")
        sides[which] = _side(answer, [step], "", score)
    return {"question": question, **sides}


def rows(
    task: str, count: int, seed: int = 0, store: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Rows of a task.

    Parameters
    ----------
    task : str
        Of `TASKS`; ``calendar`` mixes the three actions.
    count : int
    seed : int
    store : mapping, optional
        For the weather and the sky; by default `weather_store` and `sky_store` of seed 0.

    Returns
    -------
    list of dict
        The observation of a ``calculator`` row is empty: it hangs on the answer, and is the tool's to give.

    Examples
    --------
    >>> rows("calendar", 1, seed=0)[0]["pos_answer"]["actions"]["Action"]
    'Calendar.week_day'
    """
    rng = random.Random(f"{task} {seed}")
    known = store if store is not None else sky_store() if task == "sky" else weather_store()
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "calendar": lambda: rng.choice([week_day, target_day, day_difference])(rng),
        "weather": lambda: weather(rng, known),
        "multi_tools": lambda: weather(rng, known, multi=True),
        "calculator": lambda: calculator(rng),
        "week_day": lambda: week_day(rng),
        "sky": lambda: sky(rng, known),
    }
    if task not in makers:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    return [makers[task]() for _ in range(count)]


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, single digits and single other characters, which gives back every text it knows.

    Parameters
    ----------
    texts : iterable of str
        What it must know; other words become ``<unk>``.
    """
    found = {piece for text in texts for piece in re.findall(_PIECE, text, re.DOTALL)}
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(found)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
