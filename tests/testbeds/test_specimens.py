"""The shipped specimens are what their recipes say, and can be trained again."""

import pytest
import torch

from labkit.moe import ExpertAtlas
from labkit.testbeds import shipped, specimens
from labkit.testbeds.language import streams
from labkit.testbeds.training import lm_loss


@pytest.mark.parametrize("seed", specimens.SHIPPED_SEEDS)
@pytest.mark.parametrize("kind", specimens.KINDS)
def test_shipped_weights_reach_the_loss_of_their_recipe(kind, seed):
    recipe = shipped.recipe(f"specimen-{kind}-{seed}")
    assert recipe["steps"] == (800 if kind == "scratch" else 400)
    found = lm_loss(specimens.specimen(kind, seed), streams()[1], length=64)
    assert found == pytest.approx(recipe["held_out_loss"], abs=0.05)  # float16, and this Python's own text
    assert (shipped.FOLDER / f"specimen-{kind}-{seed}.safetensors").stat().st_size < 1_000_000


def test_fresh_copies_are_the_dense_model():
    dense = specimens.specimen("dense")
    mixture = specimens.copied_experts(dense)
    tokens = streams()[1][None, :64]
    with torch.no_grad():
        torch.testing.assert_close(mixture.eval()(tokens).logits, dense(tokens).logits, atol=1e-4, rtol=1e-4)
    assert ExpertAtlas(mixture, dense).weight_similarity(0, "up").loc[3, "dense"] == pytest.approx(1)


@pytest.mark.slow
def test_training_again_meets_the_loss_of_the_recipe():
    """Dense and upcycled as shipped, and a from-scratch one that has learned as much in as few steps."""
    dense, of_dense = specimens.train_specimen("dense", 1)
    recipe = shipped.recipe("specimen-dense-1")
    assert of_dense.evaluations[-1][1] == pytest.approx(recipe["held_out_loss"], abs=0.08)
    mixture, of_mixture = specimens.train_specimen("upcycled", 1, start=dense)
    assert of_mixture.losses[0] == pytest.approx(of_dense.final(), abs=0.3)
    recipe = shipped.recipe("specimen-upcycled-1")
    assert of_mixture.evaluations[-1][1] == pytest.approx(recipe["held_out_loss"], abs=0.08)
    atlas = ExpertAtlas(mixture, dense)
    table = atlas.summary([0, 3], method="exact")
    assert table.tau.min() > 0.99
    assert 0.7 < table.similarity.min() < table.to_dense.min()


def test_the_cache_holds_other_seeds(monkeypatch, tmp_path):
    calls = []

    def instead(kind, seed, **settings):
        calls.append((kind, seed))
        return specimens.untrained(kind, seed), None

    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(specimens, "train_specimen", instead)
    one, again = specimens.specimen("upcycled", 77), specimens.specimen("upcycled", 77)
    assert calls == [("dense", 77), ("upcycled", 77)]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    stand_in, shipped_one = (
        specimens.specimen("scratch", 77, train=False),
        specimens.specimen("scratch", 77 % 3),
    )
    assert torch.equal(next(stand_in.parameters()), next(shipped_one.parameters()))
    assert len(calls) == 2


def test_pairs_and_what_is_refused():
    pair = specimens.load_pair(seed=1, tokens=300)
    assert pair.tokens["upcycled"].shape == (2, 128)
    assert not torch.equal(
        pair.tokens["upcycled"], specimens.load_pair(seed=2, tokens=300).tokens["upcycled"]
    )
    with pytest.raises(ValueError, match="unknown kind 'upcycle'; did you mean 'upcycled'"):
        specimens.specimen("upcycle")
    with pytest.raises(ValueError, match="unknown source 'shiped'"):
        specimens.load_pair("shiped")
    with pytest.raises(ValueError, match="at least 128, one row; got 100"):
        specimens.load_pair(tokens=100)


def test_balance_is_part_of_the_loss():
    model = specimens.untrained("scratch", 0, layers=1)
    tokens = streams()[0][:65]
    total, text = specimens.balanced_loss(model, (tokens[None, :-1], tokens[None, 1:]))
    assert 0.005 < float(total) - text < 0.1
    total.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0
