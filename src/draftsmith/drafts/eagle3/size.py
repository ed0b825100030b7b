"""What an EAGLE-3 draft weighs and costs; the embedding is the target's."""

from dataclasses import dataclass

from draftsmith.core.recipe import TrainRecipe
from draftsmith.core.shape import Shape
from draftsmith.drafts.eagle3.model import Eagle3Config
from draftsmith.drafts.method import DraftSize, Forward

NEWTON_SCHULZ = 5  # iterations of Muon, each of about 4 m m n + 2 m m m operations for an m x n matrix
LOSS_ROWS = 2048.0  # of logits, their gradient and the teacher that are held at once


@dataclass(frozen=True)
class Eagle3Size(DraftSize):
    config: Eagle3Config

    @property
    def _matrices(self) -> list[tuple[int, int]]:
        """(rows, columns) of the layer's products: attention, SwiGLU."""
        c = self.config
        h, wide = c.hidden_size, c.intermediate_size
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return [(q, 2 * h), (kv, 2 * h), (kv, 2 * h), (h, q), (wide, h), (wide, h), (h, wide)]

    @property
    def _fc(self) -> tuple[int, int]:
        return self.config.hidden_size, len(self.config.taps) * self.config.tap_size

    @property
    def hidden(self) -> int:
        return self.config.hidden_size

    @property
    def layer(self) -> float:
        return float(sum(rows * columns for rows, columns in self._matrices))

    @property
    def fuse(self) -> float:
        """fc, used once per verified token."""
        return float(self._fc[0] * self._fc[1])

    @property
    def head(self) -> float:
        return float(self.config.draft_vocab_size) * self.config.hidden_size

    @property
    def parameters(self) -> float:
        return self.layer + self.fuse + self.head

    @property
    def kv_bytes_per_token(self) -> float:
        return 2.0 * self.config.num_key_value_heads * self.config.head_dim * 2

    def forwards(self, shape: Shape) -> list[Forward]:
        step = self.layer + self.head
        first = Forward(shape.draft_tokens, self.bytes, self.parameters)
        return [first, *[Forward(shape.topk, 2 * step, step)] * (shape.steps - 1)]

    def optimiser_bytes(self, train: TrainRecipe) -> float:
        if train.optimizer == "adamw":
            return 8 * self.parameters
        return 4 * (self.layer + self.fuse) + 8 * self.head

    def activation_bytes(self, train: TrainRecipe) -> float:
        c = self.config
        per_token = c.hidden_size * 2 * (len(c.taps) + 2 + 14 * train.ttt_steps)
        per_token += c.intermediate_size * 2 * 3 * train.ttt_steps
        return train.pack_tokens * per_token + LOSS_ROWS * c.draft_vocab_size * 4 * 3

    def training_flops(self, train: TrainRecipe, steps: float, tokens: float, loss_tokens: float) -> float:
        c = self.config
        key_value = 4.0 * c.num_key_value_heads * c.head_dim * c.hidden_size  # of the embedding and of the feature
        embedding = c.num_attention_heads * c.head_dim * c.hidden_size + key_value / 2
        # The embedding's half of q, k and v, and step 0's keys and values, are made once per token.
        once = self.fuse + embedding + key_value / 2
        per_loss_token = train.ttt_steps * (self.layer - embedding + self.head) - key_value / 2
        flops = 6 * (tokens * once + loss_tokens * per_loss_token) + 2 * loss_tokens * self.head
        if train.optimizer != "muon":
            return flops
        sides = [(min(shape), max(shape)) for shape in (*self._matrices, self._fc)]
        return flops + steps * NEWTON_SCHULZ * sum(4 * m * m * n + 2 * m**3 for m, n in sides)

    def attention_flops(self, train: TrainRecipe, pairs: float) -> float:
        return 12.0 * train.ttt_steps * pairs * self.config.num_attention_heads * self.config.head_dim
