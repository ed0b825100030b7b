"""Reading and writing EAGLE-3 draft directories: config.json and model.safetensors, as SGLang and vLLM load them.

Both engines skip missing and unknown weights without a word, so everything here is strict: each key, shape and dtype
is checked, and each problem found is named. What config.json may say is told by config_file.py, what else than EAGLE-3
a directory may hold by methods.py.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftsmith.drafts.config_file import (
    IDS,
    layer_ids,
    misread,
    read_config,
    sound,
    taps_of,
    to_draft_config,
    uncomputed,
)
from draftsmith.drafts.eagle3 import Eagle3Config, Eagle3Draft
from draftsmith.drafts.methods import EAGLE3, method_of
from draftsmith.errors import CheckpointError
from draftsmith.files import save_tensors, write_json

EMBEDDING = "embed_tokens.weight"
PLAIN = {"bfloat16", "float16", "float32", "float64"}
WHOLE = {"int64", "int32", "int16", "int8", "uint8"}
DTYPES = {  # of a safetensors header, in torch's words
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2"},
}


def expected_shapes(config: Eagle3Config) -> dict[str, tuple[int, ...]]:
    """Every weight a draft of this configuration has."""
    with torch.device("meta"):
        draft = Eagle3Draft(config)
    return {name: tuple(p.shape) for name, p in draft.named_parameters()}


def engine_config(config: Eagle3Config, named_taps: list[int] | None, provenance: dict[str, Any]) -> dict[str, Any]:
    """config.json for both engines.

    `named_taps` None leaves the ids out, so that both engines take their common default. Otherwise vLLM reads layer
    inputs at the top level, SGLang layer outputs in `eagle_config`, which cannot tell of tap 0.
    """
    eagle: dict[str, Any] = {"use_aux_hidden_state": True}
    ids: dict[str, list[int]] = {}
    if named_taps is not None:
        ids = {IDS: named_taps}
        if min(named_taps) > 0:
            eagle[IDS] = [tap - 1 for tap in named_taps]
    if config.norm_before_fc:
        eagle["norm_before_fc"] = True
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.tap_size,
        "num_aux_hidden_states": len(config.taps),
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "fc_norm": config.fc_norm,
        **ids,
        "eagle_config": eagle,
        "draftsmith": {"taps": list(config.taps), **provenance},
    }


def draft_files(
    draft: Eagle3Draft, ids_D: Tensor, named_taps: list[int] | None, provenance: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, tensors): bf16 weights, d2t offsets and t2d."""
    config = draft.config
    tensors = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in draft.named_parameters()}
    tensors["d2t"] = ids_D - torch.arange(len(ids_D))
    tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, ids_D, True)
    return engine_config(config, named_taps, provenance), tensors


def write_draft(
    directory: Path, draft: Eagle3Draft, ids_D: Tensor, named_taps: list[int] | None, provenance: dict[str, Any]
) -> None:
    """Write what `draft_files` makes and read it back strictly."""
    config, tensors = draft_files(draft, ids_D, named_taps, provenance)
    save_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    write_json(directory / "config.json", config)
    problems = [p for p in inspect_draft(directory).problems if not p.startswith("note:")]
    if problems:
        raise CheckpointError(f"{directory}: the export does not hold: {problems[0]}")


Reading = Literal["auto", "sglang", "vllm"]


@dataclass
class DraftReport:
    """What a draft directory holds, and everything wrong with it. Lines that start with `note:` are harmless.

    Of another method than EAGLE-3 only `method`, `config` and the tensors' shapes and dtypes are told.
    """

    directory: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    parameters: int
    taps: list[int] | None
    draft: Eagle3Config | None
    ids_D: Tensor | None
    problems: list[str] = field(default_factory=list)
    serving: list[str] = field(default_factory=list)
    """Those of the problems that spoil serving alone; the draft itself is whole."""
    method: str = EAGLE3

    def blocking(self, lenient: bool = False) -> list[str]:
        """Problems without notes; `lenient` leaves out those of serving."""
        return [p for p in self.problems if not p.startswith("note:") and not (lenient and p in self.serving)]

    def hf_taps(self, layers: int, reading: Reading = "auto") -> tuple[int, ...]:
        """The taps as HF hidden_states indices, for a target of so many layers.

        Without ids both engines take [2, L//2, L-3]. `sglang` takes ids for layer outputs (tap = id + 1), `vllm` for
        layer inputs (tap = id); each has its own key and, where that is missing, is given the other's ids. `auto` takes
        every key as its own engine does, and refuses two that name different taps.
        """
        if self.taps is None:
            return (2, layers // 2, layers - 3)
        if "taps" in (self.config.get("draftsmith") or {}):
            return tuple(self.taps)
        top, nested = layer_ids(self.config)
        inputs, outputs = (tuple(ids or ()) for ids in (top, nested))
        after = tuple(i + 1 for i in outputs)
        if reading == "sglang":
            return after or tuple(i + 1 for i in inputs)
        if reading == "vllm":
            return inputs or outputs
        if inputs and after and inputs != after:
            raise CheckpointError(
                f"{self.directory}: {IDS} is {list(inputs)} at the top level but {list(outputs)} in eagle_config, "
                "which name different taps; say whose are right with --taps vllm or --taps sglang"
            )
        return inputs or after


def _canonical(name: str) -> str:
    """One spelling for the names that engines accept."""
    name = name.removeprefix("model.")
    return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name


def _weight_files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = [*directory.glob("*.bin"), *directory.glob("*.pt")]
        hint = f" ({pickles[0].name} is pickled, which draftsmith does not load)" if pickles else ""
        raise CheckpointError(f"{directory}: no .safetensors file{hint}")
    return files


def read_header(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} as the files have them; reads no weight."""
    header: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in _weight_files(directory):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    dtype = part.get_dtype()
                    header[name] = DTYPES.get(dtype, dtype.lower()), tuple(part.get_shape())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a safetensors file: {error}") from None
    return header


def read_tensors(directory: Path, names: set[str] | None = None) -> dict[str, Tensor]:
    """Tensors by canonical name; all of them, or some."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(directory):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if names is None or _canonical(name) in names:
                        tensors[_canonical(name)] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a safetensors file: {error}") from None
    return tensors


def inspect_draft(directory: Path) -> DraftReport:
    """Read any draft directory (`midlayer.` or `layers.0.` names, with or without embeddings) and check it."""
    config, problems = sound(read_config(directory))
    header = read_header(directory)
    shapes = {_canonical(name): shape for name, (_, shape) in header.items()}
    dtypes = {_canonical(name): dtype for name, (dtype, _) in header.items()}
    method = method_of(config, shapes)
    report = DraftReport(directory, config, shapes, dtypes, 0, None, None, None, problems, [], method)
    if method != EAGLE3:
        report.shapes = {name: shape for name, (_, shape) in header.items()}
        report.dtypes = {name: dtype for name, (dtype, _) in header.items()}
        report.problems = [f"the method is {method}; draftsmith reads EAGLE-3 drafts alone"]
    else:
        _check_eagle3(report)
    report.parameters = sum(torch.Size(s).numel() for n, s in report.shapes.items() if n not in ("d2t", "t2d"))
    return report


def _check_eagle3(report: DraftReport) -> None:
    """Fill in what only an EAGLE-3 draft has, and name everything wrong with it."""
    config, problems, shapes, dtypes = report.config, report.problems, report.shapes, report.dtypes
    embedding = shapes.pop(EMBEDDING, None)
    embedding_dtype = dtypes.pop(EMBEDDING, "")
    report.taps = taps_of(config)
    maps = read_tensors(report.directory, {n for n in ("d2t", "t2d") if dtypes.get(n) in WHOLE | {"bool"}})
    report.ids_D = _check_vocabulary(config, shapes, dtypes, maps, problems)
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
        if embedding != wanted or embedding_dtype not in PLAIN:
            problems.append(f"{EMBEDDING} has shape {list(embedding)} of {embedding_dtype}, wanted {list(wanted)}")
        problems.append("note: embed_tokens is stored; vLLM uses it, SGLang takes the target's rows")
    if formats := _quantised(config, dtypes):
        problems.append(
            f"quantised weights ({formats}): draftsmith computes {', '.join(sorted(PLAIN - {'float64'}))} alone; give "
            "the draft as it was before quantisation"
        )
    elif report.draft:
        expected = expected_shapes(report.draft)
        fitting = {n for n, shape in expected.items() if shapes.get(n) == shape and dtypes[n] in PLAIN}
        problems += _check_weights(shapes, dtypes, read_tensors(report.directory, fitting), expected)


def _quantised(config: dict[str, Any], dtypes: dict[str, str]) -> str:
    """`modelopt: float8_e4m3fn`, or nothing: how weights are stored that are no plain floating-point numbers."""
    wish = config.get("quantization_config") or config.get("compression_config")
    method = wish.get("quant_method") if isinstance(wish, dict) else None
    held = {dtype for name, dtype in dtypes.items() if name not in ("d2t", "t2d")} - PLAIN - {"bool", "int64"}
    if not wish and not held:
        return ""
    return f"{method or 'by quantization_config' if wish else 'no method named'}: {', '.join(sorted(held)) or 'plain'}"


def _check_vocabulary(
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, str],
    maps: dict[str, Tensor],
    problems: list[str],
) -> Tensor | None:
    """Target ids of the draft rows, or None where they cannot be known."""
    size, vocab = config.get("draft_vocab_size"), config.get("vocab_size")
    if "d2t" not in shapes:
        if size and size != vocab:
            problems.append(f"d2t is missing though draft_vocab_size {size} differs from vocab_size {vocab}")
            return None
        return torch.arange(vocab) if vocab else None
    d2t, t2d = maps.get("d2t"), maps.get("t2d")
    if d2t is None or d2t.dtype == torch.bool or d2t.ndim != 1 or not len(d2t) or (size and len(d2t) != size):
        problems.append(f"d2t has shape {shapes['d2t']} and dtype {dtypes['d2t']}; wanted [{size}] of int64")
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


def _check_weights(
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, str],
    tensors: dict[str, Tensor],
    expected: dict[str, tuple[int, ...]],
) -> list[str]:
    """`tensors`: those of the right shape and a plain dtype."""
    problems = [
        f"{name} is missing; engines would serve random numbers for it" for name in expected if name not in shapes
    ]
    for name, shape in shapes.items():
        if name in ("d2t", "t2d"):
            continue
        if name not in expected:
            problems.append(f"{name} {list(shape)} is unknown; engines would skip it")
        elif shape != expected[name]:
            problems.append(f"{name} has shape {list(shape)}, wanted {list(expected[name])}")
        elif name not in tensors:
            problems.append(f"{name} has dtype {dtypes[name]}, wanted a floating-point one")
        elif not bool(tensors[name].isfinite().all()):
            problems.append(f"{name} holds NaN or Inf")
        elif not bool(tensors[name].any()):
            problems.append(f"{name} is all zeros")
    return problems


def own_embedding(directory: Path) -> Tensor | None:
    """The rows [V, H] that a draft brings along; ours use the target's."""
    return read_tensors(directory, {EMBEDDING}).get(EMBEDDING)


def load_draft(
    directory: Path, dtype: torch.dtype = torch.bfloat16, layers: int | None = None, reading: Reading | None = None
) -> tuple[Eagle3Draft, Tensor]:
    """(draft, target ids of its rows) of a directory without problems.

    With `reading`, a draft of others: faults of serving alone are let pass, and its taps are told by
    `DraftReport.hf_taps` for a target of `layers` layers.
    """
    report = inspect_draft(directory)
    real = report.blocking(lenient=reading is not None)
    if real or report.draft is None or report.ids_D is None:
        raise CheckpointError(f"{directory}: {(real or ['cannot be read'])[0]}; run: draftsmith inspect {directory}")
    config = report.draft
    if reading is not None and layers is not None:
        config = replace(config, taps=report.hf_taps(layers, reading))
    draft = Eagle3Draft(config).to(dtype)
    tensors = read_tensors(directory, set(expected_shapes(config)))
    draft.load_state_dict({name: tensors[name] for name in expected_shapes(config)})
    return draft.eval(), report.ids_D
