"""What a judge loses without a part of its training, trained once and recorded as ``recordings/tool_judges.json``.

``python -m labkit.testbeds.tool_judges_sweep`` takes about twenty minutes on one idle core. The record is written after each
run, so that a sweep that was stopped goes on where it was; ``--fresh`` begins anew.
"""

from __future__ import annotations

from typing import Any

import torch

from labkit.lab.bench import environment
from labkit.rlhf import ThemisLoss
from labkit.testbeds import recorded
from labkit.testbeds.tool_judges import accuracy, exact_calls, failing_bank, questions, train_judge

RECORD = "tool_judges"
#: The last five were added when the first three were known, to narrow the intervals; their number was fixed before they ran.
SEEDS = tuple(range(8))
ARMS: dict[str, dict[str, Any]] = {
    "all": {},
    "no observation loss": {"loss": ThemisLoss(form="paper", beta=0.0)},
    "no rationale": {"loss": ThemisLoss(form="paper", omega=0.0)},
    "authors' weights": {"loss": ThemisLoss(form="code")},
    "failures in training": {"drop_observation": 0.2},
    "no base": {"base_steps": 0},
}
FAILING = 0.2


def measure(arm: str, seed: int, tests: int = 150) -> dict[str, float]:
    """Train an arm and measure it on held-out questions.

    Returns
    -------
    dict
        ``calls`` and ``accuracy`` with all tools at work, and ``failing``, the accuracy with a fifth of the calls failing.
    """
    rows = questions(tests, seed, test=True)
    trained = train_judge(seed, **ARMS[arm])
    judged = trained.judge(rows)
    failing = trained.judge(rows, failing_bank(FAILING, seed))
    found = {"calls": exact_calls(rows, judged), "accuracy": accuracy(judged), "failing": accuracy(failing)}
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    """Train what the record lacks."""
    torch.set_num_threads(1)
    record: dict[str, dict[str, dict[str, float]]] = recorded.resumed(RECORD, __doc__).get("arms", {})
    for arm in ARMS:
        for seed in SEEDS:
            if str(seed) not in record.setdefault(arm, {}):
                record[arm][str(seed)] = measure(arm, seed)
                recorded.write(RECORD, {"arms": record}, environment())
                print(arm, seed, record[arm][str(seed)], flush=True)


if __name__ == "__main__":
    main()
