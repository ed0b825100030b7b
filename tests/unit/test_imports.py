"""What no linter holds: files and functions stay short enough to be read in one go."""

import ast
from pathlib import Path

import draftsmith

SOURCE = Path(draftsmith.__file__).parent


def test_files_and_functions_stay_short():
    long = {}
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        if (lines := len(text.splitlines())) > 450:
            long[path.name] = lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60:
                    long[f"{path.name}: {node.name}"] = lines
    assert long == {}
