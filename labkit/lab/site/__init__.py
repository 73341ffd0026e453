"""The collection and everything recorded about it as pages that open from a folder: no server, no network.

:func:`labkit.lab.site.build.write` makes them. ``render`` turns a notebook into HTML without outside references,
``settings`` reads what a notebook runs at each size, ``board``, ``sweep`` and ``speed`` arrange the recorded runs,
sweeps and benchmarks, ``glyphs`` draws the small marks, and ``pages`` fills the templates.
"""
