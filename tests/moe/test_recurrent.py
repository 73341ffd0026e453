from __future__ import annotations

import pytest
import torch
from torch import nn

from labkit.moe import RecurrentCell, RecurrentRouter, RouterState


def layers(number=3, p=6, **options):
    cell = RecurrentCell(p, options.pop("cell", "gru"))
    return cell, [
        RecurrentRouter(8, 4, 2, state_size=p, cell=cell, std=0.5, **options) for _ in range(number)
    ]


def through(routers, xs):
    state, infos = None, []
    for router, x in zip(routers, xs, strict=True):
        info, state = router.route(x, state)
        infos.append(info)
    return infos, state


@pytest.mark.parametrize("kind", ["gru", "rnn", "lstm"])
def test_equals_the_cells_of_torch(kind):
    cell, routers = layers(cell=kind)
    own = {"gru": nn.GRUCell, "rnn": nn.RNNCell, "lstm": nn.LSTMCell}[kind](6, 6)
    own.load_state_dict(cell.cell.state_dict())
    xs = [torch.randn(5, 8) for _ in routers]
    infos, _ = through(routers, xs)
    h = None
    for router, x, info in zip(routers, xs, infos, strict=True):
        h = own(x @ router.projector.weight.T, h)
        out = h[0] if kind == "lstm" else h
        torch.testing.assert_close(info.logits, out @ router.head.weight.T)


def test_equals_the_gates_written_out():
    cell, (router, *_) = layers()
    x, h = torch.randn(5, 8), torch.randn(5, 6)
    info, after = router.route(x, RouterState(h))
    w_ir, w_iz, w_in = cell.cell.weight_ih.chunk(3)
    w_hr, w_hz, w_hn = cell.cell.weight_hh.chunk(3)
    b_ir, b_iz, b_in = cell.cell.bias_ih.chunk(3)
    b_hr, b_hz, b_hn = cell.cell.bias_hh.chunk(3)
    z_in = x @ router.projector.weight.T
    r = torch.sigmoid(z_in @ w_ir.T + b_ir + h @ w_hr.T + b_hr)
    z = torch.sigmoid(z_in @ w_iz.T + b_iz + h @ w_hz.T + b_hz)
    n = torch.tanh(z_in @ w_in.T + b_in + r * (h @ w_hn.T + b_hn))
    torch.testing.assert_close(after.hidden, (1 - z) * n + z * h)
    torch.testing.assert_close(info.logits, after.hidden @ router.head.weight.T)


def test_none_forgets():
    _, routers = layers(passing="none")
    xs = [torch.randn(5, 8) for _ in routers]
    infos, _ = through(routers, xs)
    alone, _ = routers[2].route(xs[2])
    assert torch.equal(infos[2].logits, alone.logits)


@pytest.mark.parametrize(("passing", "reaches"), [("full", True), ("detach", False), ("none", False)])
def test_the_recurrent_gradient(passing, reaches):
    _, routers = layers(2, passing=passing)
    infos, _ = through(routers, [torch.randn(5, 8) for _ in routers])
    infos[1].logits.square().sum().backward()
    gradient = routers[0].projector.weight.grad
    assert (gradient is not None and bool(gradient.abs().sum() > 0)) == reaches


def test_detach_computes_what_full_computes():
    cell, full = layers(2)
    detached = [RecurrentRouter(8, 4, 2, state_size=6, cell=cell, passing="detach") for _ in full]
    for a, b in zip(full, detached, strict=True):
        b.load_state_dict(a.state_dict())
    xs = [torch.randn(5, 8) for _ in full]
    assert torch.equal(through(full, xs)[0][1].logits, through(detached, xs)[0][1].logits)


@pytest.mark.parametrize("detach", [False, True])
def test_logit_residual(detach):
    _, routers = layers(3, passing="none", logit_residual=0.5, detach_logits=detach)
    xs = [torch.randn(5, 8) for _ in routers]
    infos, _ = through(routers, xs)
    own = [r.scores(x) for r, x in zip(routers, xs, strict=True)]
    torch.testing.assert_close(infos[0].logits, own[0])
    # the previous layer's own score, not its sum
    torch.testing.assert_close(infos[2].logits, own[2] + 0.5 * own[1])
    infos[1].logits.sum().backward()
    assert (routers[0].head.weight.grad is None) == detach


def test_a_shared_cell_belongs_to_its_owner():
    cell, routers = layers()
    assert not any("cell" in name for name in routers[0].state_dict())
    model = nn.Module()
    model.cell, model.routers = cell, nn.ModuleList(routers)
    assert sum("weight_hh" in name for name in model.state_dict()) == 1
    own = RecurrentRouter(8, 4, 2, state_size=6)
    assert any("weight_hh" in name for name in own.state_dict())


def test_a_shared_projector():
    shared = nn.Linear(8, 6, bias=False)
    cell = RecurrentCell(6)
    routers = [RecurrentRouter(8, 4, 2, state_size=6, cell=cell, projector=shared) for _ in range(2)]
    assert [name for name, _ in routers[0].named_parameters()] == ["head.weight"]
    x = torch.randn(5, 8)
    torch.testing.assert_close(routers[0].scores(x), cell.cell(shared(x)) @ routers[0].head.weight.T)


def test_number_of_parameters():
    """L (D p + p E) + 6 p^2 + 6 p for L layers without biases."""
    cell, routers = layers(5)
    total = sum(p.numel() for module in (cell, *routers) for p in module.parameters())
    assert total == 5 * (8 * 6 + 6 * 4) + 6 * 36 + 36


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_narrow_models_route_in_float32(kind):
    cell, routers = layers(2, cell=kind)
    xs = [torch.randn(5, 8).bfloat16() for _ in routers]
    for module in (cell, *routers):
        module.bfloat16()
    infos, state = through(routers, xs)
    assert state.hidden.dtype == infos[1].logits.dtype == torch.float32
    for module in (cell, *routers):
        module.float()
    wide, _ = through(routers, [x.float() for x in xs])
    torch.testing.assert_close(infos[1].logits, wide[1].logits, atol=0.05, rtol=0.05)


def test_autocast_leaves_the_cell_in_float32():
    _, routers = layers(2)
    xs = [torch.randn(5, 8) for _ in routers]
    with torch.autocast("cpu", torch.bfloat16):
        infos, state = through(routers, xs)
    assert state.hidden.dtype == infos[1].logits.dtype == torch.float32


def test_a_state_of_other_tokens_is_refused():
    _, routers = layers(2)
    _, state = routers[0].route(torch.randn(5, 8))
    with pytest.raises(RuntimeError, match="call the whole model"):
        routers[1].route(torch.randn(4, 8), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_size": 0}, "state_size must be at least 1; got 0"),
        ({"cell": "transformer"}, "cell must be one of 'gru', 'rnn', 'lstm'; got 'transformer'"),
        ({"passing": "some"}, "passing must be one of"),
        ({"state_size": 5, "cell": RecurrentCell(4)}, "has width 4, but state_size is 5"),
        ({"state_size": 5, "projector": nn.Linear(8, 4)}, "must map 8 to 5; it maps 8 to 4"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RecurrentRouter(8, 4, 2, **options)
