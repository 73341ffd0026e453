"""Half fine-tuning: the draw on real classes, what it spares, the trainers, bad input, two processes."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from labkit.finetuning import (
    GEM,
    HalfFineTuningCallback,
    HalfMask,
    HalfSelector,
    check_optimizer,
    combine,
    half_finetuning,
    half_reset_,
    sequential_finetune,
)
from labkit.testbeds.models import tiny
from labkit.testbeds.shipped import state

from . import half_script
from .sequence import shifts

ROOT = Path(__file__).parents[2]


def llama(layers: int = 4, **config: Any) -> Any:
    settings = {"width": 16, "heads": 2, "vocab": 16, "tie_word_embeddings": False, "seed": 0} | config
    return tiny("llama", layers=layers, **settings)


def counts(mask: HalfMask, category: str, stack: str = "decoder") -> list[int]:
    """Trained weights of a category by layer; biases are not counted."""
    frame = mask.to_frame()
    frame = frame[
        (frame.category == category) & (frame["stack"] == stack) & ~frame.name.str.endswith(".bias")
    ]
    return frame.groupby("layer").trained.sum().tolist()


def biases_follow(mask: HalfMask) -> bool:
    pairs = [(n, n.removesuffix("bias") + "weight") for n in mask if n.endswith(".bias")]
    inside = [(b, w) for b, w in pairs if mask.entries[b].category not in ("always", "embedding")]
    assert inside
    return all(mask[b] == mask[w] for b, w in inside)


class TestCategories:
    def test_llama_2_7b_trains_as_many_parameters_as_it_should(self) -> None:
        with torch.device("meta"):
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=32000,
                    hidden_size=4096,
                    intermediate_size=11008,
                    num_hidden_layers=32,
                    num_attention_heads=32,
                )
            )
        for seed in (0, 1):
            mask = HalfSelector(seed=seed).select(model, stage=seed)
            assert mask.total == 6_738_415_616
            # 2 of 4 matrices, 1.5 of 3 in the mean over an even number of layers, 1 of 2 norms
            layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
            assert mask.trainable == 16 * layer + 2 * 32000 * 4096 + 4096 == 3_500_281_856
            assert mask.trainable_fraction == pytest.approx(0.51945, abs=1e-5)

    @pytest.mark.parametrize("layers", [2, 3, 4, 5])
    def test_llama(self, layers: int) -> None:
        mask = HalfSelector().select(llama(layers), 0)
        assert counts(mask, "attention") == [2] * layers
        assert counts(mask, "norm") == [1] * layers
        # floor(L / 2) layers freeze two of the three
        assert sorted(counts(mask, "ffn")) == [1] * (layers // 2) + [2] * (layers - layers // 2)
        assert mask["model.embed_tokens.weight"]
        assert mask["lm_head.weight"]
        assert mask["model.norm.weight"]

    def test_every_choice_is_equally_likely(self) -> None:
        model, selector = llama(2), HalfSelector(seed=7)
        frame = sum(
            selector.select(model, stage).to_frame().set_index("name").trained.astype(int)
            for stage in range(400)
        )
        inside = frame[frame.index.str.contains("layers")] / 400
        assert inside.min() > 0.4
        assert inside.max() < 0.6
        assert (frame[~frame.index.str.contains("layers")] == 400).all()

    def test_layers_are_drawn_independently(self) -> None:
        mask = HalfSelector(seed=0).select(llama(8), 0)
        rows = {tuple(mask[f"model.layers.{i}.self_attn.{m}_proj.weight"] for m in "qkvo") for i in range(8)}
        assert len(rows) > 2

    def test_grouped_queries_keep_the_rule_and_report_the_true_share(self) -> None:
        model = tiny("llama", width=64, heads=4, kv_heads=1, layers=4)
        mask = HalfSelector().select(model, 0)
        assert counts(mask, "attention") == [2] * 4
        by_hand = sum(p.numel() for n, p in model.named_parameters() if mask[n])
        assert mask.trainable == by_hand
        assert mask.trainable_fraction == by_hand / model.num_parameters()

    def test_t5(self) -> None:
        model = tiny("t5", layers=3, feed_forward_proj="gated-gelu")
        mask = HalfSelector().select(model, 0)
        for stack, kind in (
            ("encoder", "attention"),
            ("decoder", "attention"),
            ("decoder", "cross-attention"),
        ):
            assert counts(mask, kind, stack) == [2, 2, 2]
        assert sorted(counts(mask, "ffn", "encoder")) == sorted(counts(mask, "ffn", "decoder")) == [1, 2, 2]
        biases = [name for name in mask if "relative_attention_bias" in name]
        assert len(biases) == 2
        assert all(mask[name] for name in (*biases, "shared.weight", "encoder.final_layer_norm.weight"))
        plain = HalfSelector().select(tiny("t5", layers=3), 0)
        assert counts(plain, "ffn", "encoder") == [1, 1, 1]

    def test_roberta(self) -> None:
        model = tiny("roberta", layers=3, head="classification", num_labels=4)
        mask = HalfSelector().select(model, 0)
        assert counts(mask, "attention", "encoder") == [2, 2, 2]
        assert counts(mask, "ffn", "encoder") == counts(mask, "norm", "encoder") == [1, 1, 1]
        assert biases_follow(mask)
        assert all(mask[name] for name in mask if name.startswith("classifier"))

    @pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
    def test_fused_attention(self, family: str) -> None:
        if family == "gpt2":
            from transformers import GPT2Config, GPT2LMHeadModel

            model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2))
        else:
            model = tiny(family, layers=3)
        mask = HalfSelector().select(model, 0)
        for category in ("attention", "ffn", "norm"):
            assert counts(mask, category) == [1, 1, 1]
        assert biases_follow(mask)

    def test_mixtral_trains_routers_and_draws_once_for_all_experts(self) -> None:
        mask = HalfSelector().select(tiny("mixtral", layers=3), 0)
        routers = [name for name in mask if name.endswith("mlp.gate.weight")]
        assert len(routers) == 3
        assert all(mask[name] for name in routers)
        assert counts(mask, "ffn") == [1, 1, 1]  # gate_up_proj or down_proj, each holds all experts

    def test_experts_that_are_modules_share_one_draw(self) -> None:
        class Expert(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name in ("gate_proj", "up_proj", "down_proj"):
                    setattr(self, name, nn.Linear(4, 4))

        model = llama(2)
        for layer in model.model.layers:
            layer.mlp = nn.ModuleDict({"experts": nn.ModuleList(Expert() for _ in range(3))})
        mask = HalfSelector().select(model, 0)
        for i in range(2):
            for name in ("gate_proj", "up_proj", "down_proj"):
                root = f"model.layers.{i}.mlp.experts"
                drawn = {mask[f"{root}.{e}.{name}.{leaf}"] for e in range(3) for leaf in ("weight", "bias")}
                assert len(drawn) == 1
        assert sum(counts(mask, "ffn")) == 3 * 3

    def test_norms_of_queries_and_keys_are_trained(self) -> None:
        mask = HalfSelector().select(tiny("qwen3", layers=2), 0)
        assert all(mask[name] for name in mask if "q_norm" in name or "k_norm" in name)


class TestLevelsAndRatio:
    def test_layer(self) -> None:
        mask = HalfSelector(level="layer").select(llama(4), 0)
        frame = mask.to_frame().dropna(subset="layer")
        per_layer = frame.groupby("layer").trained.agg(["min", "max"])
        assert (per_layer["min"] == per_layer["max"]).all()
        assert per_layer["max"].sum() == 2

    def test_a_frozen_layer_is_frozen_whole_but_for_position_biases_and_routers(self) -> None:
        mask = HalfSelector(level="layer").select(tiny("qwen3", layers=2), 0)
        frozen = {int(name.split(".")[2]) for name in mask.frozen}
        assert len(frozen) == 1
        (layer,) = frozen
        assert all(name in mask.frozen for name in mask if f"layers.{layer}." in name)
        for stage in range(4):
            mask = HalfSelector(level="layer").select(tiny("t5", layers=2), stage)
            assert not any("relative" in name for name in mask.frozen)

    def test_model(self) -> None:
        mask = HalfSelector(level="model").select(llama(4), 0)
        units = mask.to_frame().dropna(subset="layer")
        assert units.trained.sum() == round(len(units) / 2)
        assert len(set(counts(mask, "attention"))) > 1

    @pytest.mark.parametrize("ratio", [0.1, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0])
    def test_ratio_fixes_the_total_of_each_category(self, ratio: float) -> None:
        mask = HalfSelector(ratio=ratio).select(llama(10), 0)
        for category, n in (("attention", 4), ("ffn", 3), ("norm", 2)):
            found = counts(mask, category)
            assert sum(found) == int(ratio * n * 10 + 0.5 + 1e-9)
            assert max(found) - min(found) <= 1
        if ratio == 1.0:
            assert mask.trainable_fraction == 1.0

    def test_embeddings(self) -> None:
        model = llama(2)
        frozen = {
            choice: {
                n for n in HalfSelector(train_embeddings=choice).select(model, 0).frozen if "layers" not in n
            }
            for choice in (True, False, "input", "output")
        }
        both = {"model.embed_tokens.weight", "lm_head.weight"}
        assert frozen == {
            True: set(),
            False: both,
            "input": {"lm_head.weight"},
            "output": both - {"lm_head.weight"},
        }
        tied = llama(2, tie_word_embeddings=True)
        assert HalfSelector(train_embeddings=False).select(tied, 0).frozen[0] == "model.embed_tokens.weight"
        with pytest.raises(ValueError, match="tied"):
            HalfSelector(train_embeddings="output").select(tied, 0)

    def test_stages_cover_everything(self) -> None:
        model, selector = llama(2), HalfSelector()
        seen: set[str] = set()
        for stage in range(12):
            mask = selector.select(model, stage)
            seen |= {name for name in mask if mask[name]}
        assert seen == set(dict(model.named_parameters()))

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"level": "row"}, "level must be one of category, layer, model; got 'row'"),
            ({"ratio": 0}, r"ratio must lie in \(0, 1\]"),
            ({"ratio": 1.2}, r"ratio must lie in \(0, 1\]"),
            ({"ratio": True}, "ratio"),
            ({"train_embeddings": "head"}, "train_embeddings must be"),
            ({"seed": 0.5}, "seed must be a whole number"),
        ],
    )
    def test_misuse(self, wrong: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HalfSelector(**wrong)


class TestMask:
    def test_json_there_and_back(self, tmp_path: Path) -> None:
        model = llama()
        mask = HalfSelector(seed=3).select(model, 2)
        again = HalfMask.load_json(mask.save_json(tmp_path / "mask.json"))
        assert again == mask
        assert again.settings == {
            "level": "category",
            "ratio": 0.5,
            "train_embeddings": True,
            "seed": 3,
            "stage": 2,
        }
        with half_finetuning(model, again) as used:
            assert used is again
        (tmp_path / "no.json").write_text("{}")
        with pytest.raises(ValueError, match=r"no\.json holds no mask"):
            HalfMask.load_json(tmp_path / "no.json")

    def test_frame(self) -> None:
        frame = HalfSelector().select(llama(2), 0).to_frame()
        assert frame.columns.tolist() == [
            *("name", "layer", "stack", "category", "matrix", "trained", "parameters")
        ]
        assert set(frame[frame.layer == 0].matrix) == {
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            *("input_layernorm", "post_attention_layernorm"),
        }

    def test_of_another_model(self) -> None:
        mask = HalfSelector().select(llama(4), 0)
        with pytest.raises(ValueError, match="made for another model"), half_finetuning(llama(2), mask):
            pass

    def test_half_reset(self) -> None:
        base, tuned = llama(seed=0), llama(seed=1)
        mask = HalfSelector().select(tuned, 0)
        old = {n: p.clone() for n, p in tuned.named_parameters()}
        assert half_reset_(tuned, base, mask) is tuned
        for (name, p), q in zip(tuned.named_parameters(), base.parameters(), strict=True):
            m = float(mask[name])
            assert torch.equal(p, m * old[name] + (1 - m) * q)
        with pytest.raises(ValueError, match="base is another model"):
            half_reset_(tuned, llama(2), mask)
        with pytest.raises(ValueError, match="made for another model"):
            half_reset_(llama(2), base, mask)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(16, (4, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


class TestContext:
    def test_frozen_matrices_get_no_gradient_no_state_and_no_decay(self) -> None:
        model = llama()
        before = {n: p.clone() for n, p in model.named_parameters()}
        with half_finetuning(model, HalfSelector()) as mask:
            optimizer = torch.optim.AdamW(mask.parameters(model), lr=1e-2, weight_decay=0.5)
            check_optimizer(optimizer)
            for _ in range(3):
                optimizer.zero_grad()
                model(**batch()).loss.backward()
                optimizer.step()
            assert all((p.grad is None) != mask[n] for n, p in model.named_parameters())
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) != mask[name], name
        moments = [v for held in optimizer.state.values() for k, v in held.items() if k.startswith("exp_avg")]
        assert sum(v.numel() * v.element_size() for v in moments) == 2 * 4 * mask.trainable
        assert mask.trainable < 0.65 * mask.total

    def test_flags_come_back_also_after_an_error(self) -> None:
        model = llama()
        model.model.norm.weight.requires_grad_(False)

        def fail() -> None:
            with half_finetuning(model, HalfSelector()):
                assert not model.model.norm.weight.requires_grad  # what the user froze stays frozen
                raise RuntimeError("boom")

        with pytest.raises(RuntimeError, match="boom"):
            fail()
        off = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert off == ["model.norm.weight"]

    def test_an_old_gradient_is_dropped(self) -> None:
        model = llama()
        model(**batch()).loss.backward()
        with half_finetuning(model, HalfSelector()) as mask:
            assert all(dict(model.named_parameters())[name].grad is None for name in mask.frozen)

    def test_the_weight_gradient_is_skipped_by_autograd(self) -> None:
        model = llama(width=64)
        flops = {}
        for ratio in (1.0, 0.5):
            from torch.utils.flop_counter import FlopCounterMode

            with (
                half_finetuning(model, HalfSelector(ratio=ratio)) as mask,
                FlopCounterMode(display=False) as counter,
            ):
                model(**batch()).loss.backward()
            flops[ratio] = counter.get_total_flops()
            model.zero_grad()
        rows = 4 * 8
        skipped = sum(mask.entries[n].numel for n in mask.frozen if "proj" in n)
        assert flops[1.0] - flops[0.5] == 2 * rows * skipped

    def test_the_same_stage_again_warns(self) -> None:
        model, selector = llama(), HalfSelector()
        with half_finetuning(model, selector):
            pass
        with pytest.warns(UserWarning, match="same half is trained again"), half_finetuning(model, selector):
            pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with half_finetuning(model, selector, stage=1):
                pass
            with half_finetuning(llama(), selector):
                pass

    def test_gradient_checkpointing_with_a_frozen_embedding_warns(self) -> None:
        model = llama()
        model.gradient_checkpointing_enable()
        model.disable_input_require_grads()  # newer transformers hook the embedding by themselves
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with half_finetuning(model, HalfSelector()):
                pass
        selector = HalfSelector(train_embeddings=False)
        with pytest.warns(UserWarning, match="enable_input_require_grads"), half_finetuning(model, selector):
            pass
        model.enable_input_require_grads()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with half_finetuning(model, selector, stage=1):
                pass

    def test_models_that_cannot_be_halved(self) -> None:
        with pytest.raises(ValueError, match=r"no .* recognised in Sequential"):
            HalfSelector().select(nn.Sequential(nn.Linear(2, 2)), 0)
        quantised = llama(1)
        quantised.model.layers[0].mlp.up_proj.weight = nn.Parameter(
            torch.zeros(4, dtype=torch.uint8), requires_grad=False
        )
        with pytest.raises(ValueError, match="quantised matrices can't be trained"):
            HalfSelector().select(quantised, 0)
        for stage in (-1, 0.5, True):
            with pytest.raises(ValueError, match="stage must be a whole number"):
                HalfSelector().select(llama(1), stage)  # type: ignore[arg-type]

    def test_peft_models_are_refused_and_hft_then_lora_works(self) -> None:
        peft = pytest.importorskip("peft")
        model = llama()
        with half_finetuning(model, HalfSelector()) as mask:
            optimizer = torch.optim.AdamW(mask.parameters(model), lr=1e-2)
            model(**batch()).loss.backward()
            optimizer.step()
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        for wrapped in (adapted, adapted.base_model.model):
            with pytest.raises(ValueError, match="before get_peft_model"):
                HalfSelector().select(wrapped, 1)
        trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert trained
        assert all("lora_" in name for name in trained)
        merged = adapted.merge_and_unload()
        assert len(HalfSelector().select(merged, 1).frozen) == len(mask.frozen)

    def test_an_optimizer_with_frozen_parameters_is_refused(self) -> None:
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters())
        with (
            half_finetuning(model, HalfSelector()),
            pytest.raises(ValueError, match="already holds 18 frozen"),
        ):
            check_optimizer(optimizer)

    def test_what_was_all_frozen_before_trains_nothing(self) -> None:
        model = llama()
        model.requires_grad_(False)
        with (
            pytest.raises(ValueError, match="nothing would be trained"),
            half_finetuning(model, HalfSelector()),
        ):
            pass


class TestSequence:
    def test_a_half_per_stage(self) -> None:
        model, selector = llama(vocab=16), HalfSelector(seed=2)
        copies = [copy.deepcopy(model)]
        scores = sequential_finetune(
            model,
            [shifts(1), shifts(3)],
            selector,
            steps=3,
            on_stage=lambda _: copies.append(copy.deepcopy(model)),
        )
        assert scores.stages == 2
        for stage, (old, new) in enumerate(itertools.pairwise(copies)):
            mask = selector.select(model, stage)
            for (name, p), q in zip(old.named_parameters(), new.parameters(), strict=True):
                assert torch.equal(p, q) != mask[name]

    def test_with_gem(self) -> None:
        model, gem = llama(vocab=16), GEM(8)
        before = dict(copy.deepcopy(model).named_parameters())
        sequential_finetune(model, [shifts(1), shifts(3)], combine(HalfSelector(), gem), steps=8, lr=5e-3)
        assert gem.projected > 0
        never = set(HalfSelector().select(model, 0).frozen) & set(HalfSelector().select(model, 1).frozen)
        assert never
        assert all(torch.equal(p, before[n]) == (n in never) for n, p in model.named_parameters())

    def test_two_processes_train_as_one(self, tmp_path: Path) -> None:
        pytest.importorskip("accelerate")
        half_script.main(tmp_path / "alone")
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        words += ["-m", "tests.finetuning.half_script", str(tmp_path / "pair")]
        done = subprocess.run(
            [sys.executable, *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        facts = [json.loads((tmp_path / "pair" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
        alone = json.loads((tmp_path / "alone" / "rank-0.json").read_text())
        assert [fact["world"] for fact in facts] == [2, 2]
        assert facts[0] == facts[1]
        assert facts[0]["frozen"] == alone["frozen"]
        assert facts[0]["bytes"] == alone["bytes"]
        one = load_file(tmp_path / "alone" / "rank-0.safetensors")
        for rank in (0, 1):
            pair = load_file(tmp_path / "pair" / f"rank-{rank}.safetensors")
            for name, tensor in one.items():
                torch.testing.assert_close(pair[name], tensor, atol=2e-5, rtol=0)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    common = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.3}
    quiet = {
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(output_dir=str(folder), **(common | quiet | settings))


def rows(count: int = 16) -> list[dict[str, list[int]]]:
    drawn = torch.randint(16, (count, 8), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in drawn]


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def trained(mask: HalfMask) -> set[str]:
    return {name for name in mask if mask[name]}


@pytest.mark.filterwarnings("ignore::FutureWarning")
class TestTrainer:
    def test_the_half_is_chosen_before_the_optimizer_is_made(self, tmp_path: Path) -> None:
        model, selector = llama(), HalfSelector(seed=4)
        for stage in (0, 1):
            before = {n: p.clone() for n, p in model.named_parameters()}
            callback = HalfFineTuningCallback(selector, stage)
            trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[callback])
            trainer.train()
            assert callback.mask == selector.select(model, stage)
            assert moved(model, before) == trained(callback.mask)
            held = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
            assert held == callback.mask.trainable
            moments = [
                v for s in trainer.optimizer.state.values() for k, v in s.items() if k.startswith("exp_avg")
            ]
            assert sum(v.numel() * v.element_size() for v in moments) == 8 * callback.mask.trainable
            assert all(p.requires_grad for p in model.parameters())

    def test_equals_the_loop(self, tmp_path: Path) -> None:
        settings = {"weight_decay": 0.0, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}
        model = llama()
        loop = copy.deepcopy(model)
        callback = HalfFineTuningCallback(HalfSelector(seed=4), 0)
        data = rows(4)
        Trainer(model, arguments(tmp_path, **settings), train_dataset=data, callbacks=[callback]).train()
        whole = {name: torch.tensor([row[name] for row in data]) for name in data[0]}
        with half_finetuning(loop, HalfSelector(seed=4)) as mask:
            optimizer = torch.optim.AdamW(mask.parameters(loop), lr=1e-2, weight_decay=0.0)
            for _ in range(4):
                optimizer.zero_grad()
                loop(**whole).loss.backward()
                nn.utils.clip_grad_norm_(mask.parameters(loop), 1.0)
                optimizer.step()
        for p, q in zip(model.parameters(), loop.parameters(), strict=True):
            # the sampler orders the four rows anew, and Adam divides by small moments: a step is 1e-2
            torch.testing.assert_close(p, q, atol=1e-4, rtol=0)

    def test_too_late_or_with_a_full_optimizer(self, tmp_path: Path) -> None:
        model = llama()
        trainer = Trainer(model, arguments(tmp_path), train_dataset=rows())
        trainer.add_callback(HalfFineTuningCallback())
        with pytest.raises(ValueError, match="came too late"):
            trainer.train()
        full = torch.optim.AdamW(model.parameters())
        with pytest.raises(ValueError, match="already holds 18 frozen parameters"):
            Trainer(
                model,
                arguments(tmp_path),
                train_dataset=rows(),
                callbacks=[HalfFineTuningCallback()],
                optimizers=(full, None),
            )
        assert all(p.requires_grad for p in model.parameters())

    def test_one_trainer_trains_one_stage(self, tmp_path: Path) -> None:
        callback = HalfFineTuningCallback()
        trainer = Trainer(llama(), arguments(tmp_path), train_dataset=rows(), callbacks=[callback])
        trainer.train()
        with pytest.raises(ValueError, match=r"HalfFineTuningCallback\(selector, stage=1\)"):
            trainer.train()

    def test_resumes_from_a_checkpoint(self, tmp_path: Path) -> None:
        settings = {"save_strategy": "steps", "save_steps": 2}

        def run(folder: Path, resume: bool) -> nn.Module:
            trainer = Trainer(
                llama(),
                arguments(folder, **settings),
                train_dataset=rows(),
                callbacks=[HalfFineTuningCallback()],
            )
            trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2") if resume else None)
            return trainer.model

        whole, resumed = run(tmp_path / "a", False), run(tmp_path / "b", True)
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))

    def test_misuse(self) -> None:
        with pytest.raises(TypeError, match="selector must be"):
            HalfFineTuningCallback("category")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="stage must be"):
            HalfFineTuningCallback(stage=-1)


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefghijklmn"])}
    made = Tokenizer(WordLevel(words, unk_token="<eos>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
class TestTRL:
    quiet: ClassVar = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "save_strategy": "no",
    }

    def test_sft(self, tmp_path: Path) -> None:
        trl = pytest.importorskip("trl")
        from datasets import Dataset

        model = llama()
        before = {n: p.clone() for n, p in model.named_parameters()}
        callback = HalfFineTuningCallback()
        config = trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, learning_rate=1e-2, **self.quiet)
        data = Dataset.from_list([{"text": "a b c d e f"}, {"text": "b c d e f g"}] * 4)
        trl.SFTTrainer(
            model, args=config, train_dataset=data, processing_class=tokenizer(), callbacks=[callback]
        ).train()
        assert moved(model, before) == trained(callback.mask)

    def test_dpo_after_sft_with_a_reference_of_its_own(self, tmp_path: Path) -> None:
        trl = pytest.importorskip("trl")
        from datasets import Dataset

        model = llama()
        reference = copy.deepcopy(model)
        before = {n: p.clone() for n, p in model.named_parameters()}
        callback = HalfFineTuningCallback(HalfSelector(), stage=1)
        config = trl.DPOConfig(
            str(tmp_path),
            beta=0.1,
            use_cpu=True,
            bf16=False,
            learning_rate=1e-2,
            logging_steps=1,
            **self.quiet,
        )
        pairs = [
            {"prompt": "a b", "chosen": " c d", "rejected": " f e"},
            {"prompt": "c d", "chosen": " e f", "rejected": " a"},
        ]
        trainer = trl.DPOTrainer(
            model,
            ref_model=reference,
            args=config,
            train_dataset=Dataset.from_list(pairs * 4),
            processing_class=tokenizer(),
            callbacks=[callback],
        )
        trainer.train()
        assert moved(model, before) == trained(callback.mask)
        assert not moved(reference, before)
        margins = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
        assert margins[-1] > margins[0]

    def test_adapters_with_a_shared_reference_are_refused(self, tmp_path: Path) -> None:
        trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
        from datasets import Dataset

        config = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, **self.quiet)
        with pytest.raises(ValueError, match="before get_peft_model"):
            trl.DPOTrainer(
                llama(),
                args=config,
                train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2),
                processing_class=tokenizer(),
                peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]),
                callbacks=[HalfFineTuningCallback()],
            )


def test_state_is_unchanged_outside_the_half_after_bf16(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    before = state(model)
    with half_finetuning(model, HalfSelector()) as mask:
        optimizer = torch.optim.AdamW(mask.parameters(model), lr=1e-2)
        model(**batch()).loss.backward()
        optimizer.step()
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in mask.frozen)
    assert any(not torch.equal(before[name], after[name]) for name in trained(mask))
