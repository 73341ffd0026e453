"""Fine-tuning on one task after the other: tasks, methods, and the score matrix R[i][j].

A method is added as one object with some of the hooks of `Method`: ``stage(model, index, task)``, a context that is
entered before the stage's optimizer is made; ``before_step(model)``, when the whole gradient of an update is there,
before clipping; ``after_step(model, optimizer)``; and, for methods that store rows, ``begin(course)`` and
``data(index, data)``. `Replay` and `GEM` are such methods, and `combine` joins several.
"""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "data": ["StreamBatches", "Task"],
        "methods": ["GEM", "Course", "Method", "Replay", "combine", "gem_projection"],
        "run": ["model_loss", "sequential_finetune", "target_count"],
        "scores": ["ScoreMatrix"],
    },
)
