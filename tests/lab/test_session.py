"""lab.start: what it accepts, what it refuses, and what a run writes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
import torch

from labkit import lab, papers
from labkit.lab import claims
from labkit.papers import Claim, Knob


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_RUN_DIR", str(tmp_path / "run"))
    return lab.start("nacl", size="smoke", seed=3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"slug": "nacll"}, ValueError, "did you mean 'nacl'"),
        ({"size": "lptop"}, ValueError, "'smoke', 'laptop', 'gpu', 'paper'"),
        ({"size": 3}, TypeError, "size=3 is a int; a str is wanted"),
        ({"seed": "0"}, TypeError, "seed='0' is a str; a int is wanted"),
        ({"seed": -1}, ValueError, "seed=-1 is out of range"),
        ({"seed": True}, TypeError, "seed=True"),
        ({"device": "gpu"}, ValueError, "'auto', 'cpu', 'cuda'"),
        ({"budgets": 0.2}, ValueError, "did you mean 'budget'"),
        ({"budget": 1.5}, ValueError, "budget=1.5 is out of range; any float from 0.05 up to 0.9"),
        ({"budget": float("nan")}, ValueError, "budget=nan"),
        ({"budget": "much"}, TypeError, "budget='much'"),
    ],
)
def test_bad_parameters_are_refused_with_what_is_allowed(arguments, error, message):
    with pytest.raises(error, match=message):
        lab.start(**{"slug": "nacl", **arguments})


def test_sizes_that_need_a_gpu_say_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="meant for a CUDA device.*size='laptop'"):
        lab.start("nacl", size="gpu")
    with pytest.raises(ValueError, match="no CUDA device"):
        lab.start("nacl", device="cuda:1")
    assert lab.start("nacl", size="gpu", device="cpu").device.type == "cpu"


def test_everything_is_seeded(monkeypatch):
    draws = []
    for _ in range(2):
        lab.start("nacl", size="smoke", seed=11)
        draws.append((random.random(), numpy.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert draws[0] == draws[1]
    assert torch.get_num_threads() == 1


def test_sizes_choose_and_must_agree(run):
    assert run.sizes(smoke={"steps": 1}, laptop={"steps": 9}).steps == 1
    with pytest.raises(ValueError, match="differ in epochs"):
        run.sizes(smoke={"steps": 1}, laptop={"steps": 9, "epochs": 2})
    with pytest.raises(ValueError, match="no settings for size='smoke'"):
        run.sizes(laptop={})
    with pytest.raises(ValueError, match="did you mean 'laptop'"):
        run.sizes(smoke={}, latop={})


def test_a_run_writes_its_record_and_refuses_gaps(run, tmp_path):
    with pytest.raises(ValueError, match="not registered.*Register it"):
        run.claim("no-such-claim", [1.0])
    with pytest.raises(RuntimeError, match="have no value"):
        run.verdicts()
    for claim in run.paper.claims:
        run.claim(claim.id, [0.5])
    run.record(accuracy=0.5)
    with pytest.raises(TypeError, match="record"):
        run.record(model=object())
    verdicts = run.verdicts()
    record = json.loads((tmp_path / "run" / "verdicts.json").read_text())
    assert record["seed"] == 3
    assert record["metrics"] == {"accuracy": 0.5}
    assert record["parameters"]["budget"] == 0.1
    assert {row["verdict"] for row in record["claims"]} == {claims.UNTESTABLE}
    assert record["peak_memory_mb"] > 50
    assert "torch" in record["environment"]
    assert "<table" in verdicts._repr_html_()


def test_a_run_off_the_registered_setting_says_so():
    run = lab.start("nacl", size="smoke", budget=0.5)
    for claim in run.paper.claims:
        run.claim(claim.id, [0.5])
    verdicts = run.verdicts()
    assert "Exploratory" in str(verdicts)
    assert "budget=0.5" in verdicts._repr_html_()


def test_values_that_thresholds_were_registered_for_too_are_no_exploration():
    run = lab.start("nacl", size="smoke", budget=0.5)
    knobs = {**run.paper.knobs, "budget": replace(run.paper.knobs["budget"], registered=(0.5,))}
    run.paper = replace(run.paper, knobs=knobs)
    for claim in run.paper.claims:
        run.claim(claim.id, [0.5])
    assert "Exploratory" not in str(run.verdicts())
    assert papers.load("reward_calibration").knobs["data"].registered == ("alpacaeval",)


CLAIM = Claim(
    "c", "A <b> beats B.", "difference", ">=", {"laptop": 0.3}, {"smoke": "one seed"}, unit="points"
)


@pytest.mark.parametrize(
    ("values", "verdict", "close"),
    [
        ([0.5, 0.6, 0.55], claims.REPRODUCED, False),
        ([0.1, 0.12, 0.11], claims.NOT_REPRODUCED, False),
        ([0.2, 0.5, 0.3], claims.REPRODUCED, True),
        ([0.31, 0.31], claims.UNTESTABLE, False),
        ([0.3, 0.3, 0.3], claims.REPRODUCED, False),
    ],
)
def test_verdict_from_mean_and_interval(values, verdict, close):
    result = claims.judge(CLAIM, "laptop", values)
    assert (result.verdict, result.close) == (verdict, close)
    assert result.mean == pytest.approx(numpy.mean(values))


def test_interval_matches_scipy():
    from scipy import stats

    values = [0.2, 0.5, 0.3, 0.9]
    expected = stats.t.interval(0.95, 3, loc=numpy.mean(values), scale=stats.sem(values))
    assert claims.interval(values) == pytest.approx(expected)
    assert claims.interval([1.0]) is None


def test_untestable_sizes_take_no_values_and_testable_ones_do():
    assert claims.judge(CLAIM, "smoke", None).reason == "one seed"
    with pytest.raises(ValueError, match="give one value per seed"):
        claims.judge(CLAIM, "laptop", None)
    with pytest.raises(ValueError, match="not all finite"):
        claims.judge(CLAIM, "laptop", [0.1, float("nan"), 0.3])


def test_a_claim_on_data_that_is_not_shipped_is_judged_where_it_is():
    claim = replace(CLAIM, without_data="the data is not shipped", min_seeds=1)
    absent = claims.judge(claim, "laptop", None)
    assert (absent.verdict, absent.reason) == (claims.UNTESTABLE, "the data is not shipped")
    assert claims.judge(claim, "laptop", [0.4]).verdict == claims.REPRODUCED
    assert claims.judge(claim, "laptop", [0.2]).verdict == claims.NOT_REPRODUCED
    assert claims.judge(claim, "smoke", [0.4]).reason == "one seed"


def test_claims_that_are_not_the_papers_say_so():
    control = claims.judge(replace(CLAIM, kind="control"), "laptop", [0.5] * 3)
    assert control.text == "A <b> beats B. (our control)"
    assert claims.judge(CLAIM, "laptop", [0.5] * 3).text == CLAIM.text


def test_the_two_forms_of_the_table():
    table = claims.Verdicts("x", "laptop", (claims.judge(CLAIM, "laptop", [0.51, 0.62, 0.57]),))
    assert "0.57" not in str(table)  # measured digits may differ between processors
    assert "reproduced" in str(table)
    assert "A &lt;b&gt; beats B." in table._repr_html_()
    assert "0.567" in table._repr_html_()


def test_a_paper_needs_a_threshold_or_a_reason_for_every_size():
    data = {
        "title": "t", "authors": "a", "venue": "v", "year": 2024, "arxiv": "1", "family": "kv", "idea": "i",
        "drag": "d", "sizes": {"laptop": {"seconds": 1, "memory_mb": 1}},
        "claims": [{"id": "c", "text": "t", "metric": "m", "direction": ">=", "threshold": {}}],
    }  # fmt: skip
    with pytest.raises(ValueError, match="either a threshold or a reason"):
        papers.parse("x", data)
    data["claims"][0] |= {"threshold": {"laptop": 1.0}, "direction": ">"}
    with pytest.raises(ValueError, match="'>=' or '<='"):
        papers.parse("x", data)
    data["claims"][0] |= {"direction": ">=", "kind": "contol"}
    with pytest.raises(ValueError, match="kind 'contol'; did you mean 'control'"):
        papers.parse("x", data)


def test_knob_bounds_and_choices():
    knob = Knob("mode", "str", "a", choices=("a", "b"))
    with pytest.raises(ValueError, match="mode='c' is not allowed; one of 'a', 'b'"):
        knob.check("c")
    assert Knob("x", "float", 0.5).check(1) == 1.0


def test_import_is_fast_and_loads_no_framework():
    code = (
        "import sys, time; t = time.perf_counter(); import labkit; seconds = time.perf_counter() - t;"
        "heavy = [m for m in ('torch', 'transformers', 'numpy', 'pandas', 'plotly') if m in sys.modules];"
        "print(seconds, heavy)"
    )
    fastest, heavy = 9.0, ""
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        fastest, heavy = min(fastest, float(out.split()[0])), out.split(maxsplit=1)[1].strip()
    assert heavy == "[]"
    assert fastest < 0.2
