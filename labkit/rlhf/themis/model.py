"""The reward model: any causal language model, three tokens more, and a linear head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from labkit.rlhf.positions import check_length
from labkit.rlhf.themis.losses import ThemisLoss, ranking_loss
from labkit.rlhf.themis.traces import SPECIAL_TOKENS, Example, Trace, token_ids
from labkit.rlhf.themis.tracing import check_tracing, run_traces
from labkit.rlhf.themis.verdicts import Tools

Pooling = Literal["last", "mean"]
_SETTINGS, _HEAD = "themis.json", "v_head.safetensors"


@dataclass
class ThemisOutput(ModelOutput):
    """Output of `ThemisRewardModel`.

    Attributes
    ----------
    loss, lm_loss, rm_loss : Tensor
        Scalars, given labels.
    rewards : Tensor
        (B,).
    logits : Tensor
        (B, T, V).
    tool_loss, observation_loss, rationale_loss : Tensor
        Means of the parts, given labels.
    """

    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    rm_loss: Tensor | None = None
    rewards: Tensor | None = None
    logits: Tensor | None = None
    tool_loss: Tensor | None = None
    observation_loss: Tensor | None = None
    rationale_loss: Tensor | None = None


class ThemisRewardModel(nn.Module):
    """A causal language model that writes a trace, with a head that scores it.

    Parameters
    ----------
    causal_lm : PreTrainedModel or PeftModel
        Must hold rows for the three tokens already: see `from_causal_lm`.
    pooling : str
        ``last``: the hidden state at the last attended position; ``mean``: the mean over all attended positions.
    loss : ThemisLoss, optional

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> from labkit.testbeds.language import text_tokenizer
    >>> tokenizer = text_tokenizer()
    >>> model = ThemisRewardModel.from_causal_lm(tiny("llama", vocab=len(tokenizer)), tokenizer)
    >>> batch = tokenizer(["Question: a\\nAnswer: b", "Question: a\\nAnswer: c"], return_tensors="pt")
    >>> model(batch["input_ids"], batch["attention_mask"]).rewards.shape
    torch.Size([2])
    """

    def __init__(self, causal_lm: Any, pooling: Pooling = "last", loss: ThemisLoss | None = None) -> None:
        super().__init__()
        if pooling not in ("last", "mean"):
            raise ValueError(f"pooling must be 'last' or 'mean', got {pooling!r}")
        if not hasattr(causal_lm, "get_output_embeddings") or causal_lm.get_output_embeddings() is None:
            raise TypeError(f"causal_lm must be a model with an LM head, got {type(causal_lm).__name__}")
        self.causal_lm = causal_lm
        self.pooling: str = pooling
        self.loss = loss or ThemisLoss()
        text_config = causal_lm.config.get_text_config()
        weight = causal_lm.get_output_embeddings().weight
        self.v_head = nn.Linear(text_config.hidden_size, 1, bias=False, device=weight.device)
        nn.init.normal_(self.v_head.weight, std=1 / (text_config.hidden_size + 1) ** 0.5)

    @property
    def config(self) -> Any:
        """Config of the language model."""
        return self.causal_lm.config

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.v_head.weight.device

    @classmethod
    def from_causal_lm(
        cls, causal_lm: Any, tokenizer: Any, pooling: Pooling = "last", loss: ThemisLoss | None = None
    ) -> ThemisRewardModel:
        """Add the three tokens to a tokenizer and to a model, and a head to the model; both are changed in place.

        New rows start at the mean of the old ones, so that none begins with an extreme score.
        """
        tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        embedding = causal_lm.get_input_embeddings()
        old = embedding.num_embeddings
        if len(tokenizer) > old:
            causal_lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            with torch.no_grad():
                for layer in {causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()}:
                    layer.weight[old:] = layer.weight[:old].mean(0)
                    if getattr(layer, "bias", None) is not None:
                        layer.bias[old:] = layer.bias[:old].mean()
        return cls(causal_lm, pooling, loss)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        parts: Tensor | None = None,
        **kwargs: Any,
    ) -> ThemisOutput:
        """Rewards, logits and, given labels, losses.

        Parameters
        ----------
        input_ids, attention_mask : Tensor
            (B, T), padded on either side.
        labels, parts : Tensor, optional
            (B, T): see `ThemisLoss.language`. With labels the first half of the batch are the better answers, the
            second half the worse, in the same order.
        **kwargs
            Handed to the language model.

        Raises
        ------
        ValueError
            With labels, for an odd batch; for a row without an attended token, or with more than the model has
            positions for.
        """
        if labels is not None and len(input_ids) % 2:
            raise ValueError(
                f"a batch of {len(input_ids)} holds no pairs: with labels its first half are the better answers and its "
                "second half the worse"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} is not like {tuple(input_ids.shape)}"
            )
        _attended(attention_mask)
        check_length(
            int(attention_mask.sum(1).max()),
            self.causal_lm,
            "a text with its trace",
            "ThemisCollator(max_length=) cuts beginnings off",
        )
        if "position_ids" not in kwargs and _takes(self.causal_lm, "position_ids"):
            kwargs["position_ids"] = _positions(attention_mask)
        out = self.causal_lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=True,
            use_cache=False,
            **kwargs,
        )
        rewards = self._pooled(out.hidden_states[-1], attention_mask)
        if labels is None:
            return ThemisOutput(rewards=rewards, logits=out.logits)
        losses = self.loss.language(out.logits, labels, parts)
        half = len(rewards) // 2
        rm_loss = ranking_loss(rewards[:half], rewards[half:])
        return ThemisOutput(
            loss=self.loss.total(losses["lm_loss"], rm_loss),
            lm_loss=losses["lm_loss"],
            rm_loss=rm_loss,
            rewards=rewards,
            logits=out.logits,
            tool_loss=losses["tool"],
            observation_loss=losses["observation"],
            rationale_loss=losses["rationale"],
        )

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any = None) -> Tensor:
        """Rewards alone: without the logits of every token, and reading on where a cache ends.

        Parameters
        ----------
        input_ids : Tensor
            (B, T), the tokens that the cache does not hold.
        attention_mask : Tensor
            (B, S + T), of the S cached columns and the new ones.
        past_key_values : Cache, optional
            Of the S columns before; the new tokens are added to it.

        Returns
        -------
        Tensor
            (B,).

        Raises
        ------
        ValueError
            With a cache and pooling ``mean``, which needs the hidden states of all tokens; for a mask of another width
            than cached and new tokens together; for a row without an attended token among the new ones, or with more
            than the model has positions for.
        """
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if past and self.pooling == "mean":
            raise ValueError("pooling 'mean' needs every token: score without past_key_values")
        if attention_mask.shape != (len(input_ids), past + input_ids.shape[1]):
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} must cover {past} cached and {input_ids.shape[1]} new "
                f"tokens of {len(input_ids)} rows"
            )
        new = attention_mask[:, past:]
        _attended(new)
        check_length(int(attention_mask.sum(1).max()), self.causal_lm, "a text", "shorten it")
        more: dict[str, Any] = {}
        if _takes(self.causal_lm, "position_ids"):
            more["position_ids"] = _positions(attention_mask)[:, past:]
        if _takes(self.causal_lm, "logits_to_keep"):
            more["logits_to_keep"] = 1
        if past:
            more["past_key_values"] = past_key_values
        out = self.causal_lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=True,
            use_cache=bool(past),
            **more,
        )
        return self._pooled(out.hidden_states[-1], new)

    def score_texts(self, tokenizer: Any, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        """Rewards of texts as they stand, with the end-of-text token behind each and nothing generated.

        Parameters
        ----------
        tokenizer
            As `from_causal_lm` left it.
        texts : sequence of str
            B of them, such as ``TraceFormat().plain(question, answer)`` or the ``text`` of a `Trace`.
        batch_size : int
            Texts that are read at a time.

        Returns
        -------
        Tensor
            (B,).

        Raises
        ------
        ValueError
            For no text, a text longer than the model's positions, or a tokenizer that lacks the three tokens or does
            not belong to the model.

        Examples
        --------
        >>> from labkit.rlhf import TraceFormat
        >>> from labkit.testbeds.models import tiny
        >>> from labkit.testbeds.tokenizers import byte_tokenizer
        >>> tokenizer = byte_tokenizer()
        >>> model = ThemisRewardModel.from_causal_lm(tiny("llama", vocab=len(tokenizer)), tokenizer)
        >>> model.score_texts(tokenizer, [TraceFormat().plain("6 times 7?", said) for said in ("42", "41")]).shape
        torch.Size([2])
        """
        self.check_tokenizer(tokenizer)
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"texts must be a list of at least one text, got {texts!r}")
        whole = [text + (tokenizer.eos_token or "") for text in texts]
        found = []
        for begin in range(0, len(whole), batch_size):
            batch = tokenizer(
                whole[begin : begin + batch_size],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
            )
            found.append(
                self.score(batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device))
            )
        return torch.cat(found)

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden.to(self.v_head.weight.dtype)  # (B, T, D)
        if self.pooling == "mean":
            weight = mask[..., None].to(hidden.dtype)
            pooled = (hidden * weight).sum(1) / weight.sum(1)
        else:
            place = torch.arange(mask.shape[1], device=mask.device)
            last = (mask.to(place.dtype) * place).argmax(1)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return self.v_head(pooled).squeeze(-1)  # (B,)

    def check_tokenizer(self, tokenizer: Any) -> dict[str, int]:
        """Ids of the three tokens.

        Raises
        ------
        ValueError
            If the tokenizer lacks one, or has more tokens than the model has rows.
        """
        ids = token_ids(tokenizer)
        rows = self.causal_lm.get_input_embeddings().weight.shape[0]
        if max(ids.values()) >= rows:
            raise ValueError(
                f"the tokenizer has ids up to {max(ids.values())} and the model {rows} rows; "
                "ThemisRewardModel.from_causal_lm(model, tokenizer) adds rows for the three tokens"
            )
        return ids

    def judge(
        self, tokenizer: Any, bank: Tools, examples: Sequence[Example | tuple[str, str]], **tracing: Any
    ) -> list[Trace]:
        """Judge answers with tools: see `run_traces`."""
        return run_traces(self, tokenizer, bank, examples, **tracing)

    def check_tracing(self, **tracing: Any) -> None:
        """Raise for arguments that `judge` would not take.

        Raises
        ------
        TypeError, ValueError
            For unknown names, and for numbers and options that `run_traces` refuses.
        """
        check_tracing(self, **tracing)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of the language model."""
        return self.causal_lm.generate(*args, **kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """As of the language model."""
        self.causal_lm.gradient_checkpointing_enable(**kwargs)

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Write the language model (or its adapter), the head, the settings and, if given, the tokenizer.

        The language model's files are its own, so that ``AutoModelForCausalLM.from_pretrained`` reads them too.
        """
        from labkit.lab.cache import write_atomic

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kwargs = {"save_embedding_layers": True} if _is_peft(self.causal_lm) else {}
        self.causal_lm.save_pretrained(folder, **kwargs)
        if tokenizer is not None:
            token_ids(tokenizer)
            tokenizer.save_pretrained(folder)
        head = {"weight": self.v_head.weight.detach().cpu().contiguous()}
        write_atomic(folder / _HEAD, save(head))
        rows = self.causal_lm.get_input_embeddings().weight.shape[0]
        settings = {"pooling": self.pooling, "loss": asdict(self.loss), "rows": rows}
        write_atomic(folder / _SETTINGS, json.dumps(settings, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, base: Any = None, **kwargs: Any) -> ThemisRewardModel:
        """Read what `save_pretrained` wrote.

        Parameters
        ----------
        folder : path
        base : PreTrainedModel, optional
            For a saved adapter: the language model under it; by default the one that the adapter names.
        **kwargs
            For ``AutoModelForCausalLM.from_pretrained``.

        Raises
        ------
        FileNotFoundError
            If the folder holds no such model.
        """
        from transformers import AutoModelForCausalLM

        folder = Path(folder)
        for name in (_SETTINGS, _HEAD):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}: it was not written by ThemisRewardModel.save_pretrained"
                )
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        if (folder / "adapter_config.json").is_file():
            from peft import PeftModel

            if base is None:
                named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
                base = AutoModelForCausalLM.from_pretrained(named, **kwargs)
            if base.get_input_embeddings().weight.shape[0] != settings["rows"]:
                base.resize_token_embeddings(settings["rows"], mean_resizing=False)
            causal_lm: Any = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
        else:
            causal_lm = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        model = cls(causal_lm, settings["pooling"], ThemisLoss(**settings["loss"]))
        model.v_head.load_state_dict(load_file(folder / _HEAD))
        return model

    def load_weights(self, folder: str | Path) -> None:
        """Take the weights that `save_pretrained` wrote for a model of the same make into this one."""
        folder = Path(folder)
        if _is_peft(self.causal_lm):
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(self.causal_lm, load_file(folder / "adapter_model.safetensors"))
        else:
            kept = type(self.causal_lm).from_pretrained(folder)
            self.causal_lm.load_state_dict(kept.state_dict())
        self.v_head.load_state_dict(load_file(folder / _HEAD))


def _is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _takes(model: Any, name: str) -> bool:
    import inspect

    inner = model.get_base_model() if _is_peft(model) else model
    return name in inspect.signature(inner.forward).parameters


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)  # padding on the left changes nothing


def _attended(mask: Tensor) -> None:
    if not bool(mask.any(1).all()):
        raise ValueError("a row of the batch has no attended token")
