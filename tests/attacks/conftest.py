"""Attacks on runs, servers, input and disks. The last lines tell how many were tried and how many held, by file.

A test is one attack, or as many as it says: `attacks(1000)`. `--table docs/reliability.md` writes the table there.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

MARKS = ("<!-- attacks -->\n", "<!-- end -->\n")
tried: Counter[str] = Counter()
held: Counter[str] = Counter()


@pytest.fixture
def attacks(record_property) -> Callable[[int], None]:
    """Says that this test makes more attacks than one."""
    return lambda number: record_property("attacks", number)


def pytest_addoption(parser):
    parser.addoption("--table", type=Path, help="the document whose table of attacks is written anew")


def pytest_configure(config):
    path = config.getoption("--table")
    if path and MARKS[0] not in (path.read_text() if path.is_file() else ""):
        raise pytest.UsageError(f"--table: {path} is no document with a line {MARKS[0].strip()}")


def pytest_runtest_logreport(report):
    if "attacks/" not in report.nodeid or report.skipped or (report.when != "call" and report.passed):
        return
    section = Path(report.nodeid.split("::")[0]).stem.removeprefix("test_").replace("_", " ")
    number = dict(report.user_properties).get("attacks", 1)
    tried[section] += number
    held[section] += number * report.passed


def table() -> str:
    rows = [f"| {section} | {tried[section]:,} | {held[section]:,} |\n" for section in sorted(tried)]
    total = f"| **all** | **{tried.total():,}** | **{held.total():,}** |\n"
    return "".join(["| attacks on | tried | held |\n|---|---|---|\n", *rows, total])


def pytest_terminal_summary(terminalreporter, config):
    if not tried:
        return
    terminalreporter.write_line(table())
    if path := config.getoption("--table"):
        before, _, rest = path.read_text().partition(MARKS[0])
        path.write_text(before + MARKS[0] + table() + MARKS[1] + rest.partition(MARKS[1])[2])
