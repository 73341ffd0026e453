"""Grids: lists, ranges, values in step, files; and errors that say what is wrong with one."""

from __future__ import annotations

import numpy as np
import pytest

from labkit import papers
from labkit.lab import grid

KNOWN = {"size": "laptop", "seed": 0, "budget": 0.1, "proxies": 4, "flag": False, "free": None}


@pytest.mark.parametrize(
    ("text", "wanted", "values"),
    [
        ("0:5", int, [0, 1, 2, 3, 4]),
        ("1, 4:10:3", int, [1, 4, 7]),
        ("5:0:-2", int, [5, 3, 1]),
        ("0.1:0.4:0.1", float, [0.1, 0.2, 0.3]),
        ("0.1:0.35:0.1", float, [0.1, 0.2, 0.3]),
        ("1e-4,0.5,2", float, [1e-4, 0.5, 2.0]),
        ("cuda:0,cpu", str, ["cuda:0", "cpu"]),
        ("true,no", bool, [True, False]),
        ("3,x", type(None), [3, "x"]),
    ],
)
def test_text(text, wanted, values):
    found = grid.parse("name", text, wanted)
    assert found == values
    assert [type(item) for item in found] == [type(item) for item in values]


@pytest.mark.parametrize(
    ("text", "wanted", "message"),
    [
        ("1,,2", int, "has an empty item"),
        ("three", int, "name='three' is not an int"),
        ("5:0", int, "is an empty range"),
        ("0:4:0", int, "is an empty range"),
        ("0:", int, "is no range; write a:b"),
        ("0:inf", int, "is no range"),
        ("0:1:0.5", int, "name is an int, and so are the ends and the step"),
        ("0:1", float, "a range of floats needs its step, such as 0:1:0.1"),
        ("0:1000000000", int, "has 1000000000 values"),
    ],
)
def test_wrong_text(text, wanted, message):
    with pytest.raises(ValueError, match=message):
        grid.parse("name", text, wanted)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match=r"nacl has no parameter 'buget'; did you mean 'budget'\?"):
        grid.from_text({"buget": "1"}, papers.load("nacl").check({}), "nacl")


def test_crossed_and_in_step():
    crossed = grid.expand({"budget": [0.1, 0.2], "seed": range(3)})
    assert len(crossed) == 6
    assert crossed[:2] == [{"budget": 0.1, "seed": 0}, {"budget": 0.1, "seed": 1}]
    both = grid.expand({"seed": range(2), "budget": [0.1, 0.2], "proxies": [2, 4]}, ["budget", "proxies"])
    assert [tuple(run.values()) for run in both] == [(0, 0.1, 2), (0, 0.2, 4), (1, 0.1, 2), (1, 0.2, 4)]
    assert list(both[0]) == ["seed", "budget", "proxies"]
    assert grid.expand({"seed": 1, "budget": 0.5}, True) == [{"seed": 1, "budget": 0.5}]
    # The same value may come twice where another one moves with it.
    assert len(grid.expand({"budget": [0.1, 0.1], "proxies": [2, 4]}, True)) == 2


def test_several_grids_make_each_run_once():
    runs = grid.expand([{"seed": [0, 1]}, {"seed": [1, 2]}])
    assert [run["seed"] for run in runs] == [0, 1, 2]


def test_numpy_numbers_become_python_numbers():
    runs = grid.expand({"seed": np.arange(2), "budget": np.array([0.5])})
    assert {type(value) for run in runs for value in run.values()} == {int, float}


@pytest.mark.parametrize(
    ("values", "zipped", "message"),
    [
        ({"seed": [0, 1], "budget": [0.1, 0.2, 0.3]}, True, "seed has 2 values, budget has 3 values"),
        ({"seed": [0, 1]}, ["sead"], r"zip names 'sead', which has no values; did you mean 'seed'\?"),
        ({"seed": [0, 1, 0]}, False, "seed has the value 0 twice"),
        ({"seed": []}, False, "seed has no values"),
        ({"seed": range(1000), "proxies": range(1000)}, False, "the grid has 1000000 runs"),
    ],
)
def test_grids_that_can_not_be_expanded(values, zipped, message):
    with pytest.raises(ValueError, match=message):
        grid.expand(values, zipped)


def test_yaml(tmp_path):
    path = tmp_path / "grid.yaml"
    # Plain YAML takes 1:30 for ninety, and no for False.
    path.write_text("seed: 1:4\nbudget: [0.1, 0.2, 0.3]\nfree: no\nsize: smoke\nzip: [seed, budget]\n")
    blocks = grid.read(path, KNOWN, "nacl")
    runs = grid.expand(blocks)
    assert [(run["seed"], run["budget"]) for run in runs] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert runs[0]["free"] == "no"
    path.write_text("- {budget: 0.1, proxies: [1, 2]}\n- {budget: 0.5}\n")
    assert grid.expand(grid.read(path, KNOWN, "nacl")) == [
        {"budget": 0.1, "proxies": 1},
        {"budget": 0.1, "proxies": 2},
        {"budget": 0.5},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("seed: [1", "is no YAML"),
        ("just text", "must map names to values"),
        ("", "must map names to values"),
        ("seed: {a: 1}", "seed is neither a value nor a list"),
        ("sead: 1", r"did you mean 'seed'\?"),
        ("seed: []", "has an empty item"),
    ],
)
def test_wrong_yaml(tmp_path, text, message):
    path = tmp_path / "grid.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        grid.read(path, KNOWN, "nacl")
