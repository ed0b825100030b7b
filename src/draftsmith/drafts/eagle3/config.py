"""What an EAGLE-3 draft is, weighs and costs; the embedding is the target's."""

import torch

from draftsmith.core.files import JsonObject
from draftsmith.core.recipe import TrainRecipe
from draftsmith.core.shape import Shape
from draftsmith.drafts.eagle3.chain_attention import PLAIN_ROWS
from draftsmith.drafts.method import DraftConfig
from draftsmith.drafts.objectives import chunk_rows

# Counted on real-size steps (tests/unit/test_planned_bytes.py): bytes of a logit while its loss and gradient are made,
# times that plain attention holds the scores of a chunk of queries in its backward, bytes that a CPU's norms keep. On a
# GPU the compiled loss holds no more than the logits and their gradient.
LOGIT_BYTES = {"soft_ce": 19, "lk_alpha": 25, "lk_lambda": 35}
SCORES, CPU_NORMS = 2.3, 20


class Eagle3Config(DraftConfig):
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float = 1e-6
    norm_before_fc: bool = False
    fc_norm: bool = False
    rope_scaling: JsonObject | None = None
    """As in config.json, with `rope_type` linear, llama3 or yarn."""

    @property
    def needs(self) -> str:
        if not (self.fc_norm or self.norm_before_fc):
            return ""
        key = "fc_norm" if self.fc_norm else "norm_before_fc"
        return f"It needs an engine that reads {key} (EAGLE-3.1); older ones pass over it silently and draft badly."

    @property
    def _matrices(self) -> list[tuple[int, int]]:
        """(rows, columns) of the layer's products: attention, SwiGLU."""
        h, wide = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return [(q, 2 * h), (kv, 2 * h), (kv, 2 * h), (h, q), (wide, h), (wide, h), (h, wide)]

    @property
    def _fc(self) -> tuple[int, int]:
        return self.hidden_size, len(self.taps) * self.tap_size

    @property
    def layer(self) -> float:
        return float(sum(rows * columns for rows, columns in self._matrices))

    @property
    def fuse(self) -> float:
        """fc, used once per verified token."""
        return float(self._fc[0] * self._fc[1])

    @property
    def parameters(self) -> float:
        return self.layer + self.fuse + self.head

    @property
    def kv_bytes_per_token(self) -> float:
        return 2.0 * self.num_key_value_heads * self.head_dim * 2

    def forwards(self, shape: Shape) -> list[tuple[int, float]]:
        later = (shape.topk, self.layer + self.head)
        return [(shape.draft_tokens, self.parameters), *[later] * (shape.steps - 1)]

    def optimiser_bytes(self, train: TrainRecipe) -> float:
        if train.optimizer == "adamw":
            return 8 * self.parameters
        return 4 * (self.layer + self.fuse) + 8 * self.head

    def activation_bytes(self, train: TrainRecipe, gpu: bool) -> float:
        depths = train.ttt_steps
        each = 4 if train.dtype == "fp32" else 2
        h, wide, heads = self.hidden_size, self.intermediate_size, self.num_attention_heads
        q, kv = heads * self.head_dim, self.num_key_value_heads * self.head_dim
        tokens = max(train.pack_tokens, train.max_document_tokens)  # a document longer than a pack is one by itself
        depth = each * (6 * h + 2 * q + (3 if gpu else 4) * wide) + 4 * heads + (0 if gpu else CPU_NORMS * h)
        own_keys = each * depths * (depths - 1) * kv  # every depth stacks those of the depths before it
        once = each * (len(self.taps) * self.tap_size + 4 * h + q + 4 * kv + self.draft_vocab_size)
        held = tokens * (depths * depth + own_keys + once)
        rows = min(chunk_rows(torch.device("cuda" if gpu else "cpu"), self.draft_vocab_size), tokens * depths)
        logit = 2 * each if gpu else LOGIT_BYTES[train.objective]
        loss = rows * self.draft_vocab_size * logit + 4 * self.head + tokens * depths * each * h
        flash = not gpu or (each == 2 and self.head_dim % 8 == 0 and self.head_dim <= 256)
        scores = 0.0 if flash else SCORES * PLAIN_ROWS * train.max_document_tokens * heads * 4
        return held + max(loss, scores)

    def training_flops(self, train: TrainRecipe, steps: float, tokens: float, loss_tokens: float) -> float:
        # Keys and values of the embedding and of the feature.
        key_value = 4.0 * self.num_key_value_heads * self.head_dim * self.hidden_size
        embedding = self.num_attention_heads * self.head_dim * self.hidden_size + key_value / 2
        # The embedding's half of q, k and v, and step 0's keys and values, are made once per token.
        once = self.fuse + embedding + key_value / 2
        per_loss_token = train.ttt_steps * (self.layer - embedding + self.head) - key_value / 2
        if train.objective == "lk_lambda":  # a fourth product with the head
            per_loss_token += train.ttt_steps * self.head / 3
        teacher = self.head + (float(self.vocab_size) * self.hidden_size if train.full_teacher else 0.0)
        flops = 6 * (tokens * once + loss_tokens * per_loss_token) + 2 * loss_tokens * teacher
        if train.optimizer != "muon":
            return flops
        sides = [(min(shape), max(shape)) for shape in (*self._matrices, self._fc)]
        # five polynomials: products of m x m and m x n matrices (training/optimizers.py)
        small, wide = (17, 2) if train.dtype == "fp32" else (5, 10)
        return flops + 2 * steps * sum(small * m**3 + wide * m * m * n for m, n in sides)

    def attention_flops(self, train: TrainRecipe, pairs: float) -> float:
        return 12.0 * train.ttt_steps * pairs * self.num_attention_heads * self.head_dim
