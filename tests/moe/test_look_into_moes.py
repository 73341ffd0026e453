"""The atlas and the report on real classes: what they say of a model is what one computes by hand."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from labkit.moe import ExpertAtlas, MoEReport, capture_experts, moe_blocks, swap_router
from labkit.moe import look_into_moes as lm
from labkit.testbeds.models import tiny
from labkit.testbeds.specimens import copied_experts, untrained
from tests.moe import zoo

DENSE = dict(width=32, layers=3, intermediate_size=24)  # noqa: C408


def mixtral_and_dense():
    return zoo.make("Mixtral"), tiny("mistral", seed=1, **DENSE)


# ------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_class_can_be_summarised(name):
    atlas = ExpertAtlas(zoo.shared(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = atlas.summary(method="exact")
    matrices = 2 if name == "SwitchTransformers" else 3
    assert len(table) == matrices * len(atlas.layers)
    assert (table.similarity.abs() < 0.2).all()
    assert (table.gain > 0.2).all()
    assert (table.tau.abs() < 0.3).all()
    block = moe_blocks(zoo.shared(name))[-1]
    a, b = (block.matrices(e).down.flatten() for e in (2, 6))
    square = atlas.weight_similarity(atlas.layers[-1], "down")
    assert square.loc[2, 6] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-6)
    assert square.equals(square.T)


def test_shared_experts_take_part_in_averages_only():
    atlas = ExpertAtlas(zoo.shared("Qwen2Moe"))
    average = atlas.weight_similarity(0, "down", "average")
    assert list(average.index) == [*range(8), "shared 0"]
    block = moe_blocks(zoo.shared("Qwen2Moe"))[0]
    ours = block.matrices(4).down.mean(1), block.shared_matrices()[0].down.mean(1)
    assert average.loc[4, "shared 0"] == pytest.approx(float(torch.cosine_similarity(*ours, dim=0)), abs=1e-6)
    assert list(atlas.weight_similarity(0, "down").index) == list(range(8))
    with pytest.warns(UserWarning, match="shared experts have another width"):
        atlas.summary([0], reorder=False)


def test_the_dense_reference_is_one_more_row():
    mixture, dense = mixtral_and_dense()
    atlas = ExpertAtlas(mixture, dense)
    expected = torch.cosine_similarity(
        moe_blocks(mixture)[1].matrices(3).act.flatten(),
        dense.model.layers[1].mlp.gate_proj.weight.flatten(),
        dim=0,
    )
    assert atlas.weight_similarity(1, "act").loc[3, "dense"] == pytest.approx(float(expected), abs=1e-6)
    assert atlas.match(1, "act", 3, "dense").neurons == 24
    assert atlas.weight_similarity(1, "act", "reorder").loc["dense", 3] == pytest.approx(
        atlas.match(1, "act", 3, "dense").similarity
    )


def test_upcycled_models_are_recognised_and_others_are_not():
    dense = untrained("dense", seed=3, **DENSE)
    mixture = copied_experts(dense, experts=4)
    with torch.no_grad():
        for block in moe_blocks(mixture):
            for tensor in (block.experts.gate_up_proj, block.experts.down_proj):
                noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(block.layer))
                tensor.add_(0.5 * tensor.std() * noise)
    found = MoEReport.of(mixture, dense_reference=dense).provenance()
    assert found["copies"]
    assert found["tau"] > 0.95
    assert 0.7 < found["similarity"] < found["to_dense"] < 1
    other = MoEReport.of(mixture, dense_reference=tiny("mistral", seed=4, **DENSE)).provenance()
    assert abs(other["to_dense"]) < 0.1
    assert abs(other["tau_to_dense"]) < 0.3
    assert not MoEReport.of(zoo.shared("Mixtral")).provenance()["copies"]


def test_fresh_copies_compute_what_the_dense_model_computes_and_give_no_nan():
    dense = untrained("dense", seed=3, **DENSE).eval()
    mixture = copied_experts(dense, experts=4).eval()
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(mixture(tokens).logits, dense(tokens).logits, atol=1e-4, rtol=1e-4)
    atlas = ExpertAtlas(mixture)
    assert np.allclose(atlas.weight_similarity(0, "up"), 1)
    assert (atlas.pca(0, "up")[["pc1", "pc2"]] == 0).all(axis=None)
    captured = atlas.outputs(tokens)
    assert np.allclose(captured.output_similarity(0, "angular"), 1, atol=2e-3)
    report = MoEReport.of(mixture, tokens)
    assert report.provenance()["tau"] == 1
    assert not report.tables["output_similarity"].isna().any(axis=None)


def test_router_correlation_by_hand():
    atlas = ExpertAtlas(zoo.shared("Olmoe"))
    block = moe_blocks(zoo.shared("Olmoe"))[2]
    router = np.corrcoef  # numpy's correlation, of vectors made here

    def pairs(rows):
        unit = torch.nn.functional.normalize(rows, dim=1)
        return [float(unit[i] @ unit[j]) for i in range(8) for j in range(i)]

    x = pairs(block.router.weight.detach())
    y = pairs(torch.stack([block.matrices(e).down.mean(1) for e in range(8)]))
    assert atlas.router_correlation([2]).loc[2, "down"] == pytest.approx(router(x, y)[0, 1], abs=1e-5)


def test_projections():
    atlas = ExpertAtlas(*mixtral_and_dense())
    points = atlas.pca(0, "down")
    assert list(points.expert) == [*range(8), "dense"]
    assert len(points.attrs["share"]) == 2
    assert len(atlas.pca(0, "down", noise_eps=1e-3)) == 0
    each = atlas.pca(0, "act", "neuron", dims=3)
    assert len(each) == 8 * 24
    assert list(each.columns) == ["expert", "pc1", "pc2", "pc3"]
    with pytest.raises(ValueError, match="'matrix' or 'neuron', got 'expert'"):
        atlas.pca(0, "act", "expert")


# ------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "DeepseekV2", "JetMoe", "SwitchTransformers"])
def test_recorded_inputs_give_the_outputs_of_all_experts(name, monkeypatch):
    """Chunked or not; against a second pass with every expert's output recorded inside the model."""
    from labkit.moe.look_into_moes import captured as module

    monkeypatch.setattr(module, "CHUNK", 3)
    model, given = zoo.shared(name), zoo.inputs(name, padded=2)
    captured = ExpertAtlas(model).outputs(given)
    layer = captured.layers[-1]
    block = next(b for b in moe_blocks(model) if b.layer == layer)
    seen = []
    handle = block.module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        model(**given)
    handle.remove()
    hidden = seen[0].reshape(-1, 32)
    mask = (
        given["decoder_attention_mask" if name == "SwitchTransformers" else "attention_mask"].bool().flatten()
    )
    expected = block.expert_outputs(hidden[mask]).detach()
    torch.testing.assert_close(captured.outputs(layer), expected)
    torch.testing.assert_close(captured.norms(layer), expected.norm(dim=-1))
    np.testing.assert_allclose(
        captured.output_similarity(layer, "cosine"), lm.output_similarity(expected), atol=1e-5
    )
    np.testing.assert_allclose(
        captured.token_similarity(layer, 1), lm.token_similarity(expected)[1], atol=1e-5
    )
    assert int(captured.norm_score_counts([layer]).iloc[0].sum()) == int(mask.sum())
    if name == "Mixtral":
        assert captured.tokens == int(mask.sum())
        chosen = captured.chosen_scores(layer, 5)
        assert chosen.notna().sum(axis=1).tolist() == [2] * 5
        assert captured.load().sum(axis=1).tolist() == pytest.approx([1] * 3)
        assert captured.states(layer, 0).shape == (8, 24)


def test_activation_share_of_gated_experts_is_nearly_one():
    table = ExpertAtlas(zoo.shared("Mixtral")).outputs(zoo.inputs("Mixtral")).activation_stats()
    assert (table.share > 0.9).all()
    relu = ExpertAtlas(zoo.shared("SwitchTransformers")).outputs(zoo.inputs("SwitchTransformers"))
    assert (relu.activation_stats().share < 0.7).all()  # half of the rectified states are 0


def test_batches_are_joined_and_modes_kept():
    model = zoo.make("Mixtral").train()
    one, two = zoo.inputs("Mixtral"), zoo.inputs("Mixtral", batch=3, length=4, padded=1)
    captured = capture_experts(model, [one, two["input_ids"]])
    assert captured.tokens == 14 + 12
    assert model.training
    assert all(module.training for module in model.modules())
    assert capture_experts(model, [one], layers=[1]).layers == [1]


def test_swapped_routers_are_looked_at_too():
    class First(nn.Module):
        def forward(self, hidden):
            logits = torch.arange(8.0).expand(hidden.reshape(-1, 32).shape[0], 8)
            return logits, *logits.softmax(-1).topk(2)

    model = zoo.make("Mixtral")
    with swap_router(model, lambda block: First()):
        atlas = ExpertAtlas(model)
        captured = atlas.outputs(zoo.inputs("Mixtral"))
        assert captured.chosen(0).unique().tolist() == [6, 7]
        with pytest.raises(ValueError, match="no linear router"):
            atlas.router_pairs(0)
        report = MoEReport.of(atlas, zoo.inputs("Mixtral"))
    assert "routers" not in report.tables


# ------------------------------------------------------------------------------------------- report


def test_a_report_in_one_call_survives_saving(tmp_path):
    mixture, dense = mixtral_and_dense()
    report = MoEReport.of(mixture, zoo.inputs("Mixtral"), dense_reference=dense)
    assert sorted(report.tables) == [
        "activations",
        "load",
        "norm_score_counts",
        "output_similarity",
        "outputs",
        "routers",
        "similarity",
        "weights",
    ]
    assert "experts without a common origin" in str(report)
    path = report.save(tmp_path / "deep" / "report.json")
    again = MoEReport.load(path)
    assert again.facts == json.loads(json.dumps(report.facts))
    assert str(again) == str(report)
    for name, table in report.tables.items():
        np.testing.assert_allclose(
            again.tables[name].select_dtypes("number"), table.select_dtypes("number"), atol=1e-8
        )
        assert list(again.tables[name].columns) == list(table.columns)
    figures = again.figures()
    assert set(figures) == {"similarity", "tau", "to_dense", "norm_score", "load"}
    assert len(figures["similarity"].data) == 3
    assert report.facts["tokens"] == 14


def test_reports_of_folders_and_files_that_are_none(tmp_path):
    zoo.make("Mixtral").save_pretrained(tmp_path / "model")
    report = MoEReport.of(tmp_path / "model", layers=[1], reorder=False)
    assert report.facts["layers"] == [1]
    with pytest.raises(ValueError, match="made with reorder=False"):
        report.provenance()
    with pytest.raises(ValueError, match="computes no outputs"):
        MoEReport.of(tmp_path / "model", zoo.inputs("Mixtral"))
    with pytest.raises(ValueError, match="is no MoE report"):
        MoEReport.load(tmp_path / "model" / "config.json")
    with pytest.raises(ValueError, match="it is not JSON"):
        MoEReport.load(tmp_path / "model" / "model.safetensors")


def test_figures_of_the_parts():
    atlas = ExpertAtlas(*mixtral_and_dense())
    assert len(lm.similarity_map(atlas.weight_similarity(0, "up")).data[0].z) == 9
    scatter = lm.router_scatter(atlas.router_pairs(0), "act")
    assert len(scatter.data[0].x) == 28
    slope = np.polyfit(scatter.data[0].x, scatter.data[0].y, 1)[0]
    line = scatter.data[1]
    assert (line.y[1] - line.y[0]) / (line.x[1] - line.x[0]) == pytest.approx(slope)
    with pytest.raises(ValueError, match="matrix must be one of up, act, down; got 'gate'"):
        lm.router_scatter(atlas.router_pairs(0), "gate")
    assert len(lm.pca_scatter(atlas.pca(0, "up")).data) == 9
    captured = atlas.outputs(zoo.inputs("Mixtral"))
    share = np.array(lm.norm_score_map(captured.norm_score_counts()).data[0].z)
    np.testing.assert_allclose(share.sum(1), 1, atol=1e-3)


# ------------------------------------------------------------------------------------------- refusals


def test_bad_references():
    mixture = zoo.shared("Mixtral")
    with pytest.raises(ValueError, match=r"its up matrix is \(40, 32\), an expert's \(24, 32\)"):
        ExpertAtlas(mixture, tiny("mistral", width=32, layers=3, intermediate_size=40))
    with pytest.raises(ValueError, match=r"has no feed-forward layer \[2\]; it has \[0, 1\]"):
        ExpertAtlas(mixture, tiny("mistral", width=32, layers=2, intermediate_size=24))
    with pytest.raises(ValueError, match="no dense feed-forward layer of known names"):
        ExpertAtlas(mixture, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no mixture-of-experts block"):
        ExpertAtlas(tiny("llama", width=16, heads=2))
    atlas = ExpertAtlas(mixture)
    with pytest.raises(TypeError, match="give dense_reference to the ExpertAtlas"):
        MoEReport.of(atlas, dense_reference=mixture)


def test_bad_arguments():
    atlas = ExpertAtlas(zoo.shared("Mixtral"))
    with pytest.raises(ValueError, match=r"\[9\] is no MoE layer; there are \[0, 1, 2\]"):
        atlas.weight_similarity(9, "up")
    with pytest.raises(ValueError, match="matrix must be one of 'up', 'act', 'down' here; got 'gate'"):
        atlas.weight_similarity(0, "gate")
    with pytest.raises(ValueError, match="'up', 'down' here; got 'act'"):
        ExpertAtlas(zoo.shared("SwitchTransformers")).weight_similarity(1, "act")
    with pytest.raises(ValueError, match="level must be one of"):
        atlas.weight_similarity(0, "up", "mean")
    with pytest.raises(TypeError, match="max_neurons belong to level='reorder'"):
        atlas.weight_similarity(0, "up", max_neurons=3)
    with pytest.raises(ValueError, match=r"8 is no expert of layer 0: 0\.\.7"):
        atlas.match(0, "up", 1, 8)
    with pytest.raises(ValueError, match="no text was run yet"):
        atlas.norm_score_counts()
    few = ExpertAtlas(zoo.make("Mixtral", num_local_experts=2))
    with pytest.raises(ValueError, match="2 experts, hence fewer than 3 pairs"):
        few.router_correlation()
    assert "routers" not in MoEReport.of(few).tables


def test_bad_batches():
    model = zoo.shared("Mixtral")
    with pytest.raises(TypeError, match="got str"):
        capture_experts(model, "some text")
    with pytest.raises(ValueError, match="there is no batch"):
        capture_experts(model, [])
    with pytest.raises(ValueError, match=r"\(B, T\) and not empty, got shape \(0, 3\)"):
        capture_experts(model, torch.zeros(0, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[5\] is no MoE layer"):
        capture_experts(model, torch.ones(1, 2, dtype=torch.long), layers=[5])
    hidden = {"input_ids": torch.ones(1, 2, dtype=torch.long), "attention_mask": torch.zeros(1, 2)}
    with pytest.raises(ValueError, match="no real token"):
        capture_experts(model, hidden)
    captured = capture_experts(model, torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"token must be in 0\.\.1, got 2"):
        captured.token_similarity(0, 2)
    with pytest.raises(ValueError, match=r"\[7\] is no recorded layer"):
        captured.norms(7)
