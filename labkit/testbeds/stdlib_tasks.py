"""Four classification tasks in real text: from which module of Python's standard library is this window?

Tasks that are learned one after another, for experiments on forgetting. Each task has five classes, and each class
is the source of one or a few modules of the running Python (PSF-2.0). An example is a window of 32 tokens, then a
separator, the task's own token, and the class as one label word:

    t_1 ... t_32 <sep> <task:numbers> <numbers:calendar>

The task token stands right before the answer. Put in front of the window it is too far away for a model of this
size: with every method it then answers old tasks with the newest label words, and nothing can be compared.

Training windows come from the first 80 % of a class's token stream, test windows from the last 20 %; they share no
token. The base model is a two-layer Llama that has seen all training windows as plain text, without labels.
"""

from __future__ import annotations

import functools
import json
import random
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from labkit.testbeds import shipped
from labkit.testbeds.models import tiny
from labkit.testbeds.training import IGNORED, TrainingLog, train_steps
from labkit.training.update import updates

GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "protocols": {
        "email": ("email",),
        "http": ("http",),
        "urllib": ("urllib",),
        "mailproto": ("imaplib", "smtplib", "ftplib", "poplib"),
        "xmlrpc": ("xmlrpc", "socketserver"),
    },
    "numbers": {
        "decimal": ("_pydecimal",),
        "statistics": ("statistics", "fractions"),
        "datetime": ("datetime", "_pydatetime", "zoneinfo"),
        "random": ("random", "heapq", "bisect"),
        "calendar": ("calendar", "_strptime", "locale"),
    },
    "concurrency": {
        "asyncio": ("asyncio",),
        "multiprocessing": ("multiprocessing",),
        "futures": ("concurrent/futures",),
        "threading": ("threading", "queue", "sched"),
        "subprocess": ("subprocess", "selectors"),
    },
    "tools": {
        "argparse": ("argparse",),
        "optparse": ("optparse", "getopt"),
        "unittest": ("unittest",),
        "logging": ("logging",),
        "doctest": ("doctest", "pdb"),
    },
}
"""Task to class to modules of the standard library."""

WINDOW = 32
WORDS = 3000
SHIPPED_SEEDS = (0, 1, 2)
_SPECIAL = ["<pad>", "<unk>", "<sep>", *(f"<task:{task}>" for task in GROUPS)]
_LABELS = [f"<{task}:{label}>" for task, classes in GROUPS.items() for label in classes]
PAD, UNKNOWN, SEP = 0, 1, 2
VOCAB = len(_SPECIAL) + len(_LABELS) + WORDS
_VOCABULARY = "stdlib-tasks-vocabulary.json"
_LEAST_TOKENS = 4000
_TRAINING_SHARE = 0.8
_TOKEN = re.compile(r"[A-Za-z_]+|\d+|\S")


def _files(module: str) -> list[Path]:
    """Source files of a module or package of this Python; none if this version has no such module."""
    place = Path(sysconfig.get_paths()["stdlib"]) / module
    if place.is_dir():
        return sorted(path for path in place.rglob("*.py") if "test" not in path.parts)
    return [place.with_suffix(".py")] if place.with_suffix(".py").is_file() else []


@functools.lru_cache(maxsize=1)
def _words() -> dict[tuple[str, str], list[str]]:
    """Tokens of every class, as text."""
    found: dict[tuple[str, str], list[str]] = {}
    for task, classes in GROUPS.items():
        for label, modules in classes.items():
            texts = [p.read_text(encoding="utf-8", errors="ignore") for m in modules for p in _files(m)]
            found[task, label] = words = [word for text in texts for word in _TOKEN.findall(text)]
            if len(words) <= _LEAST_TOKENS:
                raise FileNotFoundError(
                    f"the sources of {', '.join(modules)} hold {len(words)} tokens, more than {_LEAST_TOKENS} are "
                    "needed; this Python came without them: install a complete one (python.org, conda, uv)"
                )
    return found


def build_vocabulary() -> list[str]:
    """Find the most frequent words of this Python's sources, for maintainers to ship."""
    counts: Counter[str] = Counter()
    for words in _words().values():
        counts.update(words)
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:WORDS]]


@functools.lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """Names of all token ids: special and task tokens, label words, then the most frequent words.

    The words ship with the package, so that ids mean the same under every version of Python.

    Examples
    --------
    >>> names = vocabulary()
    >>> len(names), names[2], names[4]
    (3027, '<sep>', '<task:numbers>')
    """
    words = json.loads((shipped.FOLDER / _VOCABULARY).read_text(encoding="utf-8"))
    return (*_SPECIAL, *_LABELS, *words)


@functools.lru_cache(maxsize=1)
def _streams() -> dict[tuple[str, str], torch.Tensor]:
    """Token ids of every class."""
    ids = {name: index for index, name in enumerate(vocabulary())}
    return {key: torch.tensor([ids.get(word, UNKNOWN) for word in words]) for key, words in _words().items()}


def _windows(stream: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(stream) - WINDOW + 1, (count,), generator=generator)
    return stream[starts[:, None] + torch.arange(WINDOW)]  # (count, WINDOW)


@dataclass(frozen=True)
class ClassificationTask:
    """One task of a `StdlibTasks`.

    Attributes
    ----------
    name : str
        Key of `GROUPS`.
    classes : tuple of str
    label_ids : (5,) tensor
        Token ids of the label words.
    inputs, targets : (1500, 34) and (1500,) tensors
        Training examples (window, separator, task token) and the ids of their label words.
    test_inputs, test_targets : (300, 34) and (300,) tensors
    batch_size, steps : int
        As the experiments use them.
    """

    name: str
    classes: tuple[str, ...]
    label_ids: torch.Tensor = field(repr=False)
    inputs: torch.Tensor = field(repr=False)
    targets: torch.Tensor = field(repr=False)
    test_inputs: torch.Tensor = field(repr=False)
    test_targets: torch.Tensor = field(repr=False)
    batch_size: int = 32
    steps: int = 120

    def batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Give training examples as keyword arguments of a causal language model.

        Parameters
        ----------
        rows : (B,) tensor
            Numbers of the examples.

        Returns
        -------
        dict
            ``input_ids`` (B, 35), the label word last; ``labels`` (B, 35), where only the label word carries loss.
        """
        inputs, targets = self.inputs[rows], self.targets[rows]
        return {
            "input_ids": torch.cat([inputs, targets[:, None]], 1),
            "labels": torch.cat([torch.full_like(inputs, IGNORED), targets[:, None]], 1),
        }

    def batches(self, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Yield endless batches; every pass over the training examples is shuffled anew.

        Examples
        --------
        >>> task = StdlibTasks(0).tasks[0]
        >>> next(task.batches(seed=0))["input_ids"].shape
        torch.Size([32, 35])
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        while True:
            if len(order) < self.batch_size:
                order = torch.cat([order, torch.randperm(len(self.inputs), generator=generator)])
            yield self.batch(order[: self.batch_size])
            order = order[self.batch_size :]

    @torch.no_grad()
    def evaluate(self, model: Any, open_vocabulary: bool = False) -> float:
        """Share of test windows that get the right label word.

        Parameters
        ----------
        model : transformers.PreTrainedModel or PeftModel
            A causal language model; its mode is put back afterwards.
        open_vocabulary : bool
            Whether all tokens compete, or (False) the five label words of the task, as in a prompt that lists its
            options. Chance is then 0.2.

        Returns
        -------
        float
            In [0, 1].
        """
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        right = 0
        for inputs, targets in zip(self.test_inputs.split(100), self.test_targets.split(100), strict=True):
            logits = model(input_ids=inputs.to(device), use_cache=False, logits_to_keep=1).logits[:, -1].cpu()
            answers = (
                logits.argmax(-1) if open_vocabulary else self.label_ids[logits[:, self.label_ids].argmax(-1)]
            )
            right += int((answers == targets).sum())
        model.train(was_training)
        return right / len(self.test_targets)

    def decode(self, row: int) -> str:
        """Write out a training example."""
        names = vocabulary()
        return " ".join(names[token] for token in [*self.inputs[row].tolist(), int(self.targets[row])])


def label_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Loss of the label words, as the model's own, with the head computed at their positions alone.

    The head is most of this model: training takes a third of the time.
    """
    logits = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=2).logits[:, 0]  # (B, V)
    return torch.nn.functional.cross_entropy(logits, batch["labels"][:, -1])


class StdlibTasks:
    """The four tasks in the order of a seed, and the model that learns them.

    Parameters
    ----------
    seed : int
        Of the windows, of the order of the tasks and of the base model.
    train, test : int
        Windows per class.
    batch_size, steps : int
        Rows and updates of each task.
    width, layers, pretraining : int
        Size of the base model, and the updates of its training.

    Attributes
    ----------
    tasks : list of ClassificationTask

    Raises
    ------
    ValueError
        For counts below 1.
    FileNotFoundError
        When this Python came without its sources.

    Examples
    --------
    >>> world = StdlibTasks(0)
    >>> sorted(task.name for task in world.tasks)
    ['concurrency', 'numbers', 'protocols', 'tools']
    >>> world.tasks[0].test_inputs.shape
    torch.Size([300, 34])
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        train: int = 300,
        test: int = 60,
        batch_size: int = 32,
        steps: int = 120,
        width: int = 64,
        layers: int = 2,
        pretraining: int = 150,
    ) -> None:
        counts = {"train": train, "test": test, "batch_size": batch_size, "steps": steps}
        for name, count in {**counts, "width": width, "layers": layers, "pretraining": pretraining}.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a positive whole number, got {count!r}")
        self.seed = seed
        self.width, self.layers, self.pretraining = width, layers, pretraining
        names = list(GROUPS)
        random.Random(seed).shuffle(names)
        self.tasks = [self._task(name, train, test, batch_size, steps) for name in names]

    def _task(self, name: str, train: int, test: int, batch_size: int, steps: int) -> ClassificationTask:
        classes = tuple(GROUPS[name])
        number = list(GROUPS).index(name)
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        first = len(_SPECIAL) + number * len(classes)
        label_ids = torch.arange(first, first + len(classes))
        parts: list[list[torch.Tensor]] = [[], []]
        for label in classes:
            stream = _streams()[name, label]
            cut = int(_TRAINING_SHARE * len(stream))
            parts[0].append(_windows(stream[:cut], train, generator))
            parts[1].append(_windows(stream[cut:], test, generator))
        end = torch.tensor([SEP, 3 + number])
        examples = []
        for part in parts:
            inputs = torch.cat(part)
            inputs = torch.cat([inputs, end.expand(len(inputs), 2)], 1)  # (N, WINDOW + 2)
            examples.append((inputs, label_ids.repeat_interleave(len(inputs) // len(classes))))
        (inputs, targets), (test_inputs, test_targets) = examples
        return ClassificationTask(
            name, classes, label_ids, inputs, targets, test_inputs, test_targets, batch_size, steps
        )

    loss = staticmethod(label_loss)

    def probe(self, task: ClassificationTask, rows: int = 128, seed: int = 0) -> dict[str, torch.Tensor]:
        """Draw training windows of a task as plain text, without its token: what its text does to a model.

        The head is asked for the last position alone.
        """
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(task.inputs), generator=generator)[:rows]
        return {"input_ids": task.inputs[chosen, :WINDOW], "logits_to_keep": torch.tensor([WINDOW - 1])}

    def training_windows(self) -> torch.Tensor:
        """All training windows without labels, ``(20 x train, 32)``: the text of the pre-training."""
        return torch.cat([task.inputs[:, :WINDOW] for task in self.tasks])

    def base_model(self, *, retrain: bool = False, device: torch.device | str = "cpu") -> PreTrainedModel:
        """Load the base model of the seed, a fresh copy each time.

        Parameters
        ----------
        retrain : bool
            Train anew, whatever is shipped or cached, and renew the cache.
        device : str or torch.device

        Returns
        -------
        transformers.LlamaForCausalLM
            In training mode, float32. The models of `SHIPPED_SEEDS` at the default size come with the package; any
            other is trained once (some 8 seconds) and cached.
        """
        size = (self.width, self.layers, self.pretraining)

        def about() -> dict[str, Any]:
            windows = self.training_windows()
            return {"seed": self.seed, "windows": [len(windows), int(windows.sum())], "model": size}

        model: Any = shipped.load(
            f"stdlib-tasks-{self.seed}",
            untrained(self.seed, self.width, self.layers),
            lambda: train_base_model(self, steps=self.pretraining, device=device)[0],
            key=about,
            code=[untrained, train_base_model, _windows, train_steps, updates],
            default=size == (64, 2, 150),
            retrain=retrain,
        )
        return model.train().to(device)  # type: ignore[no-any-return]


def untrained(seed: int, width: int = 64, layers: int = 2) -> PreTrainedModel:
    """Make the Llama with 4 heads that pre-training begins with; 0.5 M parameters by default."""
    return tiny(
        "llama",
        width=width,
        layers=layers,
        heads=4,
        vocab=VOCAB,
        intermediate_size=3 * width,
        tie_word_embeddings=False,
        init=0.02,  # the default of the class
        pad_token_id=PAD,
        seed=seed,
    )


def train_base_model(
    world: StdlibTasks,
    *,
    steps: int = 150,
    lr: float = 3e-3,
    device: torch.device | str = "cpu",
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> tuple[PreTrainedModel, TrainingLog]:
    """Train the base model: next-token prediction on all training windows, 32 a step.

    Returns
    -------
    model, log
        Model in evaluation mode; losses in nats a token.
    """
    model: Any = untrained(world.seed, world.width, world.layers).to(device)  # type: ignore[arg-type]
    windows = world.training_windows().to(device)
    generator = torch.Generator().manual_seed(3_000_000 + world.seed)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            for rows in torch.randperm(len(windows), generator=generator).split(32):
                yield windows[rows, :-1], windows[rows, 1:]

    log = TrainingLog()
    start = time.process_time()
    run: Iterable[Any] = train_steps(
        model, batches(), steps, lr=lr, warmup=0, schedule="constant", betas=(0.9, 0.999)
    )
    for step in progress(run) if progress is not None else run:
        log.losses.append(step.loss)
    log.cpu_seconds = time.process_time() - start
    return model.eval(), log


@torch.no_grad()
def next_token_scores(model: PreTrainedModel, world: StdlibTasks) -> tuple[float, float]:
    """Loss (nats a token) and accuracy of next-token prediction on the test windows of all tasks."""
    windows = torch.cat([task.test_inputs[:, :WINDOW] for task in world.tasks])
    losses, right = 0.0, 0
    for part in windows.split(100):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits.float()
        targets = part[:, 1:]
        losses += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        )
        right += int((logits.argmax(-1) == targets).sum())
    count = windows[:, 1:].numel()
    return losses / count, right / count
