"""The record of curiosity's controls, and what it is compared with."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import torch

from labkit.rlhf import CuriosityReward, TopKGate
from labkit.testbeds import cd_rlhf_sweep as sweep
from labkit.testbeds import recorded
from labkit.testbeds.models import tiny

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "rlhf" / "cd_rlhf.ipynb"


@pytest.fixture
def batch() -> Any:
    draw = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        iteration=3,
        ref_hidden=torch.randn(6, 9, 16, generator=draw),
        tokens=torch.randint(5, (6, 8), generator=draw),
        ranks=torch.randint(3, (6, 8), generator=draw),
        mask=torch.arange(8) < torch.tensor([[8], [8], [5], [8], [3], [8]]),
        reduce=lambda values: values,
    )


def test_shuffled_rewards_are_the_same_amounts_for_other_tokens(batch: Any) -> None:
    policy = tiny("llama", width=16, heads=2, layers=1, seed=0)
    plain, shuffled = CuriosityReward(0.5, TopKGate(1)), sweep.Shuffled(0.5, TopKGate(1))
    for hook in (plain, shuffled):
        hook.attach(policy)
    before, after = plain(batch), shuffled(batch)
    passed = sweep.opened(batch, TopKGate(1))
    assert torch.equal(passed, (batch.ranks > 0) & batch.mask)
    assert after[~passed].abs().max() == 0
    assert torch.equal(after[passed].sort().values, before[passed].sort().values)
    assert float((after != before)[passed].float().mean()) > 0.7
    assert torch.equal(shuffled(batch), after)  # of the update, not of the moment
    batch.iteration = 4
    assert not torch.equal(shuffled(batch), after)


def test_what_is_paid_for_by_hand() -> None:
    tokens = torch.tensor([[7, 1], [7, 2], [7, 1], [8, 1]])
    assert sweep.rarity(tokens).exp().flatten().tolist() == pytest.approx(
        [4 / 3, 4 / 3, 4 / 3, 4, 4 / 3, 4 / 3, 4, 4 / 3]
    )
    passed = torch.tensor([[False, True], [False, True], [True, False], [True, False]])
    paid = torch.tensor([[9.0, 1.0], [9.0, 3.0], [2.0, 9.0], [2.0, 9.0]])
    x, y = (1.0, 3.0, 2.0, 2.0), [math.log(4 / 3), math.log(4), math.log(4 / 3), math.log(4)]
    errors = torch.tensor([[1.0, 4.0], [2.0, 5.0], [1.0, 4.0], [2.0, 5.0]])
    found = sweep.describe(paid, passed, errors, tokens)
    middle = sum(y) / 4
    by_hand = sum((a - 2) * (b - middle) for a, b in zip(x, y, strict=True))
    by_hand /= math.sqrt(2 * sum((b - middle) ** 2 for b in y))
    assert found == pytest.approx({"pay": 2.0, "rarity": by_hand, "place": 1.5**2 / (1.5**2 + 0.5**2)})
    assert math.isnan(sweep.paid_for_rarity(paid, torch.zeros_like(passed), tokens))


def test_effective_words() -> None:
    assert sweep.effective_words(["a b", "a c", "a d", "a e"]) == pytest.approx((1 + 4) / 2)
    assert sweep.effective_words(["a b", "a"]) == pytest.approx(1.0)


def test_the_record_holds_all_runs_and_the_code_still_begins_them() -> None:
    record = recorded.read("cd_rlhf")
    assert record["updates"] == sweep.UPDATES
    assert {"torch", "commit"} <= set(record["environment"])
    seeds = [str(seed) for seed in sweep.SEEDS]
    assert {arm: list(runs) for arm, runs in record["runs"].items()} == dict.fromkeys(sweep.ARMS, seeds)
    sums = [str(seed) for seed in sweep.SUM_SEEDS]
    assert {arm: list(runs) for arm, runs in record["sums"].items()} == dict.fromkeys(sweep.SUMS, sums)
    first = sweep.SynonymTask(1).model()
    for arm in ("shuffled", "rate 0.00001"):
        found, scores = sweep.train(arm, 1, updates=4, first=first)
        assert scores == pytest.approx(record["begins"][arm]["1"][:4], abs=0.05)
        assert set(found) == set(record["runs"][arm]["1"])
    # four updates of a network at rest: what it finds hard are places, not words
    assert found["place"] > 0.9


def test_parts_of_the_sums() -> None:
    assert sweep.add("calculator alone", 0, updates=1) > 0  # some of 64 first answers are right by chance
    assert 0 <= sweep.add("all together", 0, updates=1) <= 1
    with pytest.raises(KeyError):
        sweep.add("all", 0)


def output(holds: str) -> str:
    """The output of the notebook's only cell with that code, as HTML or text."""
    nb = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (cell for cell in nb.cells if cell.cell_type == "code" and holds in cell.source)
    data = cell.outputs[-1]["data"]
    return str(data.get("text/html") or data["text/plain"])


def table(html: str) -> dict[str, list[float]]:
    """Rows of a data frame's HTML: name to the means in its cells."""
    found = {}
    for row in re.findall(r"<tr.*?</tr>", html, re.DOTALL):
        name, cells = re.search(r"<th[^>]*>(.*?)</th>", row), re.findall(r"<td[^>]*>([^<]*)</td>", row)
        if name and cells:
            found[name[1]] = [float(cell.split("±")[0]) for cell in cells]
    return found


def test_recorded_runs_that_also_run_live_have_the_notebooks_figures() -> None:
    live, record = table(output("rows += [train(arm, s)")), recorded.read("cd_rlhf")
    for arm in ("RLHF", "CD-RLHF", "constant"):
        runs = record["runs"][arm].values()
        names = ("score", "words", "distinct_product", "ead", "self_bleu", "tfidf_similarity")
        means = [sum(run[name] for run in runs) / len(runs) for name in names]
        assert live[arm] == pytest.approx(means, abs=6e-4), arm


def test_the_live_sums_are_the_recorded_ones() -> None:
    sums = recorded.read("cd_rlhf")["sums"]
    drawn = output('title="Does it learn to add?"')
    (ends,) = re.findall(r"all together [\d.e-]+ to ([\d.e-]+)", drawn)
    assert float(ends) == pytest.approx(sums["all together"]["0"], abs=6e-4)
