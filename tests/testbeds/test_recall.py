"""Recall worlds: the tiny model's, and text needles on a checkpoint from a folder."""

from __future__ import annotations

import pytest
import torch

from labkit.testbeds import corpus, models, recall, tokenizers


def test_the_tiny_world_is_answered_by_its_own_model():
    world = recall.load("retrieval", seed=0, prompts=64)
    with torch.no_grad():
        guess = world.model(input_ids=world.asked).logits[:, -1].argmax(-1)
    assert (guess == world.answer[:, 0]).float().mean() > 0.9
    rows = torch.arange(64)
    assert torch.equal(world.context[rows, world.needle[:, 1] - 1], world.answer[:, 0])


def test_the_language_world_holds_facts_in_text_that_its_model_predicts():
    world = recall.load("language", seed=0, prompts=16)
    assert world.context.shape == (16, 512)
    with torch.no_grad():
        logits = world.model(input_ids=world.asked).logits
    assert (logits[:, -1].argmax(-1) == world.answer[:, 0]).float().mean() > 0.9
    text = world.is_text[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :511][text], world.context[:, 1:][text])
    assert loss < 4.2  # nats; a uniform guess among its 512 text tokens has 6.2
    assert not world.is_text.gather(1, world.needle[:, :1]).any()


def test_text_needles_on_a_checkpoint_from_a_folder(tmp_path):
    tokenizer = tokenizers.byte_tokenizer()
    model = models.tiny("llama", width=32, layers=1, heads=2, vocab=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    world = recall.load(str(tmp_path), seed=3, prompts=5, length=700, facts=8)
    assert world.context.shape[1] == 700
    for row in range(len(world.context)):
        begin, end = world.needle[row].tolist()
        needle = tokenizer.decode(world.context[row, begin:end])
        question = tokenizer.decode(world.question[row])
        answer = tokenizer.decode(world.answer[row])
        assert needle.strip() == f"{question.strip()}{answer}."
        assert answer.strip().isdigit()
    again = recall.load(str(tmp_path), seed=3, prompts=5, length=700, facts=8)
    assert torch.equal(world.context, again.context)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="facts=99 must lie in 1..32"):
        recall.load(facts=99)
    with pytest.raises(ValueError, match="leave length out"):
        recall.load("retrieval", length=4096)
    tokenizer = tokenizers.byte_tokenizer()
    models.tiny("llama", width=32, layers=1, heads=2, vocab=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not hold 32 facts"):
        recall.load(str(tmp_path), length=100, facts=32, prompts=1)


def test_no_word_begins_another():
    assert not [(a, b) for a in recall.WORDS for b in recall.WORDS if a != b and b.startswith(a)]
    assert len(set(recall.WORDS)) == 32
    assert corpus.stdlib_text("docs", max_bytes=1000)
