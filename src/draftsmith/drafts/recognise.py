"""Which drafting method a directory holds, by what its config.json says and the names of its tensors.

draftsmith reads EAGLE-3; of the others it only knows the name, so that nobody takes them for a broken EAGLE-3 draft.
"""

import re

from draftsmith.core.files import JsonObject
from draftsmith.drafts.tensors import Shapes

EAGLE3 = "EAGLE-3"
OTHERS = (  # methods whose names are their own: what config.json says, one of its keys, a tensor's name
    ("DSpark", "dspark", None, "markov_"),
    ("DFlash2", "dflash2", None, r"candidate_selector\."),
    ("DFlash", "dflash", "dflash_config", r"^hidden_norm\.weight$"),
    ("Medusa", "medusa", "medusa_num_heads", r"^(medusa_heads?\.)?\d+\.0\.linear\.weight$"),
    ("P-EAGLE", "peagle", "pard_token", "^mask_hidden$"),
    ("MTP (multi-token prediction)", r"mtp\b|nextn|mtpmodel|mtpforcausal", None, None),
    ("MLP speculator", "mlp_?speculator", None, None),
)


def architectures(config: JsonObject) -> list[str]:
    named = config.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def recognise(config: JsonObject, shapes: Shapes) -> str:
    """`EAGLE-3`, or the name of what it is instead; `shapes` by canonical names (`midlayer.` for `layers.0.`)."""
    named = architectures(config)
    said = " ".join([*named, *(str(config.get(key) or "") for key in ("speculators_model_type", "model_type"))]).lower()
    for method, words, key, tensor in OTHERS:
        has_key = key is not None and config.get(key) is not None
        if re.search(words, said) or has_key or (tensor and any(re.search(tensor, name) for name in shapes)):
            return method
    fuses = "fc.weight" in shapes
    if any(".kv_a_proj" in name or ".kv_b_proj" in name for name in shapes) and (fuses or "eagle" in said):
        return "EAGLE with latent attention (MLA, as DeepSeek's)"
    if "eagle3" in said:
        return EAGLE3
    if "fusion_fc.weight" in shapes or (fuses and _reads_one_stream(shapes)) or "eagle" in said:
        return "EAGLE-1 or EAGLE-2"
    if fuses or "d2t" in shapes or "midlayer.hidden_norm.weight" in shapes:
        return EAGLE3
    if "embed_tokens.weight" in shapes or any("layers." in name or name.startswith("midlayer.") for name in shapes):
        return f"no draft but a whole model ({', '.join(named) or 'no architecture named'})"
    return "none that draftsmith knows"


def _reads_one_stream(shapes: Shapes) -> bool:
    """Queries over the hidden state alone; EAGLE-3's read [embedding, feature], twice as wide."""
    query, output = (shapes.get(f"midlayer.self_attn.{name}.weight", ()) for name in ("q_proj", "o_proj"))
    return len(query) == len(output) == 2 and query[1] == output[0]
