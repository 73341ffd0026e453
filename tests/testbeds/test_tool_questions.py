"""Questions by rule: the tools agree with them, and nothing but the tools tells right from wrong."""

import datetime
import re

import pytest

from labkit.rlhf import Calculator, Calendar, ToolBank, WeatherCache
from labkit.rlhf.themis import parse_actions
from labkit.testbeds import tool_questions

STORE = tool_questions.weather_store()
BANK = ToolBank([Calendar(), WeatherCache(STORE), Calculator()])


@pytest.mark.parametrize("task", tool_questions.TASKS)
def test_the_tools_say_the_same(task):
    for row in tool_questions.rows(task, 60, seed=1, store=STORE):
        right, wrong = row["pos_answer"], row["neg_answer"]
        assert right["answer"] != wrong["answer"]
        assert right["score"] > wrong["score"]
        seen = {}
        for which in ("pos_answer", "neg_answer"):
            steps = parse_actions(row[which]["actions"])
            assert len(steps) == (2 if task == "multi_tools" else 1)
            for step in steps:
                seen[which] = BANK.call(step.action, step.action_input, {"answer": row[which]["answer"]})
                if step.observation:
                    assert seen[which] == step.observation
        if task == "calculator":
            assert [BANK.tool_of("calculator").score(seen[w]) for w in ("pos_answer", "neg_answer")] == [1, 0]
        else:
            value = re.search(r"(?:is|was) (.+)\.$", right["answer"]).group(1)
            said = {"weather": "humidity: {};", "multi_tools": "humidity: {};", "sky": "overall weather: {};"}
            assert said.get(task, "{}").format(value) in seen["pos_answer"]


def test_deterministic_and_different():
    first = tool_questions.rows("calendar", 50, seed=3)
    assert first == tool_questions.rows("calendar", 50, seed=3)
    assert first != tool_questions.rows("calendar", 50, seed=4)
    assert len({row["question"] for row in first}) == 50
    with pytest.raises(ValueError, match="task must be one of"):
        tool_questions.rows("cooking", 1)


def test_the_wording_tells_nothing():
    """Right and wrong answers differ in the value alone, and every value can be either."""
    rows = [
        row
        for row in tool_questions.rows("calendar", 900, seed=0)
        if "week" in str(row["pos_answer"]["actions"])
    ]
    counts = {which: dict.fromkeys(tool_questions.DAYS, 0) for which in ("pos_answer", "neg_answer")}
    for row in rows:
        for which, count in counts.items():
            count[row[which]["answer"].split()[-1].rstrip(".")] += 1
    for count in counts.values():
        assert min(count.values()) > 0.5 * len(rows) / 7


def test_tokenizer_gives_back_what_it_was_given():
    texts = [
        "### USER:\nQuestion: Which day is 2015-03-24?\nAnswer: It is Tuesday.",
        "Action: Calendar.week_day",
    ]
    tokenizer = tool_questions.word_tokenizer(texts)
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer("2015")["input_ids"]
    assert len(ids) == 4
    assert tokenizer("zebra")["input_ids"] == [tokenizer.unk_token_id]
    assert datetime.date(2015, 3, 24).strftime("%A") == "Tuesday"
