"""EAGLE-3 (arXiv 2503.01840): one Llama layer over [token embedding, fused target feature].

Draft position t sees the feature of token t and the embedding of token t + 1 and predicts token t + 2. The feature is
`fc` over the concatenated taps where the target has run, and the layer's own pre-norm output where it has not.
Parameter names are those of the checkpoint file. Embeddings are the target's and no part of the draft.

Shapes: ... any leading dimensions, W query tokens, L cached positions, K taps, H hidden, V target vocabulary,
D draft vocabulary. Taps are as wide as the target, which is H unless `target_hidden_size` says otherwise.
"""

from collections.abc import Iterable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.decoding.cache import StaticCache
from draftsmith.drafts.eagle3.config import Eagle3Config
from draftsmith.drafts.layers import Attention, SwiGLU, rope_frequencies, rotate
from draftsmith.drafts.method import Draft, Example
from draftsmith.drafts.objectives import teacher_probabilities

RIDGE = 0.05  # of the mean square of what fc is regressed on
SURE_ROWS = 512  # guesses that are compared with the target's


def sureness(logits_RD: Tensor, wanted_RD: Tensor) -> float:
    """What logits are best multiplied with, 0.01 to 2: where the cross-entropy to the wanted distributions is least,
    they have the same mean under these as under their own."""
    mean = (wanted_RD * logits_RD).sum()
    low, high = 0.01, 2.0
    for _ in range(20):
        middle = (low + high) / 2
        above = bool(((logits_RD * middle).softmax(-1) * logits_RD).sum() > mean)
        low, high = (low, middle) if above else (middle, high)
    return low


class DraftLayer(nn.Module):
    def __init__(self, config: Eagle3Config):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps  # a norm's gain is its weight, not 1 + weight as in Gemma
        self.self_attn = Attention(size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.mlp = SwiGLU(size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(size, eps)  # over the embedding
        self.hidden_norm = nn.RMSNorm(size, eps)  # over the feature
        self.post_attention_layernorm = nn.RMSNorm(size, eps)


class Eagle3Draft(Draft):
    method = "eagle3"
    config: Eagle3Config

    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.config = config
        size, taps, tap_size = config.hidden_size, len(config.taps), config.tap_size
        if config.norm_before_fc:
            self.input_norm = nn.RMSNorm(taps * tap_size, config.rms_norm_eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList([nn.RMSNorm(tap_size, config.rms_norm_eps) for _ in range(taps)])
        self.fc = nn.Linear(taps * tap_size, size, bias=False)
        self.midlayer = DraftLayer(config)
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)

    @torch.no_grad()
    def initialise(self, head_rows_DH: Tensor, norm_gain_H: Tensor, generator: torch.Generator) -> None:
        """Head and final norm from the target's own rows; everything else normal, and the layer's two output
        projections small, so that the draft starts as fc followed by the target's head.

        The norm's gain is scaled so that a feature of random direction gives logits of deviation 1. At the target's
        own scale it gives wildly confident guesses (on Gemma many times the loss of a uniform guess), and training
        begins by unlearning them; a direction that fits a row still reaches sqrt(H) times as far.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = parameter.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        self.lm_head.weight.copy_(head_rows_DH)
        deviation = (head_rows_DH.float() * norm_gain_H.float()).square().sum(1).mean().sqrt()
        self.norm.weight.copy_(norm_gain_H / deviation)

    @property
    def fits(self) -> bool:
        """Where a norm brings fc's taps to the scale of 1: a step of training is large beside an fc of raw ones."""
        return self.config.fc_norm or self.config.norm_before_fc

    @torch.no_grad()
    def fit(self, examples: Iterable[Example], norm_gain_H: Tensor, softcap: float | None = None) -> None:
        """The draft starts as the best linear guess of the target's next final state, normed, from taps and embedding:
        a ridge regression, whose part of the taps is fc and whose part of the embedding goes through some of the heads,
        which look at their own position; the norm's gain makes the guess as sure as it may be.

        The output comes out at the scale of 1, which is that of normed states.
        """
        layer, gain = self.midlayer, torch.where(norm_gain_H == 0, 1, norm_gain_H.to(self.fc.weight))
        size, width = self.fc.in_features, self.fc.out_features
        gram = self.fc.weight.new_zeros(size + width, size + 2 * width)
        kept: tuple[Tensor, ...] = tuple(gain.new_zeros(0, columns) for columns in (size, width, width))  # last tokens
        for example in examples:
            taps, embeds = self._fc_input(example.taps.to(gain)), layer.input_layernorm(example.embeds.to(gain))
            last = example.last.to(gain)
            rows = torch.cat([taps, embeds, last / gain], dim=-1)
            gram += rows[:, : size + width].T @ rows
            kept = tuple(torch.cat(pair)[-SURE_ROWS:] for pair in zip(kept, (taps, embeds, last), strict=True))
        taps, embeds, last = kept
        if not len(taps):
            return
        gram, cross = gram.split([size + width, width], dim=1)
        of_taps, of_embeds = gram.diagonal().split([size, width])
        of_taps.add_(RIDGE * of_taps.mean())
        of_embeds.add_(RIDGE * of_embeds.mean())
        among_embeds = gram[size:, size:]
        weight = torch.linalg.solve(gram, cross)[size:]
        # Reduced-rank regression: what is kept of it are the directions in which it says most.
        told = torch.linalg.eigh(weight.T @ among_embeds @ weight).eigenvectors.flip(1)
        told = told[:, : layer.self_attn.head_dim * max(1, layer.self_attn.num_kv_heads // 2)]
        from_embeds = weight @ told
        weight = torch.linalg.solve(gram[:size, :size], cross[:size] - gram[:size, size:] @ from_embeds @ told.T)
        guess = taps @ weight + embeds @ from_embeds @ told.T
        scale = guess.square().mean(-1).median().sqrt()
        self.fc.weight.copy_((weight / scale).T)
        # Embeddings are told apart by all their principal components but the first, which they have in common.
        apart = torch.linalg.eigh(among_embeds).eigenvectors.flip(1)[:, 1:]
        layer.self_attn.look_at_itself(apart, embeds, from_embeds / scale, told)
        logits = self.lm_head(F.rms_norm(guess, (width,)) * gain)
        wanted = teacher_probabilities(last, self.lm_head.weight, None, softcap, torch.float32)
        self.norm.weight.copy_(gain * sureness(logits, wanted))

    @cached_property
    def _rope(self) -> tuple[Tensor, float]:
        config = self.config
        return rope_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings or 2048
        )

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [..., 1, head_dim] at positions [...]."""
        frequencies, gain = self._rope
        angle = positions[..., None].double() * frequencies.to(positions.device, non_blocking=True)
        angle = torch.cat([angle, angle], dim=-1)[..., None, :]
        return (angle.cos() * gain).to(dtype), (angle.sin() * gain).to(dtype)

    def fuse(self, taps: Tensor) -> Tensor:
        """Features [..., H] from the target's taps [..., K, H]."""
        return self.fc(self._fc_input(taps))

    def _fc_input(self, taps: Tensor) -> Tensor:
        if self.config.fc_norm:
            taps = torch.stack([norm(taps[..., k, :]) for k, norm in enumerate(self.fc_norm)], dim=-2)
        flat = taps.flatten(-2)
        return self.input_norm(flat) if self.config.norm_before_fc else flat

    def logits(self, output: Tensor) -> Tensor:
        """Draft logits [..., D] from the layer's pre-norm output."""
        return self.lm_head(self.norm(output))

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Everything after attention: output projection, residuals, SwiGLU; the pre-norm output [..., H]."""
        layer = self.midlayer
        residual = residual + layer.self_attn.o_proj(attended)
        return residual + layer.mlp(layer.post_attention_layernorm(residual))

    def step(
        self,
        embeds_WH: Tensor,
        features_WH: Tensor,
        positions_W: Tensor,
        cache: StaticCache,
        length: int,
        visible_WL: Tensor | None,
    ) -> Tensor:
        """Serving forward of W positions on top of `length` cached ones of one sequence, after which they are cached.

        visible_WL says which cached rows (the new ones included) each query sees; None: all of them, which is right
        for a single query. Returns the pre-norm output [W, H], the feature of the next step.
        """
        layer, attn = self.midlayer, self.midlayer.self_attn
        x = torch.cat([layer.input_layernorm(embeds_WH), layer.hidden_norm(features_WH)], dim=-1)
        table = self.rope(positions_W, x.dtype)
        query = rotate(attn.q_proj(x).unflatten(-1, (attn.num_heads, -1)), table)
        key = rotate(attn.k_proj(x).unflatten(-1, (attn.num_kv_heads, -1)), table)
        value = attn.v_proj(x).unflatten(-1, (attn.num_kv_heads, -1))
        width, groups = len(x), attn.num_heads // attn.num_kv_heads
        cache.reserve(length + width)
        cache.write(slice(None), slice(length, length + width), length + width)
        keys, values = cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], 0)
        folded = query.view(width, attn.num_kv_heads, groups, -1).permute(1, 2, 0, 3).flatten(1, 2)
        mask = None if visible_WL is None else visible_WL.repeat(groups, 1)[None, None]
        attended = F.scaled_dot_product_attention(folded[None], keys, values, attn_mask=mask)[0]
        attended = attended.unflatten(1, (groups, width)).permute(2, 0, 1, 3).flatten(1)
        return self.finish(features_WH, attended)
