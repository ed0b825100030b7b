"""What is held on a GPU: on the pretended one by the unit tests, on a real one by tests/gpu."""

import copy
import functools

import torch
from models import VOCAB, tiny_draft, tiny_lm, tiny_recipe, tiny_target

from draftsmith.core.recipe import TrainRecipe
from draftsmith.core.records.base import write_rows
from draftsmith.core.records.data import Completion
from draftsmith.core.shape import Shape
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder
from draftsmith.drafts.eagle3.drafter import Eagle3Drafter
from draftsmith.drafts.eagle3.ttt import TTTLoss
from draftsmith.drafts.objectives import pack_inputs
from draftsmith.drafts.packing import Pack, make_pack
from draftsmith.targets.local import LocalTarget
from draftsmith.training.trainer import Trainer

ARCHITECTURES = ("llama", "gemma3", "qwen3", "minimax_m2")
SHAPES = (Shape(3, 1, 4), Shape(3, 4, 8))
SAMPLINGS = (Sampling(), Sampling(temperature=0.8, top_p=0.9, top_k=20))
PROMPT = list(range(3, 17))
STEPS = 5


@functools.cache
def on_cpu(architecture: str):
    """(target, draft, ids of its rows)"""
    target = tiny_target(architecture)
    return target, *tiny_draft(target)


def target_on(device: torch.device, architecture: str, dtype: torch.dtype = torch.float32) -> LocalTarget:
    lm = tiny_lm(architecture).to(device, dtype)
    if architecture == "minimax_m2":
        lm.set_experts_implementation("eager")  # a pretended GPU has no grouped product
    return LocalTarget.from_model(lm)


def completions(count: int = 8) -> list[Completion]:
    """Conversations of one and of two turns."""
    generator = torch.Generator().manual_seed(2)

    def row(i: int) -> Completion:
        ids = torch.randint(1, VOCAB, (40 + 3 * i,), generator=generator).tolist()
        spans = [(6, len(ids))] if i % 2 else [(5, 18), (24, len(ids))]
        return Completion(id=str(i), ids=ids, spans=spans)

    return [row(i) for i in range(count)]


def a_pack(count: int = 4) -> Pack:
    return make_pack(completions(count))


def step_on(device: torch.device, target: LocalTarget, pack: Pack, dtype: torch.dtype):
    """(loss, gradients) of one pack of random states, from rows of the target; nothing is read from the device."""
    _, draft, ids = on_cpu("llama")
    generator = torch.Generator().manual_seed(7)
    taps = torch.randn(len(pack.ids_T), 3, 32, generator=generator).to(device, dtype, non_blocking=True)
    last = torch.randn(len(pack.ids_T), 32, generator=generator).to(device, dtype, non_blocking=True)
    embedding, head = (x.to(device, dtype, non_blocking=True) for x in (target.embedding_rows(), target.head_rows(ids)))
    draft = copy.deepcopy(draft)
    return gradients_of(draft, pack, taps, last, embedding, head, None, dtype, device)


def gradients_of(draft, pack, taps, last, embedding, head, softcap, dtype, device):
    inputs = pack_inputs(pack, taps, last, embedding, head, None, softcap, dtype)
    draft = draft.to(device, dtype, non_blocking=True).requires_grad_(True)
    loss, _ = TTTLoss(draft, TrainRecipe(ttt_steps=STEPS))(inputs, [0.01] * STEPS)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in draft.named_parameters()}


def loss_and_gradients(target: LocalTarget, architecture: str, dtype: torch.dtype, device: torch.device):
    """(loss, gradients on the CPU) of one pack; the teacher is the target that is given."""
    _, draft, ids = on_cpu(architecture)
    pack = a_pack()
    states = target.capture(pack.documents, draft.config.taps)
    taps, last = states.taps_TKH.clone(), states.last_TH.clone()
    embedding, head, softcap = target.embedding_rows(), target.head_rows(ids), target.logit_softcap
    loss, gradients = gradients_of(copy.deepcopy(draft), pack, taps, last, embedding, head, softcap, dtype, device)
    return loss.item(), {name: gradient.float().cpu() for name, gradient in gradients.items()}


def decoded(target: LocalTarget, architecture: str, device: torch.device, shape: Shape | None, sampling: Sampling):
    _, draft, ids = on_cpu(architecture)
    drafter = Eagle3Drafter(copy.deepcopy(draft).to(device), ids, target.embedding_rows()) if shape else None
    return Decoder(target, drafter).generate(PROMPT, sampling, 4, shape, seed=3)


def trainer_on(target: LocalTarget, out, **changes) -> Trainer:
    write_rows(out / "completions" / "00000.jsonl", completions(12))
    settings = {"train.pack_tokens": 128, "train.accumulate": 2, "train.max_document_tokens": 64, "train.held_out": 2}
    recipe = tiny_recipe(target.identity.model, "p", **settings, **changes)
    vocabulary = DraftVocabulary(torch.arange(0, VOCAB, 2), VOCAB)
    return Trainer(recipe, target, out / "completions", vocabulary, out / "train")
