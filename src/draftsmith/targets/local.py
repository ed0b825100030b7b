"""A target in this process: any decoder-only `transformers` model with a standard key/value cache.

Shapes: B sequences, T packed tokens, W tokens a step, L cached positions, K taps, H hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from draftsmith.decoding.attention import ATTENTION_NAME, MaskedPlan, PackedPlan
from draftsmith.decoding.cache import StaticCache
from draftsmith.decoding.sampling import Sampling, sample
from draftsmith.errors import TargetError
from draftsmith.targets.base import Capture, Generation
from draftsmith.targets.endings import loops, stop_length
from draftsmith.targets.ends import (
    DTYPES,
    ModelEnds,
    first_line,
    load_tokenizer,
    resolve_device,
    resolve_model,
    tell_slow_products,
)


class LocalTarget(ModelEnds):
    """Implements `Target` and, for decoding, `prefill` and `verify`."""

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: str = "bf16",
        device: str = "auto",
        trust_remote_code: bool = False,
        batch_size: int = 64,
    ):
        from transformers import AutoModelForCausalLM

        self.device = resolve_device(device)
        tell_slow_products(self.device, dtype)
        self.tokenizer = load_tokenizer(model, revision, trust_remote_code)
        try:
            lm = AutoModelForCausalLM.from_pretrained(
                resolve_model(model),
                revision=revision,
                dtype=DTYPES[dtype],
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
            )
        except (OSError, ValueError) as error:
            raise TargetError(f"target.model: cannot load {model!r}: {first_line(error)}") from None
        lm.to(self.device)  # type: ignore[arg-type]
        self._adopt(lm, model, revision, dtype)
        self.batch_size = batch_size
        self._check_hooks()

    @classmethod
    def from_model(cls, lm, tokenizer=None, batch_size: int = 64, name: str = "in-memory") -> "LocalTarget":
        """Wrap a model that is already in memory (tests, notebooks)."""
        target = cls.__new__(cls)
        target.device = next(lm.parameters()).device
        target.tokenizer = tokenizer
        dtype = {v: k for k, v in DTYPES.items()}[next(lm.parameters()).dtype]
        target._adopt(lm, name, None, dtype)
        target.batch_size = batch_size
        target._check_hooks()
        return target

    def _check_hooks(self) -> None:
        """Drive two short documents our way (packed, then prefill and one cached step) and compare with the model's own
        forward; a model that ignores the plan or scales its logits somewhere else is refused, not served wrongly."""
        documents = [[1, 2, 3], [4, 5, 6, 7]]
        documents = [[i % self.identity.vocab_size for i in document] for document in documents]
        with torch.inference_mode():
            expected = [self.lm(input_ids=torch.tensor([d], device=self.device), use_cache=False) for d in documents]
            self.lm.set_attn_implementation(ATTENTION_NAME)
            self._tap_outputs: dict[int, Tensor] = {}
            self._taps: tuple[int, ...] = ()
            for index, layer in enumerate(self.decoder.layers):
                layer.register_forward_pre_hook(self._record_tap(index), with_kwargs=True)
            try:
                packed = self.logits(self.capture(documents, (0,)).last_TH)
                cache = StaticCache(1, 8)
                self.prefill(cache, [0], [documents[0][:2]])
                root = torch.zeros(1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
                _, stepped = self.verify(cache, 2, documents[0][2:], *root, ())
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError) as error:
                raise TargetError(
                    f"target.model: {self.identity.architecture} cannot be driven by draftsmith: {first_line(error)}"
                ) from None
        wanted = torch.cat([out.logits[0] for out in expected]).float()
        got = torch.cat([packed, self.logits(stepped)]).float()
        wanted = torch.cat([wanted, expected[0].logits[0, -1:].float()])
        tolerance = 1e-3 if packed.dtype == torch.float32 else 0.15
        difference, scale = (got - wanted).abs().max().item(), wanted.abs().max().item()
        if not difference <= tolerance * scale:
            raise TargetError(
                f"target.model: {self.identity.architecture} gives other logits through draftsmith's attention "
                f"(difference {difference:.2g} of {scale:.2g}); its layers ignore `plan` or it scales its logits"
            )

    def _record_tap(self, index: int):
        def hook(_module, args, kwargs):
            if index in self._taps:
                self._tap_outputs[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _forward(self, ids, positions, cache, plan, taps: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """(taps [B, T, K, H], last hidden after the final norm [B, T, H])."""
        self._taps = tuple(taps)
        last = self.decoder(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=cache is not None, plan=plan
        ).last_hidden_state
        tapped = torch.stack([self._tap_outputs.pop(t) for t in taps], dim=2) if taps else last[:, :, None, :0]
        return tapped, last

    def check_taps(self, taps: Sequence[int]) -> None:
        layers = self.identity.num_layers
        wrong = [t for t in taps if not 0 <= t < layers]
        if wrong:
            raise TargetError(f"draft.taps: {wrong[0]} given; {self.identity.model} has layers 0..{layers - 1}")

    def logits(self, hidden: Tensor) -> Tensor:
        """The target's own head over its own last hidden state."""
        if self._few_fp32_rows(hidden):
            logits = (self.head.weight @ hidden.T).T
        else:
            logits = self.head(hidden)
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits

    def _few_fp32_rows(self, hidden: Tensor) -> bool:
        """Where the CPU's fp32 product is twice as fast the other way round: a few rows against a whole vocabulary."""
        few = hidden.ndim == 2 and 1 < len(hidden) <= 16 and getattr(self.head, "bias", None) is None
        return few and hidden.dtype == torch.float32 and hidden.device.type == "cpu"

    @torch.inference_mode()
    def capture(self, documents: list[list[int]], taps: Sequence[int]) -> Capture:
        """One packed forward over all documents; time is linear in their tokens."""
        lengths = [len(d) for d in documents]
        ids = torch.tensor([i for d in documents for i in d], device=self.device)[None]
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths])[None]
        tapped, last = self._forward(ids, positions, None, PackedPlan(lengths), taps)
        return Capture(tapped[0], last[0])

    @torch.inference_mode()
    def logprobs(self, document: list[int]) -> list[float]:
        """Log-probability of every token of a text after the first."""
        last = self.capture([document], ()).last_TH[:-1]
        wanted = torch.tensor(document[1:], device=self.device)
        scores = [
            logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
            for logits, ids in ((self.logits(h), w) for h, w in zip(last.split(64), wanted.split(64), strict=True))
        ]
        return torch.cat(scores).tolist()

    # --- step by step -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(self, cache: StaticCache, rows: list[int], prompts: list[list[int]], taps: Sequence[int] = ()):
        """Fill the cache rows with whole prompts in one packed forward; returns (taps [T, K, H], last [T, H])."""
        lengths = [len(p) for p in prompts]
        columns = torch.cat([torch.arange(n, device=self.device) for n in lengths])
        row_index = torch.repeat_interleave(
            torch.tensor(rows, device=self.device), torch.tensor(lengths, device=self.device)
        )
        cache.reserve(max(lengths))
        cache.write_packed(row_index, columns)
        ids = torch.tensor([i for p in prompts for i in p], device=self.device)[None]
        tapped, last = self._forward(ids, columns[None], cache, PackedPlan(lengths), taps)
        return tapped[0], last[0]

    @torch.inference_mode()
    def verify(
        self, cache: StaticCache, length: int, ids: list[int], depths: Tensor, ancestors: Tensor, taps: Sequence[int]
    ):
        """One forward over a token tree on top of `length` cached positions of a single sequence.

        ids [W] with the root first; depths [W]; ancestors [W, W] True where the column is the row's ancestor or
        itself. Rows go to columns length..length+W-1. Returns (taps [W, K, H], last hidden [W, H]).
        """
        width = len(ids)
        cache.reserve(length + width)
        cache.write_slice(length, width)
        positions = (depths + length).to(self.device)
        key_positions = torch.cat([torch.arange(length, device=self.device), positions])
        past = torch.ones(width, length, dtype=torch.bool, device=self.device)
        visible = torch.cat([past, ancestors.to(self.device)], dim=1)
        plan = MaskedPlan(visible[None], positions[None], key_positions[None])
        tapped, last = self._forward(torch.tensor([ids], device=self.device), positions[None], cache, plan, taps)
        return tapped[0], last[0]

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        max_new_tokens: int,
        stop: tuple[str, ...] = (),
        seed: int = 0,
        stop_loops: bool = False,
        max_tokens: int | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """Continuous batching over `batch_size` cache rows; a pure function of its arguments.

        Free rows are refilled when a quarter of them stand empty, so that prompts are read in packs, until `max_tokens`
        are written.
        """
        if not prompts:
            return
        generator = torch.Generator().manual_seed(seed)
        waiting = list(range(len(prompts)))
        rows = min(self.batch_size, len(prompts))
        cache = StaticCache(rows, max(len(p) for p in prompts) + max_new_tokens)
        running: list[int | None] = [None] * rows  # prompt index in each cache row
        lengths = torch.zeros(rows, dtype=torch.long)
        outputs: dict[int, list[int]] = {}
        next_ids = torch.zeros(rows, dtype=torch.long)
        finished_tokens = 0
        while waiting or any(r is not None for r in running):
            free = [i for i, r in enumerate(running) if r is None]
            if max_tokens is not None and finished_tokens + sum(map(len, outputs.values())) >= max_tokens:
                waiting.clear()
            if waiting and (len(free) >= max(1, rows // 4) or len(free) == rows):
                admitted = free[: len(waiting)]
                chosen = [waiting.pop(0) for _ in admitted]
                _, last = self.prefill(cache, admitted, [prompts[c] for c in chosen])
                ends = torch.tensor([len(prompts[c]) for c in chosen]).cumsum(0) - 1
                drawn = sample(self.logits(last[ends.to(self.device)]), sampling, generator).cpu()
                for row, index, token in zip(admitted, chosen, drawn.tolist(), strict=True):
                    running[row], outputs[index] = index, []
                    lengths[row], next_ids[row] = len(prompts[index]), token
            elif len(free) > rows // 4 and not waiting:  # the tail: smaller batches cost less
                keep = [i for i, r in enumerate(running) if r is not None]
                cache.select_rows(keep)
                running = [running[i] for i in keep]
                lengths, next_ids, rows = lengths[keep], next_ids[keep], len(keep)
            for row, prompt in enumerate(running):
                if prompt is None:
                    continue
                ended = self._extend(outputs[prompt], int(next_ids[row]), max_new_tokens, stop, stop_loops)
                if ended:
                    running[row] = None
                    lengths[row] = 0
                    finished_tokens += len(outputs[prompt])
                    yield prompt, Generation(outputs.pop(prompt), ended)
            if all(r is None for r in running):
                continue
            next_ids = self._decode_step(cache, lengths, next_ids, sampling, generator)
            lengths = lengths + torch.tensor([r is not None for r in running])

    def _extend(
        self, output: list[int], token: int, max_new_tokens: int, stop: tuple[str, ...], stop_loops: bool
    ) -> str | None:
        """Append a token; the finish reason if that ended the completion (a stop string is cut off)."""
        output.append(token)
        if token in self.eos_ids:
            return "eos"
        if stop and (length := stop_length(self.tokenizer, output, stop)) is not None:
            del output[length:]
            return "stop"
        if stop_loops and loops(output):
            return "loop"
        return "length" if len(output) >= max_new_tokens else None

    def _decode_step(self, cache, lengths, ids, sampling, generator) -> Tensor:
        lengths_B = lengths.to(self.device)
        visible_length = int(lengths.max()) + 1
        cache.reserve(visible_length)
        cache.write_ragged(lengths_B[:, None], visible_length)
        columns = torch.arange(visible_length, device=self.device)
        plan = MaskedPlan(
            (columns[None] <= lengths_B[:, None])[:, None],
            lengths_B[:, None],
            columns[None].expand(len(lengths), -1),
        )
        _, last = self._forward(ids[:, None].to(self.device), lengths_B[:, None], cache, plan)
        return sample(self.logits(last[:, 0]), sampling, generator).cpu()
