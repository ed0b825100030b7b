"""A target in this process: any decoder-only `transformers` model with a standard key/value cache.

Shapes: B sequences, T packed tokens, W tokens a step, L cached positions, K taps, H hidden, V vocabulary.
"""

import copy
import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.core.errors import TargetError
from draftsmith.core.files import JsonObject
from draftsmith.core.progress import say
from draftsmith.core.recipe import TargetRecipe
from draftsmith.core.shape import DraftSampling, Shape
from draftsmith.decoding.attention import ATTENTION_NAME, MaskedPlan, PackedPlan
from draftsmith.decoding.cache import StaticCache
from draftsmith.decoding.generation import Generation
from draftsmith.decoding.products import pack_weights
from draftsmith.decoding.sampling import sample
from draftsmith.decoding.speculate import Decoder, Drafter
from draftsmith.targets.base import Asked, Capture, Target
from draftsmith.targets.configs import read_config
from draftsmith.targets.identity import PROBE, weights_hash
from draftsmith.targets.lean import LeanLayer, lean_layers
from draftsmith.targets.library import LibraryCache, LibraryForward
from draftsmith.targets.parts import (
    DTYPES,
    auto_class,
    check_amount,
    complaint_of,
    load_tokenizer,
    on_guard,
    resolve_device,
    resolve_model,
    tell_slow_products,
)

CACHE_AHEAD = 256  # tokens that the cache has room for beyond the first prompts, before it grows
LONGEST_CHECK = 1024  # sliding windows up to this are checked with a text that is longer


def _require_equal(got: Tensor, wanted: Tensor) -> None:
    difference, scale = float((got.float() - wanted.float()).abs().max()), float(wanted.float().abs().max())
    if not difference <= (1e-3 if got.dtype == torch.float32 else 0.15) * scale:
        raise ValueError(f"its logits come out differently, by {difference:.2g} of {scale:.2g}")


class LocalTarget(Target):
    """A `Target` with, for decoding, `new_cache`, `prefill` and `verify`.

    Two ways: packed, with our attention, for the architectures on which it gives the model's own logits; else the
    library's own forward, text by text (targets/library.py). `library` is None for the first.
    """

    _decoder: Decoder | None = None
    _shape: Shape | None = None
    independent = False  # one random stream for all, and products that round otherwise in other batches

    def __init__(self, settings: TargetRecipe, device: str = "auto", batch_size: int = 64):
        model, revision, trusted = settings.model, settings.revision, settings.trust_remote_code
        self.device = resolve_device(device)
        tell_slow_products(self.device, settings.dtype)
        self.tokenizer = load_tokenizer(model, revision, trusted)
        path = resolve_model(model)
        with on_guard(f"cannot load {model!r}"):
            config = read_config(path, revision, trusted)
            check_amount(path, config, trusted)
            lm, loading = auto_class(config).from_pretrained(
                path,
                revision=revision,
                dtype=DTYPES[settings.dtype],
                trust_remote_code=trusted,
                use_safetensors=True,
                output_loading_info=True,
                device_map={"": self.device},  # shard by shard to the card, never the whole through host memory
            )
        if missing := sorted(loading["missing_keys"]):  # the library fills them with random numbers
            named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise TargetError(f"target.model: {model!r} lacks weights that its config asks for: {named}")
        self.batch_size = batch_size
        with on_guard(f"cannot use {model!r}"):
            self.weights_hash = weights_hash(path, revision)
            self._adopt(lm, model, revision, settings.dtype, settings.template_options)
            self._choose_path()

    @classmethod
    def from_model(cls, lm: Any, tokenizer: Any = None, batch_size: int = 64, name: str = "in-memory") -> "LocalTarget":
        """Wrap a model that is already in memory (tests, notebooks)."""
        target = cls.__new__(cls)
        target.device = next(lm.parameters()).device
        target.tokenizer = tokenizer
        dtype = {v: k for k, v in DTYPES.items()}[next(lm.parameters()).dtype]
        target._adopt(lm, name, None, dtype)
        target.batch_size = batch_size
        target._choose_path()
        return target

    def session(
        self, drafter: Drafter | None = None, shape: Shape | None = None, draft_sampling: DraftSampling = "greedy"
    ) -> "LocalTarget":
        """This target, which keeps the buffers of decoding text by text, and drafts where it is told how."""
        session = copy.copy(self)
        session._decoder, session._shape = Decoder(self, drafter, draft_sampling=draft_sampling), shape
        return session

    @cached_property
    def identity_logprobs(self) -> list[float]:
        return self.logprobs(self.tokenizer(PROBE).input_ids)

    @property
    def context(self) -> int:
        """Positions that the model was made for; no text runs past them."""
        return self.identity.max_position_embeddings

    def _choose_path(self) -> None:
        """The packed forward if it gives the model's own logits, else the library's."""
        if self.device.type == "cuda":  # cuDNN plans anew for every length of a cache: half of a decoding step
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.library: LibraryForward | None = None
        lean = lean_layers(self.layers)
        for module in (self.head,) if lean else (self.head, self.decoder):
            pack_weights(module)
        self._tap_outputs: dict[int, Any] = {}  # by the layers that are tapped, of all sessions
        self._takes = frozenset(inspect.signature(self.decoder.forward).parameters)
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(partial(self._record_tap, index), with_kwargs=True)
        own = self.lm.config._attn_implementation
        why = complaint_of(partial(self._drive_packed, lean or []))
        if why is None:
            return
        for layer in self.layers:
            vars(layer).pop("forward", None)
        self.lm.set_attn_implementation(own)
        document = [i % self.identity.vocab_size for i in range(1, 12)]
        with torch.inference_mode(), on_guard(f"{self.identity.architecture} cannot be driven by draftsmith"):
            wanted = self._own_logits(document)
            if not bool(wanted.isfinite().all()):
                raise TargetError(
                    f"target.model: {self.identity.architecture} gives no numbers in {self.identity.dtype}; give a "
                    "target.dtype of a wider range"
                )
            self.library = LibraryForward(self._forward, self.config, self.device)
            _require_equal(self.logits(self.capture([document], (0,)).last_TH), wanted)
        decoding = "verifies chains" if self.library.can_cut_back else "leaves speculative decoding to an engine"
        say(
            f"target: {self.identity.architecture} runs by transformers' own forward, one text at a time, and "
            f"{decoding} ({why})"
        )

    def _own_logits(self, document: list[int]) -> Tensor:
        """[T, V], by the model's own forward."""
        return self.lm(input_ids=torch.tensor([document], device=self.device), use_cache=False).logits[0]

    @torch.inference_mode()
    def _drive_packed(self, lean: list[LeanLayer]) -> None:
        """Drive two documents our way (packed, then prefill and one cached step) and compare with the model's own
        forward; raises where the logits do not agree."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
        if kinds & {"longrope", "dynamic"}:
            raise ValueError("its RoPE depends on a text's length")
        # one text longer than the sliding window where that is affordable: a window that is ignored shows
        windows = [getattr(self.config, key, None) for key in ("sliding_window", "attention_chunk_size")]
        longest = max((w for w in windows if w and w <= LONGEST_CHECK), default=0)
        documents, start = [], 1
        for length in (min(longest + 16, self.context), min(7, self.context)):
            documents.append([(start + i * 7) % self.identity.vocab_size for i in range(length)])
            start += 3
        expected = [self._own_logits(document) for document in documents]
        self.lm.set_attn_implementation(ATTENTION_NAME)
        for layer, forward in zip(self.layers, lean, strict=False):
            layer.forward = forward
        packed = self.logits(self.capture(documents, (0,)).last_TH)
        cache = StaticCache(1, len(documents[0]) + 1)
        self.prefill(cache, [0], [documents[0][:-1]])
        root = torch.zeros(1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
        _, stepped = self.verify(cache, len(documents[0]) - 1, documents[0][-1:], *root, ())
        _require_equal(torch.cat([packed, self.logits(stepped)]), torch.cat([*expected, expected[0][-1:]]))

    def _record_tap(self, index: int, _module: nn.Module, args: tuple[Any, ...], kwargs: JsonObject) -> None:
        if index in self._tap_outputs:
            self._tap_outputs[index] = args[0] if args else kwargs["hidden_states"]

    def _forward(
        self, ids: Tensor, positions: Tensor, cache: Any, plan: Any, taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """(taps [B, T, K, H], the head's own input [B, T, H]); `plan` is None for the library's own attention."""
        self._tap_outputs.clear()
        self._tap_outputs.update(dict.fromkeys(taps))
        named = "cache_params" if "cache_params" in self._takes else "past_key_values"  # Mamba's name, all others'
        planned = {named: cache}
        if plan is not None:
            planned["plan"] = plan
        if plan is not None or "position_ids" in self._takes:
            planned["position_ids"] = positions
        last = self.decoder(input_ids=ids, use_cache=cache is not None, **planned).last_hidden_state
        last = self._scaled(last)
        tapped = torch.stack([self._tap_outputs.pop(t) for t in taps], dim=2) if taps else last[:, :, None, :0]
        return tapped, last

    @torch.inference_mode()
    def capture(self, documents: list[list[int]], taps: Sequence[int]) -> Capture:
        """One packed forward over all documents; time is linear in their tokens."""
        return self.prefill(None, [], documents, taps)

    @torch.inference_mode()
    def logprobs(self, document: list[int]) -> list[float]:
        return self.logprobs_of(document, self.capture([document], ()).last_TH[:-1])

    # --- step by step -------------------------------------------------------------------------------------------

    def new_cache(self, capacity: int) -> "StaticCache | LibraryCache":
        """For one sequence."""
        return self.library.new_cache() if self.library else StaticCache(1, capacity)

    @torch.inference_mode()
    def prefill(self, cache: Any, rows: list[int], prompts: list[list[int]], taps: Sequence[int] = ()) -> Capture:
        """Whole prompts in one packed forward, into rows of a cache if there is one."""
        if self.library:
            return self.library.prefill(cache, prompts, taps)
        lengths = [len(p) for p in prompts]
        columns = torch.cat([torch.arange(n, device=self.device) for n in lengths])
        if cache is not None:
            row_index = torch.repeat_interleave(
                torch.tensor(rows, device=self.device), torch.tensor(lengths, device=self.device)
            )
            cache.reserve(max(lengths))
            cache.write(row_index, columns, None)
        ids = torch.tensor([i for p in prompts for i in p], device=self.device)[None]
        tapped, last = self._forward(ids, columns[None], cache, PackedPlan(lengths), taps)
        return Capture(tapped[0], last[0])

    @torch.inference_mode()
    def verify(
        self, cache: Any, length: int, ids: list[int], depths: Tensor, ancestors: Tensor, taps: Sequence[int]
    ) -> Capture:
        """One forward over a token tree on top of `length` cached positions of a single sequence.

        ids [W] with the root first; depths [W]; ancestors [W, W] True where the column is the row's ancestor or
        itself. Rows go to columns length..length+W-1.
        """
        if self.library:
            return self.library.verify(cache, length, ids, depths, taps)
        width = len(ids)
        cache.reserve(length + width)
        cache.write(slice(None), slice(length, length + width), length + width)
        positions = (depths + length).to(self.device)
        key_positions = torch.cat([torch.arange(length, device=self.device), positions])
        past = torch.ones(width, length, dtype=torch.bool, device=self.device)
        visible = torch.cat([past, ancestors.to(self.device)], dim=1)
        plan = MaskedPlan(visible[None], positions[None], key_positions[None])
        tapped, last = self._forward(torch.tensor([ids], device=self.device), positions[None], cache, plan, taps)
        return Capture(tapped[0], last[0])

    @torch.inference_mode()
    def _answers(self, prompts: Iterable[list[int]], asked: Asked) -> Iterator[tuple[int, Generation]]:
        """Text by text with a drafter or one at once, else continuous batching over `batch_size` cache rows, over one
        by the library's forward; a pure function of its arguments.

        Free rows are refilled when a sixteenth of them stands empty, so that prompts are read in packs, until
        `max_tokens` are written. No text runs past the context; a prompt that fills it is a `TargetError`.
        """
        if asked.at_once == 1 or self._shape:
            decoder, most = self._decoder or Decoder(self), asked.max_new_tokens
            for number, prompt in enumerate(prompts):
                seed = asked.seed + number
                yield number, decoder.generate(prompt, asked.sampling_of(number), most, self._shape, seed, asked.ends)
            return
        texts = list(prompts)
        if not texts:
            return
        longest = max(map(len, texts))
        if longest >= self.context:
            raise TargetError(
                f"target.model: a prompt of {longest} tokens fills the context of {self.identity.model}, "
                f"{self.context}; give a smaller regenerate.max_prompt_tokens"
            )
        yield from self._batched(texts, asked, min(longest + asked.max_new_tokens, self.context))

    def _batched(self, texts: list[list[int]], asked: Asked, most: int) -> Iterator[tuple[int, Generation]]:
        """`most`: columns that the cache grows to."""
        generator = torch.Generator().manual_seed(asked.seed)
        waiting = deque(range(len(texts)))
        rows = 1 if self.library else min(self.batch_size, len(texts))
        capacity = min(max(map(len, texts[:rows])) + CACHE_AHEAD, most)
        cache: Any = self.library.new_cache() if self.library else StaticCache(rows, capacity, most)
        running: list[int | None] = [None] * rows  # prompt index in each cache row
        lengths, greedy_B = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.bool)
        outputs: dict[int, list[int]] = {}
        next_ids = torch.zeros(rows, dtype=torch.long)
        finished_tokens = 0
        while waiting or any(r is not None for r in running):
            free = [i for i, r in enumerate(running) if r is None]
            written = finished_tokens + sum(map(len, outputs.values()))
            if asked.max_tokens is not None and written >= asked.max_tokens:
                waiting.clear()
            if waiting and (len(free) >= max(1, rows // 16) or len(free) == rows):
                admitted = free[: len(waiting)]
                chosen = [waiting.popleft() for _ in admitted]
                greedy_B[admitted] = torch.tensor([asked.greedily(c) for c in chosen])
                last = self._admit(cache, admitted, [texts[c] for c in chosen])
                drawn = sample(self.logits(last), asked.sampling, generator, greedy_B[admitted]).tolist()
                for row, index, token in zip(admitted, chosen, drawn, strict=True):
                    running[row], outputs[index] = index, []
                    lengths[row], next_ids[row] = len(texts[index]), token
            elif rows // 4 < len(free) < rows and not waiting:  # the tail: smaller batches cost less
                keep = [i for i, r in enumerate(running) if r is not None]
                cache.select_rows(keep)
                running = [running[i] for i in keep]
                lengths, next_ids, greedy_B, rows = lengths[keep], next_ids[keep], greedy_B[keep], len(keep)
            asked.written(sum(number is not None for number in running))
            for row, (number, token) in enumerate(zip(running, next_ids.tolist(), strict=True)):
                if number is None:
                    continue
                outputs[number].append(token)
                room = min(asked.max_new_tokens, self.context - len(texts[number]))
                if ended := asked.ends.reason(outputs[number], room):
                    running[row], lengths[row] = None, 0
                    finished_tokens += len(outputs[number])
                    answer = Generation(outputs.pop(number), ended)
                    if asked.follow and (following := asked.follow(number, answer)) is not None:
                        texts[number] = following
                        waiting.append(number)
                    yield number, answer
            if all(r is None for r in running):
                continue
            last = self._decode_step(cache, lengths, next_ids)
            next_ids = sample(self.logits(last), asked.sampling, generator, greedy_B).cpu()
            lengths = lengths + torch.tensor([r is not None for r in running])

    def _admit(self, cache: Any, rows: list[int], prompts: list[list[int]]) -> Tensor:
        """Read prompts into cache rows; the last hidden state of each [B, H]."""
        _, last = self.prefill(cache, rows, prompts)
        ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
        return last[ends.to(self.device)]

    def _decode_step(self, cache: Any, lengths: Tensor, ids: Tensor) -> Tensor:
        """One more token in every row; the last hidden state of each [B, H]."""
        if self.library:
            depths = torch.zeros(1, dtype=torch.long)
            return self.library.verify(cache, int(lengths), ids.tolist(), depths, ())[1]
        lengths_B = lengths.to(self.device)
        visible_length = int(lengths.max()) + 1
        cache.reserve(visible_length)
        cache.write(torch.arange(len(lengths), device=self.device)[:, None], lengths_B[:, None], visible_length)
        columns = torch.arange(visible_length, device=self.device)
        plan = MaskedPlan(
            (columns[None] <= lengths_B[:, None])[:, None],
            lengths_B[:, None],
            columns[None].expand(len(lengths), -1),
        )
        return self._forward(ids[:, None].to(self.device), lengths_B[:, None], cache, plan)[1][:, 0]
