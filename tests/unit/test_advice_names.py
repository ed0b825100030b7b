"""Every key, flag, command, file and package that any line of draftsmith names exists under that name.

For the advice that needs a hub, a GPU or an engine, which no test here can take, this is what is checked of it; a key
that is renamed and a line that still has its old name fail here.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from draftsmith import cli
from draftsmith.commands import NAMES
from draftsmith.commands.flags import _leaves, read
from draftsmith.core.recipe import Recipe, TrainRecipe

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "draftsmith"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KEYS = {*dict(_leaves(Recipe)), "target.template"}
FILES = (".json", ".jsonl", ".gz", ".safetensors", ".md", ".j2")
THEIRS = {  # flags in lines of ours that are no flags of draftsmith
    "--served-model-name": "of both engines",
    "--per-request-spec-decode-metrics": "of vLLM",
    "--api-key": "of both engines, an example",
    "--flag": "an example",
    "--config": "of SPEED-Bench's prepare_data.py",
    "--no-deps": "of pip",
    "--always": "of git",
    "--exclude": "of git",
    "--abbrev": "of git",
    "--dirty": "of git",
    "--help": "argparse's",
    "--help-all": "ours, taken for --help",
    "--version": "of the program alone",
}
# Files that write command lines of others, engines and torchrun, and one with names of CSS.
ELSEWHERE = ("engines/vllm.py", "engines/sglang.py", "engines/server.py", "training/processes.py", "report.html")


def texts() -> Iterator[tuple[str, str]]:
    """(where, text) of every text in the source, docstrings too; what is filled in is `{}`."""
    for path in sorted(SOURCES.rglob("*.py")):
        tree = ast.parse(path.read_text())
        inside = {id(p) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for p in ast.walk(n) if p is not n}
        for node in ast.walk(tree):
            where = f"{path.relative_to(SOURCES)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                yield where, "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                yield where, node.value
    for path in (*SOURCES.rglob("*.j2"), *SOURCES.rglob("*.html"), ROOT / "docs" / "troubleshooting.md"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            yield f"{path.name}:{number}", line


TEXTS = list(texts())


def named(pattern: str, skipped: tuple[str, ...] = ()) -> dict[str, str]:
    """(what the pattern finds, or its group; where) over all texts."""
    return {
        found[found.lastindex or 0]: where
        for where, text in TEXTS
        if not where.startswith(skipped)
        for found in re.finditer(pattern, text)
    }


def flags_of(command: str) -> set[str]:
    kind = cli.find(command)
    own = {f"--{key.replace('_', '-')}" for key, field in kind.model_fields.items() if not field.is_required()}
    if "recipe" not in kind.model_fields:
        return own
    return own | {f"--{key.replace('_', '-')}" for key in KEYS} | {"--from"}


def test_keys_exist():
    parts = "|".join(Recipe.model_fields)
    found = named(rf"(?<![\w./-])(?:{parts})\.[a-z_]+(?:\.[a-z]\w*)*", ("card.md",))
    found = {key: where for key, where in found.items() if not key.endswith(FILES)}
    assert len(found) > 60
    assert {key: where for key, where in found.items() if key not in KEYS} == {}


def test_flags_exist():
    ours = set().union(*map(flags_of, NAMES))
    found = named(r"(?<![\w-])--[a-z][a-z-]*(?:\.[a-z][a-z_-]*)*(?![\w{.]*\{)", ELSEWHERE)
    assert len(found) > 30
    unknown = {
        flag: where
        for flag, where in found.items()
        if not {flag, flag.replace("_", "-"), flag.replace("--no-", "--")} & (ours | set(THEIRS))
    }
    assert unknown == {}


def test_commands_exist():
    """With the flags that stand behind them, each read as the command line reads it."""
    place = r"(?:(?:run|see|with|anew|again|use|or|it|draft's): |`|^)"
    flag = r"(?: --[a-z][\w.-]*(?: (?:\{\}|[\w./-]+))?)"
    found = named(rf"{place}(draftsmith [a-z]+ (?:RECIPE|MODEL|DIRECTORY|\{{\}}){flag}*)")
    assert len(found) > 15
    wrong = {}
    for line, where in found.items():
        _, command, *words = line.replace("{}", "train").split()
        if command not in NAMES:
            wrong[line] = where
            continue
        kind = cli.find(command)
        try:
            read(kind, Recipe if "recipe" in kind.model_fields else None, "x", "x", words)
        except ValueError as error:
            wrong[line] = f"{where}: {error}"
    assert wrong == {}


def test_files_exist():
    found = named(r"(?<![\w/-])(?:docs|recipes|scripts|examples|benchmarks)/[\w/-]+\.\w+")
    found = {path: where for path, where in found.items() if not path.startswith("examples/specdec_bench")}
    assert len(found) > 5
    assert {path: where for path, where in found.items() if not (ROOT / path).exists()} == {}


def test_packages_are_those_of_the_project():
    extras, pinned = PROJECT["optional-dependencies"], {*PROJECT["dependencies"]}
    trackers = str(TrainRecipe.model_fields["track"].annotation)
    named_extras = {found[11:-2] for found in named(r"draftsmith\[[a-z]+\]['\"]")}
    assert named_extras >= {"gguf", "gemma", "wandb"}
    assert named_extras | {name for name in re.findall(r"'(\w+)'", trackers)} <= set(extras)
    assert set(found.removeprefix("install ") for found in named(r"install transformers==[\d.*]+")) <= pinned


def test_lines_that_the_troubleshooting_page_explains_are_printed():
    """Three words in a row of each, or all of a shorter one."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    cells = [row.split("|")[1] for row in page.splitlines() if row.startswith("| ") and "`" in row.split("|")[1]]
    printed = " ".join(" ".join(text.split()) for where, text in TEXTS if not where.startswith("troubleshooting"))

    def found(fragment: str) -> bool:
        words = fragment.replace("`", "").strip(" .;:").split()
        return any(" ".join(words[at : at + 3]) in printed for at in range(max(1, len(words) - 2)))

    lines = [line.strip() for cell in cells for line in re.findall(r"``? ?(.+?) ?``?(?=[,;]| \||\s*$)", cell)]
    assert len(lines) > 30
    assert [line for line in lines if not any(map(found, line.split("...")))] == []
