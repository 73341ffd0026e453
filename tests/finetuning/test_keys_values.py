"""Keys against values: the memory view, training one side, and what a LoRA on it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
    Trainer,
    TrainingArguments,
)

from labkit.finetuning import (
    KeysOrValues,
    ffn_parts,
    lora_targets,
    target_modules,
    train_only,
    without_memory,
)
from labkit.testbeds.models import tiny

IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def make(name: str) -> PreTrainedModel:
    """A model whose weights, biases too, are random enough for every memory to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "gpt2":
            model = AutoModelForCausalLM.from_config(
                GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, **IDS)
            )
        elif name == "gptj":
            model = AutoModelForCausalLM.from_config(
                GPTJConfig(n_layer=2, n_embd=32, n_head=2, rotary_dim=8, vocab_size=50, **IDS)
            )
        elif name == "t5_gated":
            sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "vocab_size": 50}
            config = T5Config(
                **sizes, feed_forward_proj="gated-silu", decoder_start_token_id=0, dropout_rate=0.0
            )
            model = AutoModelForSeq2SeqLM.from_config(config)
        else:
            model = tiny(name, width=32, heads=2, vocab=50, layers=2)
        for p in model.parameters():
            p.data.add_(0.2 * torch.randn(p.shape))
    return model.eval()


def run(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(1, 13).view(2, 6)
    given = {"decoder_input_ids": ids + 20} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **given).logits


ALL = ["llama", "gpt_neox", "gpt2", "gptj", "t5", "t5_gated", "roberta", "phi3", "mixtral"]


@pytest.mark.parametrize("name", ALL)
def test_a_key_and_its_value_are_the_same_memory(name: str) -> None:
    model = make(name)
    whole = run(model)
    for memory in ffn_parts(model):
        for index in (0, 5, 31):
            experts = [2] if memory.experts else [None]
            for expert in experts:
                with without_memory(memory, index, expert=expert):
                    by_value = run(model)
                sides = ["keys", "key_gate", "key_up"] if memory.gated else ["keys"]
                for side in sides:
                    with without_memory(memory, index, by=side, expert=expert):
                        torch.testing.assert_close(run(model), by_value, atol=1e-5, rtol=0)
                if not memory.experts and not (name == "t5" and index == 31):
                    assert (by_value - whole).abs().max() > 1e-4
    assert torch.equal(run(model), whole)


def test_some_expert_uses_each_memory() -> None:
    model = make("mixtral")
    whole = run(model)
    for memory in ffn_parts(model):
        change = 0.0
        for expert in range(4):
            with without_memory(memory, 3, expert=expert):
                change = max(change, float((run(model) - whole).abs().max()))
        assert change > 1e-4


def test_value_i_is_what_key_i_writes() -> None:
    """FFN(h) = f(h K^T) V, spelled out from the matrices that `ffn_parts` names."""
    h = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    for name, path in (("llama", "mlp"), ("gpt2", "mlp"), ("gpt_neox", "mlp")):
        model = make(name)
        memory = ffn_parts(model)[1]
        module = model.get_submodule(memory.module)
        assert memory.module.endswith(path)

        def rows(param: nn.Parameter, flip: bool = memory.transposed) -> torch.Tensor:
            return param.T if flip else param

        fire = [h @ rows(k.param).T + memory.biases.get(k.name, torch.zeros(())) for k in memory.keys]
        activation = module.act_fn if name == "llama" else module.act
        coefficient = activation(fire[0]) * (fire[1] if memory.gated else 1)
        written = coefficient @ rows(memory.values.param).T + memory.biases.get(memory.values.name, 0)
        torch.testing.assert_close(module(h[None])[0], written, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "part", "count"),
    [
        ("llama", "key_gate", 1), ("llama", "key_up", 1), ("llama", "keys", 2), ("llama", "values", 1),
        ("t5", "keys", 1), ("t5", "values", 1), ("t5_gated", "key_up", 1), ("roberta", "keys", 1),
        ("roberta", "values", 1), ("gpt_neox", "keys", 1), ("gpt_neox", "values", 1), ("gpt2", "keys", 1),
        ("mixtral", "keys", 2), ("mixtral", "key_gate", 1), ("mixtral", "values", 1), ("phi3", "key_up", 1),
    ],
)  # fmt: skip
def test_one_side_is_trained_and_everything_comes_back(name: str, part: str, count: int) -> None:
    model = make(name)
    frozen = next(model.parameters()).requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stacks = 2 if name.startswith("t5") else 1
    memory = ffn_parts(model)[1]
    matrix = memory.values.param.numel() * count * stacks
    biases = (
        0 if part == "values" else sum(memory.biases[k.name].numel() for k in memory.keys if memory.biases)
    )
    with train_only(model, part, layers=[1]) as trained:
        assert trained.count == matrix + biases * stacks
        assert trained.total == sum(p.numel() for p in model.parameters())
        assert trained.names == [n for n, p in model.named_parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained.parameters, lr=0.1, weight_decay=0.0)
        ids = torch.arange(1, 41).view(4, 10)
        model(input_ids=ids, labels=ids).loss.backward()
        assert all((p.grad is None) == (n not in trained.names) for n, p in model.named_parameters())
        optimizer.step()
        state = sum(
            t.numel() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.dim()
        )
        assert state == 2 * sum(p.numel() for p in trained.parameters)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not frozen.requires_grad
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trained.names)
    for half_name, mask in trained.halves.items():
        half = dict(model.named_parameters())[half_name]
        change = (half - before[half_name]).detach().abs()
        assert change[..., mask[:, 0] == 0, :].max() == 0
        assert change[..., mask[:, 0] == 1, :].max() > 0


def test_the_gate_half_comes_first() -> None:
    """Only the gate's rows of a fused matrix go through the activation."""
    model = make("phi3")
    with train_only(model, "key_gate", layers=[0]) as trained:
        rows = trained.parameters[0].shape[0]
        assert trained.halves[trained.names[0]][:, 0].tolist() == [1.0] * (rows // 2) + [0.0] * (rows // 2)
    with train_only(model, "key_up", layers=[0]) as trained:
        assert trained.halves[trained.names[0]][:, 0].tolist() == [0.0] * (rows // 2) + [1.0] * (rows // 2)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_up_proj.weight[: rows // 2].zero_()  # silu(0) = 0 closes every gate
    assert mlp(torch.randn(1, 2, 32)).abs().max() == 0


def test_biases_may_stay() -> None:
    model = make("gpt_neox")
    with train_only(model, "keys", [0], biases=False) as trained:
        assert trained.names == ["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"]
    with train_only(model, "keys", [0]) as trained:
        assert trained.names[1] == "gpt_neox.layers.0.mlp.dense_h_to_4h.bias"


def test_flags_come_back_after_an_error_and_nest() -> None:
    model = make("llama")
    with pytest.raises(RuntimeError, match="stop"), train_only(model, "keys"):
        raise RuntimeError("stop")
    assert all(p.requires_grad for p in model.parameters())
    with train_only(model, "keys", [0]):
        with train_only(model, "values", [1]) as inner:
            assert inner.names == ["model.layers.1.mlp.down_proj.weight"]
        assert sum(p.requires_grad for p in model.parameters()) == 2


# ------------------------------------------------------------------------------------ LoRA


def test_target_modules_of_every_class() -> None:
    ends = {
        "llama": (["gate_proj", "up_proj"], "down_proj"),
        "gpt2": (["c_fc"], "c_proj"),
        "gptj": (["fc_in"], "fc_out"),
        "gpt_neox": (["dense_h_to_4h"], "dense_4h_to_h"),
        "t5": (["wi"], "wo"),
        "t5_gated": (["wi_0", "wi_1"], "wo"),
        "roberta": (["intermediate.dense"], "output.dense"),
    }
    for name, (keys, values) in ends.items():
        model = make(name)
        modules = dict(model.named_modules())
        found = target_modules(model, "keys", [1]), target_modules(model, "values", [1])
        stacks = 2 if name.startswith("t5") else 1
        assert [len(part) for part in found] == [len(keys) * stacks, stacks]
        assert all(any(m.endswith(k) for k in keys) for m in found[0])
        assert all(m.endswith(values) and "attention" not in m for m in found[1])
        assert set(found[0]) | set(found[1]) <= set(modules)


def test_the_papers_lora_has_equal_numbers_on_keys_and_values() -> None:
    """Exact for Llama-2-7B, without its weights."""
    peft = pytest.importorskip("peft")
    counts = {}
    for part in (None, "key_gate", "key_up", "values"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                LlamaConfig(num_hidden_layers=32, intermediate_size=11008)
            )
            targets = ["q_proj", "v_proj"] if part is None else lora_targets(model, part)
            config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=targets)
            adapted = peft.get_peft_model(model, config)
        counts[part] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert sum(p.numel() for n, p in adapted.named_parameters() if "lora_" not in n) == 6_738_415_616
    assert counts[None] == 4_194_304
    totals = {part: count for part, count in counts.items() if part}
    assert totals == dict.fromkeys(("key_gate", "key_up", "values"), 8_060_928)
    assert 8_060_928 - 4_194_304 == 32 * 8 * (4096 + 11008)


@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", ["q_proj", "v_proj"]), ("gpt_neox", ["query_key_value", "dense"]), ("gpt2", ["c_attn"]),
     ("t5", ["q", "v"]), ("roberta", ["query", "value"]), ("llama", [])],
)  # fmt: skip
def test_peft_adapts_exactly_the_targets(name: str, attention: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = make(name)
    targets = lora_targets(model, "values", attention)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    found = {
        n.split(".lora_A")[0].removeprefix("base_model.model.")
        for n, p in adapted.named_parameters()
        if "lora_A" in n
    }
    assert found == set(targets)
    per_layer = {"t5": 3 + 5, "llama": 2 * (1 + len(attention)), "gpt_neox": 6, "gpt2": 4, "roberta": 6}
    assert len(targets) == (2 * (3 + 5) if name == "t5" else per_layer[name])


# ------------------------------------------------------------------------------------ trainers


class Rows(torch.utils.data.Dataset):
    def __init__(self, n: int = 8) -> None:
        self.ids = torch.randint(1, 50, (n, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def arguments(folder: Any, **more: Any) -> TrainingArguments:
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "report_to": [], "save_strategy": "no"}
    settings |= {"use_cpu": True, "learning_rate": 1e-2, "weight_decay": 0.1, "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), **(settings | more))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "t5", "roberta"])
def test_one_object_restricts_the_trainer(name: str, tmp_path: Any) -> None:
    model = make(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    callback = KeysOrValues("keys", layers=[1])
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    assert callback.trained is not None
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in callback.trained.parameters}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p.cpu(), before[n])}
    assert moved == set(callback.trained.names)
    assert all(p.requires_grad for p in model.parameters())
    trainer.train()
    assert {n for n, p in model.named_parameters() if not torch.equal(p.cpu(), before[n])} == moved


def test_the_trainer_takes_the_steps_of_a_plain_loop(tmp_path: Any) -> None:
    one, other = make("llama"), make("llama")
    settings = {"lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0, "max_steps": 2}
    args = arguments(tmp_path, **settings, optim="adamw_torch", per_device_train_batch_size=8)
    Trainer(one, args, train_dataset=Rows(), callbacks=[KeysOrValues("values")]).train()
    ids = torch.stack([row["input_ids"] for row in Rows()])
    with train_only(other, "values") as trained:
        optimizer = torch.optim.AdamW(trained.parameters, lr=1e-2, weight_decay=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            other(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, atol=2e-5, rtol=0)


def test_trl_takes_the_same_object(tmp_path: Any) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from labkit.testbeds.tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer()
    model = tiny("llama", width=32, heads=2, vocab=len(tokenizer), layers=2, seed=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}
    settings |= {
        "use_cpu": True,
        "max_length": 16,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **settings),
        train_dataset=Dataset.from_dict({"text": ["keys choose", "values say"] * 4}),
        processing_class=tokenizer,
        callbacks=[KeysOrValues("key_gate")],
    )
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p.cpu(), before[n])}
    assert moved == {f"model.layers.{i}.mlp.gate_proj.weight" for i in (0, 1)}


def test_a_callback_that_comes_too_late_says_so(tmp_path: Any) -> None:
    model = make("llama")
    late = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Rows(), optimizers=(late, None))
    trainer.add_callback(KeysOrValues("values"))
    with pytest.raises(ValueError, match=r"the optimizer holds \d+ tensors besides the values.*constructor"):
        trainer.train()


def test_weight_decay_on_half_a_matrix_is_refused(tmp_path: Any) -> None:
    model = make("phi3")
    with pytest.raises(ValueError, match="weight_decay=0"):
        Trainer(
            model, arguments(tmp_path), train_dataset=Rows(), callbacks=[KeysOrValues("key_gate")]
        ).train()


# ------------------------------------------------------------------------------------ misuse


def _int8(model: PreTrainedModel) -> PreTrainedModel:
    linear = model.model.layers[0].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: target_modules(make("llama"), "key"), r"part must be one of 'keys', .*got 'key'"),
        (lambda: KeysOrValues("value"), r"part must be one of .*got 'value'"),
        (lambda: target_modules(make("gpt_neox"), "key_gate"), r"GPTNeoXForCausalLM has one matrix of keys .*part='keys'"),
        (lambda: target_modules(make("t5"), "key_up"), r"needs a gated feed-forward network"),
        (lambda: target_modules(make("llama"), "keys", [2]), r"layers holds 2; the model has layers 0 to 1"),
        (lambda: target_modules(make("llama"), "keys", []), r"layers is empty"),
        (lambda: target_modules(make("mixtral"), "values"), r"target_parameters=\['model.layers.0.mlp.experts.down_proj'"),
        (lambda: target_modules(make("phi3"), "key_gate"), r"no module of its own. Take part='keys'"),
        (lambda: target_modules(nn.Linear(2, 2), "keys"), r"Supported: Llama"),
        (lambda: lora_targets(make("gpt_neox"), "keys"), r"called q_proj, v_proj; there are dense, query_key_value"),
        (lambda: train_only(_int8(make("llama")), "values").__enter__(), r"down_proj.weight is quantised.*lora_targets"),
        (lambda: without_memory(ffn_parts(make("llama"))[0], 80).__enter__(), r"index must lie in 0..79 .*got 80"),
        (lambda: without_memory(ffn_parts(make("t5"))[0], 0, by="key_up").__enter__(), r"needs a gated network"),
        (lambda: without_memory(ffn_parts(make("llama"))[0], 0, by="gate").__enter__(), r"by must be one of"),
        (lambda: without_memory(ffn_parts(make("mixtral"))[0], 0).__enter__(), r"say which of 4 experts"),
        (lambda: without_memory(ffn_parts(make("llama"))[0], 0, expert=0).__enter__(), r"leave expert out"),
        (lambda: without_memory(ffn_parts(make("mixtral"))[0], 0, expert=4).__enter__(), r"expert must lie in 0..3"),
    ],
)  # fmt: skip
def test_misuse(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_one_name_is_no_list_of_names() -> None:
    with pytest.raises(TypeError, match="put it in a list"):
        lora_targets(make("llama"), "keys", "q_proj")
