"""The two kernels of cache eviction, under the family's name."""

from labkit.kernels.compact_kv import compact_kv
from labkit.kernels.proxy_column_sums import proxy_column_sums

__all__ = ["compact_kv", "proxy_column_sums"]
