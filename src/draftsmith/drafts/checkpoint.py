"""Reading and writing EAGLE-3 draft directories: config.json and model.safetensors, as SGLang and vLLM load them.

Both engines skip missing and unknown weights without a word, so everything here is strict: each key, shape and dtype
is checked, and each problem found is named. Facts about the engines: docs/engines.md.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftsmith.drafts.eagle3 import Eagle3Config, Eagle3Draft
from draftsmith.errors import CheckpointError
from draftsmith.files import save_tensors, write_json


def expected_shapes(config: Eagle3Config) -> dict[str, tuple[int, ...]]:
    """Every weight a draft of this configuration has."""
    with torch.device("meta"):
        draft = Eagle3Draft(config)
    return {name: tuple(p.shape) for name, p in draft.named_parameters()}


def engine_config(config: Eagle3Config, engine_taps: list[int] | None, provenance: dict[str, Any]) -> dict[str, Any]:
    """config.json; `engine_taps` None leaves the key out, so that both engines take their common default."""
    eagle: dict[str, Any] = {"use_aux_hidden_state": True}
    if engine_taps is not None:
        eagle["eagle_aux_hidden_state_layer_ids"] = engine_taps
    if config.norm_before_fc:
        eagle["norm_before_fc"] = True
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.hidden_size,
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
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "fc_norm": config.fc_norm,
        "eagle_config": eagle,
        "draftsmith": {"taps": list(config.taps), **provenance},
    }


def draft_files(
    draft: Eagle3Draft, ids_D: Tensor, engine_taps: list[int] | None, provenance: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, tensors): bf16 weights, d2t offsets and t2d."""
    config = draft.config
    tensors = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in draft.named_parameters()}
    tensors["d2t"] = ids_D - torch.arange(len(ids_D))
    tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, ids_D, True)
    return engine_config(config, engine_taps, provenance), tensors


def write_draft(
    directory: Path, draft: Eagle3Draft, ids_D: Tensor, engine_taps: list[int] | None, provenance: dict[str, Any]
) -> None:
    """Write what `draft_files` makes and read it back strictly."""
    config, tensors = draft_files(draft, ids_D, engine_taps, provenance)
    save_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    write_json(directory / "config.json", config)
    problems = [p for p in inspect_draft(directory).problems if not p.startswith("note:")]
    if problems:
        raise CheckpointError(f"{directory}: the export does not hold: {problems[0]}")


Reading = Literal["auto", "sglang", "vllm"]


@dataclass
class DraftReport:
    """What a draft directory holds, and everything wrong with it. Lines that start with `note:` are harmless."""

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

    def blocking(self, lenient: bool = False) -> list[str]:
        """Problems without notes; `lenient` leaves out those of serving."""
        return [p for p in self.problems if not p.startswith("note:") and not (lenient and p in self.serving)]

    def hf_taps(self, layers: int, reading: Reading = "auto") -> tuple[int, ...]:
        """The taps as HF hidden_states indices, for a target of so many layers.

        Without ids both engines take [2, L//2, L-3]. SGLang reads nested ids as layer outputs (tap = id + 1), vLLM
        reads any ids as they are; `auto` takes nested ids for SGLang's and top-level ones for vLLM's.
        """
        if self.taps is None:
            return (2, layers // 2, layers - 3)
        nested = "eagle_aux_hidden_state_layer_ids" in (self.config.get("eagle_config") or {})
        outputs = reading == "sglang" or (reading == "auto" and nested)
        if "taps" in self.config.get("draftsmith", {}) or not outputs:
            return tuple(self.taps)
        return tuple(tap + 1 for tap in self.taps)


def _canonical(name: str) -> str:
    """One spelling for the names that engines accept."""
    name = name.removeprefix("model.")
    return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name


def read_tensors(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = [*directory.glob("*.bin"), *directory.glob("*.pt")]
        hint = f" ({pickles[0].name} is pickled, which draftsmith does not load)" if pickles else ""
        raise CheckpointError(f"{directory}: no .safetensors file{hint}")
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    tensors[_canonical(name)] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a safetensors file: {error}") from None
    return tensors


def read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: no config.json; give the directory of an EAGLE-3 draft") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if "transformer_layer_config" in config:  # the layout of the `speculators` package
        speculators = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "norm_before_residual": True,
            "num_hidden_layers": 1,
        }
        return {
            **speculators,
            **config["transformer_layer_config"],
            **config,
            "architectures": ["LlamaForCausalLMEagle3"],
        }
    return config


def _taps(config: dict[str, Any]) -> list[int] | None:
    if "taps" in config.get("draftsmith", {}):
        return config["draftsmith"]["taps"]
    eagle = config.get("eagle_config") or {}
    return eagle.get("eagle_aux_hidden_state_layer_ids") or config.get("eagle_aux_hidden_state_layer_ids")


def inspect_draft(directory: Path) -> DraftReport:
    """Read any EAGLE-3 directory (`midlayer.` or `layers.0.` names, with or without embeddings) and check it."""
    config, tensors = read_config(directory), read_tensors(directory)
    embeddings = tensors.pop("embed_tokens.weight", None)
    problems: list[str] = []
    eagle = config.get("eagle_config") or {}
    taps = _taps(config)
    fc = tensors.get("fc.weight")
    size = config.get("hidden_size")
    ids_D, draft = _check_vocabulary(config, tensors, problems), None
    serving = _check_serving(config, eagle)
    problems += [*serving, *_check_config(config)]
    if embeddings is not None:
        problems.append("note: embed_tokens is stored; engines would take the target's rows without it")
    if not isinstance(size, int):
        problems.append("hidden_size is missing from config.json")
    else:
        count = config.get("num_aux_hidden_states") or (len(taps) if taps else 3)
        if fc is not None and fc.ndim == 2 and fc.shape[1] % (config.get("target_hidden_size") or size) == 0:
            held = fc.shape[1] // (config.get("target_hidden_size") or size)
            if held != count:
                problems.append(f"fc.weight fuses {held} taps, config.json says {count}")
        try:
            draft = _to_draft_config(config, tuple(taps) if taps else tuple(range(count)))
        except (KeyError, TypeError) as error:
            problems.append(f"config.json lacks {error}")
    if draft:
        problems += _check_weights(tensors, expected_shapes(draft))
    return DraftReport(
        directory,
        config,
        {n: tuple(t.shape) for n, t in tensors.items()},
        {n: str(t.dtype).removeprefix("torch.") for n, t in tensors.items()},
        sum(t.numel() for n, t in tensors.items() if n not in ("d2t", "t2d")),
        taps,
        draft,
        ids_D,
        problems,
        serving,
    )


def _to_draft_config(config: dict[str, Any], taps: tuple[int, ...]) -> Eagle3Config:
    eagle = config.get("eagle_config") or {}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return Eagle3Config(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        draft_vocab_size=config.get("draft_vocab_size") or config["vocab_size"],
        taps=taps,
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        max_position_embeddings=config.get("max_position_embeddings") or 0,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        norm_before_fc=bool(eagle.get("norm_before_fc", config.get("norm_before_fc", False))),
        fc_norm=bool(config.get("fc_norm") or config.get("use_aux_norm")),
    )


def _check_config(config: dict[str, Any]) -> list[str]:
    """What makes it another computation than ours."""
    problems = []
    rope = (config.get("rope_parameters") or {}).get("rope_theta")
    if rope is not None and "rope_theta" in config and rope != config["rope_theta"]:
        problems.append(f"rope_theta is {config['rope_theta']} at the top level but {rope} in rope_parameters")
    if config.get("norm_before_residual"):
        problems.append("norm_before_residual is not supported by SGLang")
    if config.get("attention_bias"):
        problems.append("attention_bias is not supported by SGLang's draft layer")
    if config.get("norm_output"):
        problems.append("norm_output feeds back the normed state, which is not supported here")
    if config.get("num_hidden_layers") != 1:
        problems.append(f"num_hidden_layers is {config.get('num_hidden_layers')}; an EAGLE-3 draft has 1")
    return problems


def _check_serving(config: dict[str, Any], eagle: dict[str, Any]) -> list[str]:
    """What an engine would read otherwise than it was meant."""
    problems = []
    if config.get("architectures") != ["LlamaForCausalLMEagle3"]:
        problems.append(f"architectures is {config.get('architectures')}; SGLang wants ['LlamaForCausalLMEagle3']")
    if "draft_vocab_size" not in config:
        problems.append(
            "draft_vocab_size is missing: SGLang stops with an AttributeError, vLLM assumes the full vocabulary"
        )
    if config.get("tie_word_embeddings", False):
        problems.append("tie_word_embeddings is true: SGLang would use the embedding as the draft's head")
    if "eagle_aux_hidden_state_layer_ids" in config:
        problems.append(
            "eagle_aux_hidden_state_layer_ids at the top level is ignored by SGLang; nest it in eagle_config"
        )
    ids = eagle.get("eagle_aux_hidden_state_layer_ids")
    if ids and list(ids) != sorted(set(ids)):
        problems.append(f"taps {ids} are not ascending: vLLM's native models sort them")
    if "rope_theta" not in config and not (config.get("rope_parameters") or {}).get("rope_theta"):
        problems.append("rope_theta is missing: engines assume 10000")
    context = config.get("max_position_embeddings") or 0
    target_context = config.get("draftsmith", {}).get("target", {}).get("max_position_embeddings", 2049)
    if context < target_context:  # of a target unknown to us, only that 2048 is too short for any served today
        problems.append(f"max_position_embeddings {context} is short: it must reach the target's context")
    return problems


def _check_vocabulary(config: dict[str, Any], tensors: dict[str, Tensor], problems: list[str]) -> Tensor | None:
    """Target ids of the draft rows, or None where they cannot be known."""
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    size, vocab = config.get("draft_vocab_size"), config.get("vocab_size")
    if d2t is None:
        if size and size != vocab:
            problems.append(f"d2t is missing though draft_vocab_size {size} differs from vocab_size {vocab}")
            return None
        return torch.arange(vocab) if vocab else None
    if d2t.ndim != 1 or d2t.is_floating_point() or (size and len(d2t) != size):
        problems.append(f"d2t has shape {tuple(d2t.shape)} and dtype {d2t.dtype}; wanted [{size}] of int64")
        return None
    ids = d2t.long() + torch.arange(len(d2t))
    if vocab and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
        absolute = int(d2t.max()) < vocab and bool((d2t.diff() > 0).all())
        hint = ": it holds target ids where engines read offsets" if absolute else ""
        problems.append(f"d2t leads outside the target's vocabulary of {vocab}{hint}")
        return None
    if bool((ids.diff() <= 0).any()):
        problems.append("d2t does not ascend: two draft rows may stand for one token")
    if t2d is not None and vocab:
        wanted = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True)
        if t2d.shape != wanted.shape or not torch.equal(t2d.bool(), wanted):
            problems.append("t2d does not name the tokens that d2t names")
    elif t2d is None:
        problems.append("note: t2d is missing; only training tools read it")
    return ids


def _check_weights(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> list[str]:
    problems = [
        f"{name} is missing; engines would serve random numbers for it" for name in expected if name not in tensors
    ]
    for name, tensor in tensors.items():
        if name in ("d2t", "t2d"):
            continue
        if name not in expected:
            problems.append(f"{name} {list(tensor.shape)} is unknown; engines would skip it")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, wanted {list(expected[name])}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} has dtype {tensor.dtype}, wanted a floating-point one")
        elif not bool(tensor.isfinite().all()):
            problems.append(f"{name} holds NaN or Inf")
        elif not bool(tensor.any()):
            problems.append(f"{name} is all zeros")
    return problems


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
    tensors = read_tensors(directory)
    draft.load_state_dict({name: tensors[name] for name in expected_shapes(config)})
    return draft.eval(), report.ids_D
