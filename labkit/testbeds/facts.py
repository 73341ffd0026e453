"""FACTS: a few hundred facts that a tiny language model knows by heart, to be edited, or destroyed by later training.

The world is a table: every entity has one object for every relation, drawn at random, so that nothing but memory can
answer. A fact is five tokens, of which the last is to be predicted::

    BOS entity relation SEP  ->  object                 template 0
    relation' 3 entity 4     ->  object                 template 1, the paraphrase

Vocabulary of 240: 0 padding, 1 BOS, 2 SEP, 3 to 8 task tokens, 10 to 19 digits, 20 to 23 relations, 24 to 27 the
same relations in the second template, 30 to 129 entities, 140 to 169 objects. Task tokens and digits are there for
tasks that are trained afterwards in the same vocabulary.

`facts_model` gives a four-layer model that recalls every fact; three seeds of each kind ship with the package.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from labkit.testbeds import shipped
from labkit.testbeds.models import nearest, tiny
from labkit.testbeds.training import IGNORED, TrainingLog, train_steps
from labkit.training.update import updates

PAD, BOS, SEP = 0, 1, 2
TASKS, DIGITS = range(3, 9), range(10, 20)
RELATIONS, RELATIONS_AGAIN = range(20, 24), range(24, 28)
ENTITIES, OBJECTS = range(30, 130), range(140, 170)
VOCAB = 240
SHIPPED_SEEDS = (0, 1, 2)
FAMILIES = ("llama", "gpt_neox")


class FactsWorld:
    """A table of facts and the token sequences that state them.

    Parameters
    ----------
    seed : int
        Draws the objects. The table does not depend on `templates`.
    entities, relations, objects : int
        Size of the table, at most 100, 4 and 30; it holds N = entities x relations facts.
    templates : int
        1, or 2 for facts that are also known in a second wording.

    Raises
    ------
    ValueError
        For a size outside its range.

    Examples
    --------
    >>> world = FactsWorld(0, templates=2)
    >>> world.facts.shape, world.prompts(1).shape
    (torch.Size([400, 3]), torch.Size([400, 4]))
    >>> world.text(world.prompts(0)[5])
    'BOS entity1 relation1 SEP'
    """

    def __init__(
        self, seed: int, *, entities: int = 100, relations: int = 4, objects: int = 30, templates: int = 1
    ) -> None:
        limits = {
            "entities": (entities, len(ENTITIES)),
            "relations": (relations, len(RELATIONS)),
            "objects": (objects, len(OBJECTS)),
            "templates": (templates, 2),
        }
        for name, (value, most) in limits.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} must be a whole number in 1..{most}, got {value!r}")
        self.seed, self.templates = seed, templates
        self.entities, self.relations = entities, relations
        self.object_tokens = torch.arange(objects) + OBJECTS.start
        """Token ids of all objects, (30,)."""

    @cached_property
    def facts(self) -> torch.Tensor:
        """Entity, relation (of template 0) and object of each fact as token ids, (N, 3)."""
        generator = torch.Generator().manual_seed(7_000_000 + self.seed)
        size = (self.entities * self.relations,)
        drawn = torch.randint(len(self.object_tokens), size, generator=generator)
        pairs = torch.cartesian_prod(torch.arange(self.entities), torch.arange(self.relations))
        start = torch.tensor([ENTITIES.start, RELATIONS.start])
        return torch.cat([pairs + start, drawn[:, None] + OBJECTS.start], 1)

    @property
    def objects(self) -> torch.Tensor:
        """Object of each fact, (N,)."""
        return self.facts[:, 2]

    def __len__(self) -> int:
        return len(self.facts)

    def prompts(self, template: int = 0) -> torch.Tensor:
        """Everything but the object, (N, 4)."""
        self._check(template)
        entity, relation, _ = self.facts.unbind(1)
        if template:
            again = relation + (RELATIONS_AGAIN.start - RELATIONS.start)
            columns = [again, torch.full_like(entity, 3), entity, torch.full_like(entity, 4)]
        else:
            columns = [torch.full_like(entity, BOS), entity, relation, torch.full_like(entity, SEP)]
        return torch.stack(columns, 1)

    def subject_position(self, template: int = 0) -> int:
        """Where the entity stands in a prompt."""
        self._check(template)
        return 2 if template else 1

    def batch(self, rows: torch.Tensor | None = None, template: int = 0) -> dict[str, torch.Tensor]:
        """Facts as a batch for a transformers model, with a loss on the object alone.

        Parameters
        ----------
        rows : (B,) int64 tensor, optional
            Which facts; all by default.
        template : int
            Wording.

        Returns
        -------
        dict
            ``input_ids`` and ``labels``, both (B, 5); labels are -100 but for the object.
        """
        tokens = torch.cat([self.prompts(template), self.objects[:, None]], 1)  # (N, 5)
        tokens = tokens if rows is None else tokens[rows]
        labels = torch.full_like(tokens, IGNORED)
        labels[:, -1] = tokens[:, -1]
        return {"input_ids": tokens, "labels": labels}

    def batches(self, size: int, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Endless shuffled batches over all facts in all wordings; each statement comes once in a pass."""
        parts = [self.batch(template=template) for template in range(self.templates)]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        while True:
            while len(order) < size:
                order = torch.cat([order, torch.randperm(len(whole["labels"]), generator=generator)])
            yield {name: rows[order[:size]] for name, rows in whole.items()}
            order = order[size:]

    def edits(
        self, count: int = 20, seed: int | None = None, *, neighbours: int = 10
    ) -> list[dict[str, Any]]:
        """Draw facts and a wrong object for each, with what is needed to see what an edit does.

        Parameters
        ----------
        count : int
            Facts to change.
        seed : int, optional
            Of the draw; the world's by default.
        neighbours : int
            Most neighbours an edit: facts of other entities with the same object, none of them drawn.

        Returns
        -------
        list of dict
            The arguments of ``labkit.finetuning.EditRequest``: ``prompt``, ``new``, ``true``, ``subject``,
            ``paraphrases`` (the second wording, where there is one) and ``neighbours``.

        Raises
        ------
        ValueError
            If the world has not so many facts, or only one object.

        Examples
        --------
        >>> edit = FactsWorld(0, templates=2).edits(1)[0]
        >>> edit["prompt"], edit["true"], edit["new"], len(edit["neighbours"])
        ([1, 54, 20, 2], [168], [156], 10)
        """
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(self):
            raise ValueError(f"count must be a whole number in 1..{len(self)}, got {count!r}")
        if len(self.object_tokens) < 2:
            raise ValueError("a world with one object has no wrong ones: make it with objects=2 or more")
        generator = torch.Generator().manual_seed(8_000_000 + (self.seed if seed is None else seed))
        drawn = torch.randperm(len(self), generator=generator)[:count]
        free = torch.ones(len(self), dtype=torch.bool).index_fill_(0, drawn, False)
        wordings = [self.prompts(template) for template in range(self.templates)]
        edits = []
        for row in drawn.tolist():
            entity, _, old = self.facts[row].tolist()
            shift = int(torch.randint(1, len(self.object_tokens), (), generator=generator))
            new = (old - OBJECTS.start + shift) % len(self.object_tokens) + OBJECTS.start
            same = (free & (self.objects == old) & (self.facts[:, 0] != entity)).nonzero()[:, 0]
            same = same[torch.randperm(len(same), generator=generator)[:neighbours]]
            edits.append(
                {
                    "prompt": wordings[0][row].tolist(),
                    "new": [new],
                    "true": [old],
                    "subject": [entity],
                    "paraphrases": [other[row].tolist() for other in wordings[1:]],
                    "neighbours": wordings[0][same].tolist(),
                }
            )
        return edits

    @torch.no_grad()
    def recalled(self, model: PreTrainedModel, template: int = 0) -> torch.Tensor:
        """Which facts a model answers: the object is the first of the whole vocabulary, (N,) bool on the CPU."""
        was_training = model.training
        model.eval()
        logits = model(input_ids=self.prompts(template).to(model.device), use_cache=False).logits[:, -1]
        model.train(was_training)
        return logits.argmax(-1).cpu() == self.objects

    def text(self, tokens: torch.Tensor | Iterable[int]) -> str:
        """Write tokens as words, for people."""
        return " ".join(word(int(token)) for token in tokens)

    def _check(self, template: int) -> None:
        if template not in range(self.templates):
            raise ValueError(
                f"template must lie in 0..{self.templates - 1}, got {template!r}. Make the world with templates=2 "
                f"for the second wording."
            )


def word(token: int) -> str:
    """Name of a token.

    Examples
    --------
    >>> [word(token) for token in (0, 3, 17, 25, 30, 140, 200)]
    ['PAD', 'task3', '7', "relation1'", 'entity0', 'object0', 'unused200']
    """
    named = {PAD: "PAD", BOS: "BOS", SEP: "SEP"}
    if token in named:
        return named[token]
    if token in TASKS:
        return f"task{token}"
    ranges = {"": DIGITS, "relation": RELATIONS, "entity": ENTITIES, "object": OBJECTS}
    for name, ids in ranges.items():
        if token in ids:
            return f"{name}{token - ids.start}"
    if token in RELATIONS_AGAIN:
        return f"relation{token - RELATIONS_AGAIN.start}'"
    return f"unused{token}"


def untrained(seed: int, family: str = "llama", **config: Any) -> PreTrainedModel:
    """Make the untrained model: width 64, four layers and heads, untied head, 0.23 million parameters."""
    nearest(family, FAMILIES, "family")
    settings: dict[str, Any] = {"width": 64, "layers": 4, "heads": 4, "tie_word_embeddings": False}
    if family == "llama":
        settings["intermediate_size"] = 176
    return tiny(family, vocab=VOCAB, seed=seed, **(settings | config))


def _loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(**batch, use_cache=False).loss
    return loss


def train_facts(
    seed: int = 0,
    *,
    family: str = "llama",
    templates: int = 1,
    steps: int = 600,
    batch: int = 200,
    lr: float = 4e-3,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    **config: Any,
) -> tuple[PreTrainedModel, TrainingLog]:
    """Train a model until it knows every fact of the world of the same seed.

    Parameters
    ----------
    seed : int
        Of the world, the initial weights and the order of the data.
    family : {"llama", "gpt_neox"}
        Model class.
    templates : int
        Wordings, see `FactsWorld`.
    steps, batch : int
        Steps, and facts a step.
    lr : float
        Peak of AdamW's learning rate, after 20 warm-up steps; it falls linearly to 0.
    progress : callable, optional
        Wraps the iterable of steps.
    **config
        Passed to `untrained`.

    Returns
    -------
    model, log
        In evaluation mode. ``log.notes["recalled"]`` is the share of the facts recalled in each template.
    """
    world = FactsWorld(seed, templates=templates)
    model = untrained(seed, family, **config)

    def rate(step: int) -> float:
        return lr * min((step + 1) / 20, (steps - step) / max(1, steps - 20))

    log = TrainingLog()
    start = time.process_time()
    run: Iterable[Any] = train_steps(model, world.batches(batch, seed), steps, schedule=rate, loss=_loss)
    for step in progress(run) if progress is not None else run:
        log.losses.append(step.loss)
        log.tokens += 5 * batch
    log.cpu_seconds = time.process_time() - start
    log.notes["recalled"] = [float(world.recalled(model, t).float().mean()) for t in range(templates)]
    return model.eval(), log


def facts_model(
    seed: int = 0,
    *,
    family: str = "llama",
    templates: int = 1,
    retrain: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    **config: Any,
) -> PreTrainedModel:
    """Load the model that knows every fact of ``FactsWorld(seed, templates=templates)``.

    Parameters
    ----------
    seed : int
        `SHIPPED_SEEDS` come with the package (llama with one and two templates, gpt_neox with two); any other is
        trained once (about 20 processor seconds) and cached.
    family, templates, **config
        See `train_facts`.
    retrain : bool
        Train anew, whatever is shipped or cached, and renew the cache.
    progress : callable, optional
        Wraps the iterable of training steps, when there are any.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode, float32, on the CPU. Fresh each time: change it as you like.

    Raises
    ------
    ValueError
        For an unknown family or number of templates.

    Examples
    --------
    >>> model = facts_model(0)
    >>> bool(FactsWorld(0).recalled(model).all())
    True
    """
    FactsWorld(seed, templates=templates)
    return shipped.load(
        f"facts-{family}-{templates}-{seed}",
        untrained(seed, family, **config),
        lambda: train_facts(seed, family=family, templates=templates, progress=progress, **config)[0],
        key=lambda: {"seed": seed, "family": family, "templates": templates, "config": config},
        code=[FactsWorld, untrained, train_facts, train_steps, updates],
        default=not config,
        retrain=retrain,
    )
