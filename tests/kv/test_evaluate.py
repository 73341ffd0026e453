"""Answers and losses after an eviction agree with a plain forward where nothing is evicted, and with generate."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from labkit.kv import (
    FullCache,
    GreedyEviction,
    NACLPress,
    StreamingLLMPress,
    answers,
    cache_bytes,
    continuation_loss,
    decode_logits,
)
from labkit.testbeds import models, retrieval


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", width=32, layers=2, heads=4, kv_heads=2, vocab=80, seed=3).eval()


@pytest.fixture
def tokens():
    return torch.randint(1, 80, (3, 40), generator=torch.Generator().manual_seed(1))


def test_full_cache_loss_is_the_loss_of_a_plain_forward(model, tokens):
    loss, size = continuation_loss(model, FullCache(), tokens[:, :30], tokens[:, 30:])
    logits = model(input_ids=tokens).logits[:, 30:-1].float()
    expected = F.cross_entropy(logits.transpose(1, 2), tokens[:, 31:], reduction="none")
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    assert size == 2 * 2 * 3 * 2 * 39 * 8 * 4  # layers, K and V, rows, KV heads, tokens, width, bytes


@pytest.mark.parametrize("press", [NACLPress(budget_tokens=12), GreedyEviction("h2o", budget_tokens=12)])
def test_answers_are_those_of_generate(model, tokens, press):
    with press(model):
        out = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)[
            :, 40:
        ]
    # The first new token comes out of the prefill; fed as a question, the rest must follow.
    assert answers(model, press, tokens, out[:, :1], out[:, 1:]).all()
    wrong = out[:, 1:].clone()
    wrong[0, -1] = (wrong[0, -1] + 1) % 80
    assert answers(model, press, tokens, out[:, :1], wrong).tolist() == [False, True, True]


def test_left_padding_does_not_change_the_answer(model, tokens):
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens[:1, :20]], dim=1)
    mask = (torch.arange(25) >= 5)[None].long()
    press = NACLPress(compression_ratio=0.5, seed=2)
    alone = [logits for logits, _ in decode_logits(model, press, tokens[:1, :20], tokens[:1, 20:24])]
    beside = [
        logits for logits, _ in decode_logits(model, press, padded, tokens[:1, 20:24], attention_mask=mask)
    ]
    torch.testing.assert_close(torch.stack(alone), torch.stack(beside), atol=1e-4, rtol=1e-3)


def test_a_trained_model_forgets_what_streaming_evicts_and_keeps_what_nacl_keeps():
    model = retrieval.load(0)
    batch = retrieval.RetrievalTask().batch(48, torch.Generator().manual_seed(4))
    arguments = (batch.tokens, batch.questions[:, 0], batch.answer)
    full = answers(model, FullCache(), *arguments).float().mean()
    nacl = (
        answers(model, NACLPress(0.8, proxy_tokens=4, random_share=0.5, sink=1, recent=1), *arguments)
        .float()
        .mean()
    )
    streaming = answers(model, StreamingLLMPress(0.8), *arguments).float().mean()
    assert full > 0.95
    assert nacl > 0.85
    assert streaming < 0.5


def test_bad_input(model, tokens):
    with pytest.raises(ValueError, match=r"\(B, T\) with the same B"):
        answers(model, FullCache(), tokens, tokens[:1], tokens[:, 0])
    with pytest.raises(ValueError, match="at least 2 tokens"):
        continuation_loss(model, FullCache(), tokens, tokens[:, :1])
    with pytest.raises(RuntimeError, match=r"model.eval\(\)"):
        answers(model.train(), FullCache(), tokens, tokens, tokens[:, 0])
    model.eval()
    assert cache_bytes(model(tokens).past_key_values) > 0
