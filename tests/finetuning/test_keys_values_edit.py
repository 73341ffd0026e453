"""Editing: by gradient, in closed form, and measuring it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from labkit.finetuning import (
    EditEvaluator,
    EditRequest,
    edit_by_gradient,
    ffn_parts,
    harmonic_mean,
    key_covariance,
    memory_trace,
    rome_edit,
    rome_update,
    target_log_probs,
    without_memory,
)
from labkit.finetuning.keys_values.requests import as_pair
from labkit.finetuning.keys_values.rome import last_subject_token
from labkit.testbeds.facts import FactsWorld, facts_model
from labkit.testbeds.models import tiny
from labkit.testbeds.tokenizers import byte_tokenizer

from .test_keys_values import make


@pytest.fixture(scope="module")
def world() -> FactsWorld:
    return FactsWorld(0, templates=2)


def requests(world: FactsWorld, rows: list[int]) -> list[EditRequest]:
    """Each fact gets the object of the next one that differs."""
    first, again = world.prompts(0), world.prompts(1)
    made = []
    for row in rows:
        old = int(world.objects[row])
        new = old + 1 if old < 169 else old - 1
        same = [i for i in (world.objects == old).nonzero()[:, 0].tolist() if i not in rows]
        made.append(
            EditRequest(
                first[row], [new], [old], world.facts[row, :1], [again[row]], [first[i] for i in same]
            )
        )
    return made


# ------------------------------------------------------------------------------------ probability


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "mixtral", "t5"])
def test_an_object_of_several_tokens_has_the_product_of_their_probabilities(name: str) -> None:
    model = make(name)
    pairs = [([1, 2, 3, 4, 5], [7, 8, 9]), ([6, 2], [11]), ([3], [12, 13])]
    with torch.no_grad():
        together, right = target_log_probs(model, pairs)
        for (prompt, target), got, hit in zip(pairs, together, right, strict=True):
            log_p, best = 0.0, True
            for i, token in enumerate(target):  # one call a token, no padding anywhere
                if model.config.is_encoder_decoder:
                    given = torch.tensor([[model.config.decoder_start_token_id, *target[:i]]])
                    logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=given).logits[0, -1]
                else:
                    logits = model(input_ids=torch.tensor([[*prompt, *target[:i]]])).logits[0, -1]
                log_p += float(logits.log_softmax(-1)[token])
                best &= int(logits.argmax()) == token
            assert float(got) == pytest.approx(log_p, abs=1e-4)
            assert bool(hit) == best


class Words:
    """A tokenizer that writes the space before a word as part of it, and closes texts with EOS."""

    eos_token_id = 2
    padding_side = "left"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [
            10 + sum(map(ord, word)) % 30 + (0 if i == 0 else 1)
            for i, word in enumerate(text.rstrip().split(" "))
        ]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def test_texts_are_cut_where_the_object_begins() -> None:
    prompt, target = as_pair("the tower is in", "Paris", Words())
    assert len(prompt) == 5
    assert prompt[0] == 1
    assert len(target) == 1
    spaced = as_pair("the tower is in ", " Paris", Words())
    assert spaced == (prompt, target)
    raw = as_pair("a b", "cd", byte_tokenizer())
    assert byte_tokenizer().decode([*raw.prompt, *raw.target]).endswith("a b cd")


def test_padding_side_of_a_tokenizer_does_not_matter() -> None:
    left, right = byte_tokenizer(), byte_tokenizer()
    left.padding_side, right.padding_side = "left", "right"
    model = tiny("llama", vocab=len(left), seed=0)
    texts = [EditRequest("x", "long object", "y"), EditRequest("a much longer prompt", "z", "other")]
    assert EditEvaluator(texts, left).details(model) == EditEvaluator(texts, right).details(model)
    losses = [edit_by_gradient(model, texts, "values", max_steps=1, tokenizer=t) for t in (left,)]
    losses[0].undo(model)
    again = edit_by_gradient(model, texts, "values", max_steps=1, tokenizer=right)
    assert losses[0].losses == again.losses


# ------------------------------------------------------------------------------------ by gradient


@pytest.mark.parametrize("part", ["key_gate", "values"])
def test_an_edit_moves_one_side_of_its_layers_until_the_model_says_so(world: FactsWorld, part: str) -> None:
    model = facts_model(0, templates=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    edits = requests(world, [3, 77, 250])
    evaluate = EditEvaluator(edits)
    start = evaluate(model)
    assert (start.efficacy, start.specificity, start.score) == (0.0, 1.0, 0.0)
    result = edit_by_gradient(model, edits, part, layers=[1, 2], lr=3e-3)
    assert result.converged
    assert result.steps < 200
    assert len(result.losses) == result.steps + 1
    assert result.losses[-1] < 0.05 < result.losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    end = "gate_proj" if part == "key_gate" else "down_proj"
    assert moved == {f"model.layers.{i}.mlp.{end}.weight" for i in (1, 2)} == set(result.names)
    after = evaluate(model)
    assert after.efficacy == 1.0
    assert after.score > 0.5
    assert 0 < result.change(model) < 1
    assert all(p.grad is None for p in model.parameters())
    result.undo(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert evaluate(model) == start


def test_the_steps_are_adams(world: FactsWorld) -> None:
    """Three steps against Adam by hand, on the values of one layer."""
    model, other = facts_model(1, templates=2), facts_model(1, templates=2)
    edits = requests(FactsWorld(1, templates=2), [5, 6])
    edit_by_gradient(model, edits, "values", [2], lr=1e-2, max_steps=3, tol=1e-9)
    weight = other.model.layers[2].mlp.down_proj.weight
    rows = torch.stack([torch.as_tensor(one.prompt) for one in edits])
    wanted = torch.tensor([one.new[0] for one in edits])
    m = v = torch.zeros_like(weight)
    for step in (1, 2, 3):
        loss = nn.functional.cross_entropy(other(rows).logits[:, -1], wanted)
        (gradient,) = torch.autograd.grad(loss, weight)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        with torch.no_grad():
            weight -= 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(model.model.layers[2].mlp.down_proj.weight, weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["t5", "t5_gated", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("part", ["keys", "values"])
def test_objects_of_several_tokens_are_learned_by_every_class(name: str, part: str) -> None:
    model = make(name).train()
    own = nn.Parameter(torch.zeros(1))
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    wish = EditRequest([4, 5, 6], new=[21, 22], true=[23, 24, 25])
    result = edit_by_gradient(model, wish, part, lr=2e-2, max_steps=40)
    assert result.losses[-1] < 0.3 * result.losses[0]
    assert EditEvaluator(wish)(model).efficacy == 1.0
    assert EditEvaluator(wish, measure="accuracy")(model).efficacy == 1.0
    assert model.training
    assert torch.equal(first.grad, torch.ones_like(first))
    assert own.grad is None


def test_an_edit_that_blows_up_is_taken_back() -> None:
    model = make("llama")
    before = [p.detach().clone() for p in model.parameters()]

    class Explode(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="lower lr"):
        edit_by_gradient(model, EditRequest([1], [2]), "keys", optimizer=lambda p, lr: Explode(p, lr))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_undo_knows_another_model(world: FactsWorld) -> None:
    result = edit_by_gradient(facts_model(0), requests(world, [1]), "values", [0], max_steps=1)
    with pytest.raises(ValueError, match="is not the model that was edited"):
        result.undo(make("gpt_neox"))


# ------------------------------------------------------------------------------------ measuring


class Oracle(PreTrainedModel):
    """A table of which token follows which, as a language model."""

    _supports_sdpa = True

    def __init__(self, table: dict[int, dict[int, float]]) -> None:
        super().__init__(tiny("llama", layers=1, vocab=50, attention="eager").config)
        self.table = table
        self.dummy = nn.Parameter(torch.zeros(1))

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        from types import SimpleNamespace

        logits = torch.zeros(*input_ids.shape, 50)
        for row, column in np.ndindex(*input_ids.shape):
            for token, value in self.table.get(int(input_ids[row, column]), {}).items():
                logits[row, column, token] = value
        return SimpleNamespace(logits=logits)


def test_scores_by_hand() -> None:
    model = Oracle({1: {20: 3, 10: 2}, 2: {20: 2, 10: 3}, 3: {10: 3}, 4: {20: 1}, 5: {30: 9, 20: 3, 10: 2}})
    first = EditRequest([1], [20], [10], paraphrases=[[2], [4]], neighbours=[[3], [9]])
    second = EditRequest([2], [20], [10], paraphrases=[[1]], neighbours=[[3], [2], [1]])
    third = EditRequest([5], [20], [10])
    evaluate = EditEvaluator([first, second, third])
    assert evaluate.details(model) == {
        "efficacy": [[True], [False], [True]],
        "paraphrase": [[False, True], [True], []],
        "specificity": [[True, False], [True, True, False], []],
    }
    scores = evaluate(model)
    assert scores.efficacy == pytest.approx(2 / 3)
    assert scores.paraphrase == pytest.approx(3 / 4)
    assert scores.specificity == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores.score == pytest.approx(3 / (3 / 2 + 4 / 3 + 12 / 7))
    assert EditEvaluator([first, second, third], batch=1)(model) == scores
    strict = EditEvaluator([first, third], measure="accuracy")(model)  # 30 is the first choice after 5
    assert (strict.efficacy, strict.paraphrase, strict.specificity) == (0.5, 0.5, 0.5)
    pairs = EditRequest([1], [20], neighbours=[([2], [10]), ([4], [10])])
    assert EditEvaluator(pairs, measure="accuracy")(model).specificity == 0.5


def test_nothing_is_divided_by_zero() -> None:
    assert harmonic_mean([0.0, 1.0, 1.0]) == 0.0
    assert harmonic_mean([1.0, 1.0, 1.0]) == 1.0
    assert math.isnan(harmonic_mean([math.nan, 0.0]))
    model = Oracle({1: {10: 3}})
    scores = EditEvaluator(EditRequest([1], [20], [10], paraphrases=[[1]], neighbours=[[1]]))(model)
    assert scores.as_dict() == {"efficacy": 0.0, "paraphrase": 0.0, "specificity": 1.0, "score": 0.0}
    assert math.isnan(EditEvaluator(EditRequest([1], [20], [10]))(model).score)


# ------------------------------------------------------------------------------------ closed form


def test_the_update_solves_the_constrained_problem() -> None:
    """Against the Karush-Kuhn-Tucker system of the minimisation, one output at a time."""
    generator = torch.Generator().manual_seed(0)
    weight, text = torch.randn(5, 7, generator=generator), torch.randn(40, 7, generator=generator)
    key, value = torch.randn(7, generator=generator), torch.randn(5, generator=generator)
    cov = text.T @ text / 40
    new = weight + rome_update(weight, key, value, cov)
    torch.testing.assert_close(new @ key, value, atol=1e-5, rtol=1e-5)
    for row in range(5):
        system = np.zeros((8, 8))
        system[:7, :7], system[:7, 7], system[7, :7] = 2 * cov.numpy(), key.numpy(), key.numpy()
        right = np.append(2 * cov.numpy() @ weight[row].numpy(), value[row].item())
        np.testing.assert_allclose(new[row].numpy(), np.linalg.solve(system, right)[:7], atol=1e-4)
    assert int(torch.linalg.matrix_rank(new - weight, atol=1e-4)) == 1


def test_a_singular_covariance_gets_a_ridge() -> None:
    key = torch.tensor([1.0, 1.0, 0.0])
    cov = torch.diag(torch.tensor([1.0, 4.0, 0.0]))  # the third key never fires
    update = rome_update(torch.zeros(2, 3), key, torch.tensor([1.0, 2.0]), cov)
    torch.testing.assert_close(update @ key, torch.tensor([1.0, 2.0]))
    ridge = 1e-2 * 5 / 3
    want = torch.tensor([1 / (1 + ridge), 1 / (4 + ridge), 0.0])
    torch.testing.assert_close(update[0], want / (want @ key), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_the_covariance_is_that_of_the_hidden_vectors(name: str) -> None:
    model = make(name)
    ids = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    memory = ffn_parts(model)[1]
    heard: list[torch.Tensor] = []
    second = model.get_submodule(memory.values.name.removesuffix(".weight"))
    handle = second.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    model(ids)
    handle.remove()
    k = heard[0].detach().flatten(0, 1).double()
    torch.testing.assert_close(key_covariance(model, 1, [ids[:1], ids[1:]]), k.T @ k / 18)
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], 1)
    mask = (padded > 0).long()
    batch = {"input_ids": padded, "attention_mask": mask, "labels": padded}
    torch.testing.assert_close(key_covariance(model, 1, [batch]), k.T @ k / 18, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_rome_writes_the_value_it_found_and_no_other_matrix(name: str) -> None:
    model = make(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.randint(1, 50, (20, 8), generator=torch.Generator().manual_seed(0))
    cov = key_covariance(model, 1, [ids])
    wish = EditRequest([3, 14, 15, 7], new=[26], true=[27])
    result = rome_edit(model, wish, 1, cov, place="last", max_steps=60)
    assert result.losses[-1] < 0.9 * result.losses[0]
    memory = ffn_parts(model)[1]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {memory.values.name} == set(result.names)
    with torch.no_grad():
        said = target_log_probs(model, [([3, 14, 15, 7], [26])])[0]
    # In the last layer what other tokens get does not reach the last one, so inserting v* exactly gives the loss that
    # the search ended with.
    assert -float(said) == pytest.approx(result.losses[-1], abs=1e-3)
    assert all(p.requires_grad for p in model.parameters())
    result.undo(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_prefixes_stand_behind_the_opening_token() -> None:
    model = make("llama")
    model.config.bos_token_id = 1
    cov = torch.eye(80, dtype=torch.float64)
    wish = EditRequest([1, 14, 7], new=[26], subject=[14])
    seen: list[torch.Tensor] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kw: seen.append(kw["input_ids"]), with_kwargs=True
    )
    rome_edit(model, wish, 0, cov, prefixes=[[30, 31]], max_steps=1)
    handle.remove()
    assert seen[0].tolist() == [[1, 14, 7, 26, 0, 0], [1, 30, 31, 14, 7, 26]]


def test_the_subject_is_found_where_it_stands() -> None:
    assert last_subject_token([5, 6, 5, 6, 7], [5, 6]) == 3
    with pytest.raises(ValueError, match=r"the subject \[8\] does not occur in the prompt"):
        last_subject_token([5, 6], [8])
    model = tiny("llama", vocab=len(byte_tokenizer()), seed=0)
    cov = torch.eye(160, dtype=torch.float64)
    wish = EditRequest("the tower is in", "Rome", subject="tower")
    result = rome_edit(model, wish, 1, cov, tokenizer=byte_tokenizer(), max_steps=3)
    assert result.steps == 3
    with pytest.raises(ValueError, match="the subject 'castle' does not occur in the prompt"):
        rome_edit(model, EditRequest("the tower", "x", subject="castle"), 1, cov, tokenizer=byte_tokenizer())


# ------------------------------------------------------------------------------------ looking


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "roberta", "mixtral", "t5"])
def test_the_trace_adds_up_to_what_the_network_writes(name: str) -> None:
    """Coefficients times values, all of them, is the network's output at the last token."""
    model = make(name)
    given = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    if name == "t5":
        given["decoder_input_ids"] = torch.tensor([[0, 9, 10]])
    parts = ffn_parts(model)
    heard: dict[int, torch.Tensor] = {}
    handles = []
    for number, memory in enumerate(parts):
        second = memory.module if memory.experts else memory.values.name.removesuffix(".weight")
        handles.append(
            model.get_submodule(second).register_forward_hook(
                lambda _m, _a, out, number=number: heard.__setitem__(number, out.detach())
            )
        )
    size = sum(m.values.param.numel() for m in parts)
    trace = memory_trace(model, given, top=size)
    for handle in handles:
        handle.remove()
    assert (trace.strength.diff() <= 0).all()
    for number, memory in enumerate(parts):
        total = torch.zeros(32)
        for place in (trace.memory[0] == number).nonzero()[:, 0].tolist():
            weight = memory.values.param.detach()
            weight = weight if not memory.experts else weight[int(trace.expert[0, place])]
            values = weight if memory.transposed else weight.T
            total += trace.coefficient[0, place] * values[int(trace.index[0, place])]
        out = heard[number].reshape(-1, 32)[-1]
        bias = memory.biases.get(memory.values.name)
        torch.testing.assert_close(total, out if bias is None else out - bias.detach(), atol=1e-4, rtol=1e-4)


def test_the_last_real_token_counts_whatever_the_padding() -> None:
    model = make("llama")
    row = [5, 6, 7]
    alone = memory_trace(model, torch.tensor([row]), top=5)
    right = {"input_ids": torch.tensor([[*row, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    left = {"input_ids": torch.tensor([[0, 0, *row]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    left["position_ids"] = torch.tensor([[0, 0, 0, 1, 2]])
    for padded in (right, left):
        trace = memory_trace(model, padded, top=5)
        assert torch.equal(trace.index, alone.index)
        torch.testing.assert_close(trace.coefficient, alone.coefficient, atol=1e-5, rtol=1e-4)


def test_promoted_tokens_are_the_norm_and_head_of_what_is_written(world: FactsWorld) -> None:
    model = facts_model(0, templates=2)
    trace = memory_trace(model, world.prompts()[9:11], top=4, tokens=3)
    memory = ffn_parts(model)[int(trace.memory[1, 2])]
    assert memory.layer == int(trace.layer[1, 2])
    value = memory.values.param[:, int(trace.index[1, 2])] * trace.coefficient[1, 2]
    scaled = value / (value.square().mean() + model.config.rms_norm_eps).sqrt() * model.model.norm.weight
    assert (model.lm_head.weight @ scaled).topk(3).indices.tolist() == trace.tokens[1, 2].tolist()
    frame = trace.to_frame(1, word=lambda t: f"<{t}>")
    assert len(frame) == 4
    assert frame.promotes[2].startswith(f"<{trace.tokens[1, 2, 0]}>")


def test_strong_memories_change_the_answer_and_weak_ones_do_not(world: FactsWorld) -> None:
    model = facts_model(0, templates=2)
    changes = []
    for row in range(0, 40, 4):
        ids = world.prompts()[row : row + 1]
        trace = memory_trace(model, ids, top=4 * 176)
        with torch.no_grad():
            whole = model(ids).logits[0, -1]
            for place in (0, -1):
                memory = ffn_parts(model)[int(trace.memory[0, place])]
                with without_memory(memory, int(trace.index[0, place])):
                    changes.append(float((model(ids).logits[0, -1] - whole).abs().max()))
    strongest, weakest = np.mean(changes[::2]), np.mean(changes[1::2])
    assert strongest > 20 * weakest


# ------------------------------------------------------------------------------------ misuse

OK = EditRequest([1, 2], [3], [4], subject=[2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: EditRequest([], [3]), "prompt is empty"),
        (lambda m: EditRequest([1], []), "new is empty"),
        (lambda m: EditRequest([1], [3], torch.tensor([3])), r"new and true object are the same"),
        (lambda m: EditRequest([1], "Rome", "Rome"), r"new and true object are the same \('Rome'\)"),
        (lambda m: edit_by_gradient(m, OK, "keys", lr=0), r"lr must be a positive number, got 0"),
        (lambda m: edit_by_gradient(m, OK, "keys", tol=math.nan), r"tol must be a positive number"),
        (lambda m: edit_by_gradient(m, OK, "keys", max_steps=0), r"max_steps must be .*got 0"),
        (lambda m: edit_by_gradient(m, [], "keys"), r"there are no requests"),
        (lambda m: edit_by_gradient(m, EditRequest([99], [3]), "keys"), r"token id 99 lies outside .* of 50"),
        (lambda m: edit_by_gradient(m, EditRequest("a", "b"), "keys"), r"'a' is a text: give the model's tokenizer"),
        (lambda m: edit_by_gradient(make("roberta"), OK, "keys"), r"RobertaForMaskedLM does not generate"),
        (lambda m: edit_by_gradient(make("gpt_neox"), OK, "key_up"), r"needs a gated feed-forward network"),
        (lambda m: EditEvaluator(OK, measure="exact"), r"measure must be 'comparison' or 'accuracy'"),
        (lambda m: EditEvaluator(OK, batch=0), r"batch must be"),
        (lambda m: EditEvaluator([OK, EditRequest([1], [2])]), r"request 1 has no true object"),
        (lambda m: rome_edit(m, EditRequest([1], [2]), 0, torch.eye(80)), r"needs the request's subject"),
        (lambda m: rome_edit(m, OK, 0, torch.eye(80), place="first"), r"place must be 'subject' or 'last'"),
        (lambda m: rome_edit(m, OK, 2, torch.eye(80)), r"layers holds 2; the model has layers 0 to 1"),
        (lambda m: rome_edit(m, OK, 0, torch.eye(3)), r"cov \(80, 80\); got \(80,\), \(32,\) and \(3, 3\)"),
        (lambda m: rome_edit(m, OK, 0, torch.full((80, 80), math.nan)), r"cov holds values that are not finite"),
        (lambda m: rome_edit(make("mixtral"), OK, 0, torch.eye(80)), r"has experts, which write together"),
        (lambda m: rome_edit(make("t5"), OK, 0, torch.eye(80)), r"is no decoder-only model"),
        (lambda m: rome_update(torch.eye(2), torch.zeros(2), torch.ones(2), torch.eye(2)), r"the key is zero"),
        (lambda m: key_covariance(m, 0, []), r"batches holds no tokens"),
        (lambda m: memory_trace(m, torch.tensor([[1]]), top=0), r"top must be"),
        (
            lambda m: memory_trace(
                m, {"input_ids": torch.ones(2, 2).long(), "attention_mask": torch.tensor([[1, 1], [0, 0]])}
            ),
            r"row 1 of attention_mask has no real token",
        ),
        (lambda m: harmonic_mean([]), r"values must be shares"),
    ],
)  # fmt: skip
def test_misuse_is_refused_before_anything_happens(call: Any, message: str) -> None:
    model = make("llama")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: edit_by_gradient(nn.Linear(2, 2), OK, "keys"), "must be a transformers PreTrainedModel"),
        (lambda: edit_by_gradient(make("llama"), "Rome", "keys"), "must be an EditRequest or a sequence"),
        (lambda: edit_by_gradient(make("llama"), [OK, "x"], "keys"), "must hold EditRequest, got str"),
        (lambda: as_pair("a", [1]), "both as texts or both as token ids"),
    ],
)
def test_wrong_types(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_quantised_weights_are_refused() -> None:
    model = make("llama")
    linear = model.model.layers[0].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"is quantised \(torch.int8\).*lora_targets"):
        edit_by_gradient(model, OK, "values")
    with pytest.raises(ValueError, match="is quantised"):
        rome_edit(model, OK, 0, torch.eye(80))
