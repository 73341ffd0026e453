"""The reward model, its losses and its batches."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainingArguments

from labkit.rlhf import ThemisCollator, ThemisLoss, ThemisRewardModel, ThemisTrainer, TraceFormat
from labkit.rlhf.themis import FAILED, PARTS, SPECIAL_TOKENS, ranking_loss
from labkit.testbeds.models import tiny

from .conftest import byte_tokenizer, row

ROWS = [row(), row("1999-12-31", "Friday", "Monday", context="The last day.")]
FAMILIES = ["llama", "gpt2", "gpt_neox", "mixtral"]


def made(family, **config):
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)  # of the head
    if family == "gpt2":  # positions are learned, so that padding on the left would show
        shape = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 1024, "vocab_size": len(tokenizer)}
        base = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=1))
    else:
        shape = {"width": 32, "heads": 2, "vocab": len(tokenizer), "max_position_embeddings": 1024}
        base = tiny(family, seed=0, **shape, **config)
    return ThemisRewardModel.from_causal_lm(base, tokenizer).eval(), tokenizer


# ------------------------------------------------------------------------------------------- losses


def test_ranking_loss():
    chosen, rejected = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    by_hand = -(torch.sigmoid(chosen - rejected).log()).mean()
    assert torch.allclose(ranking_loss(chosen, rejected), by_hand)
    with pytest.raises(ValueError, match="better and"):
        ranking_loss(chosen, rejected[:1])


def language_case():
    torch.manual_seed(1)
    logits, labels = torch.randn(2, 7, 5), torch.randint(5, (2, 7))
    labels[0, :3] = -100
    parts = torch.tensor([[0, 0, 0, 2, 3, 3, 4], [1, 1, 2, 2, 3, 4, 4]])
    each = -logits.log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
    counts = labels[:, 1:] != -100
    return logits, labels, parts, each, counts, parts[:, 1:]


def test_the_codes_loss_by_hand():
    logits, labels, parts, each, counts, kind = language_case()
    found = ThemisLoss().language(logits, labels, parts)
    assert torch.allclose(found["lm_loss"], each[counts].mean())
    assert torch.allclose(found["observation"], each[counts & (kind == 3)].mean())
    without = ThemisLoss(beta=0).language(logits, labels, parts)["lm_loss"]
    assert torch.allclose(without, each[counts & (kind != 3)].mean())
    without = ThemisLoss(omega=0, beta=0).language(logits, labels, parts)["lm_loss"]
    assert torch.allclose(without, each[counts & (kind < 3)].mean())
    assert torch.allclose(
        ThemisLoss(lm_weight=2, rm_weight=3).total(torch.tensor(1.0), torch.tensor(5.0)), torch.tensor(17.0)
    )


def test_the_papers_loss_by_hand():
    logits, labels, parts, each, counts, kind = language_case()
    part = [each[counts & mask].mean() for mask in (kind < 3, kind == 3, kind == 4)]
    loss = ThemisLoss("paper", alpha=0.7, beta=0.2, omega=0.4)
    lm = loss.language(logits, labels, parts)["lm_loss"]
    assert torch.allclose(lm, 0.7 * (part[0] + 0.2 * part[1] + 0.4 * part[2]))
    assert torch.allclose(loss.total(lm, torch.tensor(2.0)), lm + 2)
    plain = ThemisLoss("paper", alpha=0)
    assert plain.language(logits, labels, parts)["lm_loss"] == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"form": "sum"}, "form must be 'code' or 'paper'"),
        ({"beta": 0.5}, "beta must be 0 or 1"),
        ({"alpha": -1}, "alpha must be a number of at least 0"),
        ({"rm_weight": "x"}, "rm_weight must be a number"),
    ],
)
def test_bad_loss(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ThemisLoss(**kwargs)
    with pytest.raises(ValueError, match="do not belong together"):
        ThemisLoss().language(torch.zeros(1, 3, 4), torch.zeros(1, 2).long())


# ------------------------------------------------------------------------------------------- batches


def test_a_batch_holds_the_written_text(tokenizer, model):
    batch = ThemisCollator(tokenizer)(ROWS)
    assert batch["input_ids"].shape[0] == 4
    form = TraceFormat()
    for place, (pair, which) in enumerate([(0, "pos"), (1, "pos"), (0, "neg"), (1, "neg")]):
        ids = batch["input_ids"][place][batch["attention_mask"][place].bool()]
        side = ROWS[pair][f"{which}_answer"]
        text = tokenizer.decode(ids)
        assert text.startswith(form.prompt(ROWS[pair]["question"], side["answer"], ROWS[pair].get("context")))
        assert text.endswith(f"<start_work> Work: {side['score_agent']['explanation']}</s>")
        assert ids[-1] == tokenizer.eos_token_id


def test_labels_say_which_part_a_token_is_of(tokenizer, model):
    batch = ThemisCollator(tokenizer)(ROWS[:1])

    def read(place, part):
        where = batch["parts"][place] == PARTS.index(part)
        return tokenizer.decode(batch["input_ids"][place][where & (batch["labels"][place] != -100)])

    for place in (0, 1):
        assert read(place, "observation") == "<start_observation> Observation: Tuesday\n"
        assert read(place, "tool").startswith("<start_tool> Thought: I need to search")
        assert read(place, "tool").endswith("Action Input: 2015-03-24\n")
        assert read(place, "rationale") == "<start_work> Work: The tool says Tuesday.</s>"
    assert read(0, "answer") == "Answer: 2015-03-24 is Tuesday"
    assert read(1, "answer") == ""
    plain = ThemisCollator(tokenizer, imitate=False)(ROWS[:1])
    learned = plain["labels"] != -100
    assert not (learned & (plain["parts"] == PARTS.index("answer"))).any()
    assert (batch["labels"][learned] == batch["input_ids"][learned]).all()


def test_dropped_observations(tokenizer, model):
    text = tokenizer.batch_decode(ThemisCollator(tokenizer, drop_observation=1.0)(ROWS)["input_ids"])
    assert all(FAILED in one for one in text)
    assert not any("cannot tell" in line for line in text)
    told = ThemisCollator(tokenizer, drop_observation=1.0, failed_rationale="I cannot tell.")
    assert all("Work: I cannot tell." in line for line in tokenizer.batch_decode(told(ROWS)["input_ids"]))
    whole = ThemisCollator(tokenizer, failed_rationale="I cannot tell.")
    assert not any("cannot tell" in line for line in tokenizer.batch_decode(whole(ROWS)["input_ids"]))
    half = ThemisCollator(tokenizer, drop_observation=0.5, seed=1)
    seen = [FAILED in one for _ in range(10) for one in tokenizer.batch_decode(half(ROWS)["input_ids"])]
    assert 8 < sum(seen) < 32
    again = ThemisCollator(tokenizer, drop_observation=0.5, seed=1)
    assert seen == [
        FAILED in one for _ in range(10) for one in tokenizer.batch_decode(again(ROWS)["input_ids"])
    ]


def test_repeatable_draws_hang_on_the_batch_alone(tokenizer, model):
    rows = [row(f"2015-03-{day:02}") for day in range(1, 31)]

    def failed(collate, some):
        return [FAILED in one for one in tokenizer.batch_decode(collate.repeatable(some)["input_ids"])]

    collate, another = (ThemisCollator(tokenizer, drop_observation=0.3, seed=4) for _ in range(2))
    batches = [rows[:10], rows[10:20], rows[20:]]
    seen = [failed(collate, some) for some in batches]
    assert [failed(another, some) for some in batches[::-1]] == seen[::-1]
    assert len({tuple(one) for one in seen}) == 3
    assert failed(collate, rows[1:10]) != seen[0][1:10] + seen[0][11:20]
    assert failed(ThemisCollator(tokenizer, drop_observation=0.3, seed=5), rows[:10]) != seen[0]
    rate = sum(sum(failed(collate, [one] * 4)) for one in rows) / (8 * len(rows))
    assert abs(rate - 0.3) < 0.1
    with pytest.raises(ValueError, match="without 'neg_answer'"):
        collate.repeatable([{"question": "?", "pos_answer": rows[0]["pos_answer"]}])


def test_a_long_text_keeps_its_end(tokenizer, model):
    batch = ThemisCollator(tokenizer, max_length=60)(ROWS)
    assert batch["input_ids"].shape == (4, 60)
    assert (batch["input_ids"][:, -1] == tokenizer.eos_token_id).all()


def test_bad_batches(tokenizer):
    with pytest.raises(ValueError, match="lacks <start_tool>, <start_observation>, <start_work>"):
        ThemisCollator(byte_tokenizer())
    made("llama")
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        ThemisCollator(tokenizer, drop_observation=2)
    with pytest.raises(ValueError, match="at least 8 tokens"):
        ThemisCollator(tokenizer, max_length=2)
    with pytest.raises(ValueError, match="at least one row"):
        ThemisCollator(tokenizer)([])


# ------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("family", FAMILIES)
def test_forward(family):
    model, tokenizer = made(family)
    batch = ThemisCollator(tokenizer)(ROWS)
    out = model(**batch)
    assert out.rewards.shape == (4,)
    assert out.logits.shape == (
        *batch["input_ids"].shape,
        model.causal_lm.get_input_embeddings().weight.shape[0],
    )
    assert torch.allclose(out.rm_loss, -F.logsigmoid(out.rewards[:2] - out.rewards[2:]).mean())
    assert torch.allclose(out.loss, out.lm_loss + 0.5 * out.rm_loss)
    reference = model.causal_lm(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"],
        position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0),
    )  # fmt: skip
    assert torch.allclose(
        out.lm_loss, F.cross_entropy(reference.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_changes_nothing(family, pooling):
    model, tokenizer = made(family)
    model.pooling = pooling
    texts = ["Question: a\nAnswer: b</s>", "Question: what day is it?\nAnswer: Tuesday</s>"]
    alone = [model(tokenizer(text, return_tensors="pt").input_ids).rewards for text in texts]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        assert torch.allclose(
            model(batch.input_ids, batch.attention_mask).rewards, torch.cat(alone), atol=1e-5
        )


def test_new_rows_start_at_the_mean():
    tokenizer = byte_tokenizer()
    base = tiny("llama", width=32, heads=2, vocab=len(tokenizer), seed=0)
    before = base.get_input_embeddings().weight.detach().clone()
    model = ThemisRewardModel.from_causal_lm(base, tokenizer)
    after = model.causal_lm.get_input_embeddings().weight
    assert after.shape[0] == len(tokenizer) == len(before) + 3
    assert torch.equal(after[:-3], before)
    assert torch.allclose(after[-3:], before.mean(0).expand(3, -1))
    assert tokenizer.padding_side == "left"
    rows = (
        ThemisRewardModel.from_causal_lm(model.causal_lm, tokenizer)
        .causal_lm.get_input_embeddings()
        .weight.shape[0]
    )
    assert rows == len(tokenizer)  # twice is once


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_read(family, tmp_path):
    model, tokenizer = made(family)
    model.pooling, model.loss = "mean", ThemisLoss("paper", beta=0.3)
    batch = ThemisCollator(tokenizer)(ROWS)
    model.save_pretrained(tmp_path, tokenizer)
    again = ThemisRewardModel.from_pretrained(tmp_path).eval()
    assert torch.equal(model(**batch).loss, again(**batch).loss)
    assert (again.pooling, again.loss) == ("mean", ThemisLoss("paper", beta=0.3))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain.get_input_embeddings().weight, model.causal_lm.get_input_embeddings().weight)
    with pytest.raises(FileNotFoundError, match=r"no themis\.json"):
        ThemisRewardModel.from_pretrained(tmp_path / "none")


def test_with_lora(tmp_path):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = made("llama")
    model.causal_lm.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "embed_tokens"])
    lora = ThemisRewardModel(get_peft_model(base, config))
    batch = ThemisCollator(tokenizer)(ROWS)
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    first = lora(**batch).loss
    for _ in range(3):
        optimizer.zero_grad()
        lora(**batch).loss.backward()
        optimizer.step()
    lora.eval()
    after = lora(**batch)
    assert after.loss < first
    lora.save_pretrained(tmp_path / "adapter", tokenizer)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = ThemisRewardModel.from_pretrained(tmp_path / "adapter").eval()
    assert torch.allclose(again(**batch).rewards, after.rewards, atol=1e-6)
    assert torch.allclose(again(**batch).loss, after.loss, atol=1e-6)


def test_bad_calls(model, tokenizer):
    ids = torch.ones(3, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="a batch of 3 holds no pairs"):
        model(ids, labels=ids)
    with pytest.raises(ValueError, match="is not like"):
        model(ids, torch.ones(3, 4))
    with pytest.raises(ValueError, match="no attended token"):
        model(ids, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="pooling must be"):
        ThemisRewardModel(model.causal_lm, pooling="first")
    with pytest.raises(TypeError, match="with an LM head"):
        ThemisRewardModel(tiny("llama", head="base"))


# ------------------------------------------------------------------------------------------- trainer


def arguments(folder, **more):
    common = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "report_to": "none"}
    return TrainingArguments(
        output_dir=str(folder),
        logging_steps=2,
        save_steps=3,
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **common | more,
    )


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_trainer_learns_and_resumes(tmp_path, drop):
    def trainer(folder, **more):
        model, tokenizer = made("llama")
        collator = ThemisCollator(tokenizer, drop_observation=drop)
        return ThemisTrainer(model, arguments(folder, **more), collator, train_dataset=ROWS * 4)

    whole = trainer(tmp_path / "a")
    whole.train()
    log = [entry for entry in whole.state.log_history if "rm_loss" in entry]
    assert {"lm_loss", "rm_loss", "tool_loss", "observation_loss", "rationale_loss", "accuracy"} <= set(
        log[0]
    )
    assert log[-1]["lm_loss"] < log[0]["lm_loss"]
    for entry in log:
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + 0.5 * entry["rm_loss"], abs=2e-3)
    settings = json.loads((tmp_path / "a/checkpoint-3/themis.json").read_text())
    assert settings["pooling"] == "last"
    resumed = trainer(tmp_path / "a")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.allclose(tensor, resumed.model.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize("lora", [False, True])
def test_trainer_loads_the_best_model_at_its_end(tmp_path, lora):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = made("llama")
    if lora:
        model = ThemisRewardModel(get_peft_model(model.causal_lm, LoraConfig(r=4, target_modules=["q_proj"])))
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best model is not the last
    )
    trainer = ThemisTrainer(model, args, ThemisCollator(tokenizer), train_dataset=ROWS * 4, eval_dataset=ROWS)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    ends = [load_file(tmp_path / f"checkpoint-{n}/v_head.safetensors")["weight"] for n in (3, 6)]
    assert torch.equal(model.v_head.weight, ends[0])
    assert not torch.equal(*ends)
    batch = ThemisCollator(tokenizer)(ROWS)
    base = made("llama")[0].causal_lm if lora else None
    best = ThemisRewardModel.from_pretrained(tmp_path / "checkpoint-3", base).eval()
    assert torch.allclose(model.eval()(**batch).loss, best(**batch).loss, atol=1e-6)


def test_accumulated_batches_are_a_mean(tmp_path):
    def after(**more):
        model, tokenizer = made("llama")
        args = arguments(
            tmp_path / "x", max_steps=1, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", **more
        )
        ThemisTrainer(model, args, ThemisCollator(tokenizer), train_dataset=[ROWS[0]] * 4).train()
        return model.v_head.weight.detach()

    one = after(per_device_train_batch_size=4)
    two = after(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert torch.allclose(one, two, atol=1e-6)


def test_bad_trainer(model, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="must be a ThemisRewardModel"):
        ThemisTrainer(model.causal_lm, arguments(tmp_path), ThemisCollator(tokenizer))
    with pytest.raises(TypeError, match="must be a ThemisCollator"):
        ThemisTrainer(model, arguments(tmp_path), None)
