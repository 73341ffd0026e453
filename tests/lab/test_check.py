"""The closing summary of the whole check."""

from __future__ import annotations

import pytest

from labkit.lab import check

REPORT = """<testsuites><testsuite>
<testcase classname="a" name="one"/>
<testcase classname="a" name="two"><failure message="no"/></testcase>
<testcase classname="b" name="three"><skipped message="no browser"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def step():
    return check.Step("unit", ("-m", "pytest"), "pytest tests")


def test_counts_come_from_the_report(step, tmp_path):
    (tmp_path / "r.xml").write_text(REPORT)
    outcome = check.Outcome(step)
    check.read_report(tmp_path / "r.xml", 1, outcome)
    assert (outcome.passed, outcome.failed, outcome.skipped) == (1, 1, [("b::three", "no browser")])
    text = check.summary([outcome])
    assert "a::two" in text
    assert "when this fails: pytest tests" in text
    assert "b::three: no browser" in text
    assert text.splitlines()[-1].startswith("===== 1 failed, 1 passed, 1 skipped in")


def test_a_crash_without_a_report_is_a_failure(step, tmp_path):
    outcome = check.Outcome(step)
    check.read_report(tmp_path / "none.xml", 3, outcome)
    assert (outcome.passed, outcome.failed) == (0, 1)


@pytest.mark.parametrize(("required", "failed"), [("0", 0), ("1", 1)])
def test_a_required_browser_test_may_not_be_skipped(required, failed, tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_REQUIRE_BROWSER", required)
    (tmp_path / "r.xml").write_text(REPORT.replace("<failure", "<!--").replace('"no"/>', "-->"))
    outcome = check.Outcome(check.Step("browser", ("-m", "pytest"), "labkit doctor"))
    check.read_report(tmp_path / "r.xml", 0, outcome)
    assert outcome.failed == failed
    empty = check.Outcome(outcome.step)
    check.read_report(tmp_path / "none.xml", 5, empty)
    assert empty.failed == failed


def test_a_step_without_its_files_is_skipped_and_named(tmp_path):
    outcome = check.run(check.Step("x", ("-c", "1 / 0"), "", needs=("no/such/folder",)), tmp_path)
    assert outcome.skipped == [("x", "no/such/folder does not exist")]


def test_unknown_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        check.main(["hygeine"])
    assert "did you mean 'hygiene'?" in capsys.readouterr().err
