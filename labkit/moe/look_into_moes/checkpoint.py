"""Read expert weights from a checkpoint without loading the model.

safetensors files are memory-mapped: a tensor costs what is looked at, and a layer's pages are given back when the next
is read, so that a checkpoint of a hundred gigabytes can be analysed in a laptop's memory. Shards of a hub repository are
fetched when a layer that lies in them is asked for.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from labkit.moe.adapters.matrices import readable
from labkit.moe.look_into_moes.weights import MATRICES, Matrix

NAMES: dict[Matrix, tuple[str, ...]] = {
    "act": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "wi", "fc1"),
    "down": ("down_proj", "w2", "wo", "fc2"),
}
"""What the three matrices are called in checkpoints, by what they do."""

_LAYER = r"(?P<stack>.*?)(?:layers|block|h)\.(?P<layer>\d+)\."
_EXPERT = re.compile(
    _LAYER + r"(?P<inside>.*?)experts\.(?:expert_)?(?P<expert>\d+)\.(?P<name>\w+)\.(?P<end>weight|qweight)$"
)
_SHARED = re.compile(_LAYER + r".*?shared_experts?\.(?P<name>\w+)\.weight$")
_FUSED = re.compile(
    _LAYER + r"(?P<inside>.*?)(?P<name>experts\.gate_up_proj|experts\.up_proj|experts\.down_proj|"
    r"input_linear\.weight|output_linear\.weight)$"
)
_ROUTER = re.compile(_LAYER + r"(?:.*\.)?(?:gate|router)(?:\.classifier|\.layer|\.wg)?\.weight$")
_DENSE = re.compile(_LAYER + r"(?:.*\.)?(?:mlp|feed_forward|DenseReluDense|ffn)\.(?P<name>\w+)\.weight$")
_QUANTISED = re.compile(r"(weight_scale(_inv)?|qweight|_blocks|_scales|absmax|quant_state.*)$")


class Checkpoint:
    """The expert weights of a checkpoint, as a `WeightSource`.

    Parameters
    ----------
    place : str or Path
        A folder with safetensors files, one such file, or the id of a hub repository.
    names : mapping, optional
        Names of the matrices where they are none of `NAMES`, such as ``{"act": "linear", "up": "linear_v", "down":
        "linear_1"}``.
    revision : str, optional
        Of the hub repository.
    mixture : bool, default True
        Whether experts are expected; a dense reference has none.

    Attributes
    ----------
    bytes_read : int
        Bytes of the tensors that were handed out so far; how much of them reached memory depends on what was looked at.

    Raises
    ------
    FileNotFoundError
        If there is no safetensors file, or a shard of the index is missing.
    ValueError
        If there are no experts, or weights are quantised.
    """

    def __init__(
        self,
        place: str | Path,
        *,
        names: Mapping[str, str] | None = None,
        revision: str | None = None,
        mixture: bool = True,
    ) -> None:
        self.place, self.revision = str(place), revision
        self.bytes_read = 0
        self._names = {m: (names[m],) if names and m in names else NAMES[m] for m in MATRICES}
        if odd := set(names or {}) - set(MATRICES):
            raise ValueError(f"names has {sorted(odd)[0]!r}; the matrices are {', '.join(MATRICES)}")
        self._config = self._json("config.json") or {}
        self._open: tuple[str, Any] | None = None
        self._shard_of = self._index()
        self._find(mixture)

    @property
    def name(self) -> str:
        """Folder or repository."""
        return self.place

    def _path(self, file: str) -> Path | None:
        """A file of the checkpoint, fetched from the hub where it is one; None if it has no such file."""
        here = Path(self.place)
        if here.is_file():
            return here if file == here.name else None
        if here.is_dir():
            return here / file if (here / file).is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.place, file, revision=self.revision))
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(
                f"{self.place!r} is no folder, and {file} of the hub repository of that name cannot be fetched: {error}"
            ) from None
        except EntryNotFoundError:
            return None
        except Exception as error:  # an id that is none, no such repository, no access
            raise FileNotFoundError(
                f"{self.place!r} is neither a folder nor a hub repository that can be read: {error}"
            ) from None

    def _json(self, file: str) -> dict[str, Any] | None:
        path = None if Path(self.place).is_file() else self._path(file)
        found: dict[str, Any] | None = None if path is None else json.loads(path.read_text(encoding="utf-8"))
        return found

    def _index(self) -> dict[str, str]:
        """Which file holds a tensor."""
        here = Path(self.place)
        index = self._json("model.safetensors.index.json")
        if index is not None:
            return dict(index["weight_map"])
        if here.is_dir():
            files = sorted(path.name for path in here.glob("*.safetensors"))
        else:
            single = here.name if here.is_file() else "model.safetensors"
            files = [single] if self._path(single) is not None else []
        if not files:
            raise FileNotFoundError(
                f"{self.place} holds no safetensors file. Other formats are not read, since loading them runs code: "
                "convert with model.save_pretrained(folder)"
            )
        found: dict[str, str] = {}
        for file in files:
            found.update(dict.fromkeys(self._shard(file).keys(), file))
        return found

    def _shard(self, file: str) -> Any:
        """A memory-mapped file; only one is open at a time, so that its pages can be given back."""
        if self._open is None or self._open[0] != file:
            path = self._path(file)
            if path is None:
                raise FileNotFoundError(f"{file}, named by the index, is missing from {self.place}")
            self._open = None
            try:
                self._open = (file, safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path} is no readable safetensors file: {error}") from None
        return self._open[1]

    def close(self) -> None:
        """Give the memory-mapped pages back."""
        self._open = None

    def _tensor(self, name: str, part: int | None = None) -> Tensor:
        shard = self._shard(self._shard_of[name])
        tensor: Tensor = shard.get_tensor(name) if part is None else shard.get_slice(name)[part]
        self.bytes_read += tensor.numel() * tensor.element_size()
        return readable(tensor, name)

    def _shape(self, name: str) -> list[int]:
        return list(self._shard(self._shard_of[name]).get_slice(name).get_shape())

    def _layer_of(self, found: re.Match[str]) -> int:
        layer = int(found["layer"])
        if self._config.get("is_encoder_decoder") and found["stack"].startswith("decoder"):
            layer += int(self._config.get("num_layers", 0))
        return layer

    def _matrix(self, name: str) -> Matrix | None:
        return next((m for m in MATRICES if name in self._names[m]), None)

    def _find(self, mixture: bool) -> None:
        """Sort the names of the tensors by layer, matrix and expert."""
        self._experts: dict[int, dict[Matrix, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
        self._shared: dict[int, dict[Matrix, list[str]]] = defaultdict(lambda: defaultdict(list))
        self._fused: dict[int, dict[str, str]] = defaultdict(dict)
        self._dense: dict[int, dict[Matrix, str]] = defaultdict(dict)
        self._routers: dict[int, str] = {}
        unknown: set[str] = set()
        for name in sorted(self._shard_of):
            if _QUANTISED.search(name) and "experts" in name:
                raise ValueError(
                    f"{self.place} holds quantised experts ({name}). Load the model, call model.dequantize() and "
                    "save_pretrained(folder), then analyse that folder"
                )
            attention = re.search(r"(self_attn|attention|attn)\.", name)
            if found := _EXPERT.match(name):
                matrix = self._matrix(found["name"])
                if matrix is None:
                    unknown.add(found["name"])
                else:
                    self._experts[self._layer_of(found)][matrix][int(found["expert"])] = name
            elif (found := _FUSED.match(name)) and not attention:
                self._fused[self._layer_of(found)][
                    found["name"].split(".")[-2 if "linear" in name else -1]
                ] = name
            elif found := _SHARED.match(name):
                if matrix := self._matrix(found["name"]):
                    self._shared[self._layer_of(found)][matrix].append(name)
            elif (found := _ROUTER.match(name)) and not attention:
                self._routers[self._layer_of(found)] = name
            elif (found := _DENSE.match(name)) and (matrix := self._matrix(found["name"])):
                self._dense[self._layer_of(found)][matrix] = name
        for layer in [n for n, parts in self._dense.items() if "down" not in parts]:
            del self._dense[layer]
        if mixture and not self.layers:
            known = "; ".join(f"{m}: {', '.join(self._names[m])}" for m in MATRICES)
            seen = (
                f"its experts have {', '.join(sorted(unknown))}: give names={{...}}"
                if unknown
                else "it has none"
            )
            raise ValueError(f"{self.place} has no experts of known names ({known}); {seen}")
        if not mixture and not self._dense:
            raise ValueError(f"{self.place} has no dense feed-forward layer of known names to compare with")

    @property
    def layers(self) -> list[int]:
        """MoE layers, ascending."""
        return sorted({*self._experts, *self._fused})

    @property
    def dense_layers(self) -> list[int]:
        """Layers with a dense feed-forward layer, ascending."""
        return sorted(self._dense)

    @property
    def top_k(self) -> int | None:
        """k as the configuration gives it."""
        found = self._config.get("num_experts_per_tok", self._config.get("moe_top_k"))
        return found if isinstance(found, int) else None

    def num_experts(self, layer: int) -> int:
        """Routed experts E of a layer."""
        if layer in self._experts:
            return len(self._experts[layer]["down"])
        fused = self._fused[layer]
        return self._shape(fused.get("down_proj") or fused["output_linear"])[0]

    def matrices(self, layer: int) -> tuple[Matrix, ...]:
        """Matrices that an expert of the layer has."""
        if layer in self._experts:
            return tuple(m for m in MATRICES if m in self._experts[layer])
        return ("up", "down") if "up_proj" in self._fused[layer] else MATRICES

    def stored(self, layer: int, matrix: Matrix) -> list[Tensor]:
        """One matrix of all routed experts; views of the file, in their own float type.

        Raises
        ------
        ValueError
            If an expert's matrix is missing, or the weights are quantised.
        """
        if layer in self._experts:
            named = self._experts[layer][matrix]
            count = self.num_experts(layer)
            if sorted(named) != list(range(count)):
                lost = sorted(set(range(count)) - set(named))
                raise ValueError(
                    f"{self.place}, layer {layer}: no {matrix} of expert {lost}; is a shard missing?"
                )
            return [self._tensor(named[e]) for e in range(count)]
        return [self._from_fused(layer, matrix, e) for e in range(self.num_experts(layer))]

    def _from_fused(self, layer: int, matrix: Matrix, expert: int) -> Tensor:
        fused = self._fused[layer]
        transposed = self._config.get("model_type") == "gpt_oss"
        if matrix == "down" or "up_proj" in fused:
            name = fused.get("down_proj" if matrix == "down" else "up_proj") or fused["output_linear"]
            whole = self._tensor(name, expert)
            return whole.T if transposed else whole
        both = self._tensor(fused.get("gate_up_proj") or fused["input_linear"], expert)
        if transposed:  # GPT-OSS interleaves the two
            return both.T[0 if matrix == "act" else 1 :: 2]
        act, up = both.chunk(2)
        return act if matrix == "act" else up

    def shared(self, layer: int, matrix: Matrix) -> list[Tensor]:
        """The same matrix of the shared experts."""
        return [self._tensor(name) for name in self._shared.get(layer, {}).get(matrix, [])]

    def dense(self, layer: int, matrix: Matrix) -> Tensor:
        """The same matrix of a dense feed-forward layer."""
        return self._tensor(self._dense[layer][matrix])

    def router(self, layer: int) -> Tensor | None:
        """Weight of a linear router."""
        name = self._routers.get(layer)
        weight = None if name is None else self._tensor(name)
        return weight if weight is not None and weight.shape[0] == self.num_experts(layer) else None
