"""What a policy, a model or a user may hand in, and what must not come of it."""

import os
import socket
import time

import pytest
import torch

from labkit.rlhf import (
    Calculator,
    Calendar,
    CodeRunner,
    ThemisCollator,
    ThemisRewardModel,
    ToolBank,
    TraceFormat,
    run_trace,
    run_traces,
)
from labkit.rlhf.themis import FAILED, SPECIAL_TOKENS
from labkit.rlhf.themis.traces import Example
from labkit.testbeds.models import tiny

from .conftest import byte_tokenizer, row

MANY = 20_000


def seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__.__bases__[0].__subclasses__()",
        "9**9**9",
        "<<9**9**9=1>>1 #### 1",
        "<<__import__('os')=1>>1 #### 1",
        "####" + " " * MANY + "x",
        "####" + "," * MANY + "x",
        "#### " + "9" * MANY,
        "#### - $ -" + " " * MANY,
        "<<" * MANY,
        "<<1>>" + "," * MANY + "x",
        "<<" + "(" * MANY + ">>",
        "<<" + "9**" * 300 + "9=1>>1 #### 1",
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_a_calculator_answers_within_50_ms(text, strict):
    bank = ToolBank([Calculator(strict=strict)])
    assert seconds(lambda: bank.call("calculator", text, {"answer": text})) < 0.05
    assert bank.verdict("calculator", text, {"answer": text}) == 0


@pytest.mark.parametrize(
    "text",
    [
        "Action: x" + "\n" * MANY + "y",
        "Action: x\n" * (MANY // 10),
        "Action" + " " * MANY,
        "Action: x\nAction" + " 1" * MANY,
        "Action: x " + "Action Input: " * (MANY // 10),
    ],
)
def test_a_model_that_repeats_itself_is_read_at_once(text):
    form = TraceFormat()
    assert seconds(lambda: form.read_call(text)) < 0.5
    assert form.read_call(text) is None
    assert seconds(lambda: form.parse(f"<start_tool> Thought: y\n{text}")) < 1.5


ESCAPES = {
    "loop": "while True: pass",
    "fork": "import os\nwhile True: os.fork()",
    "memory": "x = [0] * 10 ** 9",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
    "input": "input()",
    "file": "open({!r}, 'w').write('x')",
    "crash": "import ctypes\nctypes.string_at(0)",
    "number": "x = 9 ** 9 ** 9",
    "waiting child": "import subprocess\nsubprocess.run(['sleep', '60'])",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_code_gets_a_verdict_and_nothing_else(name, tmp_path):
    runner = CodeRunner(timeout=0.3, memory_mb=128)
    if not runner.available:
        pytest.skip("no room can be opened on this machine")
    target = tmp_path / "written"
    bank = ToolBank([runner])
    state = {"answer": ESCAPES[name].format(str(target)), "test_list": ["assert True"]}
    start = time.monotonic()
    observation = bank.call("code_run", "Same as the answer", state)
    assert time.monotonic() - start < 6
    assert observation.startswith("The pass rate is 0.0. All test cases failed.")
    assert runner.score(observation) == 0
    assert not target.exists()
    assert bank.counts == {"called": 1}


def test_code_reaches_no_network():
    runner = CodeRunner(timeout=1.0, memory_mb=128)
    if not runner.available:
        pytest.skip("no room can be opened on this machine")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert runner.run(connect, ["assert True"]).passed == (False,)
        with pytest.raises(TimeoutError):
            server.accept()
        socket.create_connection(("127.0.0.1", port), timeout=1).close()  # out here it can be reached
        server.accept()[0].close()


def test_files_written_in_a_room_stay_there(tmp_path):
    runner = CodeRunner(timeout=1.0, memory_mb=128)
    if not runner.available:
        pytest.skip("no room can be opened on this machine")
    name = f"themis-{os.getpid()}"
    code = f"import tempfile, os\nopen(os.path.join(tempfile.gettempdir(), {name!r}), 'w').write('x')"
    runner.run(code, ["assert True"])
    assert not os.path.exists(f"/tmp/{name}")


def test_children_of_an_answer_say_nothing_for_it():
    runner = CodeRunner(timeout=1.0, memory_mb=128)
    if not runner.available:
        pytest.skip("no room can be opened on this machine")
    forks = "import os\nif os.fork():\n    os.wait()\nelse:\n    raise ValueError('child')"
    assert runner.run(forks, ["assert True"]).passed == (True,)
    forks = "import os\nif os.fork():\n    os.wait()\n    raise ValueError('parent')"
    report = runner.run(forks, ["assert True"])
    assert (report.passed, report.reasons) == ((False,), ("parent",))


def test_dates_that_are_none():
    bank = ToolBank([Calendar()])
    assert bank.call("Calendar.week_day", "2023-02-30") == FAILED
    assert bank.call("Calendar.target_day", "2023-01-01, " + "9" * 5000) == FAILED
    assert bank.counts == {"called": 2, "failed": 2}


def test_a_model_without_rows_for_the_tokens():
    tokenizer = byte_tokenizer()
    base = tiny("llama", width=32, heads=2, vocab=len(tokenizer), seed=0)
    model = ThemisRewardModel(base)
    with pytest.raises(ValueError, match=r"lacks <start_tool>, .* adds them to both"):
        run_traces(model, tokenizer, ToolBank([]), [("q", "a")])
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    for call in (
        lambda: run_traces(model, tokenizer, ToolBank([]), [("q", "a")]),
        lambda: ToolBank([]).as_reward_fn(model, tokenizer),
    ):
        with pytest.raises(ValueError, match=r"ids up to 260 and the model 258 rows; .*adds rows"):
            call()


def test_padding_on_the_right_is_read_at_the_last_real_token(model, tokenizer):
    texts = ["Question: a\nAnswer: b</s>", "Question: what day is it?\nAnswer: Tuesday</s>"]
    tokenizer.padding_side = "right"
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert batch.attention_mask[0, -1] == 0
    alone = torch.cat([model(tokenizer(text, return_tensors="pt").input_ids).rewards for text in texts])
    assert torch.allclose(model(**batch).rewards, alone, atol=1e-5)
    assert torch.allclose(model.score(batch.input_ids, batch.attention_mask), alone, atol=1e-5)


def test_pairs_that_are_none(model, tokenizer):
    alone = {name: value for name, value in row().items() if name != "neg_answer"}
    with pytest.raises(ValueError, match="a row without 'neg_answer'"):
        ThemisCollator(tokenizer)([row(), alone])
    batch = ThemisCollator(tokenizer)([row()])
    with pytest.raises(ValueError, match="a batch of 1 holds no pairs"):
        model(**{name: value[:1] for name, value in batch.items()})


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ("qa", "pairs of question and answer, got 'qa'"),
        (("q", "a", "c"), "pairs of question and answer"),
        (("q", None), "answer must be a text, got NoneType"),
        ((3, "a"), "question must be a text, got int"),
    ],
)
def test_examples_that_are_none(model, tokenizer, example, message):
    with pytest.raises(TypeError, match=message):
        run_traces(model, tokenizer, ToolBank([]), [example])


def test_options_that_traces_need_for_themselves(model, tokenizer):
    with pytest.raises(ValueError, match="num_return_sequences, return_dict_in_generate cannot be set"):
        run_traces(
            model, tokenizer, ToolBank([]), [("q", "a")], num_return_sequences=2, return_dict_in_generate=True
        )


@pytest.mark.parametrize("bank", [[Calculator()], None, Calculator(), Calculator])
def test_banks_that_are_none(model, tokenizer, bank):
    kind = type(bank).__name__
    with pytest.raises(TypeError, match=rf"bank must be a ToolBank, got {kind}; ToolBank\(\["):
        model.judge(tokenizer, bank, [("q", "a")])
    with pytest.raises(TypeError, match="bank must be a ToolBank"):
        run_trace(model, tokenizer, bank, "q", "a")


def test_arguments_of_no_function(model, tokenizer):
    bank = ToolBank([Calculator()])
    for judging in (
        lambda **tracing: run_traces(model, tokenizer, bank, [("q", "a")], **tracing),
        lambda **tracing: bank.as_reward_fn(model, tokenizer, **tracing),
    ):
        with pytest.raises(TypeError, match="'max_round' is no argument .* did you mean 'max_rounds'"):
            judging(max_round=3)
        with pytest.raises(
            TypeError, match="'xyzzy' is no argument of run_traces, nor of .* LlamaForCausalLM; its own"
        ):
            judging(xyzzy=3)
        with pytest.raises(ValueError, match="must be at least 1, got 0, 256 and 16"):
            judging(max_rounds=0)
        with pytest.raises(ValueError, match="num_return_sequences cannot be set"):
            judging(num_return_sequences=2)
    known = {
        "temperature": 0.7,
        "do_sample": True,
        "logits_processor": [],
        "rationale": False,
        "reuse_cache": False,
    }
    reward = bank.as_reward_fn(model, tokenizer, max_rounds=1, max_new_tokens=2, batch_size=2, **known)
    assert len(reward(["q"], ["a"])) == 1


def test_tests_as_one_text():
    with pytest.raises(TypeError, match="a list of statements, got the text 'assert f"):
        Example("q", "a", test_list="assert f(1) == 1")
