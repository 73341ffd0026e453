"""The loop of generation, tools and judgement, with a model that writes what it is told."""

import types

import pytest
import torch
from torch import nn

from labkit.rlhf import (
    Calendar,
    Step,
    ThemisCollator,
    ThemisRewardModel,
    ToolBank,
    run_trace,
    run_traces,
)
from labkit.rlhf.themis import FAILED
from labkit.rlhf.themis.traces import Example, token_ids
from labkit.testbeds import tool_questions

from .conftest import byte_tokenizer


class Scripted(nn.Module):
    """Continues a text by the script of its question, one piece a round; scores by the length of what it reads."""

    def __init__(self, tokenizer, scripts):
        super().__init__()
        self.tokenizer, self.scripts = tokenizer, scripts
        self.anchor = nn.Parameter(torch.zeros(1))
        self.pooling = "last"
        self.rounds: list[int] = []
        self.read: list[list[int]] = []

    @property
    def device(self):
        return self.anchor.device

    def generate(self, input_ids, attention_mask, eos_token_id, pad_token_id, **options):
        self.rounds.append(len(input_ids))
        out = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            self.read.append(ids[mask.bool()].tolist())
            text = self.tokenizer.decode(ids[mask.bool()])
            question = text.partition("Question: ")[2].partition("\n")[0]
            said = self.scripts[question][text.count("<start_observation>") + text.endswith("<start_work>")]
            out.append(self.tokenizer(said, add_special_tokens=False).input_ids)
        width = max(map(len, out))
        padded = [ids + [pad_token_id] * (width - len(ids)) for ids in out]
        return types.SimpleNamespace(sequences=torch.cat([input_ids, torch.tensor(padded)], 1))

    check_tokenizer = staticmethod(token_ids)

    def score(self, input_ids, attention_mask, past_key_values=None):
        return attention_mask.sum(1).float()

    def judge(self, tokenizer, bank, examples, **tracing):
        return run_traces(self, tokenizer, bank, examples, **tracing)


CALL = " Thought: look\nAction: Calendar.week_day\nAction Input: 2015-03-24\n<start_observation>"
SCRIPTS = {
    "one call": [CALL, "<start_work> Work: It is Tuesday.</s>"],
    "two calls": [
        " Thought: add\nAction: Calendar.target_day\nAction Input: 2015-03-20, 4\n<start_observation> Observation: made up",
        "<start_tool>" + CALL,
        "<start_work> Work: Done.</s>",
    ],
    "no call": [" Thought: Do I need to use a tool? No\nFinished.</s>", " Work: Plain.</s>"],
    "at once": ["<start_work> Work: Sure.</s>"],
    "nonsense": [" Thought: hm hm hm"],
    "unknown": [
        "Thought: x\nAction: Crystal ball\nAction Input: all\n<start_observation>",
        "<start_work> Work: ?</s>",
    ],
    "failing": [CALL.replace("2015-03-24", "2015-02-30"), "<start_work> Work: No result.</s>"],
    "endless": [*[CALL] * 3, "", " Work: Enough.</s>"],
}


@pytest.fixture
def setting():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<start_tool>", "<start_observation>", "<start_work>"], special_tokens=True)
    return Scripted(tokenizer, SCRIPTS), tokenizer, ToolBank([Calendar()])


def judge(setting, question, **options):
    model, tokenizer, bank = setting
    return run_trace(model, tokenizer, bank, question, "Tuesday", **options)


def test_one_call(setting):
    trace = judge(setting, "one call")
    assert trace.steps == (Step("look", "Calendar.week_day", "2015-03-24", "Tuesday"),)
    assert trace.rationale == "It is Tuesday."
    assert trace.finished == "work"
    assert trace.text == (
        "### USER:\nQuestion: one call\nAnswer: Tuesday\n### ASSISTANT:\n<start_tool> Thought: look\n"
        "Action: Calendar.week_day\nAction Input: 2015-03-24\n<start_observation> Observation: Tuesday\n"
        "<start_work> Work: It is Tuesday."
    )
    assert trace.reward == len(setting[1](trace.text + "</s>").input_ids)


@pytest.mark.parametrize("question", ["one call", "two calls", "no call"])
def test_generation_begins_between_tokens_of_the_training_text(question):
    """Else a model that was trained on whole texts is asked to go on from where it never was."""
    texts = [
        f"### USER:\nQuestion: {question}\nAnswer: Tuesday\n### ASSISTANT:\n Observation: Friday 2015-03-24"
    ]
    tokenizer = tool_questions.word_tokenizer(
        texts + [piece for script in SCRIPTS.values() for piece in script]
    )
    tokenizer.add_tokens(["<start_tool>", "<start_observation>", "<start_work>"], special_tokens=True)
    setting = Scripted(tokenizer, SCRIPTS), tokenizer, ToolBank([Calendar()])
    trace = judge(setting, question)
    sides = {"answer": "Tuesday", "actions": trace.steps, "rationale": trace.rationale}
    trained, _, _ = ThemisCollator(tokenizer).encode(
        {"question": question, "pos_answer": sides}, "pos_answer"
    )
    assert tokenizer.unk_token_id not in trained
    assert tokenizer(trace.text)["input_ids"] + [tokenizer.eos_token_id] == trained
    assert len(setting[0].read) == len(SCRIPTS[question])
    for ids in setting[0].read:
        assert ids == trained[: len(ids)]


def test_what_the_model_says_it_sees_is_not_believed(setting):
    trace = judge(setting, "two calls")
    assert [step.observation for step in trace.steps] == ["2015-03-24", "Tuesday"]
    assert "made up" not in trace.text


@pytest.mark.parametrize(
    ("question", "finished", "rationale", "observations"),
    [
        ("no call", "work", "Plain.", [""]),
        ("at once", "work", "Sure.", []),
        ("nonsense", "malformed", None, []),
        ("unknown", "work", "?", ["There is no tool 'Crystal ball'."]),
        ("failing", "work", "No result.", [FAILED]),
        ("endless", "work", "Enough.", ["Tuesday"] * 3),
    ],
)
def test_ends(setting, question, finished, rationale, observations):
    trace = judge(setting, question)
    assert (trace.finished, trace.rationale) == (finished, rationale)
    assert len(trace.steps) == len(observations)
    for step, expected in zip(trace.steps, observations, strict=True):
        assert step.observation.startswith(expected)
    counts = setting[2].counts
    assert counts["malformed"] == (question == "nonsense")
    assert counts["unknown"] == (question == "unknown")
    assert counts["failed"] == (question == "failing")


def test_many_at_a_time_are_as_one_by_one(setting):
    examples = [Example(question, "Tuesday") for question in SCRIPTS]
    together = run_traces(*setting, examples, batch_size=5)
    assert together == [judge(setting, question) for question in SCRIPTS]
    # Rounds shrink with the traces that have ended.
    assert setting[0].rounds[:4] == [5, 3, 1, 3]


def test_rounds_are_a_limit(setting):
    trace = judge(setting, "endless", max_rounds=3)
    assert len(trace.steps) == 3
    without = judge(setting, "endless", max_rounds=3, rationale=False)
    assert (len(without.steps), without.finished, without.rationale) == (3, "rounds", None)


def test_as_a_reward_of_trl(setting):
    model, tokenizer, bank = setting
    reward = bank.as_reward_fn(model, tokenizer, max_rounds=2)
    prompts = [[{"role": "user", "content": "one call"}], [{"role": "user", "content": "at once"}]]
    completions = [[{"role": "assistant", "content": "Tuesday"}]] * 2
    found = reward(prompts=prompts, completions=completions, trainer_state=None)
    assert found == [judge(setting, "one call").reward, judge(setting, "at once").reward]
    assert reward.__name__ == "themis_reward"


def test_misuse(setting):
    model, tokenizer, bank = setting
    with pytest.raises(ValueError, match="must be at least 1"):
        run_traces(model, tokenizer, bank, [("q", "a")], max_rounds=0)
    with pytest.raises(ValueError, match="from_causal_lm"):
        run_traces(model, byte_tokenizer(), bank, [("q", "a")])


def test_with_a_real_model(model, tokenizer):
    """Untrained it writes nonsense; the loop must end, and the reward be the model's own."""
    assert isinstance(model, ThemisRewardModel)
    bank = ToolBank([Calendar()])
    traces = run_traces(
        model, tokenizer, bank, [("a?", "b"), ("What day is it?", "Tuesday")], max_new_tokens=12
    )
    for trace in traces:
        ids = tokenizer(trace.text + "</s>", return_tensors="pt", add_special_tokens=False).input_ids
        assert trace.reward == pytest.approx(model(ids).rewards.item(), abs=1e-5)
