"""The package: lazy names, shipped files and their budget."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from labkit import testbeds
from labkit.testbeds import shipped
from labkit.testbeds.models import tiny


def test_every_exported_name_is_there() -> None:
    for name in testbeds.__all__:
        assert getattr(testbeds, name) is not None


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, labkit.testbeds; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shipped_files_keep_the_budget_and_have_recipes() -> None:
    files = sorted(shipped.FOLDER.glob("*.safetensors"))
    assert files
    assert all(path.stat().st_size <= 1_000_000 for path in files)
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    for path in files:
        recipe = json.loads(path.with_suffix(".json").read_text())
        assert {"seed", "steps", "function", "versions", "parameters"} <= set(recipe)
        assert {"accuracy", "loss"} & set(recipe), path.name
        assert {"python", "torch", "transformers"} <= set(recipe["versions"])


def test_state_and_restore_are_inverse_and_check_shapes() -> None:
    model, other = tiny(seed=0), tiny(seed=1)
    shipped.restore(other, shipped.state(model))
    tokens = torch.arange(9)[None]
    assert torch.equal(model.eval()(tokens).logits, other(tokens).logits)
    with pytest.raises(ValueError, match="do not fit LlamaForCausalLM"):
        shipped.restore(tiny(layers=3), shipped.state(model))
    with pytest.raises(ValueError, match="embed_tokens"):
        shipped.restore(tiny(vocab=300), shipped.state(model))


def test_write_and_read(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    model = tiny(layers=1, seed=0)
    path = shipped.write("made", model, {"seed": 0}, half=True)
    assert path.stat().st_size < 2.2 * model.num_parameters()
    assert shipped.recipe("made")["parameters"] == model.num_parameters()
    again = shipped.restore(tiny(layers=1, seed=5), shipped.read("made"))
    assert torch.allclose(again.lm_head.weight, model.lm_head.weight, atol=1e-3)
    assert again.lm_head.weight.dtype == torch.float32


def test_unknown_weights_name_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"There are: .*retrieval-0"):
        shipped.read("retrieval-99")
