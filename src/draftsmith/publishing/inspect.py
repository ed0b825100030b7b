"""`draftsmith inspect DIR`: what a draft directory holds and everything an engine would swallow silently."""

from pathlib import Path

from draftsmith.drafts.checkpoint import DraftReport, inspect_draft
from draftsmith.drafts.methods import EAGLE3

SHOWN = 64  # tensors; a draft has about twenty, a whole model thousands


def describe(report: DraftReport) -> str:
    """The report as text for a terminal."""
    config = report.config
    named = ", ".join(config.get("architectures") or ["no architecture named"])
    held = sorted(set(report.dtypes.values()) - {"bool", "int64"})
    rows = [
        ("directory", str(report.directory)),
        ("method", report.method if named in report.method else f"{report.method} ({named})"),
        ("parameters", f"{report.parameters:,} ({', '.join(held)})"),
    ]
    if report.method == EAGLE3:
        rows += _eagle3_rows(report)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    wide = max((len(dtype) for dtype in report.dtypes.values()), default=0)
    tensors = sorted(report.shapes.items())
    lines += ["", *(f"  {name:<44} {report.dtypes[name]:<{wide}} {list(shape)}" for name, shape in tensors[:SHOWN])]
    if len(tensors) > SHOWN:
        lines.append(f"  and {len(tensors) - SHOWN} more")
    lines += ["", *(p for p in report.problems if p.startswith("note:"))]
    lines += [f"problem: {problem}" for problem in report.blocking()] or ["no problems found"]
    return "\n".join(lines)


def _eagle3_rows(report: DraftReport) -> list[tuple[str, str]]:
    config, made_by = report.config, report.config.get("draftsmith") or {}
    taps = report.taps if report.taps is not None else "engine default [2, L//2, L-3]"
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
    scaling = report.draft.rope_scaling if report.draft else None
    scaled = "".join(f", {value if key == 'rope_type' else f'{key} {value}'}" for key, value in (scaling or {}).items())
    size, target_size = config.get("hidden_size"), config.get("target_hidden_size")
    rows = [
        ("hidden size", f"{size}" if target_size in (None, size) else f"{size}, of a target with {target_size}"),
        (
            "layer",
            f"{config.get('num_attention_heads')} heads, {config.get('num_key_value_heads')} key heads, head_dim "
            f"{config.get('head_dim')}, SwiGLU {config.get('intermediate_size')}",
        ),
        ("taps (HF hidden_states)" if made_by else "taps (as the file has them)", str(taps)),
        ("draft vocabulary", f"{config.get('draft_vocab_size')} of {config.get('vocab_size')} tokens"),
        ("rope_theta", f"{theta}{scaled}"),
        ("context", str(config.get("max_position_embeddings"))),
    ]
    if report.ids_D is not None and config.get("vocab_size"):
        share = len(report.ids_D) / config["vocab_size"]
        rows.append(("token ids", f"{int(report.ids_D.min())}..{int(report.ids_D.max())}, {share:.1%} of all"))
    if made_by:
        target = made_by.get("target") or {}
        rows.append(("made by", f"draftsmith {made_by.get('version')}, commit {made_by.get('commit')}"))
        rows.append(("target", f"{target.get('model')} ({target.get('dtype')})"))
        rows.append(("status", f"{made_by.get('status')} after {made_by.get('steps')} steps"))
    return rows


def inspect(directory: Path) -> bool:
    """Print the report; whether the draft is free of problems."""
    report = inspect_draft(directory)
    print(describe(report))
    return not report.blocking()
