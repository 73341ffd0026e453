"""The number of tokens that a model reads is the number that it does read."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from labkit.rlhf import RewardModel
from labkit.rlhf.positions import check_length, longest_input
from labkit.testbeds.models import tiny


def learned():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    yield GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, n_positions=24, vocab_size=40))
    yield BertForSequenceClassification(
        BertConfig(**small, vocab_size=40, max_position_embeddings=24, num_labels=1)
    )
    yield tiny(
        "roberta", vocab=40, head="classification", num_labels=1, pad_token_id=1, max_position_embeddings=26
    )


@pytest.mark.parametrize("model", list(learned()), ids=lambda model: type(model).__name__)
def test_so_many_and_not_one_more(model):
    limit = longest_input(model)
    assert limit == 24
    ids = torch.full((1, limit), 5)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    more = torch.full((1, limit + 1), 5)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=more, attention_mask=torch.ones_like(more))


def test_where_the_config_is():
    llama = tiny("llama", max_position_embeddings=77)
    assert longest_input(llama) == 77
    assert longest_input(get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))) == 77
    assert longest_input(tiny("t5")) is None
    assert longest_input(torch.nn.Linear(2, 2)) is None
    check_length(10**6, tiny("t5"), "a text", "shorten it")


def test_a_reward_model_says_what_to_do():
    model = tiny(
        "roberta", vocab=40, head="classification", num_labels=1, pad_token_id=1, max_position_embeddings=26
    )
    asked = {
        "prompts": [],
        "completions": [],
        "prompt_ids": [[5] * 20, [5]],
        "completion_ids": [[6] * 5, [6]],
    }
    with pytest.raises(ValueError, match="25 tokens passes the 24 positions of Roberta.*max_length= cuts"):
        RewardModel(model)(**asked)
    cut = RewardModel(model, max_length=24)(**asked)
    same = RewardModel(model)([], [], prompt_ids=[[5] * 19, [5]], completion_ids=[[6] * 5, [6]])
    torch.testing.assert_close(cut, same)
