"""What the report's sections show, each from one part of a run directory; None stands for a stage that has not run."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from markupsafe import Markup

from draftsmith.data.regenerate import Completion
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.evaluation.lossless import lossless_verdict
from draftsmith.evaluation.plots import interval_plot, line_plot

PROMPT_END_CHARACTERS = 400
MASK_TOKENS = 500
PLOT_POINTS = 300

View = dict[str, Any]


def setting(entry: View) -> str:
    return f"{entry['shape']}, T={entry['temperature']:g}"


def size_label(size: int) -> str:
    return f"{size // 1024}k" if size % 1024 == 0 else f"{size:,}"


# --- data ---------------------------------------------------------------------------------------------------------


def data_view(prompts: View | None, completions: View | None, timing: View | None) -> View:
    loops = completions["finish_reasons"]["loop"] / max(1, completions["completions"]) if completions else None
    return {"prompts": prompts, "completions": completions, "loop_share": loops, "timing": timing}


def vocabulary_view(table: View | None) -> View | None:
    if table is None:
        return None
    sizes = table["sizes"]
    plot = line_plot(
        "Share of answer tokens inside the draft vocabulary",
        ("draft vocabulary (tokens)", "share covered"),
        {name: (sizes, shares) for name, shares in table["coverage"].items()},
        ticks={size: size_label(size) for size in sizes},
        doubling=True,
        mark=(table["chosen_size"], f"chosen: {size_label(table['chosen_size'])}"),
    )
    return {**table, "labels": [size_label(size) for size in sizes], "plot": plot}


def sample_completions(rows: Iterable[Completion], count: int, seed: int) -> list[Completion]:
    """A random choice, as many of each category as of any other; rows are read once and few are held."""
    kept: dict[str, list[Completion]] = {}
    seen: Counter[str] = Counter()
    chooser = random.Random(f"{seed}-report")
    for row in rows:
        if not row["spans"]:
            continue
        category = row["category"]
        reservoir = kept.setdefault(category, [])
        slot = len(reservoir) if len(reservoir) < count else chooser.randrange(seen[category] + 1)
        seen[category] += 1
        if slot < count:
            reservoir[slot : slot + 1] = [row]
    for reservoir in kept.values():
        chooser.shuffle(reservoir)
    turns = zip_longest(*(kept[category] for category in sorted(kept)))
    return [row for turn in turns for row in turn if row is not None][:count]


def answer_view(row: Completion, tokenizer) -> View:
    start, ids = row["spans"][0][0], row["ids"]
    prompt = tokenizer.decode(ids[:start])
    return {
        "id": row["id"],
        "category": row["category"],
        "finish_reason": row["finish_reason"],
        "sampling": "greedy" if row["sampling"][0] == 0 else f"T={row['sampling'][0]:g}",
        "tokens": sum(end - begin for begin, end in row["spans"]),
        "prompt": ("…" if len(prompt) > PROMPT_END_CHARACTERS else "") + prompt[-PROMPT_END_CHARACTERS:],
        "answer": tokenizer.decode(ids[start:]),
    }


def token_texts(ids: Sequence[int], tokenizer) -> list[str]:
    """Text that each token adds; a character made of several tokens stands at the last of them.

    Decoding a token alone would lose the space before it with some tokenizers.
    """
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:end])
        if end < len(ids) and whole.endswith("\ufffd"):
            texts.append("")
        else:
            texts.append(whole[len(before) :])
            before = whole
    return texts


def mask_view(rows: Sequence[Completion], tokenizer, vocabulary_file: Path) -> View | None:
    """The conversation nearest to a readable length, token by token."""
    if not rows:
        return None
    row = min(rows, key=lambda r: abs(len(r["ids"]) - MASK_TOKENS // 2))
    ids = row["ids"][:MASK_TOKENS]
    known = DraftVocabulary.load(vocabulary_file).t2d.tolist() if vocabulary_file.exists() else None
    tokens = []
    for position, (token, text) in enumerate(zip(ids, token_texts(ids, tokenizer), strict=True)):
        loss = any(start <= position < end for start, end in row["spans"])
        tokens.append({"id": token, "text": text, "loss": loss, "outside": known is not None and not known[token]})
    return {
        "id": row["id"],
        "category": row["category"],
        "tokens": tokens,
        "cut": len(row["ids"]) - len(ids),
        "has_vocabulary": known is not None,
    }


# --- training -----------------------------------------------------------------------------------------------------


def thin(rows: Sequence[View]) -> Sequence[View]:
    return rows[:: math.ceil(len(rows) / PLOT_POINTS) or 1]


def training_view(metrics: Sequence[View], timing: Sequence[View], summary: View | None) -> View | None:
    rows, held_out = thin([r for r in metrics if "loss" in r]), [r for r in metrics if "held_out" in r]
    if not rows and not held_out:
        return None
    return {
        "plots": [*step_plots(rows), *held_out_plots(held_out), *throughput_plots(timing)],
        "summary": summary,
        "last": held_out[-1] if held_out else None,
        "tokens": sum(r["tokens"] for r in timing),
        "seconds": sum(r["seconds"] for r in timing),
    }


def step_plots(rows: Sequence[View]) -> list[Markup]:
    if not rows:
        return []
    steps = [r["step"] for r in rows]
    alphas = {f"depth {d + 1}": (steps, [r["alpha"][d] for r in rows]) for d in range(len(rows[0]["alpha"]))}
    return [
        line_plot("Training loss", ("optimiser step", "loss"), {"loss": (steps, [r["loss"] for r in rows])}),
        line_plot("Acceptance per depth while training", ("optimiser step", "alpha"), alphas, from_zero=True),
    ]


def held_out_plots(rows: Sequence[View]) -> list[Markup]:
    if not rows:
        return []
    steps = [r["step"] for r in rows]
    taus = {
        f"chain of {name.removeprefix('tau_')}": (steps, [r["held_out"][name] for r in rows])
        for name in rows[0]["held_out"]
        if name.startswith("tau_")
    }
    return [line_plot("tau on held-out completions", ("optimiser step", "tau"), taus)]


def throughput_plots(timing: Sequence[View]) -> list[Markup]:
    """About sixty stretches: single steps vary with their packing."""
    width = math.ceil(len(timing) / 60) or 1
    stretches = [timing[i : i + width] for i in range(0, len(timing), width)]
    if not stretches:
        return []
    rates = [sum(r["tokens"] for r in stretch) / sum(r["seconds"] for r in stretch) for stretch in stretches]
    points = ([stretch[-1]["step"] for stretch in stretches], rates)
    return [line_plot("Throughput", ("optimiser step", "tokens/s"), {"tokens/s": points}, from_zero=True)]


# --- evaluation ---------------------------------------------------------------------------------------------------


def evaluation_view(results: View | None) -> View | None:
    if results is None:
        return None
    entries = results["acceptance"]
    categories = sorted({name for entry in entries for name in entry["by_category"]})
    rows = [
        {"setting": setting(e), "taus": [e["all"], *(e["by_category"].get(c) for c in categories)], **e}
        for e in entries
    ]
    depth = max((len(e["acceptance_by_depth"]) for e in entries), default=0)
    return {
        "settings": results["settings"],
        "categories": categories,
        "rows": rows,
        "depth": depth,
        "tau_plot": tau_plot(rows, categories) if rows else None,
        "depth_plot": depth_plot(rows, depth) if rows else None,
        "comparison": tree_against_chain(results),
        "speed": results["speed"],
        "lossless": results["lossless"],
        "ties": [{"shape": entry["shape"], **d} for entry in results["speed"] for d in entry["differences"]],
    }


def engines_view(results: Sequence[View]) -> View:
    """What engines measured beside the embedded one: a row per engine, shape and temperature."""
    rows = [
        {"engine": r["settings"]["engine"], "dtype": r["settings"]["dtype"], "setting": setting(e), **e}
        for r in results
        for e in r["acceptance"]
    ]
    return {
        "rows": rows,
        "categories": sorted({name for row in rows for name in row["by_category"]}),
        "speed": [{"engine": r["settings"]["engine"], **entry} for r in results for entry in r["speed"]],
        "lossless": [
            {"engine": r["settings"]["engine"], "verdict": lossless_verdict(r["lossless"]), **r["lossless"]}
            for r in results
            if r["lossless"]
        ],
    }


def tau_plot(rows: Sequence[View], categories: Sequence[str]) -> Markup:
    def dot(value: View | None) -> tuple[float, float, float] | None:
        if value is None or value["tau"] is None:
            return None
        return value["tau"], value["low"] or value["tau"], value["high"] or value["tau"]

    series = {row["setting"]: [dot(value) for value in row["taus"]] for row in rows}
    return interval_plot("tau by category, 95 % intervals over prompts", "tau", ["all", *categories], series)


def depth_plot(rows: Sequence[View], depth: int) -> Markup:
    def line(shares: Sequence[float | None]) -> tuple[list[float], list[float]]:
        return list(range(1, len(shares) + 1)), [math.nan if value is None else value for value in shares]

    return line_plot(
        "Acceptance by depth, given that the depth was reached",
        ("depth", "share accepted"),
        {row["setting"]: line(row["acceptance_by_depth"]) for row in rows},
        ticks={d: str(d) for d in range(1, depth + 1)},
        from_zero=True,
    )


def tree_against_chain(results: View) -> list[View]:
    """Every tree beside the chain of as many steps, at the same temperature."""

    def steps_topk(shape: str) -> tuple[int, int]:
        steps, topk, _ = shape.split("/")
        return int(steps), int(topk)

    speedups = {entry["shape"]: entry["speedup"] for entry in results["speed"]}
    measured = [(*steps_topk(entry["shape"]), entry) for entry in results["acceptance"]]
    chains = {(steps, entry["temperature"]): entry for steps, topk, entry in measured if topk == 1}
    pairs = []
    for steps, topk, tree in measured:
        chain = chains.get((steps, tree["temperature"]))
        if topk == 1 or chain is None:
            continue
        known = tree["all"]["tau"] is not None and chain["all"]["tau"] is not None
        pairs.append(
            {
                "temperature": tree["temperature"],
                "gain": tree["all"]["tau"] - chain["all"]["tau"] if known else None,
                **{
                    name: {"shape": e["shape"], "tau": e["all"], "speedup": speedups.get(e["shape"])}
                    for name, e in (("chain", chain), ("tree", tree))
                },
            }
        )
    return pairs
