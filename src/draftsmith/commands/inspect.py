"""`draftsmith inspect DIRECTORY`: what a draft directory holds and everything an engine would swallow silently."""

from pathlib import Path
from typing import TYPE_CHECKING

from draftsmith.core.recipe_model import Model

if TYPE_CHECKING:
    from draftsmith.drafts.method import DraftReport

SHOWN = 64  # tensors; a draft has about twenty, a whole model thousands


class Inspect(Model):
    """Read any draft directory and name every problem an engine would swallow silently."""

    directory: Path
    """Directory with config.json and .safetensors files."""

    def __call__(self) -> int:
        from draftsmith.drafts.directories import inspect_draft

        report = inspect_draft(self.directory)
        print(page(report))
        return 1 if report.blocking() else 0


def page(report: "DraftReport") -> str:
    """The report as text for a terminal."""
    from draftsmith.core.secrets import line
    from draftsmith.core.tables import table
    from draftsmith.drafts.directories import method_in
    from draftsmith.drafts.recognise import architectures

    named = ", ".join(architectures(report.config) or ["no architecture named"])
    held = sorted(set(report.dtypes.values()) - {"bool", "int64"})
    rows = [
        ("directory", str(report.directory)),
        ("method", report.method if named in report.method else f"{report.method} ({named})"),
        ("parameters", f"{report.parameters:,} ({', '.join(held)})"),
    ]
    if method := method_in(report):
        rows += method.facts(report)
    tensors = [(f"  {name}", report.dtypes[name], str(list(shape))) for name, shape in sorted(report.shapes.items())]
    lines = [table(rows), "", table(tensors[:SHOWN])]
    if len(tensors) > SHOWN:
        lines.append(f"  and {len(tensors) - SHOWN} more")
    lines += ["", *(line(p) for p in report.problems if p.startswith("note:"))]
    lines += [line(f"problem: {problem}") for problem in report.blocking()] or ["no problems found"]
    return "\n".join(lines)
