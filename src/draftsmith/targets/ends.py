"""Both ends of a target: tokenizer, embedding, final norm and head; all that a trainer needs beside hidden states."""

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.errors import TargetError
from draftsmith.files import digest
from draftsmith.progress import say
from draftsmith.targets import embedded
from draftsmith.targets.base import TargetIdentity

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def resolve_model(model: str) -> str:
    """Path or hub name to load; an embedded target is converted on first use."""
    return str(embedded.materialise(model)) if model in embedded.EMBEDDED else model


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise TargetError(f"device: {device} asked for, but torch {torch.__version__} sees no GPU; use auto or cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise TargetError(f"device: {device!r} given; allowed are auto, cpu, cuda and cuda:N") from None


def tell_slow_products(device: torch.device, dtype: str) -> None:
    """Many CPUs widen bf16 number by number: ten times slower than fp32, and nothing else would say why."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    if device.type == "cpu" and dtype == "bf16" and capabilities.get("architecture") == "x86_64" and not native:
        say(
            "target.dtype: this CPU has no bf16 products, so they take about ten times as long as fp32 ones; give "
            "--target.dtype fp32 --train.dtype fp32"
        )


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False):
    from transformers import AutoTokenizer

    path = resolve_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise TargetError(f"target.model: no tokenizer in {model!r}: {first_line(error)}") from None
    if model in embedded.EMBEDDED:
        embedded.check_tokenizer(model, tokenizer)
    return tokenizer


def tokenizer_hash(tokenizer) -> str:
    """Identity of the mapping from text to ids, by vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def default_taps(num_layers: int) -> tuple[int, int, int]:
    """[2, L//2, L-3]: what SGLang and vLLM capture when a checkpoint names no taps."""
    taps = (2, num_layers // 2, num_layers - 3)
    if list(taps) != sorted(set(taps)):
        raise TargetError(f"draft.taps: a target of {num_layers} layers has no default taps; name them")
    return taps


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ModelEnds:
    """What the whole model in this process and a model that runs elsewhere have in common."""

    device: torch.device
    tokenizer: Any

    def _adopt(self, lm: Any, name: str, revision: str | None, dtype: str) -> None:
        self.lm = lm.eval().requires_grad_(False)
        self.decoder = lm.get_decoder()
        self.config = self.decoder.config
        missing = [part for part in ("layers", "embed_tokens", "norm") if not hasattr(self.decoder, part)]
        if missing or lm.get_output_embeddings() is None:
            raise TargetError(
                f"target.model: {type(lm).__name__} has no {' and no '.join(missing or ['output head'])}; "
                "draftsmith needs a decoder-only model with .layers, .embed_tokens, .norm and a head"
            )
        rows = lm.get_input_embeddings().weight.shape[0]
        highest = max(self.tokenizer.get_vocab().values()) if self.tokenizer else 0
        if highest >= rows:
            raise TargetError(
                f"target.model: the tokenizer knows ids up to {highest} but the model has {rows} rows; "
                "give the model its own tokenizer"
            )
        self.head = lm.get_output_embeddings()
        self.logit_softcap = getattr(self.config, "final_logit_softcapping", None)
        eos = getattr(lm.generation_config, "eos_token_id", None) or self.config.eos_token_id
        self.eos_ids = frozenset([eos] if isinstance(eos, int) else eos or [])
        quantization = getattr(lm.config, "quantization_config", None) or {}
        if not isinstance(quantization, dict):
            quantization = quantization.to_dict()
        self.identity = TargetIdentity(
            model=name,
            revision=revision,
            dtype=dtype,
            architecture=type(lm).__name__,
            num_layers=len(self.decoder.layers),
            hidden_size=self.config.hidden_size,
            vocab_size=self.head.weight.shape[0],
            max_position_embeddings=self.config.max_position_embeddings,
            tokenizer_hash=tokenizer_hash(self.tokenizer) if self.tokenizer else "none",
            template_hash=digest(getattr(self.tokenizer, "chat_template", None)),
            quantization=quantization.get("quant_method"),
        )

    @torch.inference_mode()
    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.decoder.norm(hidden)

    def norm_gain(self) -> Tensor:
        """Gain [H] of the final norm as a plain RMSNorm has it: what it makes of a vector of ones.

        So a norm stored as 1 + w (Gemma) needs no special case.
        """
        gain = self.final_norm(torch.ones(self.identity.hidden_size, dtype=self.head.weight.dtype, device=self.device))
        if not bool(gain.any()) or not bool(gain.isfinite().all()):
            raise TargetError(f"target.model: the final norm of {self.identity.architecture} is no RMSNorm")
        return gain

    def head_rows(self, ids: Tensor) -> Tensor:
        return self.head.weight[ids.to(self.device)]

    def embedding_rows(self) -> Tensor:
        return self.decoder.embed_tokens.weight


class LooseEnds(ModelEnds):
    """The ends of a model whose layers are never loaded: 230 B parameters cost three tensors here."""

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: str = "bf16",
        device: str = "auto",
        trust_remote_code: bool = False,
    ):
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        self.device = resolve_device(device)
        self.tokenizer = load_tokenizer(model, revision, trust_remote_code)
        path = resolve_model(model)
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(path, **options)
            with torch.device("meta"):
                lm = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise TargetError(f"target.model: cannot read {model!r}: {first_line(error)}") from None
        with contextlib.suppress(OSError):  # a model without one ends by its config
            lm.generation_config = GenerationConfig.from_pretrained(path, revision=revision or "main")
        self._adopt(lm, model, revision, dtype)
        self._source = path, revision
        self._tied = config.get_text_config().tie_word_embeddings

    def _load(self) -> None:
        """Read the three tensors on first use; regeneration needs none of them."""
        if not self.head.weight.is_meta:
            return
        dtype = self.head.weight.dtype
        found = _read_ends(*self._source, tied=self._tied)
        for module, weight in zip((self.decoder.embed_tokens, self.decoder.norm, self.head), found, strict=True):
            if weight.shape != module.weight.shape:
                raise TargetError(
                    f"target.model: {self.identity.model} stores {list(weight.shape)} where its config says "
                    f"{list(module.weight.shape)}; its config belongs to another model"
                )
            module.weight = nn.Parameter(weight.to(self.device, dtype), requires_grad=False)

    def final_norm(self, hidden: Tensor) -> Tensor:
        self._load()
        return super().final_norm(hidden)

    def head_rows(self, ids: Tensor) -> Tensor:
        self._load()
        return super().head_rows(ids)

    def embedding_rows(self) -> Tensor:
        self._load()
        return super().embedding_rows()


# Where checkpoints keep them, under whatever prefix a multimodal wrapper adds.
ENDS = (r"(.+\.)?embed_tokens\.weight", r"(?!.*\.layers\.)(.+\.)?norm\.weight", r"(.+\.)?lm_head\.weight")


def _read_ends(path: str, revision: str | None, tied: bool) -> list[Tensor]:
    """Embedding, final norm and head, from the few files that hold them."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from safetensors import SafetensorError, safe_open

    def local(name: str) -> Path:
        if Path(path).is_dir():
            return Path(path, name)
        return Path(hf_hub_download(path, name, revision=revision))

    try:
        try:
            index = json.loads(local("model.safetensors.index.json").read_text())["weight_map"]
        except (FileNotFoundError, HfHubHTTPError, LocalEntryNotFoundError):
            with safe_open(local("model.safetensors"), "pt") as file:
                index = dict.fromkeys(file.keys(), "model.safetensors")
        tensors = []
        for pattern in ENDS[:2] if tied else ENDS:
            names = [name for name in index if re.fullmatch(pattern, name)]
            if len(names) != 1:
                what = f"{len(names)} tensors ({', '.join(names)})" if names else "no tensor"
                raise TargetError(f"target.model: {path} has {what} named like {pattern}")
            with safe_open(local(index[names[0]]), "pt") as file:
                tensors.append(file.get_tensor(names[0]))
    except (OSError, SafetensorError) as error:
        raise TargetError(f"target.model: cannot read the weights of {path}: {first_line(error)}") from None
    return [*tensors, tensors[0]] if tied else tensors
