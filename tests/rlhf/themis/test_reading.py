"""Reading on from a cache: the same traces and rewards as reading everything again, and fewer tokens read."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, LogitsProcessorList

from labkit.rlhf import Calendar, ThemisRewardModel, ToolBank, run_trace, run_traces
from labkit.rlhf.themis.traces import Example
from labkit.testbeds import tool_questions
from labkit.testbeds.models import tiny

from .conftest import byte_tokenizer

CALL = " Thought: look {}\nAction: Calendar.week_day\nAction Input: 2015-03-24\n<start_observation>"
LATER = "<start_tool> Thought: add{}\nAction: Calendar.target_day\nAction Input: 2015-03-20, 4\n<start_observation>"
SCRIPTS = {
    "one": [CALL, "<start_work> Work: It is{}.</s>"],
    "a longer question with two calls": [CALL, LATER, "<start_work> Work: Done{}.</s>"],
    "three": [CALL, LATER, LATER, " Work:{} Enough.</s>"],
    "none": [" Thought: {}\nFinished.</s>", " Work: Plain{}.</s>"],
    "at once": ["<start_work> Work:{}</s>"],
    "nonsense": [" Thought:{} hm</s>"],
    "late nonsense": [CALL, " hm{}</s>"],
    "unknown": [
        " Thought:{}\nAction: Oracle\nAction Input: all\n<start_observation>",
        "<start_work> Work:{}.</s>",
    ],
}
EXAMPLES = [Example(question, "Tuesday " * (1 + number % 3)) for number, question in enumerate(SCRIPTS)]
CHOSEN = 3  # tokens of its own that a model writes at {}


class Dictate(LogitsProcessor):
    """Lets a model write a script, but choose some of its tokens itself."""

    def __init__(self, scripts, width, free):
        self.scripts, self.width, self.free = scripts, width, free

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -torch.inf)
        for row, script in enumerate(self.scripts):
            place = input_ids.shape[1] - self.width
            wanted = script[min(place, len(script) - 1)]
            allowed = self.free if wanted is None else [wanted]
            out[row, allowed] = scores[row, allowed]
        return out


class Dictated(ThemisRewardModel):
    """A real model with a real cache that follows a script."""

    def prepare(self, tokenizer, free):
        self.tokenizer, self.free, self.reads = tokenizer, free, 0
        self.causal_lm.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def _count(self, module, args, kwargs):
        self.reads += kwargs["input_ids"].numel()

    def generate(self, input_ids, attention_mask, **options):
        scripts = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = self.tokenizer.decode(ids[mask.bool()])
            question = text.partition("Question: ")[2].partition("\n")[0]
            before, free, after = SCRIPTS[question][
                text.count("<start_observation>") + text.endswith("<start_work>") * (question == "none")
            ].partition("{}")
            pieces = [self.tokenizer(part, add_special_tokens=False).input_ids for part in (before, after)]
            scripts.append(pieces[0] + [None] * CHOSEN * bool(free) + pieces[1])
        hand = LogitsProcessorList([Dictate(scripts, input_ids.shape[1], self.free)])
        return super().generate(
            input_ids=input_ids, attention_mask=attention_mask, logits_processor=hand, **options
        )


def made(family="llama", words="words", adapter=None, pooling="last", **config):
    if words == "words":
        known = [
            CALL,
            LATER,
            "### USER:\nQuestion: Answer: Tuesday Tuesday\n### ASSISTANT:\n red green blue Observation: Friday",
        ]
        known += ["There is no tool 'Oracle'. Tools: Calendar.week_day, Calendar.day_difference."]
        tokenizer = tool_questions.word_tokenizer(
            known
            + [p for s in SCRIPTS.values() for p in s]
            + [f"Question: {q}\nAnswer: Tuesday" for q in SCRIPTS]
        )
        free = tokenizer(" red green blue").input_ids
    else:
        tokenizer = byte_tokenizer()
        # Bytes from 128 on are no text by themselves: what is decoded from them is other tokens when it is read again.
        letters = "abcdefg" if words == "bytes" else "ÃãÂ³ÿ"
        free = tokenizer.convert_tokens_to_ids(list(letters))
        assert len(set(free)) > 3
    torch.manual_seed(0)
    if family == "gpt2":
        shape = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 1024, "vocab_size": len(tokenizer)}
        base = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=1))
    else:
        base = tiny(
            family,
            width=32,
            heads=2,
            vocab=len(tokenizer),
            seed=0,
            max_position_embeddings=1024,
            init=0.3,
            **config,
        )
    model = Dictated.from_causal_lm(base, tokenizer, pooling=pooling)
    if adapter:
        from peft import LoraConfig, get_peft_model

        lora = get_peft_model(
            model.causal_lm, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        model = Dictated(lora, pooling)
    return model.prepare(tokenizer, free).eval(), tokenizer


def judged(model, tokenizer, **options):
    model.reads = 0
    bank = ToolBank([Calendar()])
    traces = run_traces(model, tokenizer, bank, EXAMPLES, max_new_tokens=150, **options)
    return traces, model.reads, bank.counts


def assert_same(model, tokenizer, **options):
    again, all_reads, counts = judged(model, tokenizer, reuse_cache=False, **options)
    found, reads, found_counts = judged(model, tokenizer, **options)
    for one, other in zip(found, again, strict=True):
        assert (one.text, one.steps, one.rationale, one.finished) == (
            other.text, other.steps, other.rationale, other.finished
        )  # fmt: skip
        assert one.reward == pytest.approx(other.reward, abs=1e-5)
        ids = tokenizer(one.text + "</s>", return_tensors="pt", add_special_tokens=False).input_ids
        assert one.reward == pytest.approx(model(ids).rewards.item(), abs=1e-5)
    assert counts == found_counts
    return found, reads / all_reads


@pytest.mark.parametrize(
    ("words", "batch_size"), [("words", 1), ("words", 3), ("words", 16), ("bytes", 3), ("unstable", 8)]
)
def test_same_with_and_without(words, batch_size):
    model, tokenizer = made(words=words)
    traces, share = assert_same(model, tokenizer, batch_size=batch_size)
    assert [len(trace.steps) for trace in traces] == [1, 2, 3, 1, 0, 0, 1, 1]
    assert [trace.finished for trace in traces] == [*["work"] * 5, "malformed", "malformed", "work"]
    assert len({trace.text.partition("look")[2][: CHOSEN + 1] for trace in traces}) > 1 or words == "words"
    if words == "unstable":
        assert any("\ufffd" in trace.text for trace in traces)
    assert share < (0.9 if words == "unstable" else 0.75)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mixtral", "qwen3"])
def test_families(family):
    _, share = assert_same(*made(family))
    assert share < 0.75


def test_with_an_adapter():
    model, tokenizer = made(adapter="lora")
    _, share = assert_same(model, tokenizer)
    assert share < 0.75


def test_other_ways_to_judge():
    model, tokenizer = made()
    for options in ({"max_rounds": 1}, {"rationale": False, "max_rounds": 2}, {"repetition_penalty": 1.5}):
        assert_same(model, tokenizer, **options)
    model.train()
    tokenizer.padding_side = "right"
    assert_same(model.eval(), tokenizer)
    assert tokenizer.padding_side == "right"


def test_pooling_over_all_tokens_reads_them_all_once_more():
    _, share = assert_same(*made(pooling="mean"))
    assert share < 0.9


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"family": "mistral", "sliding_window": 24}, {}),
        ({}, {"num_beams": 2}),
        ({}, {"use_cache": False}),
        ({}, {"cache_implementation": "static", "disable_compile": True}),
    ],
)
def test_caches_that_cannot_be_continued_are_not(config, options):
    _, share = assert_same(*made(**config), **options)
    assert share == 1


@pytest.mark.parametrize("batch_size", [1, 8])
def test_positions_end(batch_size):
    """Learned positions: one token too many would be an error of the embedding."""
    model, tokenizer = made("gpt2")
    whole, _, _ = judged(model, tokenizer)
    length = [len(tokenizer(trace.text + "</s>").input_ids) for trace in whole]
    prompts = [len(tokenizer(trace.text.partition("<start_tool>")[0]).input_ids) for trace in whole]
    base = model.causal_lm
    ends = set()
    for limit in (max(length), max(length) - 1, sorted(length)[-2], sorted(length)[3], max(prompts) + 3):
        base.config.n_positions = limit
        base.transformer.wpe = torch.nn.Embedding.from_pretrained(base.transformer.wpe.weight[:limit])
        traces, _, _ = judged(model, tokenizer, batch_size=batch_size)
        for trace, other, tokens in zip(traces, whole, length, strict=True):
            ends.add(trace.finished)
            if tokens <= limit:
                assert (trace.text, trace.finished) == (other.text, other.finished)
                assert trace.reward == pytest.approx(other.reward, abs=1e-5)
            else:
                assert trace.finished == "length"
                assert other.text.startswith(trace.text)
                assert trace.steps == other.steps[: len(trace.steps)]
            ids = tokenizer(trace.text + "</s>", return_tensors="pt").input_ids[:, -limit:]
            assert trace.reward == pytest.approx(model(ids).rewards.item(), abs=1e-5)
    assert ends == {"work", "malformed", "length"}


def test_what_leaves_no_room_is_refused():
    model, tokenizer = made("gpt2")
    bank, asked = ToolBank([Calendar()]), [("one", "Tuesday"), ("one", "Tuesday " * 1100)]
    with pytest.raises(ValueError, match="answer 1 have 1[01]\\d\\d tokens .* the model 1024 positions"):
        run_traces(model, tokenizer, bank, asked, batch_size=1)
    with pytest.raises(ValueError, match="passes the 1024 positions"):
        model.score_texts(tokenizer, ["Tuesday " * 1024])
    with pytest.raises(ValueError, match="1025 tokens passes the 1024 positions .*max_length"):
        model(torch.ones(2, 1025, dtype=torch.long))


def test_a_window_that_has_not_slid_is_continued():
    _, share = assert_same(*made("mistral", sliding_window=1000))
    assert share < 0.75


def test_score_from_a_cache():
    model, tokenizer = made("gpt2", "bytes")
    batch = tokenizer(["shorter", "a longer text"], return_tensors="pt", padding=True)
    ids, mask = batch.input_ids, batch.attention_mask
    whole = model(ids, mask).rewards.detach()
    assert torch.allclose(model.score(ids, mask), whole, atol=1e-5)
    for cut in (3, 12):
        past = model.causal_lm(
            input_ids=ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, :cut],
        ).past_key_values  # fmt: skip
        assert torch.allclose(model.score(ids[:, cut:], mask, past), whole, atol=1e-5)
    with pytest.raises(ValueError, match="must cover 13 cached and 2 new"):
        model.score(ids[:, :2], mask, past)
    model.pooling = "mean"
    with pytest.raises(ValueError, match="pooling 'mean' needs every token"):
        model.score(ids[:, :2], mask, past)


def test_one_is_as_many():
    model, tokenizer = made()
    together, _, _ = judged(model, tokenizer)
    for example, trace in zip(EXAMPLES, together, strict=True):
        one = run_trace(
            model, tokenizer, ToolBank([Calendar()]), example.question, example.answer, max_new_tokens=150
        )
        assert one.text == trace.text
        assert one.reward == pytest.approx(trace.reward, abs=1e-5)
