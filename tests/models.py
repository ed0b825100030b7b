"""Tiny random targets of several architectures, and drafts for them."""

import functools
import json

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from draftsmith.core.recipe import Recipe, TargetRecipe, TrainRecipe
from draftsmith.core.recipe_file import parse_recipe
from draftsmith.core.records.data import Completion, Prompt
from draftsmith.core.sources import Source
from draftsmith.data.prompts import Tally, chosen, prompts_of
from draftsmith.decoding.sampling import Sampling
from draftsmith.drafts.eagle3.config import Eagle3Config
from draftsmith.drafts.eagle3.model import Eagle3Draft
from draftsmith.drafts.eagle3.ttt import TTTLoss
from draftsmith.drafts.objectives import pack_inputs
from draftsmith.drafts.packing import make_pack
from draftsmith.targets.local import LocalTarget

VOCAB = 64
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=0,
    pad_token_id=0,
    tie_word_embeddings=False,
    initializer_range=0.5,  # sharp distributions: drafts and ties behave as in real models
)
BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON)),
    # a window far shorter than the sequences, on every second layer
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **COMMON, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 3, query_pre_attn_scalar=8
        )
    ),
    "minimax_m2": lambda: MiniMaxM2ForCausalLM(
        MiniMaxM2Config(**COMMON, num_local_experts=4, num_experts_per_tok=2, rotary_dim=4)
    ),
}


def tiny_lm(architecture: str = "llama", seed: int = 0):
    torch.manual_seed(seed)
    return BUILDERS[architecture]().eval()


def tiny_target(architecture: str = "llama", seed: int = 0, **options) -> LocalTarget:
    return LocalTarget.from_model(tiny_lm(architecture, seed), **options)


def local_target(model, batch_size: int = 64, **settings) -> LocalTarget:
    """The model of a directory, in fp32."""
    return LocalTarget(TargetRecipe(model=str(model), dtype="fp32", **settings), "cpu", batch_size)


def tiny_draft(target: LocalTarget, draft_vocab: int = 40, seed: int = 0, **options):
    """(draft, ids of its rows) with random weights; its guesses are sometimes right."""
    generator = torch.Generator().manual_seed(seed)
    shape = {"intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, **options}
    config = Eagle3Config(
        hidden_size=target.identity.hidden_size,
        vocab_size=target.identity.vocab_size,
        draft_vocab_size=draft_vocab,
        taps=(1, 3, 4),
        rope_theta=10000.0,
        max_position_embeddings=4096,
        **shape,
    )
    ids = torch.randperm(target.identity.vocab_size, generator=generator)[:draft_vocab].sort().values
    draft = Eagle3Draft(config)
    draft.initialise(target.head_rows(ids), target.norm_gain(), generator)
    return draft.eval(), ids


@functools.cache
def trained_draft(architecture: str = "llama", steps: int = 60, **options):
    """(target, draft, ids): a draft that learned enough of its tiny target to be right now and then."""
    target = tiny_target(architecture)
    draft, ids = tiny_draft(target, **options)
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(1, VOCAB, (8,), generator=generator).tolist() for _ in range(24)]
    completions = []
    for index, generation in target.generate(prompts, Sampling(), 48):
        span = (8, 8 + len(generation.ids))
        completions.append(Completion(id=str(index), ids=prompts[index] + generation.ids, spans=[span]))
    pack = make_pack(completions)
    states = target.capture(pack.documents, draft.config.taps)
    inputs = pack_inputs(
        pack,
        states.taps_TKH.clone(),
        states.last_TH.clone(),
        target.embedding_rows(),
        target.head_rows(ids),
        None,
        None,
        torch.float32,
    )
    loss_module = TTTLoss(draft, TrainRecipe(ttt_steps=3))
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    for _ in range(steps):
        loss, _ = loss_module(inputs, [1e-3] * 3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return target, draft.requires_grad_(False), ids


WORDS = [
    "the",
    "a",
    "of",
    "to",
    "in",
    "is",
    "it",
    "you",
    "that",
    "he",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
    "his",
    "they",
    "be",
    "at",
    "one",
    "have",
    "this",
    "from",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 64 tokens, whose end-of-turn token is also the end token of the tiny models."""
    words = ["<end>", "<s>", "<unk>", "<user>", "<assistant>", "<system>", *WORDS]
    words += [f"w{i}" for i in range(VOCAB - len(words))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<end>",
        unk_token="<unk>",
        chat_template=chat_template,
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
    )


def save_tiny_target(directory, architecture: str = "llama", **tokenizer_options) -> str:
    """A tiny target on disk, as a hub download would be."""
    tiny_lm(architecture).save_pretrained(directory)
    tiny_tokenizer(**tokenizer_options).save_pretrained(directory)
    return str(directory)


def tiny_recipe(model: str, prompts: str, **changes) -> Recipe:
    """Every stage in seconds; changes as {"train.epochs": 2, ...}."""
    values = {
        "name": "tiny",
        "device": "cpu",
        "target": {"model": model, "dtype": "fp32"},
        "prompts": {"sources": [{"name": prompts}], "held_out": 2},
        "regenerate": {"temperature": 1.0, "max_new_tokens": 24, "batch_size": 4, "shard_prompts": 6},
        "vocab": {"size": 40},
        "draft": {"taps": [1, 3, 4], "intermediate_size": 40},
        "train": {
            "epochs": 2,
            "pack_tokens": 96,
            "max_document_tokens": 64,
            "ttt_steps": 3,
            "learning_rate": 3e-3,
            "held_out": 4,
            "log_every": 2,
            "evaluate_every": 4,
            "checkpoint_every": 3,
            "dtype": "fp32",
        },
        "evaluate": {
            "max_new_tokens": 12,
            "speed_prompts": 2,
            "lossless_prompts": 2,
            "lossless_tokens": 12,
            "shapes": ["3/1/4", "3/4/8"],
        },
    }
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return parse_recipe(values, "test")


def write_prompts(path, count: int = 20) -> str:
    """Prompts of three categories in the tokenizer's words."""
    import random

    chooser = random.Random(5)
    with path.open("w") as file:
        for i in range(count):
            text = " ".join(chooser.choice(WORDS) for _ in range(4 + i % 5)) + f" w{i % 30}"
            category = ("chat", "code", "math")[i % 3]
            file.write(json.dumps({"id": f"p{i}", "category": category, "prompt": text}) + "\n")
    return str(path)


def read_source(source: Source, max_turns: int, skip_bad: bool, seed: int) -> tuple[list[Prompt], int]:
    """(prompts of one source, number of bad rows skipped)."""
    tally = Tally()
    return chosen(prompts_of(source, max_turns, skip_bad, seed, tally), source, seed), tally.bad
