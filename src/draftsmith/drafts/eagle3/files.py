"""The directory of an EAGLE-3 draft: config.json and model.safetensors, as SGLang and vLLM load them.

Both engines skip missing and unknown weights without a word, so everything here is strict: each key, shape and dtype
is checked, and each problem found is named. What config.json may say is told by config_file.py.
"""

import torch
from torch import Tensor

from draftsmith.core.errors import CheckpointError
from draftsmith.core.files import JsonObject
from draftsmith.core.taps import Taps, engine_default, of_outputs, to_outputs
from draftsmith.drafts.eagle3.config import Eagle3Config
from draftsmith.drafts.eagle3.config_file import IDS, layer_ids, misread, sound, taps_of, to_draft_config, uncomputed
from draftsmith.drafts.eagle3.model import Eagle3Draft
from draftsmith.drafts.method import DraftReport, Reading
from draftsmith.drafts.tensors import EMBEDDING, FLOATS, WHOLE, Shapes, read_tensors

ARCHITECTURE = "LlamaForCausalLMEagle3"


def expected_shapes(config: Eagle3Config) -> Shapes:
    """Every weight a draft of this configuration has."""
    with torch.device("meta"):
        draft = Eagle3Draft(config)
    return {name: tuple(p.shape) for name, p in draft.named_parameters()}


def engine_config(config: Eagle3Config, layers: int, provenance: JsonObject) -> JsonObject:
    """config.json for both engines.

    Their common default goes unsaid. Other taps stand at the top level as layer inputs, for vLLM, and in `eagle_config`
    as layer outputs, for SGLang, which knows of no tap 0.
    """
    eagle: JsonObject = {"use_aux_hidden_state": True}
    ids: JsonObject = {}
    if config.taps != engine_default(layers):
        ids = {IDS: list(config.taps)}
        if outputs := to_outputs(config.taps):
            eagle[IDS] = outputs
    if config.norm_before_fc:
        eagle["norm_before_fc"] = True
    own = config.model_dump(exclude={"taps", "target_hidden_size", "norm_before_fc", "rope_scaling"})
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "target_hidden_size": config.tap_size,
        "num_aux_hidden_states": len(config.taps),
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **own,
        **ids,
        "eagle_config": eagle,
        "draftsmith": {"taps": list(config.taps), **provenance},
    }


def draft_files(
    draft: Eagle3Draft, ids_D: Tensor, layers: int, provenance: JsonObject
) -> tuple[JsonObject, dict[str, Tensor]]:
    """(config.json, tensors): bf16 weights, d2t offsets and t2d."""
    tensors = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in draft.named_parameters()}
    tensors["d2t"] = ids_D - torch.arange(len(ids_D))
    tensors["t2d"] = torch.zeros(draft.config.vocab_size, dtype=torch.bool).index_fill_(0, ids_D, True)
    return engine_config(draft.config, layers, provenance), tensors


def named_taps(report: DraftReport, layers: int, reading: Reading) -> Taps:
    """The taps of a draft, for a target of so many layers.

    Without ids engines take their default. SGLang takes ids for layer outputs, vLLM for layer inputs; each has its own
    key and, where that is missing, is given the other's ids. `auto` takes every key as its own engine does, and refuses
    two that name different taps.
    """
    if report.taps is None:
        return engine_default(layers)
    if "taps" in (report.config.get("draftsmith") or {}):
        return tuple(report.taps)
    top, nested = layer_ids(report.config)
    inputs, outputs = tuple(top or ()), of_outputs(nested or ())
    if reading == "outputs":
        return outputs or of_outputs(inputs)
    if reading == "inputs":
        return inputs or tuple(nested or ())
    if inputs and outputs and inputs != outputs:
        raise CheckpointError(
            f"{report.directory}: {IDS} is {list(inputs)} at the top level but {nested} in eagle_config, "
            "which name different taps; delete the wrong ones (compare: --taps inputs or --taps outputs)"
        )
    return inputs or outputs


def check_directory(report: DraftReport) -> None:
    """Fill in what only an EAGLE-3 draft has, and name everything wrong with it."""
    report.config, report.problems = sound(report.config)
    config, problems, shapes, dtypes = report.config, report.problems, report.shapes, report.dtypes
    embedding = shapes.pop(EMBEDDING, None)
    embedding_dtype = dtypes.pop(EMBEDDING, "")
    report.taps = taps_of(config)
    maps = read_tensors(report.directory, {n for n in ("d2t", "t2d") if dtypes.get(n) in WHOLE | {"bool"}})
    report.ids_D = _check_vocabulary(report, maps)
    report.serving = misread(config)
    problems += [*report.serving, *uncomputed(config)]
    count = config.get("num_aux_hidden_states") or (len(report.taps) if report.taps else 3)
    width = config.get("target_hidden_size") or config.get("hidden_size")
    fc = shapes.get("fc.weight", ())
    if width and len(fc) == 2 and fc[1] % width == 0 and fc[1] // width != count:
        problems.append(f"fc.weight fuses {fc[1] // width} taps, config.json says {count}")
    report.draft = to_draft_config(config, tuple(report.taps or range(count)), problems)
    if embedding is not None:
        wanted = (config.get("vocab_size"), config.get("hidden_size"))
        if embedding != wanted or embedding_dtype not in FLOATS:
            problems.append(f"{EMBEDDING} has shape {list(embedding)} of {embedding_dtype}, wanted {list(wanted)}")
        problems.append("note: embed_tokens is stored; vLLM uses it, SGLang takes the target's rows")
    if formats := _quantised(config, dtypes):
        problems.append(
            f"quantised weights ({formats}): draftsmith computes {', '.join(sorted(FLOATS - {'float64'}))} alone; give "
            "the draft as it was before quantisation"
        )
    elif report.draft:
        expected = expected_shapes(report.draft)
        fitting = {n for n, shape in expected.items() if shapes.get(n) == shape and dtypes[n] in FLOATS}
        problems += _check_weights(report, read_tensors(report.directory, fitting), expected)


def _quantised(config: JsonObject, dtypes: dict[str, str]) -> str:
    """`modelopt: float8_e4m3fn`, or nothing: how weights are stored that are no plain floating-point numbers."""
    settings = config.get("quantization_config") or config.get("compression_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    held = {dtype for name, dtype in dtypes.items() if name not in ("d2t", "t2d")} - FLOATS - {"bool", "int64"}
    if not settings and not held:
        return ""
    return (
        f"{method or 'by quantization_config' if settings else 'no method named'}: {', '.join(sorted(held)) or 'plain'}"
    )


def _check_vocabulary(report: DraftReport, maps: dict[str, Tensor]) -> Tensor | None:
    """Target ids of the draft rows, or None where they cannot be known."""
    shapes, problems = report.shapes, report.problems
    size, vocab = report.config.get("draft_vocab_size"), report.config.get("vocab_size")
    if "d2t" not in shapes:
        if size and size != vocab:
            problems.append(f"d2t is missing though draft_vocab_size {size} differs from vocab_size {vocab}")
            return None
        return torch.arange(vocab) if vocab else None
    d2t, t2d = maps.get("d2t"), maps.get("t2d")
    if d2t is None or d2t.dtype == torch.bool or d2t.ndim != 1 or not len(d2t) or (size and len(d2t) != size):
        problems.append(f"d2t has shape {shapes['d2t']} and dtype {report.dtypes['d2t']}; wanted [{size}] of int64")
        return None
    ids = d2t.long() + torch.arange(len(d2t))
    if vocab and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
        absolute = int(d2t.max()) < vocab and bool((d2t.diff() > 0).all())
        hint = ": it holds target ids where engines read offsets" if absolute else ""
        problems.append(f"d2t leads outside the target's vocabulary of {vocab}{hint}")
        return None
    if bool((ids.diff() <= 0).any()):
        problems.append("d2t does not ascend: two draft rows may stand for one token")
    if "t2d" not in shapes:
        problems.append("note: t2d is missing; only training tools read it")
    elif vocab:
        wanted = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True)
        if t2d is None or t2d.shape != wanted.shape or not torch.equal(t2d.bool(), wanted):
            problems.append("t2d does not name the tokens that d2t names")
    return ids


def _check_weights(report: DraftReport, tensors: dict[str, Tensor], expected: Shapes) -> list[str]:
    """`tensors`: those of the right shape and a plain dtype."""
    missing = [name for name in expected if name not in report.shapes]
    problems = [f"{name} is missing; engines would serve random numbers for it" for name in missing]
    for name, shape in report.shapes.items():
        if name in ("d2t", "t2d"):
            continue
        if name not in expected:
            problems.append(f"{name} {list(shape)} is unknown; engines would skip it")
        elif shape != expected[name]:
            problems.append(f"{name} has shape {list(shape)}, wanted {list(expected[name])}")
        elif name not in tensors:
            problems.append(f"{name} has dtype {report.dtypes[name]}, wanted a floating-point one")
        elif not all(bool(part.isfinite().all()) for part in tensors[name].view(-1).split(1 << 24)):
            problems.append(f"{name} holds NaN or Inf")
        elif not bool(tensors[name].any()):
            problems.append(f"{name} is all zeros")
    return problems


def facts(report: DraftReport) -> list[tuple[str, str]]:
    """What `inspect` shows of it."""
    config, made_by = report.config, report.config.get("draftsmith") or {}
    taps = report.taps if report.taps is not None else "engine default [2, L//2, L-3]"
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
    scaling = report.draft.rope_scaling if isinstance(report.draft, Eagle3Config) else None
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
