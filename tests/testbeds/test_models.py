"""Tiny models: real classes, sane defaults, clear refusals."""

from __future__ import annotations

import pytest
import torch

from labkit.testbeds.models import FAMILIES, tiny, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_forward_and_backward(family: str) -> None:
    model = tiny(family, width=32, layers=2, heads=2, vocab=40, seed=0)
    assert model.config.model_type == family
    assert type(model).__module__.startswith("transformers.models.")
    tokens = torch.randint(1, 40, (2, 11))
    logits = model(input_ids=tokens, labels=tokens).logits
    assert logits.shape == (2, 11, 40)
    model(input_ids=tokens, labels=tokens).loss.backward()
    grown = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not grown


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "roberta"])
def test_every_generator_generates(family: str) -> None:
    model = tiny(family, width=32, layers=1, heads=2, vocab=40, seed=0).eval()
    made = model.generate(input_ids=torch.randint(1, 40, (1, 5)), max_new_tokens=3, do_sample=False)
    assert made.shape[1] == (4 if family == "t5" else 8)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "t5"])
def test_auto_init_follows_the_width(family: str) -> None:
    for width in (32, 128):
        model = tiny(family, width=width, layers=1, heads=2, vocab=300, seed=0, tie_word_embeddings=False)
        spread = model.get_input_embeddings().weight.std().item()
        assert spread == pytest.approx(0.35 / width**0.5, rel=0.1)
    assert tiny_config(family, init=0.02).initializer_range == 0.02


def test_first_loss_is_that_of_guessing() -> None:
    for family in ("llama", "gpt_neox", "roberta", "mixtral"):
        tokens = torch.randint(1, 256, (4, 32), generator=torch.Generator().manual_seed(0))
        model = tiny(family, seed=0)
        loss = model(input_ids=tokens, labels=tokens).loss.item()
        assert loss == pytest.approx(5.55, abs=0.6), family


def test_seed_decides_the_weights_and_leaves_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = tiny(seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.model.embed_tokens.weight, tiny(seed=3).model.embed_tokens.weight)
    assert not torch.equal(first.model.embed_tokens.weight, tiny(seed=4).model.embed_tokens.weight)


def test_grouped_heads_share_keys() -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3", "mixtral"):
        attention = tiny(family, width=64, heads=4, kv_heads=2).model.layers[0].self_attn
        assert attention.k_proj.out_features == 32, family
        assert attention.q_proj.out_features == 64, family


def test_no_special_token_points_beyond_the_vocabulary() -> None:
    for family in FAMILIES:
        config = tiny_config(family, vocab=10)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name)
            assert value is None or value < 10, (family, name)


def test_rope_theta_reaches_the_frequencies() -> None:
    slow, fast = (tiny("llama", rope_theta=theta).model.rotary_emb.inv_freq for theta in (10000.0, 100.0))
    assert fast[-1] > slow[-1]
    assert tiny_config("gpt_neox", rope_theta=100).rope_parameters["partial_rotary_factor"] == 1.0


def test_eager_attention_returns_maps() -> None:
    model = tiny("llama", attention="eager", seed=0).eval()
    maps = model(input_ids=torch.arange(6)[None], output_attentions=True).attentions
    assert len(maps) == 2
    assert torch.allclose(maps[0].sum(-1), torch.ones(1, 4, 6), atol=1e-5)


def test_other_heads() -> None:
    reward = tiny("llama", head="classification", num_labels=1, pad_token_id=0)
    assert reward(input_ids=torch.tensor([[3, 4, 5]])).logits.shape == (1, 1)
    assert tiny("roberta", head="base")(input_ids=torch.tensor([[3, 4]])).last_hidden_state.shape == (
        1,
        2,
        64,
    )


def test_saved_and_loaded_model_is_the_same(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("qwen3", seed=1).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.arange(8)[None]
    assert torch.equal(model(tokens).logits, again(tokens).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "lama"}, "did you mean 'llama'.*Allowed: llama, mistral"),
        ({"width": 30}, r"width \(30\) must be a multiple of heads \(4\)"),
        ({"kv_heads": 3}, r"kv_heads \(3\) must divide heads \(4\)"),
        ({"family": "gpt_neox", "kv_heads": 2}, "no grouped heads"),
        ({"layers": 0}, "layers must be a positive whole number"),
        ({"vocab": 2.5}, "vocab must be a positive whole number"),
        ({"init": "small"}, "init must be"),
        ({"init": -1.0}, "init must be"),
        ({"intermediate_sise": 7}, "did you mean 'intermediate_size'"),
        ({"pad_token_id": 256}, "pad_token_id=256 must be None or lie in 0..255"),
        ({"family": "t5", "rope_theta": 100}, "no rotary positions"),
        ({"attention": "eagre"}, "did you mean 'eager'"),
        ({"head": "lmm"}, "did you mean 'lm'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)
