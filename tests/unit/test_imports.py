"""Who may know whom (docs/architecture.md), read from the code itself."""

import ast
from pathlib import Path

import draftsmith

SOURCE = Path(draftsmith.__file__).parent
FORBIDDEN = {
    "recipe": {"torch", "transformers", "numpy"},
    "errors": {"torch", "transformers", "numpy", "draftsmith"},
    "drafts": {"draftsmith.recipe", "draftsmith.pipeline", "draftsmith.training", "draftsmith.evaluation", "httpx"},
    "decoding": {"draftsmith.recipe", "draftsmith.pipeline", "draftsmith.training", "draftsmith.files", "httpx"},
    "training": {"draftsmith.evaluation", "draftsmith.publishing", "draftsmith.pipeline"},
    "evaluation": {"draftsmith.training", "draftsmith.publishing", "draftsmith.pipeline"},
    "data": {"draftsmith.training", "draftsmith.evaluation", "draftsmith.drafts"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_nobody_imports_what_he_may_not():
    checked = 0
    for part, forbidden in FORBIDDEN.items():
        files = [SOURCE / f"{part}.py"] if (SOURCE / f"{part}.py").exists() else sorted((SOURCE / part).glob("*.py"))
        for path in files:
            checked += 1
            for name in imports(path):
                wrong = [f for f in forbidden if name == f or name.startswith(f + ".")]
                assert not wrong, f"{path.relative_to(SOURCE)} imports {name}"
    assert checked > 20


def test_files_stay_short():
    long = {p.name: n for p in SOURCE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 500}
    assert long == {}
