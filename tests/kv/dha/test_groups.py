"""Similarity and the search of groups, against numpy and exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from labkit.kv.dha import HeadGroups, head_moments, head_similarity, linear_cka, search_groups
from tests.kv.dha.checkpoints import llama


def numpy_cka(x, y):
    n = len(x)
    centre = np.eye(n) - np.ones((n, n)) / n
    gram = [centre @ (z @ z.T) @ centre for z in (x.astype(float), y.astype(float))]
    return (gram[0] * gram[1]).sum() / np.sqrt((gram[0] ** 2).sum() * (gram[1] ** 2).sum())


def head_outputs(model, ids):
    """Per layer the outputs of the key and the value projections, from a plain forward pass."""
    seen = {}
    for index, layer in enumerate(model.model.layers):
        for kind in "kv":
            module = getattr(layer.self_attn, f"{kind}_proj")
            module.register_forward_hook(
                lambda m, a, out, at=(index, kind): seen.__setitem__(at, out.flatten(0, 1).numpy())
            )
    with torch.no_grad():
        model(ids)
    return seen


def test_cka_is_that_of_gram_matrices(ids):
    model = llama(attention_bias=True)
    table = head_similarity(model, [ids[:1], ids[1:]])
    seen = head_outputs(llama(attention_bias=True), ids)
    for (layer, kind), rows in seen.items():
        heads = rows.reshape(len(rows), 4, -1)
        wanted = [[numpy_cka(heads[:, i], heads[:, j]) for j in range(4)] for i in range(4)]
        assert np.allclose(table[layer][kind], wanted, atol=1e-6)
    x, y = (torch.randn(20, 3) for _ in range(2))
    assert abs(linear_cka(x, y) - numpy_cka(x.numpy(), y.numpy())) < 1e-9


def test_cosine_sees_a_turned_basis_where_cka_does_not(ids):
    model = llama()
    weight = model.model.layers[0].self_attn.v_proj.weight.data
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    weight[8:16] = turn @ weight[:8]
    cka, cosine = (head_similarity(model, [ids], metric=m)[0]["v"][0, 1] for m in ("cka", "cosine"))
    assert abs(cka - 1) < 1e-5
    assert cosine < 0.9


def test_padding_is_not_counted(ids):
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    padded = head_moments(llama(), [{"input_ids": ids, "attention_mask": mask}])
    assert padded[0].tokens == ids.numel() - 10


def test_a_head_without_variance_is_like_no_other(ids):
    model = llama()
    model.model.layers[1].self_attn.k_proj.weight.data[8:16] = 0
    with pytest.warns(UserWarning, match="layer 1 k1"):
        table = head_similarity(model, [ids])
    assert not table[1]["k"][1].any()
    assert np.isfinite(table[1]["k"]).all()


def blocks(*sizes, alike=0.9, other=0.1):
    """A similarity with planted groups of interleaved heads."""
    label = np.concatenate([np.full(size, i) for i, size in enumerate(sizes)])
    label = label[np.random.default_rng(0).permutation(len(label))]
    matrix = np.where(label[:, None] == label, alike, other).astype(float)
    np.fill_diagonal(matrix, 1)
    planted = tuple(sorted(tuple(np.flatnonzero(label == i).tolist()) for i in range(len(sizes))))
    return matrix, planted


@pytest.mark.parametrize("method", ["global", "anneal"])
def test_planted_groups_are_found_with_their_numbers(method):
    planted = {(la, kind): blocks(*sizes) for (la, kind), sizes in {
        (0, "k"): (3, 3, 2), (0, "v"): (8,), (1, "k"): (5, 3), (1, "v"): (2, 2, 2, 2)}.items()}  # fmt: skip
    similarity = {la: {kind: planted[la, kind][0] for kind in "kv"} for la in (0, 1)}
    groups = search_groups(similarity, 5 / 16, method=method)
    assert groups.key_heads == (3, 2)
    assert groups.value_heads == (1, 4)
    assert all(groups.of(kind)[la] == planted[la, kind][1] for la, kind in planted)
    assert groups.kept == 10 / 32


def test_annealing_reaches_the_best_partition():
    raw = np.random.default_rng(3).random((5, 5))
    similarity = (raw + raw.T) / 2
    np.fill_diagonal(similarity, 1)

    def worth(label):
        parts = [[i for i in range(5) if label[i] == c] for c in set(label)]
        return sum(similarity[np.ix_(p, p)].sum() / len(p) for p in parts)

    best = max(worth(label) for label in itertools.product(range(2), repeat=5) if len(set(label)) == 2)
    groups = search_groups({0: {"k": similarity, "v": similarity}}, 0.4, method="anneal", moves=400)
    assert abs(worth(groups.maps("k")[0]) - best) < 1e-9


def test_kinds_of_search(ids):
    similarity = head_similarity(llama(), [ids])
    per_layer = search_groups(similarity, (0.5, 0.25), method="per_layer")
    assert (per_layer.key_heads, per_layer.value_heads) == ((2, 2), (1, 1))
    coupled = search_groups(similarity, 0.5, decoupled=False)
    assert coupled.keys == coupled.values
    assert coupled.kept == 0.5
    joint = search_groups(similarity, 0.375, joint=True)
    assert sum(joint.key_heads) + sum(joint.value_heads) == 6
    assert search_groups(similarity, 0.5, method="adjacent") == HeadGroups.adjacent(2, 4, 2)
    assert search_groups(similarity, 1.0).key_heads == (4, 4)
    assert HeadGroups.from_json(per_layer.to_json()) == per_layer
    assert per_layer.allocation[1] == {"layer": 1, "key heads": 2, "value heads": 1}


@pytest.mark.parametrize(
    ("budget", "method", "message"),
    [
        (0.0, "global", r"must lie in \(0, 1\]; got 0.0"),
        (1.5, "global", "must lie in"),
        (0.125, "global", "at least 2: take 2/8"),
        (0.3, "global", "leaves 2.4 of the 8 heads"),
        (0.3, "per_layer", "of the 4 heads of a layer; .* take 1/4 or 2/4"),
        (0.75, "adjacent", r"must divide the 4 heads: \[1, 2, 4\]; got 3"),
        (0.5, "glob", "method must be one of"),
    ],
)
def test_budgets_that_do_not_fit(budget, method, message):
    similarity = {la: {"k": np.eye(4), "v": np.eye(4)} for la in range(2)}
    with pytest.raises(ValueError, match=message):
        search_groups(similarity, budget, method=method)


def test_other_bad_input(ids):
    with pytest.raises(ValueError, match="head 2 is in no group"):
        HeadGroups([[[0, 1], [3]]], [[[0, 1, 2, 3]]], 4)
    with pytest.raises(ValueError, match="values of layer 0: head 1 is in more than one group"):
        HeadGroups([[[0, 1]]], [[[0, 1], [1]]], 2)
    with pytest.raises(ValueError, match="head 7 is outside"):
        HeadGroups([[[0, 1, 7]]], [[[0, 1]]], 2)
    with pytest.raises(ValueError, match="no calibration tokens"):
        head_similarity(llama(), [])
    with pytest.raises(ValueError, match="metric must be"):
        head_similarity(llama(), [ids], metric="cca")
    with pytest.raises(TypeError, match="a batch must be"):
        head_similarity(llama(), ["text"])
    eye = {0: {"k": np.eye(4), "v": np.eye(4)}}
    with pytest.raises(ValueError, match="decoupled"):
        search_groups(eye, 0.5, joint=True, decoupled=False)
    with pytest.raises(ValueError, match="layers 0, 1"):
        search_groups({1: eye[0]}, 0.5)


def test_the_size_penalty_keeps_one_cluster_from_swallowing_all():
    # A chain: without the penalty, head after head joins the first pair.
    chain = np.array([0.9, 0.89, 0.88, 0.87, 0.86])
    matrix = np.eye(6)
    for i in range(6):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = chain[i - 1]
    groups = [
        search_groups({0: {"k": matrix, "v": matrix}}, 1 / 3, size_penalty=p).keys[0] for p in (0.0, 0.02)
    ]
    assert [sorted(map(len, part)) for part in groups] == [[1, 5], [2, 4]]
