"""The draft's shape: the recipe's values, else the target's own, else a dense draft's.

What a target computes with is not always what a draft of one dense layer can use: `intermediate_size` may be one
expert of 256, head_dim may differ between layers, and latent attention has 128 key heads that it never caches. There
the defaults are those of published drafts: a SwiGLU three times as wide as the model, heads of 128, eight for keys.
"""

import math
from typing import Any

from draftsmith.core.errors import TargetError
from draftsmith.core.files import JsonObject
from draftsmith.core.recipe import DraftRecipe
from draftsmith.core.taps import default_taps
from draftsmith.drafts.eagle3.config import Eagle3Config
from draftsmith.targets.configs import expert_count, per_layer, value_of
from draftsmith.targets.parts import UNBOUNDED, context_of, rope_of

WIDTHS = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
WIDE = 1024  # hidden size from which widths are rounded to what kernels like
MLP_RATIO, KEY_HEADS = 3, 8
ENOUGH_CONTEXT = 32768  # of a draft whose target counts no positions; engines keep a RoPE table of this length
WIDEST_HEAD = 256  # of engines' attention kernels; wider ones are latents shared by all heads (DeepSeek V4)


def draft_config(recipe: DraftRecipe, target: Any, layers: int, vocabulary: int) -> Eagle3Config:
    """The draft of a target with this `transformers` text config."""
    taps = recipe.taps or default_taps(layers)
    beyond = [tap for tap in taps if not 0 <= tap < layers]
    if beyond:
        raise TargetError(f"draft.taps: {beyond[0]} given; the target has layers 0..{layers - 1}")
    widths, _ = _widths(recipe, target)
    heads, kv_heads = widths["num_attention_heads"], widths["num_key_value_heads"]
    if heads % kv_heads:
        raise TargetError(f"draft.num_attention_heads: {heads} is no multiple of num_key_value_heads {kv_heads}")
    rope = rope_of(target)
    context = context_of(target)
    return Eagle3Config(
        hidden_size=target.hidden_size,
        **widths,
        vocab_size=target.vocab_size,
        draft_vocab_size=vocabulary,
        taps=tuple(taps),
        rope_theta=recipe.rope_theta or rope.get("rope_theta") or getattr(target, "rope_theta", None) or 10000.0,
        max_position_embeddings=context if context < UNBOUNDED else ENOUGH_CONTEXT,
        norm_before_fc=recipe.norm_before_fc,
        fc_norm=recipe.fc_norm,
    )


def shape_note(recipe: DraftRecipe, target: Any) -> str | None:
    """One line where not all widths are the recipe's or the target's own: which are whose; else None."""
    widths, dense = _widths(recipe, target)
    if not dense:
        return None
    own = [name for name in WIDTHS if name not in dense and getattr(recipe, name) is None]
    told = ", ".join(f"{name} {widths[name]}" for name in WIDTHS if name in dense)
    kept = f"; {', '.join(f'{name} {widths[name]}' for name in own)} as the target" if own else ""
    return f"draft: {told} of a dense draft, as the target has {_unlike(target)}{kept}; draft.* changes them"


def _unlike(c: Any) -> str:
    """What makes a target's widths no draft's."""
    reasons = {
        "experts": expert_count(c),
        "latent attention": value_of(c, "kv_lora_rank"),
        f"heads wider than {WIDEST_HEAD}": _too_wide(c),
        "values per layer": any(per_layer(c, name) for name in WIDTHS),
    }
    return " and ".join(reason for reason, holds in reasons.items() if holds) or "no such value"


def _too_wide(c: Any) -> bool:
    return (value_of(c, "head_dim") or 0) > WIDEST_HEAD


def _widths(recipe: DraftRecipe, c: Any) -> tuple[JsonObject, list[str]]:
    """The four widths, and which of them are a dense draft's."""
    hidden = c.hidden_size
    given = {name: value for name in WIDTHS if (value := getattr(recipe, name))}
    experts = expert_count(c)
    own = {}
    if not per_layer(c, "intermediate_size") and not experts:
        own["intermediate_size"] = value_of(c, "intermediate_size")
    plain = not value_of(c, "kv_lora_rank") and not _too_wide(c) and not any(per_layer(c, k) for k in WIDTHS[1:])
    if plain and (heads := value_of(c, "num_attention_heads")):
        own["num_attention_heads"] = heads
        own["head_dim"] = getattr(c, "head_dim", None) or hidden // heads
        kv_heads = getattr(c, "num_key_value_heads", None) or heads
        if not experts or kv_heads <= KEY_HEADS:
            own["num_key_value_heads"] = kv_heads
    known = {name: value for name, value in own.items() if value} | given
    return _dense(hidden, known) | known, [name for name in WIDTHS if name not in known]


def _dense(hidden: int, known: dict[str, int]) -> dict[str, int]:
    """Widths of a dense draft; heads in eights, so that tensor parallelism can share them."""
    wide = hidden >= WIDE
    head = known.get("head_dim") or (128 if wide else max(8, min(64, hidden // 4)))
    heads = known.get("num_attention_heads") or max(1, hidden // head)
    if "num_attention_heads" not in known and heads > 8:
        heads -= heads % 8
    return {
        "intermediate_size": math.ceil(MLP_RATIO * hidden / 128) * 128 if wide else MLP_RATIO * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": math.gcd(heads, KEY_HEADS),
        "head_dim": head,
    }
