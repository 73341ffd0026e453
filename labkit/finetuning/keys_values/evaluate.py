"""Did the edit take, does it generalise, and did it leave the rest alone?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from labkit.finetuning.keys_values.requests import (
    EditRequest,
    Pair,
    as_pair,
    check_model,
    check_requests,
    target_log_probs,
)

MEASURES = ("comparison", "accuracy")


@dataclass(frozen=True)
class EditScores:
    """Scores of an edited model, each in 0..1; nan where a request has nothing to measure it on.

    Attributes
    ----------
    efficacy : float
        Share of requests whose prompt now prefers the new object (reliability).
    paraphrase : float
        The same on paraphrases (generality).
    specificity : float
        Share of neighbour prompts that still prefer their own object (locality).
    score : float
        Harmonic mean of the three; 0 if one of them is 0.
    """

    efficacy: float
    paraphrase: float
    specificity: float
    score: float

    def as_dict(self) -> dict[str, float]:
        """The four numbers by name."""
        return asdict(self)


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean, which is 0 if a value is 0 and nan if one is nan.

    Raises
    ------
    ValueError
        For no values or a negative one.

    Examples
    --------
    >>> round(harmonic_mean([1.0, 0.5, 0.5]), 2), harmonic_mean([1.0, 0.0])
    (0.6, 0.0)
    """
    if not values or any(value < 0 for value in values):
        raise ValueError(f"values must be shares of at least 0, got {list(values)!r}")
    if any(math.isnan(value) for value in values):
        return math.nan
    return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)


class EditEvaluator:
    """Score edited models on a list of requests.

    Parameters
    ----------
    requests : EditRequest or sequence of them
        With their true objects; paraphrases and neighbours where those are to be measured.
    tokenizer : transformers tokenizer, optional
        Needed for requests that are texts.
    measure : {"comparison", "accuracy"}
        ``comparison``, as for CounterFact: P(new) > P(true) at prompt and paraphrases, P(true) > P(new) at
        neighbours. ``accuracy``, as for zsRE: every token of the object is the most probable one, the new object at
        prompt and paraphrases and the true one at neighbours.
    batch : int
        Rows at a time.

    Raises
    ------
    ValueError
        For an unknown measure, or a request without its true object where one is needed.

    Examples
    --------
    >>> from labkit.testbeds.facts import FactsWorld, facts_model
    >>> world = FactsWorld(0, templates=2)
    >>> prompts, again = world.prompts(0), world.prompts(1)
    >>> same = (world.objects == world.objects[7]).nonzero()[:, 0]
    >>> request = EditRequest(prompts[7], new=[150], true=world.objects[7:8], paraphrases=[again[7]],
    ...                       neighbours=[prompts[i] for i in same if i != 7])
    >>> EditEvaluator(request)(facts_model(0, templates=2))
    EditScores(efficacy=0.0, paraphrase=0.0, specificity=1.0, score=0.0)
    """

    def __init__(
        self,
        requests: EditRequest | Sequence[EditRequest],
        tokenizer: Any = None,
        *,
        measure: str = "comparison",
        batch: int = 256,
    ) -> None:
        if measure not in MEASURES:
            raise ValueError(f"measure must be 'comparison' or 'accuracy', got {measure!r}")
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch must be a whole number of at least 1, got {batch!r}")
        self.requests, self.measure, self.batch = check_requests(requests), measure, batch
        self._asked: dict[str, list[tuple[int, Pair, Pair | None]]] = {
            "efficacy": [],
            "paraphrase": [],
            "specificity": [],
        }
        for number, one in enumerate(self.requests):
            both = measure == "comparison"
            if one.true is None and (both or any(not isinstance(n, tuple) for n in one.neighbours)):
                raise ValueError(
                    f"request {number} has no true object: EditEvaluator compares with it. Give EditRequest(true=...)"
                )
            true = one.true if both else None
            self._add("efficacy", number, one.prompt, one.new, true, tokenizer)
            for prompt in one.paraphrases:
                self._add("paraphrase", number, prompt, one.new, true, tokenizer)
            for neighbour in one.neighbours:
                prompt, own = neighbour if isinstance(neighbour, tuple) else (neighbour, one.true)
                self._add("specificity", number, prompt, own, one.new if both else None, tokenizer)

    def _add(self, name: str, number: int, prompt: Any, wanted: Any, other: Any, tokenizer: Any) -> None:
        against = None if other is None else as_pair(prompt, other, tokenizer)
        self._asked[name].append((number, as_pair(prompt, wanted, tokenizer), against))

    @torch.no_grad()
    def details(self, model: PreTrainedModel) -> dict[str, list[list[bool]]]:
        """For each measure and request, whether each of its prompts is answered as it should be."""
        check_model(model)
        was_training = model.training
        model.eval()
        found: dict[str, list[list[bool]]] = {}
        try:
            for name, asked in self._asked.items():
                found[name] = [[] for _ in self.requests]
                for begin in range(0, len(asked), self.batch):
                    part = asked[begin : begin + self.batch]
                    held, right = target_log_probs(model, [wanted for _, wanted, _ in part])
                    if self.measure == "comparison":
                        others = [other for _, _, other in part if other is not None]
                        right = held > target_log_probs(model, others)[0]
                    for (number, _, _), good in zip(part, right.tolist(), strict=True):
                        found[name][number].append(good)
        finally:
            model.train(was_training)
        return found

    def __call__(self, model: PreTrainedModel) -> EditScores:
        """Score a model: means over requests of the share of their prompts."""
        shares = {}
        for name, rows in self.details(model).items():
            held = [sum(row) / len(row) for row in rows if row]
            shares[name] = sum(held) / len(held) if held else math.nan
        return EditScores(**shares, score=harmonic_mean(list(shares.values())))
