"""The cache: one build per recipe, damage detected, nothing half-written."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest

from labkit.lab import cache


def test_same_recipe_is_built_once_and_other_recipes_apart(own_cache):
    calls = []

    def build():
        calls.append(1)
        return {"loss": [1.5, 2.5]}

    first = cache.cached("t", {"a": 1, "b": 2}, build)
    assert cache.cached("t", {"b": 2, "a": 1}, build) == first == {"loss": [1.5, 2.5]}
    assert len(calls) == 1
    cache.cached("t", {"a": 1, "b": 3}, build)
    cache.cached("t", {"a": 1, "b": 2}, build, rebuild=True)
    assert len(calls) == 3


def test_first_and_later_calls_return_the_same_types(own_cache):
    assert cache.cached("t", {}, lambda: {"x": (1, 2)}) == {"x": [1, 2]}


def test_tensors_round_trip_bit_for_bit(own_cache):
    torch = pytest.importorskip("torch")
    weights = {"w": torch.randn(3, 5), "i": torch.arange(4)}
    cache.cached("m", {"seed": 0}, lambda: weights, kind="tensors")
    again = cache.cached("m", {"seed": 0}, lambda: pytest.fail("built twice"), kind="tensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty-record", "garbage-record"])
def test_damaged_entry_is_rebuilt_with_a_warning(own_cache, damage):
    cache.cached("d", {"k": 1}, lambda: list(range(100)))
    payload = next(path for path in own_cache.glob("d-*.json") if "record" not in path.name)
    record = next(own_cache.glob("d-*.record.json"))
    if damage == "truncate":
        payload.write_bytes(payload.read_bytes()[:20])
    elif damage == "flip":
        payload.write_text(payload.read_text().replace("42", "43"))
    elif damage == "empty-record":
        record.write_text("")
    else:
        record.write_text("{]")
    with pytest.warns(UserWarning, match="damaged.*built again"):
        assert cache.cached("d", {"k": 1}, lambda: list(range(100))) == list(range(100))
    assert json.loads(payload.read_text())[42] == 42


def test_failed_build_and_full_disk_leave_nothing(own_cache, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        cache.cached("f", {}, lambda: 1 / 0)

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        cache.cached("f", {}, lambda: 1)
    assert [path.name for path in own_cache.iterdir() if not path.name.endswith(".lock")] == []


def _slow_build(folder, counter):
    os.environ["LABKIT_CACHE"] = str(folder)

    def build():
        with counter.get_lock():
            counter.value += 1
        time.sleep(0.4)
        return 7

    assert cache.cached("shared", {"k": 0}, build) == 7


def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    workers = [context.Process(target=_slow_build, args=(tmp_path, counter)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert counter.value == 1


def _hang_in_build(folder, started):
    os.environ["LABKIT_CACHE"] = str(folder)

    def build():
        started.set()
        time.sleep(60)

    cache.cached("killed", {}, build)


def test_a_killed_builder_frees_the_lock(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    worker = context.Process(target=_hang_in_build, args=(tmp_path, started))
    worker.start()
    assert started.wait(20)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(20)
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    assert cache.cached("killed", {}, lambda: "fresh") == "fresh"


def test_source_of_the_code_belongs_to_the_key():
    def one():
        return 1

    def two():
        return 2

    assert cache.fingerprint({}, [one]) != cache.fingerprint({}, [two])


def test_bad_arguments_are_named(own_cache):
    with pytest.raises(ValueError, match=r"kind='pickle'.*'json', 'tensors'"):
        cache.cached("x", {}, lambda: 1, kind="pickle")
    with pytest.raises(TypeError, match="cache key"):
        cache.cached("x", {"f": object()}, lambda: 1)
    with pytest.raises(TypeError, match="must be JSON"):
        cache.cached("x", {}, lambda: object())
