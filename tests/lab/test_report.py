"""The table of verdicts in the terminal."""

from __future__ import annotations

from labkit.lab import report, runner

from .test_site import out  # noqa: F401 - a fixture


def test_terminal_table(out, capsys):  # noqa: F811
    report.show(runner.load_all(out))
    text = capsys.readouterr().out
    assert "0.320 [0.050, 0.580]" in text
    assert "other laptop-seed0: failed in cell 3: E" in text
    assert "<tb>" in text
