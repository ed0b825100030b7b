"""`draftsmith inspect DIR`: what a draft directory holds and everything an engine would swallow silently."""

from pathlib import Path

from draftsmith.drafts.checkpoint import DraftReport, inspect_draft


def describe(report: DraftReport) -> str:
    """The report as text for a terminal."""
    config = report.config
    made_by = config.get("draftsmith", {})
    taps = report.taps if report.taps is not None else "engine default [2, L//2, L-3]"
    rows = [
        ("directory", str(report.directory)),
        ("method", f"EAGLE-3 ({', '.join(config.get('architectures') or ['no architecture named'])})"),
        ("parameters", f"{report.parameters:,} ({', '.join(sorted(set(report.dtypes.values()) - {'bool', 'int64'}))})"),
        ("hidden size", str(config.get("hidden_size"))),
        (
            "layer",
            f"{config.get('num_attention_heads')} heads, {config.get('num_key_value_heads')} key heads, head_dim "
            f"{config.get('head_dim')}, SwiGLU {config.get('intermediate_size')}",
        ),
        ("taps (HF hidden_states)" if made_by else "taps (as the file has them)", str(taps)),
        ("draft vocabulary", f"{config.get('draft_vocab_size')} of {config.get('vocab_size')} tokens"),
        ("rope_theta", str(config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta"))),
        ("context", str(config.get("max_position_embeddings"))),
    ]
    if report.ids_D is not None and config.get("vocab_size"):
        size = config["vocab_size"]
        rows.append(
            (
                "token ids",
                f"{int(report.ids_D.min())}..{int(report.ids_D.max())}, {len(report.ids_D) / size:.1%} of all",
            )
        )
    if made_by:
        rows.append(("made by", f"draftsmith {made_by.get('version')}, commit {made_by.get('commit')}"))
        rows.append(("target", f"{made_by['target']['model']} ({made_by['target']['dtype']})"))
        rows.append(("status", f"{made_by.get('status')} after {made_by.get('steps')} steps"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines.append("")
    lines += [f"  {name:<44} {report.dtypes[name]:<9} {list(shape)}" for name, shape in sorted(report.shapes.items())]
    lines.append("")
    notes = [p for p in report.problems if p.startswith("note:")]
    lines += notes
    lines += [f"problem: {problem}" for problem in report.blocking()] or ["no problems found"]
    return "\n".join(lines)


def inspect(directory: Path) -> bool:
    """Print the report; whether the draft is free of problems."""
    report = inspect_draft(directory)
    print(describe(report))
    return not report.blocking()
