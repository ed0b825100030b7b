"""`draftsmith predict`: what speculation will buy, for every shape and batch, before anybody serves it."""

import math
from collections.abc import Sequence

from draftsmith.core.records.machine import Prediction
from draftsmith.core.shape import Shape
from draftsmith.core.tables import table
from draftsmith.hardware.accept_length import AcceptLength
from draftsmith.hardware.cost_model import Costs, paying_batches, predict

ROWS = 12  # of the table; the heat map and the JSON have all
WORTH = 1.03  # a gain below this is within the model's error


def candidate_shapes(deepest: int, trees: bool = True) -> list[Shape]:
    """Chains up to the deepest known step, and the trees that engines are usually served with."""
    chains = [Shape.chain(steps) for steps in range(1, min(deepest, 10) + 1)]
    wanted = [
        Shape(steps, topk, tokens)
        for steps in (2, 3, 5, 7)
        for topk in (2, 4, 8)
        for tokens in (4, 6, 8, 16, 32)
        if steps <= deepest and steps < tokens <= 1 + topk + (steps - 1) * topk**2
    ]
    return chains + (wanted if trees else [])


def predict_all(
    costs: Costs, accept: AcceptLength, shapes: Sequence[Shape], batches: Sequence[int], context: int
) -> list[list[Prediction]]:
    """One row per shape, one column per batch; the best at the first batch comes first."""
    known = [(shape, accept.tau(shape)) for shape in shapes]
    rows = [[predict(costs, shape, tau, batch, context) for batch in batches] for shape, tau in known]
    return sorted(rows, key=lambda row: math.inf if math.isnan(row[0].speedup) else -row[0].speedup)


def where_it_pays(costs: Costs, best: Prediction) -> str:
    """The batches at which drafting gains, in words."""
    ranges, largest = paying_batches(costs, best.shape, best.tau, best.context)
    if ranges == [(1, largest)]:
        return f"no break-even up to batch {largest}, as far as is known"
    if len(ranges) == 1 and ranges[0][0] == 1:
        return f"break-even above batch {ranges[0][1]}"
    words = [f"{a} and more" if b == largest else f"{a} to {b}" if b > a else str(a) for a, b in ranges]
    return f"pays only at batches {', '.join(words)}" if words else "no batch gains"


def advice(rows: list[list[Prediction]], costs: Costs) -> str:
    """One sentence: the shape to use, what to expect of it, and where it stops paying."""
    best = rows[0][0]
    if best.speedup < WORTH:
        return (
            f"do not speculate on {costs.name}: the best shape, {best.shape}, would run at {best.speedup:.2f}x; a step "
            f"costs {best.c:.2f} plain ones and yields {best.tau:.2f} tokens"
        )
    sentence = (
        f"{best.shape}; expect {best.speedup:.2f}x at batch {best.batch} on {costs.name} (accept length "
        f"{best.tau:.2f}, a step costs {best.c:.2f} plain ones)"
    )
    if len(rows[0]) > 1:
        sentence += f"; {where_it_pays(costs, best)}"
        known = [row for row in rows if not math.isnan(row[-1].speedup)]
        last = max(known, key=lambda row: row[-1].speedup)[-1] if known else best
        if last.shape != best.shape and last.speedup >= WORTH:
            sentence += f"; at batch {last.batch} rather {last.shape}, {last.speedup:.2f}x"
    return sentence


def page(rows: list[list[Prediction]]) -> str:
    """The predictions as text for a terminal."""
    batches = [p.batch for p in rows[0]]
    cells = [
        [str(row[0].shape), f"{row[0].tau:.2f}", f"{row[0].c:.2f}"]
        + ["-" if math.isnan(p.speedup) else f"{p.speedup:.2f}x" for p in row]
        for row in rows[:ROWS]
    ]
    head = ["shape", "tau", "c", *(f"batch {batch}" for batch in batches)]
    lines = [table(cells, head, range(len(head)))]
    if len(rows) > ROWS:
        lines.append(f"{len(rows) - ROWS} more in the JSON file")
    lines.append(f"c: a step's cost in plain decoding steps, at batch {batches[0]}; speed-up = tau / c")
    if any(math.isnan(p.speedup) for row in rows for p in row):
        lines.append("-: beyond what was measured")
    return "\n".join(lines)


def heat_map(rows: list[list[Prediction]], title: str) -> str:
    """SVG: speed-up by shape and batch; white is 1x, blue gains, red loses. The line is where gain turns to loss."""
    import io

    from matplotlib import rc_context
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    shown = rows[:24]
    values = [[p.speedup for p in row] for row in shown]
    flat = [v for row in values for v in row if not math.isnan(v)]
    norm = TwoSlopeNorm(1.0, min(0.5, *flat), max(1.5, *flat))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "draftsmith", "font.size": 9}):
        figure = Figure(figsize=(1.8 + 0.75 * len(values[0]), 1.2 + 0.3 * len(values)), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(values, cmap="RdBu", norm=norm, aspect="auto")
        axes.set_title(title, loc="left", fontsize=10, wrap=True)
        axes.set_xticks(range(len(values[0])), [str(p.batch) for p in shown[0]])
        axes.set_yticks(range(len(shown)), [str(row[0].shape) for row in shown])
        axes.set_xlabel("batch")
        axes.set_ylabel("steps/top-k/draft tokens")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if math.isnan(value):
                    continue
                dark = abs(norm(value) - 0.5) > 0.32
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
                if x + 1 < len(row) and not math.isnan(row[x + 1]) and (value > 1) != (row[x + 1] > 1):
                    axes.plot([x + 0.5, x + 0.5], [y - 0.5, y + 0.5], color="black", linewidth=2)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
