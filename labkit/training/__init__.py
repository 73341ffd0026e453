"""Training that outgrows one device: one loop, its data, its checkpoints, and launch files for accelerate.

A script that trains on one CPU trains on many GPUs unchanged::

    python train.py                                                                    # one process
    torchrun --nproc-per-node 2 train.py                                               # DDP
    accelerate launch --config_file "$(python -m labkit.training ddp)" train.py        # DDP
    accelerate launch --config_file "$(python -m labkit.training fsdp2)" train.py      # sharded (FSDP2)

One process needs torch alone; several processes and mixed precision go through accelerate
(``pip install 'labkit[train]'``). See `TrainingLoop` for a script.
"""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "checkpoint": ["Checkpoint", "checkpoints", "latest_checkpoint"],
        "data": ["DatasetBatches", "DrawnBatches", "GlobalBatches"],
        "launch": ["launch_config"],
        "loop": ["TrainingConfig", "TrainingLoop"],
        "processes": ["ManyProcesses", "OneProcess"],
        "update": ["Step", "updates"],
    },
)
