"""Tables for a terminal."""

import io
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from draftsmith.core.secrets import line

WIDTH = 400  # lines are never folded: a terminal folds them, a file keeps them


def by_reason(counts: Mapping[str, int]) -> str:
    """`12 too long, 3 refused by the template`, the most frequent first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), right: Iterable[int] = ()) -> str:
    """Columns two spaces apart; `right`: numbers of the columns that are aligned there."""
    right = set(right)
    out = Table(box=None, show_header=bool(head), header_style="", padding=(0, 2, 0, 0), pad_edge=False)
    rows = [[line(str(cell)) for cell in row] for row in rows]
    for number in range(max((len(row) for row in rows), default=len(head))):
        title = Text(head[number]) if head else ""
        out.add_column(title, justify="right" if number in right else "left", no_wrap=True)
    for row in rows:
        out.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    console.print(out)
    return "\n".join(row.rstrip() for row in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
