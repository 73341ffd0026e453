"""Stages of a trace: their texts, their rewards, and the figures."""

from __future__ import annotations

import itertools

import pytest
import torch

from labkit.rlhf import ThemisRewardModel, Trace
from labkit.rlhf.themis.plots import STAGES, pairs_figure, stage_rewards, stage_texts, stages_figure
from labkit.testbeds.language import text_tokenizer
from labkit.testbeds.models import tiny

HEAD = "### USER:\nQuestion: q\nAnswer: a\n### ASSISTANT:\n"
CALL = "<start_tool> Thought: t\nAction: x\nAction Input: 1\n"
HEARD = "<start_observation> Observation: 4\n"
WORK = "<start_work> Work: so"


def test_texts_of_the_stages():
    trace = Trace(text=HEAD + CALL + HEARD + WORK)
    assert stage_texts(trace) == [HEAD, HEAD + CALL, HEAD + CALL + HEARD, HEAD + CALL + HEARD + WORK]


def test_with_two_calls_the_last_observation_counts():
    trace = Trace(text=HEAD + CALL + HEARD + CALL + HEARD + WORK)
    assert stage_texts(trace)[1] == HEAD + CALL + HEARD + CALL


@pytest.mark.parametrize("text", [HEAD, HEAD + CALL, HEAD + CALL + HEARD, HEAD + "<start_tool> No\n" + WORK])
def test_missing_stages_add_nothing(text):
    stages = stage_texts(Trace(text=text))
    assert stages[-1] == text
    assert all(after.startswith(before) for before, after in itertools.pairwise(stages))


def test_rewards_are_those_of_the_texts_one_by_one():
    tokenizer = text_tokenizer()
    model = ThemisRewardModel.from_causal_lm(tiny("llama", vocab=len(tokenizer)), tokenizer).eval()
    traces = [Trace(text=HEAD + CALL + HEARD + WORK), Trace(text=HEAD + CALL)]
    found = stage_rewards(model, tokenizer, traces, batch_size=3)
    assert found.shape == (2, len(STAGES))
    for trace, row in zip(traces, found, strict=True):
        for text, value in zip(stage_texts(trace), row, strict=True):
            ids = tokenizer(
                text + (tokenizer.eos_token or ""), return_tensors="pt", add_special_tokens=False
            )["input_ids"]
            with torch.no_grad():
                assert float(model(ids).rewards[0]) == pytest.approx(float(value), abs=1e-4)


def test_figures_say_what_is_wrong():
    with pytest.raises(ValueError, match="1 rewards of better and 2"):
        pairs_figure([1.0], [1.0, 2.0], "?")
    with pytest.raises(ValueError, match="3 rewards; there are 4 stages"):
        stages_figure([1.0] * 4, [1.0] * 3)
    assert "50%" in pairs_figure([1.0, 0.0], [0.0, 1.0], "?").layout.title.text
