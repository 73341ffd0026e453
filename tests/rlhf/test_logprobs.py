"""Log-probabilities, entropy and rank against the whole logits of real transformers classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)

from labkit.rlhf import left_pad, sequence_stats, token_logprobs
from labkit.rlhf.logprobs import LinearHead, anatomy, model_inputs
from labkit.testbeds.models import tiny

SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    special: dict[str, Any] = {
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=0.5)),
        "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=3.0)),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=0.2)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=32, n_layer=2, n_head=2)),
    }
    make = special.get(name)
    return (make() if make else tiny(name, width=32, heads=2, vocab=37, seed=0)).eval()


def rows() -> tuple[torch.Tensor, ...]:
    prompt, prompt_mask = left_pad([[3, 4, 5, 6], [7], [8, 9]])
    tokens = torch.tensor([[10, 11, 12, 13, 14], [15, 2, 0, 0, 0], [16, 17, 18, 2, 0]])
    mask = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    return prompt, prompt_mask, tokens, mask


FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "mixtral",
    "gpt_neox",
    "gpt2",
    "gemma2",
    "cohere",
    "granite",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_rows_are_what_the_model_says_of_each_alone(name: str) -> None:
    model = model_of(name)
    assert not isinstance(anatomy(model).head, nn.Identity)
    prompt, prompt_mask, tokens, mask = rows()
    with torch.no_grad():
        found = sequence_stats(model, prompt, prompt_mask, tokens, mask, temperature=0.7)
        for row in range(3):
            own_prompt, own = prompt[row, prompt_mask[row]], tokens[row, mask[row]]
            logits = (
                model(torch.cat([own_prompt, own])[None]).logits[0, len(own_prompt) - 1 : -1].float() / 0.7
            )
            logp = logits.log_softmax(-1)
            place = torch.arange(len(own))
            torch.testing.assert_close(found.logprobs[row, mask[row]], logp[place, own], atol=2e-5, rtol=1e-4)
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            torch.testing.assert_close(found.entropy[row, mask[row]], entropy, atol=2e-5, rtol=1e-4)
            order = logits.argsort(-1, descending=True)
            rank = (order == own[:, None]).nonzero()[:, 1]
            assert found.ranks[row, mask[row]].tolist() == rank.tolist()
    assert not found.logprobs[~mask].any()
    assert not found.entropy[~mask].any()


@pytest.mark.parametrize("name", ["gemma2", "recurrent_gemma", "xlstm"])
def test_soft_caps_are_known_before_they_show(name: str) -> None:
    torch.manual_seed(0)
    if name == "gemma2":
        model: Any = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16)).eval()
    elif name == "xlstm":
        shape = {"vocab_size": 37, "hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2}
        model = xLSTMForCausalLM(xLSTMConfig(**shape, mode="inference")).eval()
    else:
        model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SMALL, lru_width=32)).eval()
    parts = anatomy(model)  # of a new model, whose logits are far below the cap
    assert isinstance(parts.head, LinearHead)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2000)
        wanted = model(ids, use_cache=False).logits
        found = parts.head(parts.body(**model_inputs(model, ids, torch.ones_like(ids))))
    assert wanted.abs().max() > 25
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("chunk", [1, 37 * 3, 1 << 20])
def test_chunks_change_neither_numbers_nor_gradients(chunk: int) -> None:
    model = model_of("llama")
    prompt, prompt_mask, tokens, mask = rows()
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    for way in ("ours", "theirs"):
        model.zero_grad()
        if way == "ours":
            found = sequence_stats(
                model, prompt, prompt_mask, tokens, mask, 0.7, chunk=chunk, entropy_grad=True
            )
            logprobs, entropy = found.logprobs, found.entropy
        else:
            ids, attend = torch.cat([prompt, tokens], 1), torch.cat([prompt_mask, mask], 1).long()
            positions = (attend.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=attend, position_ids=positions).logits[:, 3:-1] / 0.7
            logp = logits.log_softmax(-1)
            logprobs = logp.gather(2, tokens[..., None])[..., 0] * mask
            entropy = -(logp.exp() * logp).sum(-1) * mask
        (weights * (logprobs + 0.3 * entropy)).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if way == "ours":
            ours, mine = (logprobs.detach(), entropy.detach()), grads
    torch.testing.assert_close(ours[0], logprobs.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], entropy.detach(), atol=1e-5, rtol=1e-5)
    assert mine.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(mine[name], grad, atol=1e-5, rtol=1e-4)


def test_no_logits_of_the_whole_batch_are_made() -> None:
    seen = []

    class Head(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x) * self.out_features)
            return super().forward(x)

    head = Head(8, 100)
    hidden = torch.randn(64, 8, requires_grad=True)
    found = token_logprobs(hidden, head, torch.randint(0, 100, (64,)), chunk=1000)
    found.logprobs.sum().backward()
    assert max(seen) <= 1000
    assert len(seen) == 14  # seven chunks, each again for the backward pass
    assert not found.entropy.requires_grad


def test_a_layer_that_others_watch_is_called() -> None:
    head = nn.Linear(8, 30)
    hidden, tokens = torch.randn(6, 8), torch.randint(0, 30, (6,))
    plain = token_logprobs(hidden, head, tokens, 0.7)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    watched = token_logprobs(hidden, head, tokens, 0.7)
    assert calls
    torch.testing.assert_close(plain.logprobs, watched.logprobs)
    torch.testing.assert_close(plain.entropy, watched.entropy)
    assert torch.equal(plain.ranks, watched.ranks)


def test_the_place_of_the_padding_does_not_matter() -> None:
    model = model_of("llama")
    prompt, prompt_mask, tokens, mask = rows()
    wide = nn.functional.pad(prompt, (5, 0), value=9), nn.functional.pad(prompt_mask, (5, 0))
    long = nn.functional.pad(tokens, (0, 3), value=9), nn.functional.pad(mask, (0, 3))
    with torch.no_grad():
        found = sequence_stats(model, prompt, prompt_mask, tokens, mask)
        again = sequence_stats(model, *wide, *long)
        for row in range(3):
            alone = sequence_stats(model, *(x[row : row + 1] for x in (prompt, prompt_mask, tokens, mask)))
            torch.testing.assert_close(alone.logprobs[0], found.logprobs[row], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.logprobs[:, :5], found.logprobs, atol=1e-5, rtol=1e-5)
    assert not again.logprobs[:, 5:].any()


def test_hidden_states_are_those_before_and_after_each_token() -> None:
    model = model_of("gpt_neox")
    prompt, prompt_mask, tokens, mask = rows()
    with torch.no_grad():
        found = sequence_stats(model, prompt, prompt_mask, tokens, mask, return_hidden=True)
        own = model(
            torch.cat([prompt[2, prompt_mask[2]], tokens[2, mask[2]]])[None], output_hidden_states=True
        ).hidden_states[-1][0]
    assert found.hidden is not None
    assert found.hidden.shape == (3, 6, 32)
    torch.testing.assert_close(found.hidden[2, :5], own[1:], atol=1e-5, rtol=1e-4)


def test_forbidden_tokens_have_no_entropy() -> None:
    head = nn.Linear(2, 3)
    with torch.no_grad():
        head.bias[1] = -torch.inf
    hidden = torch.randn(4, 2, requires_grad=True)
    found = token_logprobs(hidden, head, torch.zeros(4, dtype=torch.long), entropy_grad=True)
    allowed = head(hidden.detach())[:, [0, 2]]
    torch.testing.assert_close(found.entropy, torch.distributions.Categorical(logits=allowed).entropy())
    found.entropy.sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_adapters_and_prompt_tuning_go_their_own_way() -> None:
    peft = pytest.importorskip("peft")
    prompt, prompt_mask, tokens, mask = rows()
    lora = peft.get_peft_model(
        model_of("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    ).eval()
    assert not isinstance(anatomy(lora).head, nn.Identity)
    tuned = peft.get_peft_model(
        model_of("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    assert isinstance(anatomy(tuned).head, nn.Identity)
    for model in (lora, tuned):
        with torch.no_grad():
            found = sequence_stats(model, prompt, prompt_mask, tokens, mask)
            own = model(torch.cat([prompt[:1], tokens[:1]], 1)).logits[0, -6:-1].log_softmax(-1)
        torch.testing.assert_close(found.logprobs[0], own[torch.arange(5), tokens[0]], atol=1e-5, rtol=1e-5)


def test_what_is_not_a_causal_model_is_refused() -> None:
    with pytest.raises(TypeError, match="encoder-decoder"):
        anatomy(tiny("t5", seed=0))
    with pytest.raises(TypeError, match="must be a transformers causal language model, got Linear"):
        anatomy(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="no language-model head"):
        anatomy(tiny("llama", head="base", seed=0))
    with pytest.raises(ValueError, match=r"hidden must be \(N, D\)"):
        token_logprobs(torch.zeros(2, 3, 4), nn.Linear(4, 5), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature and chunk must be positive"):
        token_logprobs(torch.zeros(2, 4), nn.Linear(4, 5), torch.zeros(2, dtype=torch.long), 0.0)
