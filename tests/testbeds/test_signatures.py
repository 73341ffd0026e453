"""First parameters of the standard library's functions."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter

import pytest

from labkit.testbeds.signatures import Signature, signature_edits, signature_facts


def test_every_fact_is_true_of_the_running_python() -> None:
    facts = signature_facts()
    assert len(facts) > 500
    assert len(set(facts)) == len(facts)
    for module, function, parameter in facts[::7]:
        called = getattr(importlib.import_module(module), function)
        assert next(iter(inspect.signature(called).parameters)) == parameter
    assert Signature("json", "dumps", "obj") in facts


def test_edits_are_wrong_and_neighbours_are_right() -> None:
    facts = {f"{f.module}.{f.function}": f.parameter for f in signature_facts()}
    edits = signature_edits(40, seed=3)
    subjects = [edit["subject"] for edit in edits]
    assert len(set(subjects)) == 40
    for edit in edits:
        assert facts[edit["subject"]] == edit["true"] != edit["new"]
        assert edit["new"] in facts.values()
        assert edit["subject"] in edit["prompt"]
        assert edit["subject"] in edit["paraphrases"][0]
        assert edit["true"] not in edit["prompt"].split()
        for prompt in edit["neighbours"]:
            named = prompt.removeprefix("In Python, the first parameter of ").removesuffix(" is called")
            assert facts[named] == edit["true"]
            assert named not in subjects
    assert signature_edits(40, seed=3) == edits
    assert signature_edits(40, seed=4) != edits
    assert Counter(len(e["neighbours"]) for e in edits)[10] > 5


def test_too_many_edits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"count must lie in 1\.\.\d+, got 100000"):
        signature_edits(100_000)
