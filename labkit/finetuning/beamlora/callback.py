"""BeamLoRA in ``transformers.Trainer`` and the trainers that are built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from labkit.finetuning.beamlora.schedule import FILE, BeamEvent, BeamScheduler


class BeamSearchCallback(TrainerCallback):
    """Reallocates ranks while a Trainer trains a model with a `BeamLoraConfig`; also trl's trainers.

    Values are remembered in ``on_optimizer_step`` and ranks reallocated in ``on_step_end``. Checkpoints of the trainer
    get two more files, from which ``train(resume_from_checkpoint=...)`` goes on.

    Parameters
    ----------
    total_steps : int, optional
        S; by default what the trainer counts.
    every, end, p0 : optional
        As `BeamLoraConfig`, whose values hold where they are left out.
    seed : int
        Of the permutations.
    **settings
        Further arguments of `BeamScheduler`.

    Attributes
    ----------
    scheduler : BeamScheduler or None
        There once training has begun.
    events : list of BeamEvent

    Examples
    --------
    ::

        model = get_peft_model(model, BeamLoraConfig(r=64, lora_alpha=128, target_modules="all-linear"))
        Trainer(model, args, train_dataset=data, callbacks=[BeamSearchCallback()]).train()
        save_beam_adapter(model, "adapter")  # a plain LoRA
    """

    def __init__(
        self,
        total_steps: int | None = None,
        every: int | None = None,
        end: int | None = None,
        p0: float | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.total_steps = total_steps
        self.settings: dict[str, Any] = {"every": every, "end": end, "p0": p0, "seed": seed} | settings
        self.scheduler: BeamScheduler | None = None

    @property
    def events(self) -> list[BeamEvent]:
        """Reallocations so far."""
        return [] if self.scheduler is None else self.scheduler.events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find layers and optimizer; go on from a checkpoint if the trainer does."""
        steps = self.total_steps or state.max_steps
        self.scheduler = BeamScheduler(kwargs["model"], kwargs["optimizer"], steps, **self.settings)
        if state.global_step:
            self._resume(args, state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember, where it is due; the trainer has not counted the step yet."""
        assert self.scheduler is not None
        self.scheduler.remember(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reallocate, where it is due."""
        assert self.scheduler is not None
        self.scheduler.advance(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put what was remembered beside the trainer's checkpoint."""
        if self.scheduler is not None and state.is_world_process_zero:
            self.scheduler.save(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")

    def _resume(self, args: TrainingArguments, step: int) -> None:
        assert self.scheduler is not None
        given = args.resume_from_checkpoint
        places = [Path(given)] if isinstance(given, str) and Path(given).is_dir() else []
        places.append(Path(args.output_dir or ".") / f"checkpoint-{step}")
        for place in places:
            if (place / f"{FILE}.json").is_file():
                self.scheduler.restore(place)
                return
        self.scheduler.finished = step
        if self.scheduler.needs_cache:
            raise ValueError(
                f"training goes on at step {step}, but none of {', '.join(map(str, places))} holds {FILE}.json with "
                f"what BeamLoRA had remembered: resume from the run's own output_dir, or name the checkpoint in "
                f"TrainingArguments(resume_from_checkpoint=...) too"
            )
