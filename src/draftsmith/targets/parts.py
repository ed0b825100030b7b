"""Both ends of a target: tokenizer, embedding, final norm and head; all that a trainer needs beside hidden states."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.core.errors import TargetError, out_of_memory
from draftsmith.core.files import JsonObject
from draftsmith.core.progress import say
from draftsmith.core.records.run import TargetIdentity
from draftsmith.targets import embedded
from draftsmith.targets.configs import read_config, value_of
from draftsmith.targets.identity import template_hash, tokenizer_hash

LONGEST_JSON = 1 << 28  # bytes; the largest vocabularies have a tenth of it
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def resolve_model(model: str) -> str:
    """Path or hub name to load; an embedded target is converted on first use.

    Of a directory nothing is read that has no end: a `TargetError` names pipes, devices and endless configurations.
    """
    if model in embedded.EMBEDDED:
        return str(embedded.materialise(model))
    for path in (*Path(model).glob("*"), *Path(model).glob("additional_chat_templates/*")):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise TargetError(f"target.model: {path} is no plain file")
        if path.suffix == ".json" and path.exists() and path.stat().st_size > LONGEST_JSON:
            raise TargetError(f"target.model: {path} has {path.stat().st_size:,} bytes; no model's is that long")
    return model


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise TargetError(f"device: {device} asked for, but torch {torch.__version__} sees no GPU; use auto or cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise TargetError(f"device: {device!r} given; allowed are auto, cpu, cuda and cuda:N") from None


def card_room(device: torch.device) -> tuple[int, int] | None:
    """(free, all) bytes of a card, once what is kept for reuse is given back; None where the device is no card."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)


def tell_slow_products(device: torch.device, dtype: str) -> None:
    """Many CPUs widen bf16 number by number: ten times slower than fp32, and nothing else would say why."""
    capabilities: JsonObject = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    if device.type == "cpu" and dtype == "bf16" and capabilities.get("architecture") == "x86_64" and not native:
        say(
            "target.dtype: this CPU has no bf16 products, so they take about ten times as long as fp32 ones; give "
            "--target.dtype fp32 --train.dtype fp32"
        )


UNUSUAL = "Wörter, 言葉 and \u2603 7"


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    path = resolve_model(model)
    with on_guard(f"no tokenizer in {model!r}"):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    with on_guard(f"the tokenizer of {model!r} cannot read text"):  # some are found out by what they do not know only
        tokenizer.decode(tokenizer(UNUSUAL).input_ids)
    if model in embedded.EMBEDDED:
        embedded.check_tokenizer(model, tokenizer)
    return tokenizer


def first_line(error: BaseException) -> str:
    """Of its text, with the next where the first only announces it; Python's own errors have their name before it."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    told = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
    bare = isinstance(error, TypeError | LookupError | AttributeError | ArithmeticError)
    return f"{type(error).__name__}: {told}" if bare else told


@contextlib.contextmanager
def on_guard(what: str) -> Iterator[None]:
    """A model's own code, the libraries that read it, and files that are not as they expect raise what they like: all
    of it is a `TargetError` of one line, but for a machine that is too small."""
    try:
        yield
    except TargetError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise TargetError(f"target.model: {what}: {first_line(error)}") from None


def complaint_of(attempt: Callable[[], object]) -> str | None:
    """The line that an attempt fails with, whatever it raises; None where it works. Raises on a machine too small."""
    try:
        attempt()
    except Exception as error:
        if out_of_memory(error):
            raise
        return first_line(error)
    return None


def from_auto_class(make: Callable[[Any], Any]) -> Any:
    """`make(auto class)` of the first class that knows the model: wrappers of a vision tower and a decoder have their
    own. Raises what the first one raised where none does."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        return make(AutoModelForCausalLM)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        unknown = error
    try:
        return make(AutoModelForImageTextToText)
    except ValueError as error:
        raise (unknown if "Unrecognized configuration class" in str(error) else error) from None


def empty_model(config: Any, dtype: str, trust_remote_code: bool) -> Any:
    """Its class without its numbers."""
    with torch.device("meta"):
        return from_auto_class(
            lambda auto: auto.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
        )


def check_amount(place: str, revision: str | None, trust_remote_code: bool) -> None:
    """Before memory is asked for: a config that wants more numbers than its files can hold belongs to another model."""
    config = read_config(place, revision, trust_remote_code)
    if not Path(place).is_dir():
        return
    lm = empty_model(config, "fp32", trust_remote_code)
    asked = sum(tensor.numel() for tensor in (*lm.parameters(), *lm.buffers()))
    held = sum(path.stat().st_size for path in Path(place).glob("*.safetensors"))
    if asked > NUMBERS_PER_BYTE * held + UNSTORED:
        raise TargetError(
            f"target.model: config.json of {place!r} asks for {asked:,} numbers, but its .safetensors files have "
            f"{held:,} bytes; it belongs to another model"
        )


NUMBERS_PER_BYTE, UNSTORED = 8, 1 << 27  # of the tightest quantisation; masks and tables that no file has
UNBOUNDED = 1 << 30  # positions of a model that counts none (Mamba, ALiBi)
# What configs call the positions that a model was made for, and classes the last norm
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_seq_length")
NORMS = ("norm", "final_layernorm", "embedding_norm", "norm_f", "final_layer_norm", "ln_f", "final_norm")


def find_decoder(lm: Any) -> tuple[nn.Module, nn.Module, nn.Module, nn.ModuleList]:
    """(decoder, its input embedding, its final norm, its layers), inside whatever wraps it; raises `TargetError`."""
    embedding = lm.get_input_embeddings()
    for module in lm.modules():
        if embedding is None or not any(embedding is child for child in module.children()):
            continue
        norm = next((getattr(module, name) for name in NORMS if hasattr(module, name)), None)
        stacks = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        if norm is not None and stacks and lm.get_output_embeddings() is not None:
            return module, embedding, norm, max(stacks, key=len)
    raise TargetError(
        f"target.model: {type(lm).__name__} has no decoder with layers, an input embedding, a final norm and a head, "
        "which is where a draft reads"
    )


def end_ids(tokenizer: Any, *configs: Any) -> frozenset[int]:
    """Everything that engines stop at: the end tokens of the tokenizer, generation_config.json and config.json."""
    found: set[int] = set()
    for holder in (tokenizer, *configs):
        named = getattr(holder, "eos_token_id", None)
        found |= {named} if isinstance(named, int) else set(named or ())
    return frozenset(found)


def rope_of(config: Any) -> JsonObject:
    """The parameters of RoPE, those of full attention where layers differ."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope) if isinstance(rope, dict) else rope
    numbers = ("factor", "rope_theta", "original_max_position_embeddings")
    if not isinstance(rope, dict) or not all(isinstance(rope.get(key) or 0, int | float) for key in numbers):
        raise TargetError(f"target.model: rope_parameters of its config.json are {rope!r}; wanted numbers by name")
    return rope


def context_of(config: Any) -> int:
    """Positions that a text may have, as engines derive it; stretched RoPE reaches further."""
    length = next((n for name in LENGTHS if (n := value_of(config, name))), UNBOUNDED)
    rope = rope_of(config)
    kind, factor = rope.get("rope_type"), float(rope.get("factor") or 1.0)
    if kind in ("linear", "dynamic"):
        return int(length * factor)
    if kind == "yarn" and (original := rope.get("original_max_position_embeddings")):
        return max(length, int(original * factor))
    return length


def logit_scale(config: Any) -> float:
    """What a model multiplies its logits with: Cohere's logit_scale, Falcon-H1's multiplier, Granite's divisor."""
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    return float(scale) / float(getattr(config, "logits_scaling", None) or 1.0)


class ModelParts:
    """What the whole model in this process and a model that runs elsewhere have in common."""

    device: torch.device
    tokenizer: Any
    weights_hash: str | None = None
    """Of the files that the whole model was loaded from."""

    def _adopt(
        self, lm: Any, name: str, revision: str | None, dtype: str, template_options: Mapping[str, Any] | None = None
    ) -> None:
        self.lm = lm.eval().requires_grad_(False)
        self.decoder, self.embedding, self.norm, self.layers = find_decoder(lm)
        self.config = lm.config.get_text_config()
        self.head = lm.get_output_embeddings()
        if getattr(self.head, "bias", None) is not None and (self.head.bias.is_meta or bool(self.head.bias.any())):
            raise TargetError(
                f"target.model: the output head of {type(lm).__name__} has a bias, which neither drafts nor their "
                "teacher have; no draft can be made for it"
            )
        self.logit_softcap = getattr(self.config, "final_logit_softcapping", None)
        self.logit_scale = logit_scale(self.config)
        self.eos_ids = end_ids(self.tokenizer, getattr(lm, "generation_config", None), lm.config, self.config)
        quantization = getattr(lm.config, "quantization_config", None) or {}
        if not isinstance(quantization, dict):
            quantization = quantization.to_dict()
        self.identity = TargetIdentity(
            model=name,
            revision=revision,
            dtype=dtype,
            architecture=type(lm).__name__,
            num_layers=len(self.layers),
            hidden_size=self.config.hidden_size,
            vocab_size=self.head.weight.shape[0],
            max_position_embeddings=context_of(self.config),
            tokenizer_hash=tokenizer_hash(self.tokenizer) if self.tokenizer else "none",
            template_hash=template_hash(self.tokenizer, template_options),
            quantization=quantization.get("quant_method"),
        )

    def _load(self) -> None:
        """Read what is not here yet of embedding, norm and head."""

    @torch.inference_mode()
    def final_norm(self, hidden: Tensor) -> Tensor:
        """The head's own input [..., H] from the last layer's output; a scale of the logits is part of it."""
        self._load()
        return self._scaled(self.norm(hidden))

    def _scaled(self, last: Tensor) -> Tensor:
        return last if self.logit_scale == 1.0 else last * self.logit_scale

    def norm_gain(self) -> Tensor:
        """Gain [H] of the final norm as a plain RMSNorm has it: what it makes of a vector of length sqrt(H).

        So a norm stored as 1 + w (Gemma), a LayerNorm (signs in turn have mean 0) and a scale of the logits need no
        special case.
        """
        signs = torch.ones(self.identity.hidden_size, dtype=self.head.weight.dtype, device=self.device)
        signs[1::2] = -1
        gain = self.final_norm(signs) * signs
        if not bool(gain.any()) or not bool(gain.isfinite().all()):
            raise TargetError(f"target.model: the final norm of {self.identity.architecture} gives no numbers")
        return gain

    def logits(self, hidden: Tensor) -> Tensor:
        """The target's own head over its own last hidden state."""
        logits = self.head(hidden)
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits

    @torch.inference_mode()
    def logprobs_of(self, document: list[int], last_TH: Tensor) -> list[float]:
        """Log-probability of every token after the first, from the head's input at those before the last."""
        self._load()
        wanted = torch.tensor(document[1:], device=self.device)
        scores = [
            self.logits(hidden).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
            for hidden, ids in zip(last_TH.split(64), wanted.split(64), strict=True)
        ]
        return torch.cat(scores).tolist()

    def head_rows(self, ids: Tensor) -> Tensor:
        self._load()
        return self.head.weight[ids.to(self.device)]

    def embedding_rows(self) -> Tensor:
        self._load()
        return self.embedding.weight  # type: ignore[return-value]


class WeightsOnlyTarget(ModelParts):
    """A model whose layers are never loaded: 230 B parameters cost three tensors here."""

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: str = "bf16",
        device: str = "auto",
        trust_remote_code: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ):
        from transformers import GenerationConfig

        self.device = resolve_device(device)
        self.tokenizer = load_tokenizer(model, revision, trust_remote_code)
        path = resolve_model(model)
        with on_guard(f"cannot read {model!r}"):
            lm = empty_model(read_config(path, revision, trust_remote_code), dtype, trust_remote_code)
            with contextlib.suppress(OSError):  # a model without one ends by its config
                lm.generation_config = GenerationConfig.from_pretrained(path, revision=revision or "main")
            self._adopt(lm, model, revision, dtype, template_options)
        self._source = path, revision

    def _load(self) -> None:
        """Read the three tensors on first use; regeneration needs none of them."""
        if not self.head.weight.is_meta:
            return
        dtype = self.head.weight.dtype
        names = {id(module): name.split(".")[-1] for name, module in self.lm.named_modules()}
        modules = (self.embedding, self.norm, self.head)
        found = _read_tensors(
            *self._source,
            tied=any(bool(getattr(config, "tie_word_embeddings", False)) for config in (self.lm.config, self.config)),
            leaves=tuple(names[id(module)] for module in modules),
            strays=tuple(getattr(type(self.lm), "_keys_to_ignore_on_load_unexpected", None) or ()),
        )
        for module, weight in zip(modules, found, strict=True):
            if weight.shape != module.weight.shape:
                raise TargetError(
                    f"target.model: {self.identity.model} stores {list(weight.shape)} where its config says "
                    f"{list(module.weight.shape)}; its config belongs to another model"
                )
            module.weight = nn.Parameter(weight.to(self.device, dtype), requires_grad=False)


# Modules beside the decoder that hold embeddings and norms of their own: multi-token prediction, towers, projectors.
BESIDE = re.compile(r"(^|\.)(layers|blocks|mtp\w*|vis\w+|audio\w*|\w*tower|\w*projector|merger|\w*encoder|talker)\.")


def _read_tensors(
    path: str,
    revision: str | None,
    tied: bool,
    leaves: tuple[str, ...] = ("embed_tokens", "norm", "lm_head"),
    strays: tuple[str, ...] = (),
) -> list[Tensor]:
    """Embedding, final norm and head, from the few files that hold them.

    `leaves`: what the model's class calls the three, under whatever prefix; `strays`: patterns of tensors that the
    class itself ignores. A checkpoint without a head has its embedding for it where `tied` allows that.
    """
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
        own = [n for n in index if not BESIDE.search(n) and not any(re.search(s, n) for s in strays)]
        tensors: list[Tensor] = []
        for leaf in leaves:
            names = [name for name in own if re.fullmatch(rf"(.+\.)?{leaf}\.weight", name)]
            if not names and tied and len(tensors) == 2:
                return [*tensors, tensors[0]]
            if len(names) != 1:
                what = f"{len(names)} tensors ({', '.join(names)})" if names else "no tensor"
                raise TargetError(f"target.model: {path} has {what} named {leaf}.weight")
            with safe_open(local(index[names[0]]), "pt") as file:
                tensors.append(file.get_tensor(names[0]))
    except (OSError, SafetensorError) as error:
        raise TargetError(f"target.model: cannot read the weights of {path}: {first_line(error)}") from None
    return tensors
