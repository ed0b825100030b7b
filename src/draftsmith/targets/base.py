"""A target: it generates token ids, captures hidden states, and lends its head and embedding rows.

Shapes: T tokens of all documents, K taps, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draftsmith.core.errors import TargetError
from draftsmith.core.records.run import TargetIdentity
from draftsmith.decoding.generation import Generation
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.stopping import Ends
from draftsmith.targets.identity import template_hash, tokenizer_hash
from draftsmith.targets.parts import context_of, end_ids, find_decoder, logit_scale

Follow = Callable[[int, Generation], list[int] | None]
"""(index of the prompt, its answer) -> what the conversation goes on with; None where it ends."""
Written = Callable[[int], None]
"""Told how many tokens have come since it was told last."""


class Capture(NamedTuple):
    """Hidden states of tokens, such as those of packed documents, in the target's dtype.

    taps_TKH: residual stream entering each tapped layer (HF `hidden_states[t]`).
    last_TH: the head's own input, after the target's final norm.
    """

    taps_TKH: Tensor
    last_TH: Tensor


@dataclass(frozen=True)
class Asked:
    """How prompts are to be answered, as `Target.generate` is told."""

    sampling: Sampling
    greedily: Callable[[int], bool]
    """Of a prompt by its index: whether it is answered greedily beside the others."""
    max_new_tokens: int
    ends: Ends
    seed: int
    max_tokens: int | None
    follow: Follow | None
    written: Written
    at_once: int | None
    ignore_end: bool

    def sampling_of(self, number: int) -> Sampling:
        return Sampling() if self.greedily(number) else self.sampling


class Target:
    """What the whole model in this process and a model that runs elsewhere have in common."""

    device: torch.device
    tokenizer: Any
    independent: bool
    """Whether an answer does not depend on those that are decoded beside it."""
    weights_hash: str | None = None
    """Of the files that the whole model was loaded from."""

    @cached_property
    def identity_logprobs(self) -> list[float]:
        """Of the probe text of targets/identity.py; of servers those of the first that answered, none before."""
        return []

    @property
    def one(self) -> "Target":
        """A single server of those that answer, which is what a speed is told of."""
        return self

    def generate(
        self,
        prompts: Iterable[list[int]],
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        seed: int = 0,
        stop_loops: bool = False,
        max_tokens: int | None = None,
        follow: Follow | None = None,
        written: Written = lambda tokens: None,
        *,
        greedily: Callable[[int], bool] = lambda number: False,
        at_once: int | None = None,
        ignore_end: bool = False,
    ) -> Iterator[tuple[int, Generation]]:
        """Completions as (index of the prompt, generation), each as soon as it ends, and those of the turns that
        `follow`; once `max_tokens` are written, none is begun. `written` is told of tokens as they come. At most
        `at_once` are in flight, else as many as it is worth giving. `greedily` chooses by their indices those that are
        answered greedily beside the others; `ignore_end`: end tokens do not end them."""
        ends = Ends(frozenset() if ignore_end else self.eos_ids, self.tokenizer, stop, stop_loops)
        asked = Asked(sampling, greedily, max_new_tokens, ends, seed, max_tokens, follow, written, at_once, ignore_end)
        return self._answers(prompts, asked)

    def _answers(self, prompts: Iterable[list[int]], asked: Asked) -> Iterator[tuple[int, Generation]]:
        raise NotImplementedError

    def logprobs(self, document: list[int]) -> list[float]:
        """Log-probability of every token of a text after the first."""
        raise NotImplementedError

    def capture(self, documents: list[list[int]], taps: Sequence[int]) -> Capture:
        raise NotImplementedError

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
        """Rows [len(ids), H] of the output head."""
        self._load()
        return self.head.weight[ids.to(self.device)]

    def embedding_rows(self) -> Tensor:
        """The raw input embedding [V, H], without any scale that the model applies."""
        self._load()
        return self.embedding.weight  # type: ignore[return-value]
