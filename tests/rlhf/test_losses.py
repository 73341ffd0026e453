"""PPO's losses, against numbers worked out by hand and gradients that must not flow."""

from __future__ import annotations

import math

import pytest
import torch

from labkit.rlhf import policy_loss, token_segments, value_loss
from labkit.rlhf.losses import policy_terms, value_terms


def test_the_clip_cuts_the_gradient_only_where_it_would_go_further() -> None:
    logratio = torch.tensor([[math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5), 0.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0]])
    new = logratio.clone().requires_grad_()
    mask = torch.ones(1, 5)
    terms = policy_terms(new, torch.zeros(1, 5), advantages, mask, clip=0.2)
    assert terms.loss[0].tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -2.0])
    assert terms.clipped[0].tolist() == [True, False, False, True, False]
    terms.loss.sum().backward()
    assert new.grad is not None
    assert new.grad[0].tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0, -2.0])
    assert policy_loss(new, torch.zeros(1, 5), advantages, mask).item() == pytest.approx(-1.4 / 5)


def test_padding_has_no_part_in_losses() -> None:
    new, old = torch.randn(2, 4), torch.randn(2, 4)
    advantages, values, returns = torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    dirty = [x.masked_fill(mask == 0, 1e30) for x in (new, old, advantages, values, returns)]
    clean = [x.masked_fill(mask == 0, 0) for x in (new, old, advantages, values, returns)]
    assert policy_loss(*dirty[:3], mask) == policy_loss(*clean[:3], mask)
    assert value_loss(dirty[3], dirty[1], dirty[4], mask) == value_loss(clean[3], clean[1], clean[4], mask)


def test_the_joint_ratio_is_a_product_and_counts_each_group_once() -> None:
    new = torch.log(torch.tensor([[1.1, 1.05, 0.9, 7.0]]))
    mask = torch.tensor([[1, 1, 1, 0]])
    segments = torch.tensor([[0, 0, 1, -1]])
    advantages = torch.tensor([[2.0, 2.0, -1.0, 5.0]])
    terms = policy_terms(new, torch.zeros(1, 4), advantages, mask, ratio="joint", segments=segments)
    assert terms.ratio[0].tolist() == pytest.approx([1.155, 0.9])
    assert terms.loss[0].tolist() == pytest.approx([-2.31, 0.9])
    loss = policy_loss(new, torch.zeros(1, 4), advantages, mask, ratio="joint", segments=segments)
    assert float(loss) == pytest.approx((-2.31 + 0.9) / 2)


def test_joint_and_token_ratios_agree_for_groups_of_one() -> None:
    new, old, advantages = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 5)
    mask = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    token = policy_loss(new, old, advantages, mask)
    joint = policy_loss(new, old, advantages, mask, ratio="joint", segments=token_segments(mask))
    torch.testing.assert_close(token, joint)


def test_at_the_sampling_policy_both_ratios_have_the_policy_gradient() -> None:
    old = torch.randn(1, 6)
    segments = torch.tensor([[0, 0, 0, 1, 1, 2]])
    advantages = torch.tensor([[2.0, 2.0, 2.0, -1.0, -1.0, 3.0]])
    mask = torch.ones(1, 6)
    token, joint = old.clone().requires_grad_(), old.clone().requires_grad_()
    (6 * policy_loss(token, old, advantages, mask)).backward()
    (3 * policy_loss(joint, old, advantages, mask, ratio="joint", segments=segments)).backward()
    assert token.grad is not None
    assert joint.grad is not None
    torch.testing.assert_close(token.grad, -advantages)
    torch.testing.assert_close(joint.grad, -advantages)


def test_the_value_clip_keeps_the_larger_error() -> None:
    values = torch.tensor([[1.0, 0.1, -1.0]], requires_grad=True)
    old, returns, mask = torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 1.0]]), torch.ones(1, 3)
    terms = value_terms(values, old, returns, mask, clip=0.2)
    assert terms.loss[0].tolist() == pytest.approx([0.32, 0.405, 2.0])
    assert terms.clipped[0].tolist() == [True, False, False]
    terms.loss.sum().backward()
    assert values.grad is not None
    assert values.grad[0].tolist() == pytest.approx([0.0, -0.9, -2.0])
    assert value_loss(values, old, returns, mask, clip=None).item() == pytest.approx((0 + 0.81 / 2 + 2) / 3)


def test_bad_ratios_are_named() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="ratio must be 'token' or 'joint', got 'macro'"):
        policy_loss(x, x, x, x, ratio="macro")
    with pytest.raises(ValueError, match="needs segments"):
        policy_loss(x, x, x, x, ratio="joint")


@pytest.mark.parametrize("clip", [-1.0, 0.0, float("nan")])
def test_a_clip_must_be_positive(clip):
    one = torch.ones(1, 2)
    for loss in (policy_loss, value_loss):
        with pytest.raises(ValueError, match="clip must be positive"):
            loss(one, one, one, one, clip=clip)
