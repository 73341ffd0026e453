"""Checkpoints are read as transformers writes them, in shards, and never as a whole."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from labkit.moe import Checkpoint, ExpertAtlas
from labkit.moe.look_into_moes.weights import ModelSource
from labkit.testbeds.models import tiny
from tests.moe import zoo

PER_EXPERT = {
    "Mixtral": "model.layers.1.block_sparse_moe.experts.5.w2.weight",
    "Qwen2Moe": "model.layers.1.mlp.experts.5.down_proj.weight",
    "Olmoe": "model.layers.1.mlp.experts.5.gate_proj.weight",
    "DeepseekV3": "model.layers.1.mlp.experts.5.up_proj.weight",
    "SwitchTransformers": "encoder.block.1.layer.1.mlp.experts.expert_5.wi.weight",
}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_sharded_checkpoint_holds_what_the_model_holds(name, tmp_path):
    model = zoo.make(name).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    if name in PER_EXPERT:
        assert (
            PER_EXPERT[name]
            in json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        )
    ours, theirs = Checkpoint(tmp_path), ModelSource(model)
    assert ours.layers == theirs.layers
    assert ours.dense_layers == theirs.dense_layers
    for layer in ours.layers:
        assert ours.num_experts(layer) == theirs.num_experts(layer)
        assert ours.matrices(layer) == theirs.matrices(layer)
        assert torch.equal(ours.router(layer), theirs.router(layer))
        for matrix in ours.matrices(layer):
            for here, there in zip(ours.stored(layer, matrix), theirs.stored(layer, matrix), strict=True):
                assert here.dtype == torch.bfloat16
                assert torch.equal(here, there)
            for here, there in zip(ours.shared(layer, matrix), theirs.shared(layer, matrix), strict=True):
                assert torch.equal(here, there)
    for layer in ours.dense_layers:
        assert torch.equal(ours.dense(layer, "down"), theirs.dense(layer, "down"))


def test_the_atlas_finds_the_same_in_folder_and_model(tmp_path):
    mixture, dense = zoo.make("Mixtral"), tiny("mistral", width=32, layers=3, intermediate_size=24, seed=1)
    mixture.save_pretrained(tmp_path / "mixture", max_shard_size="50KB")
    dense.save_pretrained(tmp_path / "dense")
    atlas = ExpertAtlas.from_checkpoint(tmp_path / "mixture", tmp_path / "dense")
    loaded = ExpertAtlas(mixture, dense)
    for level in ("matrix", "average", "reorder"):
        ours, theirs = (a.weight_similarity(1, "down", level) for a in (atlas, loaded))
        assert ours.equals(theirs)
        assert "dense" in ours.index
    assert atlas.router_correlation().equals(loaded.router_correlation())
    with pytest.raises(ValueError, match="computes no outputs"):
        atlas.outputs(torch.ones(1, 2, dtype=torch.long))


def test_single_files_and_other_names(tmp_path):
    model = zoo.make("Mixtral")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert torch.equal(Checkpoint(file).stored(0, "up")[2], ModelSource(model).stored(0, "up")[2])
    renames = {".w1.": ".linear.", ".w3.": ".linear_v.", ".w2.": ".linear_1."}
    tensors = {}
    for name, tensor in load_file(file).items():
        for old, new in renames.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"experts have linear, linear_1, linear_v: give names="):
        Checkpoint(tmp_path)
    named = Checkpoint(tmp_path, names={"act": "linear", "up": "linear_v", "down": "linear_1"})
    assert torch.equal(named.stored(0, "act")[2], ModelSource(model).stored(0, "act")[2])
    with pytest.raises(ValueError, match="names has 'gate'; the matrices are up, act, down"):
        Checkpoint(tmp_path, names={"gate": "linear"})


def test_only_what_is_asked_for_is_read(tmp_path):
    zoo.make("Qwen2Moe").save_pretrained(tmp_path, max_shard_size="60KB")
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.bytes_read == 0
    ExpertAtlas(checkpoint).weight_similarity(1, "up")
    assert checkpoint.bytes_read == 2 * 8 * 24 * 32 * 4 - 8 * 24 * 32 * 4  # one matrix of eight experts, once
    assert checkpoint.bytes_read < total / 12


PROBE = """
import gc, json, re, sys
import torch
from labkit.moe import ExpertAtlas
torch.set_num_threads(1)
def resident(kind):
    return int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
warm = ExpertAtlas.from_checkpoint(sys.argv[2]); warm.summary(reorder=False); warm.router_correlation()
warm.reorder(0, "up", max_neurons=16); del warm; gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
atlas = ExpertAtlas.from_checkpoint(sys.argv[1])
atlas.summary(reorder=False)
atlas.router_correlation()
for layer in atlas.layers:
    atlas.reorder(layer, "up", max_neurons=16)
print(json.dumps({"peak": resident("VmHWM") - before, "read": atlas.source.bytes_read}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's memory counters")
def test_memory_stays_at_a_few_matrices_however_large_the_checkpoint(tmp_path):
    """96 MB of weights, every layer analysed, and less than a third of it is ever in memory."""
    shape = {"width": 256, "heads": 4, "intermediate_size": 512, "vocab": 64, "num_local_experts": 8}
    model = tiny("mixtral", layers=15, seed=0, **shape).bfloat16()
    model.save_pretrained(tmp_path / "large", max_shard_size="8MB")
    tiny("mixtral", width=16, heads=2, seed=0).save_pretrained(tmp_path / "small")
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert size > 90e6
    (tmp_path / "probe.py").write_text(PROBE)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "probe.py"), str(tmp_path / "large"), str(tmp_path / "small")],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["read"] > size  # all of it was looked at, parts more than once
    assert found["peak"] < size / 3, f"{found['peak'] / 1e6:.0f} of {size / 1e6:.0f} MB"


# ------------------------------------------------------------------------------------------- what is refused


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="holds no safetensors file"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="loading them runs code"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing like it")
    with pytest.raises(ValueError, match="no readable safetensors file"):
        Checkpoint(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="'nobody/nothing'"):
        Checkpoint("nobody/nothing")
    with pytest.raises(TypeError, match="use ExpertAtlas.from_checkpoint"):
        ExpertAtlas(str(tmp_path))


def test_models_without_experts_and_missing_shards(tmp_path):
    tiny("llama", width=16, heads=2).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="has no experts of known names.*it has none"):
        Checkpoint(tmp_path / "dense")
    zoo.make("Mixtral").save_pretrained(tmp_path / "moe", max_shard_size="60KB")
    index = json.loads((tmp_path / "moe/model.safetensors.index.json").read_text())["weight_map"]
    lost = index["model.layers.2.block_sparse_moe.experts.7.w2.weight"]
    (tmp_path / "moe" / lost).unlink()
    with pytest.raises(FileNotFoundError, match=f"{lost}, named by the index, is missing"):
        Checkpoint(tmp_path / "moe").stored(2, "down")
    with pytest.raises(ValueError, match="no dense feed-forward layer"):
        Checkpoint(tmp_path / "moe", mixture=False)


def test_missing_experts_and_quantised_ones(tmp_path):
    names = [f"model.layers.0.mlp.experts.{e}.{m}.weight" for e in (0, 2) for m in ("up_proj", "down_proj")]
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layer 0: no up of expert \[1\]"):
        Checkpoint(tmp_path).stored(0, "up")
    save_file(
        {"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(2, dtype=torch.uint8)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match="quantised experts.*dequantize"):
        Checkpoint(tmp_path)
    small = {name.replace("s.2", "s.1"): torch.zeros(2, 2).to(torch.float8_e4m3fn) for name in names}
    save_file(small, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="quantised"):
        Checkpoint(tmp_path).stored(0, "down")
