"""Models with facts to change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from labkit.testbeds.editing import editing_world
from labkit.testbeds.facts import FactsWorld
from labkit.testbeds.models import tiny
from labkit.testbeds.signatures import signature_edits, signature_facts
from labkit.testbeds.tokenizers import byte_tokenizer


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_tiny_model_knows_what_is_to_be_changed(family: str) -> None:
    world = editing_world(family, seed=2, edits=5)
    assert world.edits == FactsWorld(2, templates=2).edits(5)
    for edit in world.edits:
        for prompt in (edit["prompt"], *edit["paraphrases"], *edit["neighbours"]):
            assert int(world.model(torch.tensor([prompt])).logits[0, -1].argmax()) == edit["true"][0]
    assert sum(map(len, world.texts)) == 800


def test_a_folder_of_a_model_gets_texts(tmp_path: Any) -> None:
    tokenizer = byte_tokenizer()
    tiny("llama", width=16, heads=2, layers=1, vocab=len(tokenizer), seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    world = editing_world(str(tmp_path), seed=1, edits=2)
    assert world.edits == signature_edits(2, 1)
    assert len(world.texts) == len(signature_facts())
    assert world.texts[0].shape[0] == 1
    assert world.word(tokenizer("x")["input_ids"][-1]) == "'x'"
