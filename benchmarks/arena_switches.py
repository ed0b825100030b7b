"""Switches of arena.py that no recipe has: each changes a trainer before it trains. One that gains is to become a key.

Shapes: T tokens, K taps, H hidden.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from draftsmith.drafts.packing import Pack
from draftsmith.targets.base import Capture
from draftsmith.training.capture import CaptureSource
from draftsmith.training.trainer import Trainer

DECAY = 0.9  # of the running mean of weights, a step; a run here has some fifty
NOISE = 0.1  # of a tap's root mean square


def layer_of_target(trainer: Trainer) -> None:
    """The draft's layer is the target's last one, which sees the last tap in the place of its own input; what it adds
    is scaled as that tap is, since the draft's residual starts at the scale of 1."""
    draft, target = trainer.draft, trainer.target
    own, layer, size = draft.midlayer, target.layers[-1], draft.config.hidden_size
    states = target.capture([trainer.rows[0].ids], (target.identity.num_layers - 1,)).taps_TKH[5:]
    scale = states.square().mean().sqrt()  # without the first tokens, whose states are huge
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(own.self_attn, name).weight[:, size:].copy_(getattr(layer.self_attn, name).weight)
        own.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight / scale)
        own.hidden_norm.weight.copy_(layer.input_layernorm.weight)
        own.post_attention_layernorm.weight.copy_(layer.post_attention_layernorm.weight)
        for name in ("gate_proj", "up_proj"):
            getattr(own.mlp, name).weight.copy_(getattr(layer.mlp, name).weight)
        own.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight / scale)
        draft.fc.weight.zero_()[:, -size:].copy_(torch.eye(size))
    unfitted(trainer)


def unfitted(trainer: Trainer) -> None:
    """Nothing is solved for: all but head and norm is random, and the norm's gain gives logits of deviation 1."""
    trainer._fit = lambda capture: None


def frozen_head(trainer: Trainer) -> None:
    """The head stays the target's own rows, as EAGLE has it (arXiv 2401.15077): a product and two moments less."""
    trainer.draft.get_submodule(trainer.draft.head).requires_grad_(False)


def averaged(trainer: Trainer) -> None:
    """Checkpoints hold a running mean of the weights."""
    draft, step, checkpoint = trainer.draft, trainer._optimiser_step, trainer._checkpoint
    means: dict[str, Tensor] = {}

    def stepped(packs: list[Pack], capture: CaptureSource) -> None:
        step(packs, capture)
        for name, weight in draft.state_dict().items():
            means[name] = means[name].lerp_(weight, 1 - DECAY) if name in means else weight.clone()

    def saved() -> None:
        own = {name: weight.clone() for name, weight in draft.state_dict().items()}
        draft.load_state_dict(means)
        checkpoint()
        draft.load_state_dict(own)

    trainer._optimiser_step, trainer._checkpoint = stepped, saved


def noisy(trainer: Trainer) -> None:
    """Normal noise on the taps, as EAGLE has uniform noise on its features (arXiv 2401.15077, section 4)."""
    target, generator = trainer.target, torch.Generator().manual_seed(trainer.recipe.seed)
    capture = target.capture

    def captured(documents: list[list[int]], taps: tuple[int, ...]) -> Capture:
        states = capture(documents, taps)
        deviation = NOISE * states.taps_TKH.square().mean(-1, keepdim=True).sqrt()
        drawn = torch.randn(states.taps_TKH.shape, generator=generator)
        return Capture(states.taps_TKH + deviation * drawn, states.last_TH)

    target.capture = captured


SWITCHES: dict[str, tuple[str, Callable[[Trainer], None]]] = {
    "init-last-layer": ("initialisation by the target's last layer", layer_of_target),
    "init-random": ("a random start instead of the best linear guess", unfitted),
    "head-frozen": ("the head frozen", frozen_head),
    "averaged": (f"weights averaged, decay {DECAY:g} a step", averaged),
    "noise": (f"noise on the taps, {NOISE:g} of their size", noisy),
}
