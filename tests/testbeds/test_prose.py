"""The many-headed language model, and worlds of text."""

from __future__ import annotations

import pytest
import torch

from labkit.testbeds import prose, shipped


@pytest.mark.parametrize("seed", prose.SHIPPED_SEEDS)
def test_shipped_models_meet_their_metric(seed: int) -> None:
    model = prose.prose_model(seed)
    assert model.config.num_key_value_heads == model.config.num_attention_heads == 8
    # The text differs between Python versions, so the loss may too.
    assert prose.held_out_loss(model) == pytest.approx(shipped.recipe(f"prose-{seed}")["loss"], abs=0.35)


def test_training_takes_the_recipe_s_path() -> None:
    # The whole recipe takes over a minute; its first twentieth must be on the way there.
    model, log = prose.train_prose_model(0, steps=80)
    assert log.tokens == 80 * 16 * 64
    assert len(log.losses) == 80
    assert prose.held_out_loss(prose.untrained(0)) > 6.2 > 5.4 > prose.held_out_loss(model)


def test_other_seeds_are_trained_once(own_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stand_in(seed, **settings):
        calls.append(seed)
        return prose.untrained(5), None

    monkeypatch.setattr(prose, "train_prose_model", stand_in)
    first, second = prose.prose_model(7), prose.prose_model(7)
    assert calls == [7]
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    prose.world(seed=8, train=False)
    assert calls == [7]


def test_a_world_gives_one_order_of_batches_and_keeps_the_mode() -> None:
    made = prose.world(seed=0)
    first, second = (next(made.batches(3, seed=4)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])
    made.model.train()
    assert made.loss(rows=4) > 0
    assert made.model.training


def test_a_world_of_a_checkpoint(tmp_path) -> None:
    from labkit.testbeds import language, models

    model = models.tiny("llama", width=32, layers=1, heads=2, vocab=language.VOCAB)
    model.save_pretrained(tmp_path)
    language.text_tokenizer().save_pretrained(tmp_path)
    made = prose.world(str(tmp_path), length=32)
    assert next(made.batches(2))[0].shape == (2, 32)
    assert made.loss(rows=4) == pytest.approx(made.loss(model.eval(), rows=4))
