"""The recipe: everything a run depends on, as frozen pydantic models. Imports no torch.

A YAML file gives the values, command-line flags of the same names override them, and nothing else exists.
The string under each field is its help text.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from draftsmith.core import secrets
from draftsmith.core.recipe_model import Beta, Count, Model, Positive, Share, path_part
from draftsmith.core.shape import DraftSampling, Shape
from draftsmith.core.sources import EvaluationSet, Source

ServerUrl = Annotated[str, AfterValidator(secrets.server_url)]
CommandLine = Annotated[str, AfterValidator(secrets.command_line)]

EngineName = Literal["vllm", "sglang"]
DecoderName = Literal["auto", "embedded", "vllm", "sglang"]


class Template(Model):
    """How a conversation becomes tokens where the tokenizer has no chat template of its own."""

    prefix: str = ""
    """Text before the first turn (the tokenizer adds its own beginning-of-sequence token)."""
    user: str = "User: {content}\n"
    """One user turn; must contain {content}."""
    assistant: str = "Assistant:"
    """What stands before every assistant turn."""
    close: str = "\n\n"
    """What stands after an assistant turn that is followed by another user turn."""
    stop: tuple[str, ...] = ("\nUser:",)
    """Texts that end a completion; they are cut off."""

    @model_validator(mode="after")
    def _has_content(self) -> "Template":
        if "{content}" not in self.user:
            raise ValueError(f"target.template.user: {self.user!r} does not contain {{content}}")
        return self


class TargetRecipe(Model):
    """The model to speed up."""

    engine: Literal["transformers", "vllm", "sglang"] = "transformers"
    """What runs the target: transformers in this process (its engine is called embedded below, draftsmith in tables),
    or vLLM or SGLang servers (see `server`)."""
    model: str
    """Directory, hub name, or a bundled target: `smollm2-135m-instruct` or `gemma3-270m`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Number format that the target is served in; hidden states are captured in the same."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""
    template: Template | None = None
    """Prompt format; leave out to use the tokenizer's own chat template."""
    template_options: dict[str, bool | int | float | str] = {}
    """Options of the tokenizer's chat template, as it will be served: enable_thinking, reasoning_effort, a date ..."""

    @model_validator(mode="after")
    def _one_template(self) -> "TargetRecipe":
        if self.template is not None and self.template_options:
            raise ValueError(
                "target.template_options: given beside target.template, which takes none; leave one of them out"
            )
        return self


class ServerRecipe(Model):
    """Where the servers are and how patiently they are asked; changes nothing about what they answer."""

    urls: tuple[ServerUrl, ...] = ()
    """One URL per replica, such as http://127.0.0.1:8000."""
    last_urls: tuple[ServerUrl, ...] = ()
    """SGLang only, for training: servers that return the last hidden state, beside `urls`, which return the taps."""
    concurrency: Positive = 32
    """Requests in flight per replica."""
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest wait for one answer."""
    attempts: Positive = 12
    """Times a request, or a server that went away, is asked before the run stops."""
    backoff_s: Annotated[float, Field(gt=0)] = 1.0
    """First pause after a failure; it doubles up to a minute."""
    packs_ahead: Positive = 4
    """Packs whose hidden states are fetched before training needs them; this bounds memory and disk."""
    hidden_states: Path | None = None
    """Folder in which this machine sees the files that capturing servers write; left out: the servers' own path."""
    api_key_env: Annotated[str, AfterValidator(secrets.variable)] = "DRAFTSMITH_API_KEY"
    """Environment variable that holds the servers' key, if they want one; `Basic ...` in it goes to them as it is."""
    ca_file: Path | None = None
    """PEM file of the authority that signed the servers' certificates, where they are https and it is your own."""


class PromptsRecipe(Model):
    """Prompts to train on, and the ones to keep for evaluation."""

    sources: tuple[Source, ...] = (Source(name="bundled"),)
    """Where training prompts come from: a bundled set, one of the hub, a file or a folder of files; a table's columns
    are named as in '{name: mine.csv, columns: {prompt: question_text, category: topic}, limit: 1000}'."""
    evaluation: tuple[Source, ...] = ()
    """Where evaluation prompts come from; empty: `held_out` of each category are split off the sources."""
    held_out: Positive = 8
    """Prompts per category split off when `evaluation` is empty."""
    max_turns: Positive = 1
    """User turns kept of a conversation. A turn that a draft cannot learn from (an image, a tool's answer) ends it
    earlier; what is left out is counted by reason."""
    skip_bad: bool = False
    """Count malformed rows and go on instead of stopping at the first."""


class RegenerateRecipe(Model):
    """On-policy completions, written by the target itself."""

    engine: DecoderName = "auto"
    """What answers where the target runs in this process: this process (embedded), or servers that are started for it
    as `serve` says, one on every `serve.tensor_parallel` GPUs; auto: vLLM where there are GPUs and it is installed."""
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus filter; 1.0 switches it off."""
    top_k: Count = 0
    """Keep the k most probable tokens; 0 switches it off."""
    greedy_share: Share = 0.0
    """Share of prompts answered greedily instead, chosen by their names (drafts are served at temperature 0, too)."""
    max_new_tokens: Positive = 512
    """Longest completion."""
    max_prompt_tokens: Positive = 1024
    """Prompts longer than this are dropped and counted."""
    max_tokens: Positive | None = None
    """Begin no further completion once this many tokens are written; what is being written is finished, so a run ends
    within one batch of it."""
    stop_loops: bool = False
    """End a completion that repeats itself (small base models do); the repetition seen so far is kept."""
    batch_size: Positive = 64
    """Completions decoded together in this process, at most those of one file; server.urls take server.concurrency."""
    shard_prompts: Positive = 256
    """Prompts per file; an interrupted run loses at most the file in flight."""


class VocabRecipe(Model):
    """The draft vocabulary: the target's most frequent loss tokens."""

    size: Positive = 32000
    """Number of tokens; equal to the target's vocabulary for a full head."""


class Eagle3Recipe(Model):
    """Shape of an EAGLE-3 draft; what is left out follows the target, or a dense draft's usual shape where the target
    has none (experts, latent attention, values per layer): training prints which."""

    method: Literal["eagle3"] = "eagle3"
    """How it drafts."""
    taps: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    """Layers whose input is fused, ascending; left out: [2, L//2, L-3]."""
    intermediate_size: Positive | None = None
    """Width of the SwiGLU; left out: the target's."""
    num_attention_heads: Positive | None = None
    """Query heads; left out: the target's."""
    num_key_value_heads: Positive | None = None
    """Key and value heads; left out: the target's."""
    head_dim: Annotated[int, Field(gt=0, multiple_of=2)] | None = None
    """Width of a head, even as RoPE turns pairs; left out: the target's."""
    rope_theta: Annotated[float, Field(gt=0.0)] | None = None
    """RoPE base; left out: the target's (its full-attention layers')."""
    fc_norm: bool = True
    """EAGLE-3.1: one RMSNorm per tap before fc. Engines from before EAGLE-3.1 pass over it without a word and draft
    badly: false for those."""
    norm_before_fc: bool = False
    """EAGLE-3.1: one RMSNorm over the concatenated taps before fc, instead of fc_norm."""

    @model_validator(mode="after")
    def _ascending(self) -> "Eagle3Recipe":
        if self.taps is not None and list(self.taps) != sorted(set(self.taps)):
            raise ValueError(f"draft.taps: {list(self.taps)} must be ascending and distinct (vLLM sorts them)")
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("draft.norm_before_fc and draft.fc_norm: choose one (draft.fc_norm is true if left out)")
        return self


DraftRecipe = Eagle3Recipe
# A second method makes it Annotated[Eagle3Recipe | OtherRecipe, Field(discriminator="method")].


class TrainRecipe(Model):
    """Training-time test (EAGLE-3) on packed documents."""

    from_draft: Annotated[Path | None, Field(json_schema_extra={"flag": "--from"})] = None
    """Directory of a draft of the same target, ours or others', to go on from instead of starting anew; with its shape,
    taps and vocabulary."""
    epochs: Positive = 1
    """Passes over the completions."""
    max_steps: Positive | None = None
    """Stop after this many optimiser steps; left out: all epochs."""
    on_prompts: bool = False
    """The loss falls on prompts, too, but for what all of them begin with: more to learn from a text that is trained on
    several times."""
    pack_tokens: Positive = 2048
    """Tokens per forward; documents are packed into it."""
    max_document_tokens: Positive = 2048
    """Longer conversations are cut."""
    accumulate: Positive = 1
    """Packs per optimiser step, dealt out to all processes."""
    shard: bool = False
    """Several processes and AdamW only: keep weights and optimiser in parts on them (FSDP2) instead of a copy on
    each."""
    timeout_min: Annotated[float, Field(gt=0, le=10080)] = 15.0
    """Several processes only: how long they wait for one another, in minutes, before a training ends that one of them
    hangs in. The first one evaluates and saves meanwhile, so it is to be longer than that takes."""
    ttt_steps: Positive = 7
    """Depth of the training-time test."""
    step_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Step i weighs step_decay ** i."""
    objective: Literal["soft_ce", "lk_alpha", "lk_lambda"] = "soft_ce"
    """soft_ce: cross-entropy to the target's distribution; lk_alpha, lk_lambda: the acceptance of sampled drafts,
    alone or mixed with KL (arXiv 2602.23881), at the cost of a product with every head row, and of one more with the
    draft's for lk_lambda."""
    lk_eta: Annotated[float, Field(gt=0.0)] = 3.0
    """lk_lambda only: how fast the weight moves from KL to acceptance as the mean acceptance of a depth rises."""
    true_probabilities: bool = False
    """soft_ce only, as lk_* always does: compare with the target's full distribution instead of the one renormalised
    over the draft vocabulary; costs a product with every head row."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the matrices of the layer and fc, AdamW for the head and the norms."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    """Peak of the schedule."""
    head_rate: Annotated[float, Field(gt=0.0)] = 1.0
    """Learning rate of what AdamW trains beside Muon (head and norms), as a multiple of learning_rate."""
    warmup_share: Share = 0.02
    """Share of steps spent warming up."""
    final_share: Share = 0.0
    """The cosine ends at this share of the peak."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's decoupled decay."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's moments."""
    clip_norm: Annotated[float, Field(gt=0.0)] = 0.5
    """Gradient norm is clipped to this."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute format; master weights are always fp32."""
    capture: Literal["online", "offline"] = "online"
    """online: hidden states never touch the disk; offline: written once, read every epoch."""
    held_out: Positive = 24
    """Completions kept from training for its own evaluation (`prompts.held_out` are those that `evaluate` asks)."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Positive = 100
    """Steps between evaluations on held-out completions."""
    checkpoint_every: Positive = 200
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept on disk."""
    track: Literal["wandb", "trackio", "tensorboard"] | None = None
    """Send the rows of metrics.jsonl there, too (pip install "draftsmith[wandb]" and so on). Without a network:
    WANDB_MODE=offline, then `wandb sync`; trackio keeps its rows on this machine, tensorboard in train/tracking."""
    patience: Positive = 4
    """Converged where tau - 1 rose by less than 1 % over the second half of the steps; told after more evaluations than
    this."""

    @property
    def full_teacher(self) -> bool:
        """Whether the target's probabilities are taken over all its tokens."""
        return self.true_probabilities or self.objective != "soft_ce"


# Keys of `train` that only say what is watched and kept, and where: changing them continues a training. What is in
# `from_draft` decides by itself.
BOOKKEEPING = {
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "patience",
    "track",
    "shard",
    "timeout_min",
    "from_draft",
}


# Keys of `serve` that change what a started server measures.
MEASURED_WITH = {"draft_sampling", "extra", "tensor_parallel", "context", "draft_quantization", "peer_to_peer", "pcie"}
DEFAULT_SHAPE = Shape.chain(3)


class EvaluateRecipe(Model):
    """What is measured on the exported draft."""

    engine: DecoderName = "auto"
    """What decodes: the embedded engine, or a real one; auto: where the target runs in this process vLLM on GPUs that
    have it, else embedded."""
    url: ServerUrl | None = None
    """Server that runs the target with the draft, in `target.dtype`, as no server tells its own; left out: one is
    started as `serve` says."""
    plain_url: ServerUrl | None = None
    """Server of the target alone, for speed and losslessness; left out: one is started, unless `url` is given."""
    batches: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1,)
    """Requests in flight while a real engine's speed is measured."""
    shapes: Annotated[tuple[Shape, ...], Field(min_length=1)] = (
        DEFAULT_SHAPE,
        Shape(3, 4, 8),
    )
    """Drafting shapes to measure: steps/topk/draft_tokens; top-k 1 is a chain. With `url` the one of that server."""
    temperatures: Annotated[tuple[Annotated[float, Field(ge=0.0)], ...], Field(min_length=1)] = (0.0, 1.0)
    """0.0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus filter at temperatures above 0."""
    top_k: Count = 0
    """Keep the k most probable tokens at temperatures above 0."""
    prompts: Positive | None = None
    """Evaluation prompts used, an equal number per category; left out: all."""
    max_new_tokens: Positive = 128
    """Longest completion."""
    speed_prompts: Positive = 6
    """Prompts on which plain and speculative decoding alternate (servers: one after the other)."""
    lossless_prompts: Positive = 50
    """Prompts on which greedy output must equal plain decoding, in fp32 (servers: as they serve)."""
    lossless_tokens: Positive = 128
    """Tokens compared per prompt."""
    sets: tuple[EvaluationSet, ...] = ()
    """Sets that people quote, measured beside the run's own prompts: mt-bench, humaneval, gsm8k, math500, alpaca (80
    prompts), spec-bench from the hub or {name, path}; speed-bench and sets of your own by path."""

    @model_validator(mode="after")
    def _sets_once(self) -> "EvaluateRecipe":
        names = [chosen.name for chosen in self.sets]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"evaluate.sets: {twice} is given twice; give one of them another name and a path")
        return self


class ServeRecipe(Model):
    """How `draftsmith serve` starts an engine."""

    engine: EngineName = "vllm"
    """The engine to start."""
    program: CommandLine = ""
    """How it is started, such as "/opt/engine/bin/vllm serve"; left out: `vllm serve` or this Python's sglang."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the server to the network."""
    port: Annotated[int, Field(gt=0, lt=65536)] = 8000
    """Port to listen on."""
    shape: Shape = DEFAULT_SHAPE
    """What is drafted at every step; vLLM drafts chains (topk 1) only."""
    draft_sampling: DraftSampling | Literal["auto"] = "auto"
    """How drafts are taken at temperatures above 0: greedy proposes the draft's first choices, sampled draws from its
    distribution; auto: `evaluate` measures chains both ways and what is accepted more is served, where the engine
    can."""
    tuned: bool = True
    """Where `tune` has run and `shape` is the default: serve the shape that it measured to be the fastest."""
    tensor_parallel: Positive = 1
    """GPUs that share the target."""
    context: Positive | None = None
    """Longest conversation in tokens; left out: the engine's choice."""
    draft_quantization: Literal["inherit", "none"] = "none"
    """SGLang only: `inherit` quantises the draft like its target; vLLM never does."""
    peer_to_peer: bool = True
    """Let GPUs talk directly; switch off where PCIe peer access is broken or hangs."""
    pcie: bool = False
    """The GPUs are joined by PCIe alone: SGLang's own all-reduce for that."""
    states: Path = Path("/dev/shm/draftsmith-states")
    """Folder for the hidden states of `--purpose capture`; memory or a fast disk."""
    patience_s: Annotated[float, Field(gt=0)] = 1800.0
    """Longest wait until the engine is healthy."""
    extra: CommandLine = ""
    """More flags for the engine, passed on as they are; on the command line write --serve.extra="--flag value". A key
    or token is written as $NAME, an environment variable that holds it: --serve.extra='--api-key $NAME'."""


class CardRecipe(Model):
    """The model card; everything else on it comes from the run."""

    repo: str | None = None
    """Where the draft is to live, as owner/name; stands in the card's commands and is where `publish` uploads."""
    base_model: str | None = None
    """The target's name on the hub; needed where target.model is a directory."""
    licence: str | None = None
    """Licence of the draft, as Hugging Face writes it (apache-2.0, mit, gemma, other ...); needed where the target's
    is not known, and then your own decision."""
    data_licences: dict[str, str] = {}
    """Licences of prompt sources that draftsmith does not know, by the source's name."""
    author: str = ""
    """Who stands behind the draft."""


class Recipe(Model):
    """One run, from prompts to a proven draft."""

    name: Annotated[str, AfterValidator(path_part)]
    """Name of the run directory under `runs/`."""
    seed: int = 0
    """Every random choice follows from it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    target: TargetRecipe
    server: ServerRecipe = ServerRecipe()
    prompts: PromptsRecipe = PromptsRecipe()
    regenerate: RegenerateRecipe = RegenerateRecipe()
    vocab: VocabRecipe = VocabRecipe()
    draft: DraftRecipe = DraftRecipe()
    train: TrainRecipe = TrainRecipe()
    evaluate: EvaluateRecipe = EvaluateRecipe()
    serve: ServeRecipe = ServeRecipe()
    card: CardRecipe = CardRecipe()

    @model_validator(mode="after")
    def _servers_are_asked(self) -> "Recipe":
        if self.target.engine == "transformers" and (self.server.urls or self.server.last_urls):
            raise ValueError(
                "server.urls: given, but target.engine transformers runs the target in this process and asks nobody; "
                "give target.engine vllm or sglang, or leave them out"
            )
        return self

    @model_validator(mode="after")
    def _can_be_kept(self) -> "Recipe":
        """A run keeps its recipe in files, so nothing that is secret may be part of one, no NUL, half of a surrogate
        pair, NaN or infinity, and no number beyond 64 bits."""
        for key, value in _leaves(self.model_dump()):
            text = str(value)
            kept = "\0" not in text and text.encode(errors="replace").decode() == text
            if isinstance(value, int | float):
                kept = math.isfinite(value) and abs(value) < 2**63
            if not kept:
                raise ValueError(f"{key}: {value!r} given; wanted a text without NUL, or a number of 64 bits")
            try:
                secrets.no_password(text)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        return self


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything inside."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield path, key
            yield from _leaves(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, path)
    else:
        yield path, value
