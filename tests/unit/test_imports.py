"""What no linter holds: files and functions stay short enough to be read in one go, and a served engine is named in its
own file and in the recipe's choices alone."""

import ast
from pathlib import Path

import draftsmith
from draftsmith.engines import SERVERS

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


def test_a_served_engine_is_named_in_its_own_file_and_in_recipes_alone():
    for name in SERVERS:
        naming = {path.name for path in SOURCE.rglob("*.py") if f'"{name}"' in path.read_text()}
        assert naming == {f"{name}.py", "recipe.py"}
