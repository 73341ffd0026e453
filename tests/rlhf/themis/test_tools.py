"""The tools: what they answer, and what they do with input that no tool should get."""

import datetime
import threading
import time

import numpy as np
import pytest

from labkit.rlhf import (
    BM25Search,
    Calculator,
    Calendar,
    CodeRunner,
    Tool,
    ToolBank,
    ToolUnavailable,
    Translator,
    WeatherCache,
    evaluate_arithmetic,
    tool,
)
from labkit.rlhf.themis import BM25, FAILED
from labkit.rlhf.themis.code_runner import code_blocks
from labkit.sandbox import Sandbox, SandboxUnavailable

# ------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * -3", -9),
        ("7 // 2 + 7 % 4", 6),
        ("2 ** 10", 1024),
        ("2^3", 8),
        ("1,000,000 / 4", 250_000),
        ("30 * 20%", 6),
        ("50% + 1", 1.5),
        ("10 % 3", 1),
        ("$5.50 × 2", 11),
        ("007 + 1", 8),
        ("ceil(2.4) + sqrt(16)", 7),
        ("1e3", 1000),
    ],
)
def test_arithmetic(text, value):
    assert evaluate_arithmetic(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__",
        "x + 1",
        "[1, 2]",
        "'a' * 3",
        "9**9**9",
        "(10**4000) * (10**4000)",
        "2 ** 100000 % 7",
        "1 / 0",
        "10.0 ** 400",
        "(-8) ** 0.5",
        "lambda: 1",
        "1 if 1 else 2",
        "1 < 2",
        "True",
        "1j",
        "",
        "(" * 500 + "1" + ")" * 500,
        "1+" * 600 + "1",
        "1_000",
        "2_005 + 1",
        "0x10",
        "abs(1, 2)",
        "sqrt(x=4)",
        "1\n2",
    ],
)
def test_what_is_not_arithmetic_is_refused_at_once(text):
    start = time.process_time()
    with pytest.raises(ValueError):
        evaluate_arithmetic(text)
    assert Calculator()(text, {}).startswith("Error")
    assert time.process_time() - start < 0.05


def test_arithmetic_agrees_with_python_on_random_expressions():
    rng = np.random.default_rng(0)
    for _ in range(300):
        numbers = rng.integers(1, 60, 4)
        first, second, third = rng.choice(["+", "-", "*", "/"], 3)
        text = f"({numbers[0]} {first} {numbers[1]}) {second} {numbers[2]} {third} {numbers[3]}"
        assert evaluate_arithmetic(text) == eval(text)


@pytest.mark.parametrize(
    ("marks", "answer", "strict", "loose"),
    [
        ("<<2*3=6>>6", "#### 6", "correct", "correct"),
        ("<<2*3=7>>7", "#### 6", "process wrong", "process wrong"),
        ("<<2*3=6>>6", "#### 7", "answer wrong", "answer wrong"),
        ("<<2*3=7>>7", "#### 7", "both", "both"),
        ("<<3*0.1=0.3>>0.3", "#### 0.3", "both", "correct"),
        ("<<10/3=3.33>>3.33", "#### 3.33", "both", "correct"),
        ("<<10/3=3.34>>3.34", "#### 3.33", "both", "process wrong"),
        ("<<2-7=-5>>-5", "#### -5", "none", "correct"),
        ("<<500*2=1,000>>1,000", "#### 1,000", "both", "correct"),
        ("<<30*20%=6>>6", "#### 6", "both", "correct"),
        ("<<1/2=1/2>>1/2", "#### 0.5", "process wrong", "correct"),
        ("<<2*3=6>>6", "six", "none", "none"),
        ("", "#### 6", "both", "both"),
        ("<<9**9**9=1>>1", "#### 1", "both", "both"),
        ("<<500*2=1_000>>1_000", "#### 1000", "process wrong", "process wrong"),
    ],
)
def test_verdicts(marks, answer, strict, loose):
    heads = {
        "correct": "Both the calculation and the answer are correct.",
        "process wrong": "The calculation process is incorrect, but the answer matches the predicted answer. Details: ",
        "answer wrong": "The calculation process is correct, but the resulting answer ",
        "both": "Both the calculation and the answer are incorrect. Details: ",
        "none": "No valid answer.",
    }
    for is_strict, expected in ((True, strict), (False, loose)):
        calculator = Calculator(strict=is_strict)
        verdict = calculator(marks, {"answer": answer})
        assert verdict.startswith(heads[expected]), (is_strict, verdict)
        assert calculator.score(verdict) == float(expected == "correct")


def test_wording_of_a_wrong_answer():
    assert Calculator()("<<8*4=32>>32", {"answer": "#### 30"}) == (
        "The calculation process is correct, but the resulting answer 32 does not match the predicted answer 30.0."
    )
    assert Calculator()("<<8*4=31>>31", {"answer": "#### 30"}) == (
        "Both the calculation and the answer are incorrect. Details: An unexpected error occurred during the calculation."
        " The calculated answer 32 does not match the predicted answer 30.0."
    )


# ------------------------------------------------------------------------------------------- calendar, stores, search


def test_calendar():
    bank = ToolBank([Calendar()])
    for day in (datetime.date(1900, 3, 1), datetime.date(2024, 2, 29), datetime.date(2999, 12, 31)):
        assert bank.call("Calendar.week_day", day.isoformat()) == day.strftime("%A")
    assert bank.call("Calendar.day_difference", "2000-01-10, 2020-06-10") == "7457"
    assert bank.call("Calendar.target_day", "2024-02-28, 2") == "2024-03-01"
    assert bank.call("Calendar.target_day", "2024-03-01, -2") == "2024-02-28"
    assert bank.counts["failed"] == 0


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("Calendar.week_day", "2023-02-30"),
        ("Calendar.week_day", "tomorrow"),
        ("Calendar.week_day", "2023-01-01, 2023-01-02"),
        ("Calendar.day_difference", "2023-01-01"),
        ("Calendar.target_day", "2023-01-01, soon"),
        ("Calendar.target_day", "2023-01-01, 99999999999"),
    ],
)
def test_a_failing_tool_is_an_observation(action, text):
    bank = ToolBank([Calendar()])
    assert bank.call(action, text) == FAILED
    assert bank.counts == {"called": 1, "failed": 1}


def test_weather_store(tmp_path):
    cache = WeatherCache.synthetic(["Suzhou", "Riyadh"], ["2023-06-23", "2023-06-24"], seed=3)
    assert len(cache.store) == 4
    again = WeatherCache.synthetic(["Suzhou", "Riyadh"], ["2023-06-23", "2023-06-24"], seed=3)
    assert again.store == cache.store
    assert cache("Nowhere, 2023-06-23", {}) == "None"
    asked = []
    fetching = WeatherCache(cache.store, fetch=lambda key: asked.append(key) or "fine")
    assert [fetching("Nowhere, 2023-06-23", {}) for _ in range(2)] == ["fine", "fine"]
    assert asked == ["Nowhere, 2023-06-23"]
    with pytest.raises(TypeError, match="store must map"):
        WeatherCache({"Suzhou, 2023-06-23": 3})


@pytest.mark.parametrize("kind", [WeatherCache, Translator])
def test_stores_that_are_none(kind, tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(
        TypeError, match=r"store must map '?(City|texts).* path of a JSON file that does, got list"
    ):
        kind([1])
    with pytest.raises(TypeError, match=r"store must map .*; .*list\.json holds list"):
        kind(tmp_path / "list.json")
    with pytest.raises(TypeError, match="got int"):
        kind(3)


def test_weather_in_the_words_of_the_release():
    values = {
        "sky": "Sunny",
        "temperature": 32.3,
        "wind": 20.5,
        "rain": 0,
        "visibility": 10,
        "humidity": 37,
        "uv": 10,
    }
    assert WeatherCache.observation("Suzhou", "2023-06-23", values) == (
        "The weather for Suzhou on 2023-06-23 is: \noverall weather: Sunny; temperature: 32.3(C); wind speed: 20.5(kph), "
        "12.7(mph); precipitation: 0.0(mm), 0.00(inch); visibility: 10.0(km), 6.0(miles); humidity: 37.0; UV index: 10.0."
    )


def test_translations():
    bank = ToolBank([Translator({"x1": {"question": "Guten Tag ", "answer": "Good day"}})])
    assert bank.call("translate", " Guten Tag") == "Good day"
    assert "not in the store of translations" in bank.call("translate", "Bonjour")
    assert bank.counts["failed"] == 1
    assert Translator(translate=str.upper)("bonjour", {}) == "BONJOUR"
    assert not Translator().available
    with pytest.raises(ToolUnavailable):
        Translator()("x", {})


def test_bm25_by_hand():
    index = BM25(["a b", "a a c", "d"], k1=1.2, b=0.5)
    rarity = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    lengths = np.array([2, 3, 1])
    norm = 1.2 * (1 - 0.5 + 0.5 * lengths / 2)
    expected = [rarity * 1 * 2.2 / (1 + norm[0]), rarity * 2 * 2.2 / (2 + norm[1]), 0]
    assert index.scores("A?") == pytest.approx(expected)
    assert [place for place, _ in index.search("a c", 2)] == [1, 0]


def test_search_tool(tmp_path):
    (tmp_path / "rivers.txt").write_text(
        "The Nile is a long river in Africa.\n\nThe Rhine is a river in Europe, too.\n\nx"
    )
    search = BM25Search(tmp_path, name="google_serper")
    bank = ToolBank([search])
    assert bank.call("google_serper", "river in Africa") == "rivers | The Nile is a long river in Africa."
    assert bank.call("google_serper", "zzz") == "None"
    assert BM25Search(["one fish", "two fish"], k=2)("two fish", {}) == "two fish one fish"
    with pytest.raises(ValueError, match="is no folder"):
        BM25Search(tmp_path / "none")
    with pytest.raises(ValueError, match="at least one text"):
        BM25Search([])
    with pytest.raises(ValueError, match="k must be at least 1"):
        search.index.search("x", 0)


# ------------------------------------------------------------------------------------------- code

SQUARE = ["assert f(2) == 4", "assert f(3) == 9", "assert f(-1) == 1"]


@pytest.fixture(scope="module")
def runner():
    made = CodeRunner(timeout=1.0, memory_mb=128)
    if not made.available:
        pytest.skip("no room can be opened on this machine")
    return made


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(x): return x * x", "The pass rate is 1.0. All test cases passed."),
        ("def f(x): return -x * x", "The pass rate is 0.0. All test cases failed."),
        (
            "def f(x): return x ** x",
            "The pass rate is 0.3333333333333333. 1 test cases passed, and 2 test cases failed.",
        ),
        (
            "def f(x): return y",
            "The pass rate is 0.0. All test cases failed. Failed reason: name 'y' is not defined",
        ),
        (
            "def f(x:",
            "The pass rate is 0.0. All test cases failed. Failed reason: '(' was never closed (<string>, line 1)",
        ),
        (
            "def f(x): return [4, 9][x - 2] if x > 0 else [][0]",
            "The pass rate is 0.6666666666666666. 2 test cases passed, and 1 test cases failed. "
            "Failed reason: list index out of range",
        ),
        (
            "Here it is:\n```python\ndef f(x): return x * x\n```\nDone.",
            "The pass rate is 1.0. All test cases passed.",
        ),
        (
            "import os\ndef f(x): os._exit(0)",
            "The pass rate is 0.0. All test cases failed. Failed reason: ended early",
        ),
        ("raise SystemExit(0)", "The pass rate is 0.0. All test cases failed. Failed reason: 0"),
        ("def f(x):\n  print('x' * 10 ** 5)\n  return x * x", "The pass rate is 1.0. All test cases passed."),
        (
            "f = lambda x: (input(), x * x)[1]",
            "The pass rate is 0.0. All test cases failed. Failed reason: EOF when reading",
        ),
        (
            "import socket\ns = socket.socket()\nf = lambda x: x * x",
            "The pass rate is 0.0. All test cases failed. Failed",
        ),
        ("bytearray(10 ** 9)\nf = lambda x: x * x", "The pass rate is 0.0. All test cases failed."),
        (
            "open('/etc/labkit', 'w')\nf = lambda x: x * x",
            "The pass rate is 0.0. All test cases failed. Failed reason: [Err",
        ),
    ],
)
def test_code(runner, code, expected):
    observation = runner("Same as the answer", {"answer": code, "test_list": SQUARE})
    assert observation.startswith(expected), observation
    assert runner.score(observation) == pytest.approx(float(expected.split()[4].rstrip(".")))


SQUARED = "def f(x): return x * x\n"


@pytest.mark.parametrize(
    "answer",
    [
        f"```\n{SQUARED}```",
        f"```Python\n{SQUARED}```",
        f"``` PYTHON 3.11\n{SQUARED}```",
        f"```python3 title=x\n{SQUARED}```",
        f"Here:\n```py\n{SQUARED}",
        f"Here:\n```\n{SQUARED}",
        "```python\nfrom math import prod\n```\nthen\n```python\ndef f(x): return prod([x, x])\n```",
        f"```\n{SQUARED}```\nso that\n```\nf(3) gives 9\n```",
        f"```python\n{SQUARED}```\nFor example:\n```python\n>>> f(3)\n9\n```",
        f"```python\n{SQUARED}```\nIt prints\n```\nraise\n```\nRun it by\n```bash\npython f.py\n```",
        f"```bash\npip install nothing\n```\n```\n{SQUARED}```",
        f"# `f` squares\n{SQUARED}",
    ],
)
def test_code_in_fences(runner, answer):
    assert runner.run(answer, SQUARE).pass_rate == 1, answer


@pytest.mark.parametrize(
    "answer", ["```js\nf = x => x * x\n```", "```python\ndef f(x:\n```\n```python\ny = 1\n```", "```"]
)
def test_fences_without_the_answer(runner, answer):
    assert runner.run(answer, SQUARE).pass_rate == 0


def test_many_fences_are_read_at_once():
    start = time.process_time()
    for text in ("```" * 20_000, "```\n" * 20_000, "```py " + " " * 50_000, "```py\n" + "`` \n" * 20_000):
        code_blocks(text)
    assert time.process_time() - start < 0.5


def test_code_without_end(runner):
    code = "def f(x):\n    while x > 0: pass\n    return x * x"
    report = CodeRunner(timeout=0.3, memory_mb=128).run(code, SQUARE)
    assert report.passed == (False, False, True)
    assert report.reasons[0] == "timed out"
    assert report.isolation == runner.sandbox.kind
    assert report.pass_rate == pytest.approx(1 / 3)


def test_one_test_cannot_spoil_the_next(runner):
    code = "import os, sys\nopen('seen', 'a').write('x')\nf = lambda x: x * x if x > 2 else os.kill(os.getppid(), 9)"
    report = runner.run(code, SQUARE)
    assert not any(report.passed[:1])
    forging = "import os\nfor fd in range(60):\n    try: os.write(fd, b'\"passed\"\\n')\n    except OSError: pass\nf = None"
    assert sum(runner.run(forging, SQUARE).passed) == 0


def test_input_other_than_the_answer(runner):
    state = {"answer": "nothing", "test_list": ["assert f() == 1"]}
    assert runner("def f(): return 1", state) == "The pass rate is 1.0. All test cases passed."


def test_code_misuse(monkeypatch):
    with pytest.raises(ValueError, match="timeout must be above 0"):
        CodeRunner(timeout=0)
    with pytest.raises(ValueError, match="memory_mb must be at least 16"):
        CodeRunner(memory_mb=1)
    with pytest.raises(ValueError, match="at least one statement"):
        CodeRunner(sandbox=object()).run("x", [])
    from labkit.rlhf.themis import code_runner

    def closed(*args, **kwargs):
        raise SandboxUnavailable("nothing works here")

    monkeypatch.setattr(code_runner, "Sandbox", closed)
    assert not CodeRunner().available
    bank = ToolBank([CodeRunner()])
    assert bank.call("code_run", "x", {"test_list": ["x"]}) == "The tool is not available: nothing works here"
    assert isinstance(Sandbox, type)


# ------------------------------------------------------------------------------------------- bank


def test_bank():
    @tool(name="units", description="Metres to feet.")
    def convert(text):
        return f"{float(text) * 3.28084:.1f}"

    @tool(name="whole")
    def whole(text, state):
        """The whole state."""
        return f"{text} {sorted(state)}"

    bank = ToolBank([convert, whole, Calendar()])
    assert bank.call("units", "2") == "6.6"
    assert bank.call("units", "two") == FAILED
    assert bank.call("whole", "x", {"answer": 1, "question": 2}) == "x ['answer', 'question']"
    assert bank.names == [
        "units",
        "whole",
        "Calendar.week_day",
        "Calendar.day_difference",
        "Calendar.target_day",
    ]
    assert bank.describe().splitlines()[:2] == ["units: Metres to feet.", "whole: The whole state."]
    assert bank.call("unit", "2").startswith("There is no tool 'unit'. Tools: units, whole")
    assert bank.counts == {"called": 3, "failed": 1, "unknown": 1}
    assert isinstance(convert, Tool)
    with pytest.raises(ValueError, match="did you mean 'units'"):
        bank.tool_of("unit")


def test_a_tool_that_hangs():
    hung = threading.Event()
    slow = tool(name="slow", timeout=0.05)(lambda text: hung.wait(20) and "late")
    quick = tool(name="quick", timeout=20)(str.upper)
    broken = tool(name="broken", timeout=20)(lambda text: text[99])
    bank = ToolBank([slow, quick, broken])
    assert bank.call("slow", "x") == FAILED
    assert bank.call("quick", "x") == "X"
    assert bank.call("broken", "x") == FAILED
    assert bank.counts == {"called": 3, "failed": 2}
    hung.set()
    with pytest.raises(ValueError, match="timeout must be above 0"):
        tool(name="x", timeout=0)


def test_bank_misuse():
    with pytest.raises(ValueError, match="two tools have an action 'calculator'"):
        ToolBank([Calculator(), Calculator()])
    with pytest.raises(TypeError, match="wrap a function with @tool"):
        ToolBank([len])
    with pytest.raises(ValueError, match="one line of text"):
        tool(name="")


def test_verdicts_as_rewards():
    bank = ToolBank([Calculator(), Calendar()])
    reward = bank.as_reward_fn(action="calculator")
    completions = [
        [{"role": "assistant", "content": "<<6*7=42>>42\n#### 42"}],
        [{"role": "assistant", "content": "42"}],
    ]
    prompts = [[{"role": "user", "content": "6 times 7?"}]] * 2
    assert reward(prompts=prompts, completions=completions, completion_ids=[[1], [2]]) == [1.0, 0.0]
    assert reward.__name__ == "calculator_reward"
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        reward(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="column 'context' has 1 entries for 2 prompts"):
        reward(["a", "b"], ["c", "d"], context=["x"])
    with pytest.raises(TypeError, match="gives no verdict"):
        bank.as_reward_fn(action="Calendar.week_day")(["a"], ["2023-01-01"])
    with pytest.raises(ValueError, match="no tool has an action"):
        bank.as_reward_fn(action="x")
    with pytest.raises(ValueError, match="either a model"):
        bank.as_reward_fn()
    with pytest.raises(ValueError, match="needs its tokenizer"):
        bank.as_reward_fn(object())


def test_code_as_a_reward(runner):
    reward = ToolBank([runner]).as_reward_fn(action="code_run", action_input=lambda question, answer: answer)
    completions = ["def f(x): return x * x", "def f(x): return 4"]
    assert reward(["Square."] * 2, completions, test_list=[SQUARE, SQUARE]) == [1.0, pytest.approx(1 / 3)]
