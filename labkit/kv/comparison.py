"""The eviction policies of the comparison, by name and at one budget."""

from __future__ import annotations

from labkit.kv.baselines import H2OPress, RandomPress, SnapKVPress, StreamingLLMPress
from labkit.kv.greedy import GreedyH2O, GreedyMSRNN, GreedyTOVA, Scissorhands
from labkit.kv.nacl import NACLPress
from labkit.kv.press import CachePress


def policies(
    kept: float, *, proxies: int = 4, sink: int = 1, recent: int = 1, seed: int = 0
) -> dict[str, CachePress]:
    """NACL, its ablations and its baselines, all with the same number of entries per head.

    Parameters
    ----------
    kept : float
        Share of the prompt's cache that is kept, in (0, 1].
    proxies : int
        Tokens at the end of the prompt whose queries score: NACL's proxies and SnapKV's window.
    sink, recent : int
        First and last tokens that are always kept, by the policies that protect any.
    seed : int
        Of the random draws.

    Returns
    -------
    dict of str to CachePress

    Raises
    ------
    ValueError
        If `kept` is outside (0, 1].

    Notes
    -----
    The other settings are those that did best at a tenth of the cache on retrieval models with seeds 100 to 102,
    from: SnapKV's pooling {1, 3, 5} (1 is "proxies only", hence 3), H2O's recent share {0, .1, .25, .5, .75},
    Scissorhands' window {8, 32, 64}, sinks {1, 4}.

    Examples
    --------
    >>> list(policies(0.1))[:3]
    ['NACL', 'proxies only', 'SnapKV']
    """
    if not 0 < kept <= 1:
        raise ValueError(f"kept is the share of the cache that stays and must lie in (0, 1]; got {kept!r}")
    evicted = 1 - kept

    def nacl(proxy_tokens: int, random_share: float) -> NACLPress:
        return NACLPress(
            evicted, proxy_tokens=proxy_tokens, random_share=random_share, sink=sink, recent=recent, seed=seed
        )

    return {
        "NACL": nacl(proxies, 0.5),
        "proxies only": nacl(proxies, 0.0),
        "SnapKV": SnapKVPress(evicted, window=proxies, kernel_size=3),
        "H2O once, normalised": H2OPress(evicted, normalized=True),
        "H2O once": H2OPress(evicted),
        "last token once": nacl(1, 0.0),
        "H2O greedy": GreedyH2O(evicted, recent=0.25),
        "Scissorhands": Scissorhands(evicted, window=8),
        "TOVA greedy": GreedyTOVA(evicted),
        "MSRNN greedy": GreedyMSRNN(evicted),
        "StreamingLLM": StreamingLLMPress(evicted, sink=sink),
        "random": RandomPress(evicted, seed=seed),
    }
