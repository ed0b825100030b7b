"""docs/results.md and README's tables are what the recorded files and `plan` say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_docs_are_what_the_files_say():
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    assert (ROOT / "docs" / "results.md").read_text() == results.document()
    readme = (ROOT / "README.md").read_text()
    assert f"<!-- results -->\n{results.first_table()}\n<!-- end results -->" in readme
    assert f"<!-- cases -->\n{results.cases_table()}\n<!-- end cases -->" in readme
    assert len(readme.split("\n---\n")[0].split()) < 700, "the first screen stays short, tables included"
