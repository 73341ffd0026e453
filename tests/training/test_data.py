"""Global batches: the same rows however they are shared."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from labkit.training import DatasetBatches, DrawnBatches
from labkit.training.launch import launch_config, launch_configs


def drawn(block: int | None) -> DrawnBatches:
    return DrawnBatches(
        lambda rows, g: {"x": torch.rand(rows, 2, generator=g), "n": 3}, 12, block=block, seed=5
    )


def rows(step: int, data, world: int, accumulate: int) -> torch.Tensor:
    parts = [part for rank in range(world) for part in data.micro_batches(step, rank, world, accumulate)]
    assert len(parts) == world * accumulate
    return torch.cat([part["x"] if isinstance(part, dict) else part for part in parts])


@pytest.mark.parametrize(
    "data",
    [drawn(None), drawn(1), drawn(4), DatasetBatches(torch.arange(17), 12, seed=2)],
    ids=["whole", "rows", "blocks", "dataset"],
)
def test_rows_do_not_depend_on_the_sharing(data) -> None:
    for step in (0, 1, 5):
        alone = rows(step, data, 1, 1)
        for world, accumulate in ((2, 1), (1, 3), (2, 3), (12, 1), (4, 3)):
            assert torch.equal(rows(step, data, world, accumulate), alone)
    assert not torch.equal(rows(0, data, 1, 1), rows(1, data, 1, 1))


def test_blocks_draw_no_more_than_their_own() -> None:
    asked = []

    def draw(rows: int, generator: torch.Generator) -> torch.Tensor:
        asked.append(rows)
        return torch.rand(rows, generator=generator)

    list(DrawnBatches(draw, 12, block=2).micro_batches(0, rank=1, world=3))
    assert asked == [2, 2]


def test_every_row_of_a_data_set_once_an_epoch_in_a_new_order() -> None:
    data = DatasetBatches([{"x": torch.tensor(i)} for i in range(10)], 4, seed=1)
    seen = torch.cat([next(data.micro_batches(step))["x"] for step in range(10)])
    epochs = seen.view(4, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    plain = DatasetBatches(list(range(3)), 4, shuffle=False, collate=list)
    assert next(plain.micro_batches(1)) == [1, 2, 0, 1]


def test_named_tuples_stay_what_they_are() -> None:
    Pair = namedtuple("Pair", "a b")
    data = DrawnBatches(lambda n, g: Pair(torch.rand(n, generator=g), [torch.ones(n, 1)]), 4, block=1)
    batch = next(data.micro_batches(0))
    assert isinstance(batch, Pair)
    assert batch.a.shape == (4,)
    assert batch.b[0].shape == (4, 1)


def test_launch_files_are_what_accelerate_reads() -> None:
    pytest.importorskip("accelerate")
    from accelerate.commands.config.config_args import load_config_from_file

    for name in launch_configs():
        config = load_config_from_file(str(launch_config(name)))
        assert config.num_processes == 2
        assert (config.fsdp_config or {}).get("fsdp_version") == (2 if "fsdp2" in name else None)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DrawnBatches(torch.rand, 0), ValueError, "batch must be at least 1"),
        (lambda: DrawnBatches(torch.rand, 8, block=3), ValueError, "block must divide the batch of 8"),
        (lambda: list(drawn(1).micro_batches(0, 0, 5)), ValueError, "cut evenly into 5 processes"),
        (lambda: DatasetBatches(iter([1]), 1), TypeError, "must have a length"),
        (lambda: DatasetBatches([], 1), ValueError, "empty"),
        (lambda: launch_config("fsdp"), ValueError, "did you mean 'fsdp2'"),
    ],
)
def test_bad_calls_are_refused(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
