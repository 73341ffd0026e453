"""Which parameters a stage trains, and Half-Reset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from labkit.lab.cache import write_atomic

if TYPE_CHECKING:
    import pandas as pd

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Entry:
    """What a mask knows of one parameter.

    Attributes
    ----------
    trained : bool
    numel : int
        Its numbers.
    layer : int or None
        None outside the layers.
    stack : str
        "encoder", "decoder", or "" outside the layers.
    category : str
        "attention", "cross-attention", "ffn", "norm", "always" or "embedding".
    """

    trained: bool
    numel: int
    layer: int | None = None
    stack: str = ""
    category: str = "always"


class HalfMask(Mapping[str, bool]):
    """Names of parameters to whether they are trained.

    Parameters
    ----------
    entries : mapping of str to Entry
        In the order of ``named_parameters()``.
    settings : mapping
        What selected it: level, ratio, train_embeddings, seed, stage.

    Examples
    --------
    >>> from labkit.finetuning import HalfSelector
    >>> from labkit.testbeds.models import tiny
    >>> mask = HalfSelector(seed=0).select(tiny("llama", layers=2, tie_word_embeddings=False), stage=0)
    >>> mask["lm_head.weight"], len(mask), sum(mask.values())
    (True, 21, 12)
    >>> round(mask.trainable_fraction, 3)
    0.629
    """

    def __init__(self, entries: Mapping[str, Entry], settings: Mapping[str, Any] | None = None) -> None:
        self.entries = dict(entries)
        self.settings = dict(settings or {})

    def __getitem__(self, name: str) -> bool:
        return self.entries[name].trained

    def __iter__(self) -> Any:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HalfMask) and self.entries == other.entries

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        stage = self.settings.get("stage")
        return (
            f"HalfMask({self.trainable:,} of {self.total:,} parameters trained, {self.trainable_fraction:.1%}"
            + (f", stage {stage})" if stage is not None else ")")
        )

    @property
    def trainable(self) -> int:
        """Numbers that are trained."""
        return sum(entry.numel for entry in self.entries.values() if entry.trained)

    @property
    def total(self) -> int:
        """Numbers in all, tied ones once."""
        return sum(entry.numel for entry in self.entries.values())

    @property
    def trainable_fraction(self) -> float:
        """True share of the model's numbers that is trained, embeddings and head included."""
        return self.trainable / self.total

    @property
    def frozen(self) -> list[str]:
        """Names of the parameters that stay."""
        return [name for name, entry in self.entries.items() if not entry.trained]

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The model's parameters that are trained: what the optimizer of a loop of yours should get."""
        return [parameter for name, parameter in self._of(model).items() if self[name]]

    def to_frame(self) -> pd.DataFrame:
        """A row per parameter: layer, stack, category, matrix (last part of its name), trained, parameters."""
        import pandas as pd

        rows = []
        for name, entry in self.entries.items():
            parts = [part for part in name.split(".") if part not in ("weight", "default")]
            rows.append(
                {
                    "name": name,
                    "layer": entry.layer,
                    "stack": entry.stack,
                    "category": entry.category,
                    "matrix": parts[-1] if parts[-1] != "bias" else ".".join(parts[-2:]),
                    "trained": entry.trained,
                    "parameters": entry.numel,
                }
            )
        return pd.DataFrame(rows).astype({"layer": "Int64"})

    def save_json(self, path: Path | str) -> Path:
        """Write the mask and what selected it."""
        entries = {
            name: [entry.trained, entry.numel, entry.layer, entry.stack, entry.category]
            for name, entry in self.entries.items()
        }
        document = {"format": "half-mask-1", "settings": self.settings, "entries": entries}
        return write_atomic(Path(path), json.dumps(document, indent=1) + "\n")

    @classmethod
    def load_json(cls, path: Path | str) -> HalfMask:
        """Read what `save_json` wrote.

        Raises
        ------
        ValueError
            When the file holds no mask.
        """
        try:
            document: Any = json.loads(Path(path).read_text())
            if document["format"] != "half-mask-1":
                raise ValueError(f"its format is {document['format']!r}")
            return cls({n: Entry(*entry) for n, entry in document["entries"].items()}, document["settings"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} holds no mask of HalfMask.save_json: {error!r}") from None

    def _of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters by name, after a check that they are those of the mask."""
        own = dict(model.named_parameters())
        wrong = [name for name in self if name not in own or own[name].numel() != self.entries[name].numel]
        wrong += [name for name in own if name not in self.entries]
        if wrong:
            raise ValueError(
                f"the mask was made for another model: {', '.join(wrong[:4])} missing, unknown or of another size in "
                f"{type(model).__name__}; select one with HalfSelector(...).select(model, stage)"
            )
        return own


@torch.no_grad()
def half_reset_(tuned: M, base: nn.Module, mask: HalfMask) -> M:
    """Put the frozen half of a mask back to the base model's values: θ = Mθ₁ + (1 - M)θ₀, in place.

    Parameters
    ----------
    tuned : torch.nn.Module
        The fine-tuned model θ₁, changed and returned.
    base : torch.nn.Module
        Model of the same form before fine-tuning, θ₀.
    mask : HalfMask
        What it trains is kept from `tuned`, what it freezes is taken from `base`.

    Returns
    -------
    torch.nn.Module
        `tuned`.

    Raises
    ------
    ValueError
        When the mask or the base are of another form than `tuned`; nothing is changed then.

    Examples
    --------
    >>> from labkit.finetuning import HalfSelector
    >>> from labkit.testbeds.models import tiny
    >>> base, tuned = tiny("llama", layers=2, seed=0), tiny("llama", layers=2, seed=1)
    >>> mask = HalfSelector().select(tuned, stage=0)
    >>> theta = dict(half_reset_(tuned, base, mask).named_parameters())
    >>> all(torch.equal(theta[name], p) == (not mask[name]) for name, p in base.named_parameters() if p.ndim > 1)
    True
    """
    own = mask._of(tuned)
    theirs = dict(base.named_parameters())
    wrong = [n for n in mask.frozen if n not in theirs or theirs[n].shape != own[n].shape]
    if wrong:
        raise ValueError(
            f"base is another model than tuned: {', '.join(wrong[:4])} missing or of another shape; give the "
            f"checkpoint that the fine-tuning started from"
        )
    for name in mask.frozen:
        own[name].copy_(theirs[name])
    return tuned
