"""Controls of curiosity in the world of synonyms, trained once and recorded as ``recordings/cd_rlhf.json``.

``python -m labkit.testbeds.cd_rlhf_sweep`` takes about six minutes on one idle core. The record is written after each
run, so that a sweep that was stopped goes on where it was; ``--fresh`` begins anew.

`ARMS` have the setting of the notebook: its learning rate, KL weight and number of updates, and its seeds. Two ask what
of the curiosity matters: `Shuffled` pays the same amounts to other words, and the constant is given at half its weight.
Five change the learning rate of the curiosity network, which the notebook has at 0.001 and the authors at 0.00001.

`SUMS` take the notebook's policy that learns to add apart.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from labkit.lab.bench import environment
from labkit.rlhf import (
    Calculator,
    CalibratedRewardModel,
    CuriosityReward,
    FixedNgram,
    GateBonus,
    PPOConfig,
    PPOTrainer,
    RolloutBatch,
    RunningLowess,
    ToolBank,
    TopKGate,
    diversity_report,
)
from labkit.testbeds import recorded
from labkit.testbeds.models import tiny
from labkit.testbeds.synonyms import LENGTH, PROMPTS, SynonymTask
from labkit.testbeds.tool_questions import word_tokenizer

RECORD = "cd_rlhf"
SEEDS = (0, 1, 2)
SUM_SEEDS = (0, 1, 2, 3, 4)
UPDATES = 100
BEGIN = 5  # updates whose scores are recorded, for a look whether the record can be had again
LAST = 10  # updates over which what curiosity pays is averaged
RECIPE: dict[str, Any] = {
    "batch_size": 32,
    "max_new_tokens": LENGTH,
    "eos_token_id": None,
    "learning_rate": 4e-3,
    "kl_coef": 0.005,
}


class Shuffled(CuriosityReward):
    """Curiosity whose rewards are dealt out anew among the tokens of the batch that pass the gate.

    The same sum is paid, in the same amounts, to the same number of tokens. Which of them gets what is chance.
    """

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """Token rewards ``(B, T)`` of a rollout."""
        paid = super().__call__(batch).clone()
        passed = opened(batch, self.gate)
        amounts = paid[passed]
        order = torch.randperm(len(amounts), generator=torch.Generator().manual_seed(batch.iteration))
        paid[passed] = amounts[order.to(amounts.device)]
        return paid


def opened(batch: RolloutBatch, gate: TopKGate | None) -> Tensor:
    """Real tokens that pass the gate, ``(B, T)`` bool."""
    mask = batch.mask.bool()
    return mask if gate is None else gate(batch.ranks) & mask


def rarity(tokens: Tensor) -> Tensor:
    """How rare each token is among those at its place: minus the logarithm of its share of the answers.

    Parameters
    ----------
    tokens : Tensor
        ``(B, T)`` ids of B answers without padding.

    Returns
    -------
    Tensor
        ``(B, T)``, 0 where all answers have the same token.

    Examples
    --------
    >>> rarity(torch.tensor([[5, 6], [5, 7]])).exp().tolist()
    [[1.0, 2.0], [1.0, 2.0]]
    """
    same = (tokens[:, None] == tokens[None]).float().mean(1)  # (B, T)
    return -same.log()


def paid_for_rarity(paid: Tensor, passed: Tensor, tokens: Tensor) -> float:
    """Correlation, over the tokens that passed the gate, of what they were paid with their `rarity`.

    Parameters
    ----------
    paid, passed, tokens : Tensor
        ``(B, T)``: rewards, bool and ids.

    Returns
    -------
    float
        nan where fewer than two tokens passed, or all were paid the same.

    Examples
    --------
    >>> paid = torch.tensor([[0.2, 0.0], [0.1, 0.0], [0.1, 0.0]])
    >>> round(paid_for_rarity(paid, paid > 0, torch.tensor([[5, 6], [7, 6], [7, 6]])), 3)
    1.0
    """
    pair = torch.stack([paid[passed], rarity(tokens)[passed]]).double()
    return float(torch.corrcoef(pair)[0, 1]) if pair.shape[1] > 1 else float("nan")


def describe(paid: Tensor, passed: Tensor, errors: Tensor, tokens: Tensor) -> dict[str, float]:
    """What an update's curiosity paid for.

    Parameters
    ----------
    paid, passed, errors, tokens : Tensor
        ``(B, T)``: rewards in standard deviations, which tokens passed the gate, prediction errors and ids.

    Returns
    -------
    dict
        ``pay``, the mean reward of a token that passed; ``rarity``, as `paid_for_rarity`; ``place``, the share of the
        errors' variance that the place in the sentence explains.

    Examples
    --------
    >>> errors = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    >>> found = describe(errors - 2, errors > 2, errors, torch.tensor([[5, 6], [5, 7]]))
    >>> found["pay"], found["place"]
    (1.0, 1.0)
    """
    place = errors.mean(0).var(correction=0) / errors.var(correction=0)
    rare = paid_for_rarity(paid, passed, tokens)
    return {"pay": float(paid[passed].mean()), "rarity": rare, "place": float(place)}


def effective_words(texts: Sequence[str]) -> float:
    """Among how many words the texts choose at a place: the exponential of the entropy, mean over places.

    Examples
    --------
    >>> round(effective_words(["warm bread", "warm soup"]), 3)
    1.5
    """
    found = []
    for words in zip_longest(*(text.split() for text in texts)):
        counts = Counter(word for word in words if word is not None)
        shares = [count / counts.total() for count in counts.values()]
        found.append(math.exp(-sum(share * math.log(share) for share in shares)))
    return sum(found) / len(found)


class Ledger:
    """Wraps a hook, and notes in the last updates what it paid for."""

    def __init__(self, hook: Any, first: int) -> None:
        self.hook, self.first = hook, first
        self.needs_ref_hidden = getattr(hook, "needs_ref_hidden", False)
        self.pages: list[dict[str, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.hook, name)

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """What the hook pays."""
        paid: Tensor = self.hook(batch)
        if batch.iteration >= self.first and isinstance(self.hook, CuriosityReward):
            with torch.no_grad():
                errors = self.hook.error(batch.ref_hidden, batch.tokens)
            passed = opened(batch, self.hook.gate)
            self.pages.append(describe(paid / self.hook.eta, passed, errors, batch.tokens))
        return paid

    def report(self) -> dict[str, float]:
        """Means over the updates of what `describe` says; empty for other hooks than curiosity."""
        names = self.pages[0] if self.pages else ()
        return {name: sum(page[name] for page in self.pages) / len(self.pages) for name in names}


def curious(lr: float = 1e-3, kind: type[CuriosityReward] = CuriosityReward) -> Callable[[], Any]:
    """A recipe for curiosity at the notebook's weight and gate."""
    return lambda: kind(0.04, TopKGate(1), lr=lr)


ARMS: dict[str, Callable[[], Any] | None] = {
    "RLHF": None,
    "CD-RLHF": curious(),
    "shuffled": curious(kind=Shuffled),
    "constant": lambda: GateBonus(0.04, TopKGate(1)),
    "constant, half": lambda: GateBonus(0.02, TopKGate(1)),
    "rate 0.01": curious(1e-2),
    "rate 0.003": curious(3e-3),
    "rate 0.0003": curious(3e-4),
    "rate 0.0001": curious(1e-4),
    "rate 0.00001": curious(1e-5),
}


def measure(model: Any, task: SynonymTask, answers: int = 100) -> dict[str, float]:
    """Score, and diversity of groups of ten answers.

    Parameters
    ----------
    model : PreTrainedModel
    task : SynonymTask
    answers : int
        To each prompt; a multiple of ten.

    Returns
    -------
    dict
        ``score``, ``words`` as in `effective_words`, and the columns of `labkit.rlhf.diversity_report`.
    """
    texts = task.sample(model, answers)
    scores = [sum(task.reward([p] * answers, a)) / answers for p, a in zip(PROMPTS, texts, strict=True)]
    tens = [a[i : i + 10] for a in texts for i in range(0, answers, 10)]
    words = sum(map(effective_words, texts)) / len(PROMPTS)
    return {"score": sum(scores) / len(PROMPTS), "words": words, **diversity_report(tens).mean().to_dict()}


def train(
    arm: str, seed: int, updates: int = UPDATES, first: Any = None
) -> tuple[dict[str, float], list[float]]:
    """Train an arm and measure it.

    Parameters
    ----------
    arm : str
        A key of `ARMS`.
    seed : int
    updates : int
    first : PreTrainedModel, optional
        The start, where it is there already; it stays as it is.

    Returns
    -------
    dict
        As `measure`, and for curiosity what `Ledger.report` says.
    list of float
        Mean score of the rollout of each update.
    """
    task = SynonymTask(seed)
    policy = copy.deepcopy(first) if first is not None else task.model()
    make = ARMS[arm]
    hooks = [Ledger(make(), updates - LAST)] if make is not None else []
    config = PPOConfig(iterations=updates, seed=seed, device="cpu", **RECIPE)
    data: dict[str, Any] = {"train_dataset": task.prompts, "processing_class": task.tokenizer}
    history = PPOTrainer(policy, [task.reward], config, **data, token_rewards=hooks).train()
    found = measure(policy, task)
    for hook in hooks:
        found |= hook.report()
    scores = [round(record["objective/scores"], 4) for record in history]
    return {name: round(value, 4) for name, value in found.items()}, scores


#: Which parts the policy that learns to add has: a liking for length, its calibration, macro actions and curiosity.
SUMS: dict[str, frozenset[str]] = {
    "calculator alone": frozenset(),
    "all together": frozenset({"length", "calibrated", "macro", "curiosity"}),
    "all but the calibration": frozenset({"length", "macro", "curiosity"}),
    "calibrated, plain PPO": frozenset({"length", "calibrated"}),
}


def add(arm: str, seed: int, updates: int = UPDATES) -> float:
    """Share of right sums, mean over the last five updates.

    Parameters
    ----------
    arm : str
        A key of `SUMS`.
    seed, updates : int

    Returns
    -------
    float
    """
    parts = SUMS[arm]
    sums = [{"prompt": f"{a}+{b}="} for a in range(1, 5) for b in range(1, 5)]
    words = word_tokenizer(["0123456789+="])
    verdict = ToolBank([Calculator()]).as_reward_fn(action="calculator")

    def right(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return verdict(
            prompts, [f"<<{p}{a}>>{a} #### {a}" for p, a in zip(prompts, completions, strict=True)]
        )

    def likes_length(completions: Sequence[str], **_: Any) -> list[float]:
        return [0.3 * len(text) for text in completions]

    rewards: list[Any] = [right]
    if "length" in parts:
        calibrated = "calibrated" in parts
        rewards.append(
            CalibratedRewardModel(likes_length, RunningLowess(window=1024)) if calibrated else likes_length
        )
    config = PPOConfig(
        iterations=updates,
        batch_size=64,
        max_new_tokens=4,
        segmenter=FixedNgram(2) if "macro" in parts else None,
        learning_rate=4e-3,
        kl_coef=0.005,
        seed=seed,
        device="cpu",
    )
    hooks = [CuriosityReward(0.02, TopKGate(1), lr=1e-3)] if "curiosity" in parts else []
    policy = tiny("llama", width=48, heads=4, layers=1, vocab=len(words), seed=seed)
    data: dict[str, Any] = {"train_dataset": sums, "processing_class": words}
    history = PPOTrainer(policy, rewards, config, **data, token_rewards=hooks).train()
    name = "reward/right" if len(rewards) > 1 else "objective/scores"
    return round(sum(record[name] for record in history[-5:]) / len(history[-5:]), 4)


def main() -> None:
    """Train what the record lacks."""
    torch.set_num_threads(1)
    record = recorded.resumed(RECORD, __doc__)
    runs: dict[str, dict[str, dict[str, float]]] = record.get("runs", {})
    begins: dict[str, dict[str, list[float]]] = record.get("begins", {})
    sums: dict[str, dict[str, float]] = record.get("sums", {})

    def note(*what: Any) -> None:
        ordered = {arm: runs[arm] for arm in ARMS if arm in runs}
        values = {"updates": UPDATES, "runs": ordered, "begins": begins, "sums": sums}
        recorded.write(RECORD, values, environment())
        print(*what, flush=True)

    for seed in SEEDS:
        first = SynonymTask(seed).model()
        for arm in ARMS:
            if str(seed) not in runs.setdefault(arm, {}):
                runs[arm][str(seed)], scores = train(arm, seed, first=first)
                begins.setdefault(arm, {})[str(seed)] = scores[:BEGIN]
                note(arm, seed, runs[arm][str(seed)])
    for arm in SUMS:
        for seed in SUM_SEEDS:
            if str(seed) not in sums.setdefault(arm, {}):
                sums[arm][str(seed)] = add(arm, seed)
                note(arm, seed, sums[arm][str(seed)])


if __name__ == "__main__":
    main()
