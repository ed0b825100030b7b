"""docs/files.md, from the records themselves: `python scripts/describe_files.py > docs/files.md`."""

import re
from types import ModuleType
from typing import Any, get_args

from draftsmith.core.records import data, evaluation, machine, run, training
from draftsmith.core.records.base import Record

INTRODUCTION = """# Files of a run

Made by `python scripts/describe_files.py > docs/files.md`. Every file of a run is one of these models,
validated when it is written and when it is read. Text is UTF-8, times are seconds, sizes are bytes, `tau` is
1 + accepted draft tokens / verification steps. Where the files lie: `core/run_files.py`.
"""


def _kind(annotation: Any) -> str:
    """A type in a reader's words."""
    text = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    return re.sub(r"(draftsmith(\.\w+)+|typing|pathlib)\.", "", text)


def _section(module: ModuleType) -> list[str]:
    lines = []
    for record in vars(module).values():
        if not (isinstance(record, type) and issubclass(record, Record) and record.__module__ == module.__name__):
            continue
        lines += [f"## {record.__name__}", *([" ".join(record.__doc__.split())] if record.__doc__ else []), ""]
        for name, field in record.model_fields.items():
            meaning = f": {' '.join(field.description.split())}" if field.description else ""
            lines.append(f"- `{name}` `{_kind(field.annotation)}`{meaning}")
        lines.append("")
    return lines


def document() -> str:
    """Every record and its fields: name, type, meaning."""
    sections = [line for module in (run, data, training, evaluation, machine) for line in _section(module)]
    return "\n".join([INTRODUCTION, *sections])


if __name__ == "__main__":
    print(document(), end="")
