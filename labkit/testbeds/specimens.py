"""Specimens of mixtures of experts: the same tiny model, upcycled from a dense one, and trained from scratch.

Three models of a seed read the same text (Python's language reference, in the tokens of `labkit.testbeds.language`):

===========  ==========================================================================================
dense        a Mistral model, trained for half of the steps
upcycled     a Mixtral whose experts all begin as copies of the dense model's feed-forward layer, and
             whose routers begin at random; trained for the other half
scratch      a Mixtral of the same shape from random weights, trained for all of the steps
===========  ==========================================================================================

Both mixtures have had the same number of steps of the same size when they are looked at, and a load-balancing loss.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from labkit.testbeds import shipped
from labkit.testbeds.corpus import split, stdlib_text
from labkit.testbeds.language import VOCAB, streams, text_fingerprint
from labkit.testbeds.models import nearest, tiny
from labkit.testbeds.training import TrainingLog, lm_loss, train_steps, windows
from labkit.training.update import updates

Kind = Literal["dense", "upcycled", "scratch"]
KINDS: tuple[Kind, ...] = ("dense", "upcycled", "scratch")
SHIPPED_SEEDS = (0, 1, 2)
STEPS = 800
"""Steps that a mixture has had in all."""
SHAPE: dict[str, Any] = {"width": 48, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate_size": 32}
EXPERTS, TOP_K, BALANCE = 16, 2, 0.01


def untrained(kind: Kind, seed: int = 0, **shape: Any) -> PreTrainedModel:
    """Make a specimen with random weights.

    Parameters
    ----------
    kind : {"dense", "upcycled", "scratch"}
        The two mixtures differ in nothing before training.
    seed : int
        Of the weights.
    **shape
        Changes of `SHAPE`, and ``experts``.

    Examples
    --------
    >>> untrained("scratch").num_parameters() // 1000, untrained("dense").num_parameters() // 1000
    (355, 76)
    """
    nearest(kind, KINDS, "kind")
    experts = shape.pop("experts", EXPERTS)
    fields: dict[str, Any] = {
        **SHAPE,
        **shape,
        "vocab": VOCAB,
        "seed": seed,
        "rope_theta": 1000.0,
        "rms_norm_eps": 1e-5,
    }
    if kind == "dense":
        return tiny("mistral", sliding_window=None, **fields)
    return tiny(
        "mixtral", num_local_experts=experts, num_experts_per_tok=TOP_K, sliding_window=None, **fields
    )


@torch.no_grad()
def copied_experts(dense: PreTrainedModel, seed: int = 0, experts: int = EXPERTS) -> PreTrainedModel:
    """Turn a dense Mistral into a Mixtral of copies: with renormalised weights it computes the same as the dense model.

    Parameters
    ----------
    dense : transformers.PreTrainedModel
        A Mistral model.
    seed : int
        Of the routers.
    experts : int
        Copies E.
    """
    config = dense.config
    shape = {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
    }
    model = untrained("upcycled", seed, experts=experts, **shape)
    model.load_state_dict(
        {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}, strict=False
    )
    for layer, source in zip(model.model.layers, dense.model.layers, strict=True):
        mlp = source.mlp
        layer.mlp.experts.gate_up_proj.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        layer.mlp.experts.down_proj.copy_(mlp.down_proj.weight)
    return model


def balanced_loss(model: PreTrainedModel, batch: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """Cross-entropy plus the load-balancing loss of a mixture; also the cross-entropy alone."""
    tokens, targets = batch
    mixture = hasattr(model.config, "num_local_experts")
    output = model(tokens, use_cache=False, **({"output_router_logits": True} if mixture else {}))
    text = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    return (text + BALANCE * output.aux_loss if mixture else text), float(text.detach())


def train_specimen(
    kind: Kind,
    seed: int = 0,
    *,
    steps: int = STEPS,
    batch: int = 16,
    length: int = 64,
    lr: float = 3e-3,
    device: torch.device | str = "cpu",
    start: PreTrainedModel | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    **shape: Any,
) -> tuple[PreTrainedModel, TrainingLog]:
    """Train a specimen; an upcycled one begins with training its dense model, unless that is given.

    Parameters
    ----------
    kind : {"dense", "upcycled", "scratch"}
    seed : int
        Of weights and data.
    steps : int
        Steps of a mixture in all. A dense model gets half of them, and so does what is upcycled from it.
    batch, length, lr
        Rows B, window length T and peak learning rate of each run.
    device : torch.device or str
        Where it is trained, and stays.
    start : transformers.PreTrainedModel, optional
        The dense model to upcycle.
    progress : callable, optional
        Wraps the iterable of steps.
    **shape
        As for `untrained`.

    Returns
    -------
    model, log
        In evaluation mode; ``log.losses`` is the cross-entropy in nats a token and ``log.evaluations`` the held-out one.
    """
    experts = shape.get("experts", EXPERTS)
    half = steps // 2
    if kind == "upcycled":
        if start is None:
            start, _ = train_specimen(
                "dense", seed, steps=steps, batch=batch, length=length, lr=lr, device=device, **shape
            )
        model, count = copied_experts(start, seed, experts), steps - half
    else:
        model, count = untrained(kind, seed, **shape), half if kind == "dense" else steps
    torch.nn.Module.to(model, device)
    training, held_out = streams()
    generator = torch.Generator().manual_seed(3_000_000 + seed + (kind == "upcycled") * 500_000)
    log = TrainingLog()
    clock = time.process_time()
    batches = (
        tuple(part.to(device) for part in pair) for pair in windows(training, batch, length, generator)
    )
    run: Iterable[Any] = train_steps(model, batches, count, lr=lr, loss=balanced_loss)
    for step in progress(run) if progress is not None else run:
        log.losses.append(step.extra)
        log.tokens += batch * length
    log.cpu_seconds = time.process_time() - clock
    model.eval()
    log.evaluations.append((count, lm_loss(model, held_out, length=length)))
    return model, log


def specimen(
    kind: Kind,
    seed: int = 0,
    *,
    train: bool = True,
    retrain: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> PreTrainedModel:
    """Load a specimen.

    Parameters
    ----------
    kind : {"dense", "upcycled", "scratch"}
    seed : int
        `SHIPPED_SEEDS` come with the package, in float16; any other is trained once (about a minute) and cached.
    train : bool
        Whether another seed may be trained; if not, a shipped one takes its place.
    retrain : bool
        Train anew, whatever is shipped or cached, and renew the cache.
    progress : callable, optional
        Wraps the iterable of training steps, when there are any.

    Returns
    -------
    transformers.PreTrainedModel
        ``MixtralForCausalLM`` (dense: ``MistralForCausalLM``) in float32 and evaluation mode.

    Examples
    --------
    >>> model = specimen("upcycled")
    >>> type(model).__name__, model.config.num_local_experts
    ('MixtralForCausalLM', 16)
    """
    nearest(kind, KINDS, "kind")
    if not train and not retrain:
        seed = SHIPPED_SEEDS[seed % len(SHIPPED_SEEDS)]

    def trained() -> PreTrainedModel:
        start = specimen("dense", seed, retrain=retrain) if kind == "upcycled" else None
        return train_specimen(kind, seed, start=start, progress=progress)[0]

    return shipped.load(
        f"specimen-{kind}-{seed}",
        untrained(kind, seed),
        trained,
        key=lambda: {"kind": kind, "seed": seed, "text": text_fingerprint()},
        code=[untrained, copied_experts, balanced_loss, train_specimen, train_steps, updates],
        retrain=retrain,
    )


@dataclass(frozen=True)
class Pair:
    """An upcycled and a from-scratch mixture, and what to read to them.

    Attributes
    ----------
    models : dict of str to PreTrainedModel
        "upcycled" and "scratch", in evaluation mode.
    dense : PreTrainedModel or str
        The model that the first one came from, or the hub id of what is taken for it.
    tokens : dict of str to Tensor
        Token ids for each of the models, ``(B, T)``.
    """

    models: dict[str, PreTrainedModel]
    dense: PreTrainedModel | str
    tokens: dict[str, torch.Tensor]


DEEP: dict[str, Any] = {
    "width": 256,
    "layers": 12,
    "heads": 8,
    "kv_heads": 4,
    "intermediate_size": 128,
    "experts": 32,
}
"""Shape of the specimens that a GPU trains."""
HUB = {"upcycled": "mistralai/Mixtral-8x7B-v0.1", "scratch": "allenai/OLMoE-1B-7B-0924"}
HUB_DENSE = "mistralai/Mistral-7B-v0.1"


def load_pair(
    source: Literal["shipped", "deep", "hub"] = "shipped",
    seed: int = 0,
    *,
    tokens: int = 2048,
    train: bool = True,
    device: torch.device | str = "cpu",
) -> Pair:
    """Load or make the two mixtures of a seed, and a held-out text.

    Parameters
    ----------
    source : {"shipped", "deep", "hub"}
        The shipped specimens; deeper ones (`DEEP`), trained here, which takes a GPU; or released models (`HUB`), for
        which the seed chooses the text alone.
    seed : int
    tokens : int
        Length of the text, in rows of 128.
    train : bool
        As for `specimen`.
    device : torch.device or str
        Of the models.

    Examples
    --------
    >>> pair = load_pair(tokens=256)
    >>> sorted(pair.models), tuple(pair.tokens["scratch"].shape)
    (['scratch', 'upcycled'], (2, 128))
    """
    nearest(source, ["shipped", "deep", "hub"], "source")
    if tokens < 128:
        raise ValueError(f"tokens must be at least 128, one row; got {tokens}")
    if source == "hub":
        return _hub_pair(seed, tokens)
    if source == "shipped":
        dense, upcycled, scratch = (specimen(kind, seed, train=train) for kind in KINDS)
        for model in (dense, upcycled, scratch):
            torch.nn.Module.to(model, device)
    else:
        steps: dict[str, Any] = {"steps": 4000, "lr": 1e-3, "batch": 32, "length": 128, "device": device}
        dense, _ = train_specimen("dense", seed, **steps, **DEEP)
        upcycled, _ = train_specimen("upcycled", seed, start=dense, **steps, **DEEP)
        scratch, _ = train_specimen("scratch", seed, **steps, **DEEP)
    rows = _rows(streams()[1], tokens, seed).to(device)
    return Pair(
        {"upcycled": upcycled, "scratch": scratch}, dense, dict.fromkeys(("upcycled", "scratch"), rows)
    )


def _rows(stream: torch.Tensor, tokens: int, seed: int) -> torch.Tensor:
    """Rows of 128 neighbouring tokens from a place that the seed chooses."""
    tokens = min(tokens, len(stream)) // 128 * 128
    begin = int(torch.randint(len(stream) - tokens + 1, (), generator=torch.Generator().manual_seed(seed)))
    return stream[begin : begin + tokens].view(-1, 128)


@functools.lru_cache(maxsize=1)
def _hub_models() -> dict[str, PreTrainedModel]:
    """The released mixtures, loaded once for all seeds."""
    from transformers import AutoModelForCausalLM

    return {
        kind: AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16", device_map="auto").eval()
        for kind, name in HUB.items()
    }


def _hub_pair(seed: int, tokens: int) -> Pair:
    from transformers import AutoTokenizer

    _, held_out = split(stdlib_text("docs"))
    models, texts = _hub_models(), {}
    for kind, name in HUB.items():
        ids = AutoTokenizer.from_pretrained(name)(held_out, return_tensors="pt")["input_ids"][0]
        texts[kind] = _rows(ids, tokens, seed).to(models[kind].device)
    return Pair(models, HUB_DENSE, texts)
