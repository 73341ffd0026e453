"""The language model that also recalls."""

from __future__ import annotations

import pytest
import torch

from labkit.testbeds import language, retrieval, shipped
from labkit.testbeds.retrieval import RetrievalTask, accuracy
from labkit.testbeds.training import IGNORED, lm_loss


def test_tokenizer_names_the_recall_tokens_and_keeps_text() -> None:
    tokenizer = language.text_tokenizer()
    assert len(tokenizer) == language.VOCAB
    assert tokenizer("<key31><value0><filler31>")["input_ids"] == [39, 40, 103]
    text = "The :keyword:`with` statement, naïvely 漢字.\n"
    ids = tokenizer(text)["input_ids"]
    assert min(ids) >= retrieval.VOCAB
    assert tokenizer.decode(ids) == text


def test_filler_is_a_passage_of_the_text() -> None:
    stream = retrieval.VOCAB + torch.arange(300)
    for first in (False, True):
        task = RetrievalTask(5, 40, question_first=first)
        batch = task.batch(6, torch.Generator().manual_seed(0), questions=2, text=stream)
        assert (batch.filler.sum(1) == 40).all()
        passage = batch.context[batch.filler].view(6, 40)
        assert torch.equal(passage[:, 1:], passage[:, :-1] + 1)
        assert torch.equal(batch.context.gather(1, batch.needles[..., 1]), batch.answers)
        assert (batch.context[:, 0] == retrieval.BOS).all()
    with pytest.raises(ValueError, match="30 tokens, fewer than the 40"):
        task.batch(1, torch.Generator(), text=stream[:30])


def test_targets_are_the_next_text_token_and_the_asked_values() -> None:
    stream = retrieval.VOCAB + torch.arange(300)
    tokens, text, answers = language.training_batch(
        RetrievalTask(4, 30), 3, stream, torch.Generator().manual_seed(0), questions=2
    )
    row, column = (text != IGNORED).nonzero(as_tuple=True)
    assert len(row) == 90
    assert torch.equal(tokens[row, column + 1], text[row, column])
    row, column = (answers != IGNORED).nonzero(as_tuple=True)
    assert len(row) == 6
    assert torch.equal(tokens[row, column + 1], answers[row, column])


@pytest.mark.parametrize("seed", language.SHIPPED_SEEDS)
def test_shipped_models_recall_and_predict(seed: int) -> None:
    model, _ = language.language_model(seed)
    recipe = shipped.recipe(f"language-{seed}")
    _, held_out = language.streams()
    assert accuracy(model, language.TASK, prompts=96, batch=32, text=held_out) >= 0.95
    # The text differs between Python versions, so the loss may too.
    assert lm_loss(model, held_out, length=512, rows=8) == pytest.approx(recipe["loss"], abs=0.35)


def test_training_starts_from_the_retrieval_model() -> None:
    start, source = language.untrained(1), retrieval.load(1)
    assert torch.equal(start.model.embed_tokens.weight[: retrieval.VOCAB], source.model.embed_tokens.weight)
    assert torch.equal(
        start.model.layers[0].self_attn.q_proj.weight, source.model.layers[0].self_attn.q_proj.weight
    )
    assert start.lm_head.weight.data_ptr() == start.model.embed_tokens.weight.data_ptr()


def test_other_seeds_are_trained_once(own_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stand_in(seed, **settings):
        calls.append(seed)
        return language.untrained(0), None

    monkeypatch.setattr(language, "train_language_model", stand_in)
    first, _ = language.language_model(7)
    second, _ = language.language_model(7)
    assert calls == [7]
    assert torch.equal(first.model.embed_tokens.weight, second.model.embed_tokens.weight)


@pytest.mark.slow
def test_recipe_reaches_its_metrics_again() -> None:
    model, log = language.train_language_model(100)
    _, held_out = language.streams()
    assert log.steps == 650
    assert accuracy(model, language.TASK, prompts=256, batch=32, text=held_out) >= 0.95
    assert lm_loss(model, held_out, length=512) < 4.1
