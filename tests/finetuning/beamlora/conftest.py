"""Tiny adapted models of four families, and their batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from labkit.finetuning import BeamLoraConfig
from labkit.testbeds.models import tiny

FAMILIES = ("llama", "t5", "roberta", "gpt_neox")


@pytest.fixture
def adapted():
    """adapted(family="llama", r=4, **config) -> model with a BeamLoRA on all linear modules, with live B and gates."""

    def make(family: str = "llama", *, live: bool = True, **config: Any) -> Any:
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
        model = get_peft_model(
            tiny(family, width=32, layers=2, heads=2, vocab=40, seed=0), BeamLoraConfig(**settings)
        )
        if live:
            generator = torch.Generator().manual_seed(1)
            for name, weight in model.named_parameters():
                if "lora_B" in name or "lora_gate" in name:
                    scale = 0.3 if "lora_B" in name else 0.05
                    weight.data.copy_(scale * torch.randn(weight.shape, generator=generator))
        return model.eval()

    return make


@pytest.fixture
def batch():
    """batch(family) -> what the model takes, labels included."""

    def make(family: str = "llama", rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
        ids = torch.randint(4, 40, (rows, 9), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "labels": ids.clone()}

    return make
