"""The pure functions against derivations of their own, with numpy and scipy where those have the same thing."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from labkit.moe import look_into_moes as lm
from labkit.moe.look_into_moes import static


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- S1, S2


@pytest.mark.parametrize("block", [7, 1 << 22])
def test_matrix_similarity_is_the_cosine_of_the_flattened(monkeypatch, block):
    monkeypatch.setattr(static, "BLOCK", block)
    matrices = list(draw(5, 6, 4))
    flat = torch.stack(matrices).flatten(1).numpy()
    expected = (flat @ flat.T) / np.outer(np.linalg.norm(flat, axis=1), np.linalg.norm(flat, axis=1))
    np.testing.assert_allclose(lm.matrix_similarity(matrices), expected, atol=1e-6)


def test_similarity_is_computed_in_float32_whatever_the_weights():
    matrices = [m.bfloat16() for m in draw(3, 64, 64)]
    exact = lm.matrix_similarity([m.float() for m in matrices])
    assert torch.equal(lm.matrix_similarity(matrices), exact)
    assert not torch.equal(exact, exact.bfloat16().float())  # what rounding as the release does would change


def test_a_matrix_of_zeros_is_like_nothing():
    similarity = lm.matrix_similarity([torch.zeros(2, 2), torch.ones(2, 2)])
    assert similarity.tolist() == [[0, 0], [0, 1]]


def test_average_similarity_and_experts_of_other_size():
    a, b = draw(8, 5), draw(20, 5, seed=1)
    expected = torch.cosine_similarity(a.mean(0), b.mean(0), dim=0)
    torch.testing.assert_close(lm.average_similarity([a, b])[0, 1], expected)
    with pytest.raises(ValueError, match=r"one width D; got widths \[4, 5\]"):
        lm.average_similarity([a, draw(8, 4)])
    with pytest.raises(ValueError, match=r"of one shape; got \[\(8, 5\), \(20, 5\)\]"):
        lm.matrix_similarity([a, b])


# ------------------------------------------------------------------------------------------- S3


def test_a_permuted_expert_is_found_again():
    a = draw(20, 30)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    b = a[order] + 0.05 * draw(20, 30, seed=1)
    found = lm.match_neurons(a, b)
    assert torch.equal(found.columns[order.argsort().argsort()], order.argsort()) or torch.equal(
        order[found.columns], torch.arange(20)
    )
    assert found.similarity > 0.99 > 0.5 > found.before
    assert found.tau == pytest.approx(scipy.stats.kendalltau(range(20), order.argsort()).statistic)
    assert found.gain == pytest.approx(found.similarity - found.before)
    greedy = lm.match_neurons(a, b, "greedy")
    assert torch.equal(greedy.columns, found.columns)
    assert greedy.matched == 1


def test_the_matching_is_the_best_of_all():
    a, b = draw(5, 3), draw(5, 3, seed=1)
    unit = [torch.nn.functional.normalize(m, dim=1) for m in (a, b)]
    best = max(
        itertools.permutations(range(5)), key=lambda order: float((unit[0] * unit[1][list(order)]).sum())
    )
    assert lm.match_neurons(a, b, "exact").columns.tolist() == list(best)


def test_similarity_after_matching_is_that_of_the_flattened_matrices():
    a, b = draw(9, 4), draw(9, 4, seed=1)
    found = lm.match_neurons(a, b)
    both = torch.stack([a.flatten(), b[found.columns].flatten()])
    assert found.similarity == pytest.approx(
        float(torch.cosine_similarity(both[0], both[1], dim=0)), abs=1e-6
    )
    assert found.before == pytest.approx(
        float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)), abs=1e-6
    )


def test_a_sample_estimates_tau():
    """Half of the neurons reversed: tau of all and of a sample agree within its error."""
    a = draw(400, 64)
    order = torch.cat([torch.arange(200).flip(0), torch.arange(200, 400)])
    b = a[order] + 0.1 * draw(400, 64, seed=1)
    whole = lm.match_neurons(a, b)
    part = lm.match_neurons(a, b, max_neurons=100)
    assert len(part.rows) == 100 == round(400 * part.matched)
    assert torch.equal(order[part.columns], part.rows)
    assert part.tau == pytest.approx(whole.tau, abs=0.1)
    assert part.similarity == pytest.approx(whole.similarity, abs=0.01)
    other = lm.match_neurons(a, b, max_neurons=100, seed=1)
    assert not torch.equal(part.rows, other.rows)
    assert torch.equal(part.rows, lm.match_neurons(a, b, max_neurons=100).rows)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_mutual_nearest_by_hand(block):
    a, b = draw(12, 5), draw(9, 5, seed=1)
    cosine = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    pairs = [
        (i, int(cosine[i].argmax())) for i in range(12) if int(cosine[:, cosine[i].argmax()].argmax()) == i
    ]
    rows, columns = lm.mutual_nearest(a, b, block)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == pairs


def test_greedy_never_invents_order_in_random_matrices():
    taus = [
        lm.match_neurons(draw(200, 16, seed=s), draw(200, 16, seed=s + 50), "greedy").tau for s in range(6)
    ]
    assert abs(sum(taus) / 6) < 0.15


def test_random_matrices_gain_too():
    gain = lm.random_gain(32, 48, draws=20)
    assert 0.25 < gain < 0.29
    assert lm.random_gain(32, 2048) < 0.06
    same = draw(32, 48)
    rotated = [lm.rotated_gain(same, same, seed=s) for s in range(8)]  # equal experts, until one is rotated
    assert sum(rotated) / 8 == pytest.approx(gain, abs=0.03)


def test_matching_refuses():
    with pytest.raises(ValueError, match=r"neuron by neuron: \(4, 3\) and \(5, 3\)"):
        lm.match_neurons(draw(4, 3), draw(5, 3))
    with pytest.raises(ValueError, match="'exact', 'greedy', 'auto'; got 'fast'"):
        lm.match_neurons(draw(4, 3), draw(4, 3), "fast")
    with pytest.raises(ValueError, match="max_neurons must be at least 2, got 1"):
        lm.match_neurons(draw(4, 3), draw(4, 3), max_neurons=1)
    with pytest.raises(ValueError, match="must be positive"):
        lm.random_gain(0, 3)
    assert math.isnan(lm.kendall_tau(torch.tensor([0])))


# ------------------------------------------------------------------------------------------- S4, S5


def test_pearson_is_numpys():
    x, y = draw(28), draw(28, seed=1)
    assert lm.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    assert math.isnan(lm.pearson(torch.ones(4), draw(4)))
    with pytest.raises(ValueError, match="3 pairs of experts take at least 3 experts"):
        lm.pearson(draw(2), draw(2))


@pytest.mark.parametrize("block", [11, 1 << 22])
def test_matrix_pca_is_that_of_a_full_svd(monkeypatch, block):
    monkeypatch.setattr(static, "BLOCK", block)
    matrices = draw(6, 5, 4)
    matrices[:, 0, 0] = 1.5  # a column that does not vary
    flat = matrices.flatten(1).double().numpy()
    deviation = flat.std(0, ddof=1)
    standard = np.divide(flat - flat.mean(0), deviation, out=np.zeros_like(flat), where=deviation > 1e-9)
    u, s, _ = np.linalg.svd(standard, full_matrices=False)
    found = lm.matrix_pca(list(matrices), dims=3)
    np.testing.assert_allclose(found.points.abs(), np.abs(u * s)[:, :3], atol=1e-4)
    np.testing.assert_allclose(found.share, (s**2 / (s**2).sum())[:3], atol=1e-5)
    assert (found.points.gather(0, found.points.abs().argmax(0, keepdim=True)) > 0).all()


def test_neuron_pca_is_that_of_a_full_svd():
    experts = [draw(7, 5, seed=s) for s in range(3)]
    points = torch.cat(experts).double().numpy()
    standard = (points - points.mean(0)) / points.std(0, ddof=1)
    u, s, _ = np.linalg.svd(standard, full_matrices=False)
    found = lm.neuron_pca(experts, dims=3)
    np.testing.assert_allclose(found.points.abs(), np.abs(u * s)[:, :3], atol=1e-4)
    with pytest.raises(ValueError, match=r"dims must be in 1\.\.5"):
        lm.neuron_pca(experts, dims=6)


def test_freshly_copied_experts_give_no_nan():
    same = [torch.ones(4, 3)] * 4
    found = lm.matrix_pca(same)
    assert torch.equal(found.points, torch.zeros(4, 2))
    assert torch.equal(found.share, torch.zeros(2))
    with pytest.raises(ValueError, match=r"dims must be in 1\.\.3"):
        lm.matrix_pca(same, dims=4)


def test_noise_points():
    cluster = draw(6, 2) * 0.1
    points = torch.cat([cluster, torch.tensor([[5.0, 5.0], [5.1, 5.0]])])
    assert lm.noise_points(points, 1.0).tolist() == [False] * 6 + [True, True]
    edge = torch.cat([cluster, cluster[:1] + torch.tensor([0.9, 0.0])])
    assert not lm.noise_points(edge, 1.0)[-1]  # not a core itself, but next to one
    with pytest.raises(ValueError, match="eps must be positive"):
        lm.noise_points(points, 0)


# ------------------------------------------------------------------------------------------- D1 to D3


@pytest.mark.parametrize("kind", ["cosine", "angular"])
def test_output_similarity_token_by_token(kind):
    outputs = draw(4, 3, 6)
    expected = torch.zeros(3, 3)
    for t, i, j in itertools.product(range(4), range(3), range(3)):
        cosine = float(torch.cosine_similarity(outputs[t, i], outputs[t, j], dim=0).clamp(-1, 1))
        value = 1.0 if i == j else cosine if kind == "cosine" else 1 - math.acos(cosine) / math.pi
        expected[i, j] += value / 4
    torch.testing.assert_close(lm.output_similarity(outputs, kind), expected, atol=1e-5, rtol=1e-5)


def test_experts_that_agree_exactly_give_one_and_not_nan():
    vector = draw(50, 1, 300)
    similarity = lm.output_similarity(vector.expand(50, 3, 300), "angular")
    torch.testing.assert_close(similarity, torch.ones(3, 3), atol=2e-4, rtol=0)


def test_padding_does_not_count():
    outputs, mask = draw(5, 3, 4), torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(lm.output_similarity(outputs, mask=mask), lm.output_similarity(outputs[mask]))
    norms, scores = outputs.norm(dim=-1), draw(5, 3, seed=2).softmax(-1)
    assert torch.equal(
        lm.norm_score_counts(norms, scores, mask), lm.norm_score_counts(norms[mask], scores[mask])
    )
    assert lm.active_share(outputs[:, 0], 0.5, mask) == lm.active_share(outputs[mask][:, 0], 0.5)
    with pytest.raises(ValueError, match="the mask hides all"):
        lm.output_similarity(outputs, mask=torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must be \(5,\)"):
        lm.output_similarity(outputs, mask=torch.ones(3, dtype=torch.bool))


def test_norm_score_counts_by_hand():
    norms, scores = draw(30, 4), draw(30, 4, seed=1)
    expected = np.zeros((4, 4), dtype=int)
    for t in range(30):
        score_rank = scipy.stats.rankdata(scores[t]).astype(int) - 1
        norm_rank = scipy.stats.rankdata(norms[t]).astype(int) - 1
        for expert in range(4):
            expected[score_rank[expert], norm_rank[expert]] += 1
    counts = lm.norm_score_counts(norms, scores)
    assert counts.tolist() == expected.tolist()
    assert counts.sum(0).tolist() == counts.sum(1).tolist() == [30] * 4
    share = (norms.argmax(-1) == scores.argmax(-1)).float().mean()
    assert lm.top_agreement(counts) == pytest.approx(float(share))
    assert lm.top_agreement(lm.norm_score_counts(norms, norms)) == 1


def test_bad_shapes():
    with pytest.raises(ValueError, match="'cosine' or 'angular', got 'dot'"):
        lm.output_similarity(draw(2, 3, 4), "dot")
    with pytest.raises(ValueError, match=r"outputs must be \(T, E, D\)"):
        lm.output_similarity(draw(2, 3))
    with pytest.raises(ValueError, match=r"must both be \(T, E\)"):
        lm.norm_score_counts(draw(2, 3), draw(2, 4))
    with pytest.raises(ValueError, match="of no token"):
        lm.top_agreement(torch.zeros(2, 2))
