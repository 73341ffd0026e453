"""Search for groups of heads under a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from labkit.kv.dha.groups import HeadGroups
from labkit.kv.dha.similarity import Similarity

METHODS = ("global", "per_layer", "adjacent", "anneal")
Site = tuple[int, str]
Clusters = dict[Site, list[list[int]]]


def search_groups(
    similarity: Similarity,
    kv_budget: float | tuple[float, float] = 0.25,
    *,
    method: str = "global",
    decoupled: bool = True,
    joint: bool = False,
    size_penalty: float = 0.02,
    moves: int = 2000,
    seed: int = 0,
) -> HeadGroups:
    """Group alike heads until the budget is met.

    Parameters
    ----------
    similarity : dict
        From :func:`head_similarity`.
    kv_budget : float or pair of float, default 0.25
        Share of the heads that stays, in (0, 1]; a pair is (keys, values). The share of all layers' heads must be
        a whole number, for ``"per_layer"`` and ``"adjacent"`` that of one layer's.
    method : {"global", "per_layer", "adjacent", "anneal"}, default "global"
        ``"global"``: in all layers at once, merge the two clusters of one layer that are most alike (average
        link, less ``size_penalty`` for each head in the merged cluster); layers with more alike heads end with
        fewer. ``"per_layer"``: the same with equally many heads in each layer. ``"adjacent"``: neighbours, as in
        GQA. ``"anneal"``: the result of ``"global"``, improved by simulated annealing with the same number of
        heads in each layer.
    decoupled : bool, default True
        Group keys and values apart. False groups them alike, by the mean of both similarities.
    joint : bool, default False
        One budget for keys and values together, so that the more alike kind gives up more heads.
    size_penalty : float, default 0.02
        Keeps one cluster from swallowing all.
    moves : int, default 2000
        Of the annealing, for each layer and kind; the temperature falls from 1 to 0.01 in units of the
        similarity.
    seed : int, default 0
        Of the annealing.

    Returns
    -------
    HeadGroups

    Raises
    ------
    ValueError
        For a budget below one head for each layer and kind or above all heads, one that is no whole number of
        heads, or contradicting options.

    Notes
    -----
    Annealing raises the sum over clusters c of sum_{i, j in c} s_ij / \\|c\\|, the objective of kernel k-means; the
    plain sum of similarities within clusters would be largest for one cluster with all heads.

    Examples
    --------
    >>> import numpy as np
    >>> from labkit.kv import search_groups
    >>> alike = np.array([[1, 0, .9, 0], [0, 1, 0, .8], [.9, 0, 1, 0], [0, .8, 0, 1.0]])
    >>> groups = search_groups({0: {"k": alike, "v": np.eye(4)}}, kv_budget=(0.5, 1.0))
    >>> groups.keys[0], groups.value_heads
    (((0, 2), (1, 3)), (4,))
    """
    layers, heads = _check(similarity)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if joint and not decoupled:
        raise ValueError("joint=True divides one budget between keys and values: it needs decoupled=True")
    pair = kv_budget if isinstance(kv_budget, tuple) else (kv_budget, kv_budget)
    if (joint or not decoupled) and pair[0] != pair[1]:
        raise ValueError(f"keys and values share one budget here; got two, {pair}")
    if joint and method in ("per_layer", "adjacent"):
        raise ValueError(f"joint=True needs method='global' or 'anneal'; got {method!r}")
    if method == "adjacent":
        counts = [_count(share, heads, 1, "of a layer") for share in pair]
        parts = [HeadGroups.adjacent(layers, heads, count).keys for count in counts]
        return HeadGroups(parts[0], parts[1], heads)

    if decoupled:
        sites = {(layer, kind): similarity[layer][kind] for layer in range(layers) for kind in ("k", "v")}
    else:
        sites = {(la, "kv"): (similarity[la]["k"] + similarity[la]["v"]) / 2 for la in range(layers)}
    clusters: Clusters = {site: [[head] for head in range(heads)] for site in sites}
    for chosen, total in _budgets(list(sites), pair, heads, method, joint):
        _merge({site: sites[site] for site in chosen}, clusters, total, size_penalty)
    if method == "anneal":
        rng = np.random.default_rng(seed)
        clusters = {site: _anneal(sites[site], clusters[site], moves, rng) for site in sites}
    kinds = ("k", "v") if decoupled else ("kv", "kv")
    keys, values = ([clusters[la, kind] for la in range(layers)] for kind in kinds)
    return HeadGroups(keys, values, heads)  # type: ignore[arg-type]


def _check(similarity: Similarity) -> tuple[int, int]:
    layers = len(similarity)
    if not layers or sorted(similarity) != list(range(layers)):
        raise ValueError(f"similarity must have the layers 0, 1, ...; got {sorted(similarity)[:8]}")
    shapes = {
        np.shape(similarity[layer].get(kind, np.empty(0))) for layer in similarity for kind in ("k", "v")
    }
    shape = shapes.pop()
    if shapes or len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(
            "similarity must hold one (K, K) matrix 'k' and one 'v' for each layer, K the same in all"
        )
    return layers, shape[0]


def _count(share: float, heads: int, least: int, where: str) -> int:
    """Heads that a share stands for; an error where it is none, too few or too many."""
    if not 0 < share <= 1:
        raise ValueError(f"kv_budget is the share of heads that stays and must lie in (0, 1]; got {share!r}")
    count = round(share * heads)
    if abs(share * heads - count) > 1e-6 * heads or count < least:
        low = max(least, math.floor(share * heads))
        near = sorted({low, min(heads, max(least, math.ceil(share * heads)))})
        options = " or ".join(f"{n}/{heads}" for n in near)
        raise ValueError(
            f"kv_budget={share!r} leaves {share * heads:g} of the {heads} heads {where}; it must be a whole number of "
            f"at least {least}: take {options}"
        )
    return count


def _budgets(
    sites: list[Site], pair: tuple[float, float], heads: int, method: str, joint: bool
) -> Iterable[tuple[list[Site], int]]:
    """Sites that share a budget, and that budget."""
    if method == "per_layer":
        for site in sites:
            yield [site], _count(pair[1] if site[1] == "v" else pair[0], heads, 1, "of a layer")
    elif joint:
        yield sites, _count(pair[0], heads * len(sites), len(sites), "of all layers, keys and values")
    else:
        for kind in sorted({kind for _, kind in sites}):
            chosen = [site for site in sites if site[1] == kind]
            share = pair[1] if kind == "v" else pair[0]
            yield chosen, _count(share, heads * len(chosen), len(chosen), "of all layers")


def _merge(sites: dict[Site, np.ndarray], clusters: Clusters, total: int, penalty: float) -> None:
    """Merge in place until ``total`` clusters are left over all sites; the first of equals goes first."""

    def best(site: Site) -> tuple[float, int, int]:
        groups = clusters[site]
        if len(groups) < 2:
            return (-math.inf, 0, 0)
        member = np.zeros((len(groups), len(sites[site])))
        for number, group in enumerate(groups):
            member[number, group] = 1
        size = member.sum(1)
        link = member @ sites[site] @ member.T / np.outer(size, size) - penalty * np.add.outer(size, size)
        link[np.tril_indices(len(groups))] = -math.inf
        place = int(link.argmax())
        return (float(link.flat[place]), *divmod(place, len(groups)))

    candidates = {site: best(site) for site in sites}
    for _ in range(sum(len(clusters[site]) for site in sites) - total):
        site = max(candidates, key=lambda s: candidates[s][0])
        _, a, b = candidates[site]
        clusters[site][a] = sorted(clusters[site][a] + clusters[site].pop(b))
        candidates[site] = best(site)


def _anneal(
    similarity: np.ndarray, start: list[list[int]], moves: int, rng: np.random.Generator
) -> list[list[int]]:
    """Improve one site's clusters by moving and swapping heads, never emptying a cluster."""
    if len(start) in (1, len(similarity)):
        return start
    label = np.zeros(len(similarity), dtype=int)
    for number, group in enumerate(start):
        label[group] = number

    def worth(labels: np.ndarray) -> float:
        member = np.eye(len(start))[labels]  # (K, G)
        return float(((member.T @ similarity * member.T).sum(1) / member.sum(0)).sum())

    now = worth(label)
    best, best_label = now, label.copy()
    for move in range(moves):
        temperature = 0.01 ** (move / max(1, moves - 1))
        trial = label.copy()
        a = int(rng.integers(len(label)))
        if rng.random() < 0.5:
            b = int(rng.integers(len(label)))
            trial[a], trial[b] = label[b], label[a]
        else:
            trial[a] = rng.integers(len(start))
            if not (trial == label[a]).any():
                continue
        after = worth(trial)
        if after >= now or rng.random() < math.exp((after - now) / temperature):
            label, now = trial, after
            if now > best + 1e-12:
                best, best_label = now, label.copy()
    return [np.flatnonzero(best_label == number).tolist() for number in range(len(start))]
