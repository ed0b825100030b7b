"""A target in this process: any decoder-only `transformers` model with a standard key/value cache.

Shapes: B sequences, T packed tokens, W tokens a step, L cached positions, K taps, H hidden, V vocabulary.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from draftsmith.data.loops import loop_onset
from draftsmith.decoding.attention import ATTENTION_NAME, MaskedPlan, PackedPlan
from draftsmith.decoding.cache import StaticCache
from draftsmith.decoding.sampling import Sampling, sample
from draftsmith.errors import TargetError
from draftsmith.targets import embedded
from draftsmith.targets.base import Capture, Generation, TargetIdentity

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def resolve_model(model: str) -> str:
    """Path or hub name to load; the embedded target is converted on first use."""
    return str(embedded.materialise()) if model == embedded.NAME else model


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise TargetError(f"device: {device} asked for, but torch {torch.__version__} sees no GPU; use auto or cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise TargetError(f"device: {device!r} given; allowed are auto, cpu, cuda and cuda:N") from None


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False):
    from transformers import AutoTokenizer

    path = resolve_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise TargetError(f"target.model: no tokenizer in {model!r}: {_first_line(error)}") from None
    if model == embedded.NAME:
        embedded.check_tokenizer(tokenizer)
    return tokenizer


def tokenizer_hash(tokenizer) -> str:
    """Identity of the mapping from text to ids, by vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class LocalTarget:
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
            raise TargetError(f"target.model: cannot load {model!r}: {_first_line(error)}") from None
        self._adopt(lm, model, revision, dtype, batch_size)

    @classmethod
    def from_model(cls, lm, tokenizer=None, batch_size: int = 64, name: str = "in-memory") -> "LocalTarget":
        """Wrap a model that is already in memory (tests, notebooks)."""
        target = cls.__new__(cls)
        target.device = next(lm.parameters()).device
        target.tokenizer = tokenizer
        dtype = {v: k for k, v in DTYPES.items()}[next(lm.parameters()).dtype]
        target._adopt(lm, name, None, dtype, batch_size)
        return target

    def _adopt(self, lm, name: str, revision: str | None, dtype: str, batch_size: int) -> None:
        self.lm = lm.to(self.device).eval().requires_grad_(False)
        self.batch_size = batch_size
        self.decoder = lm.get_decoder()
        self.config = self.decoder.config
        missing = [part for part in ("layers", "embed_tokens", "norm") if not hasattr(self.decoder, part)]
        if missing or lm.get_output_embeddings() is None:
            raise TargetError(
                f"target.model: {type(lm).__name__} has no {' and no '.join(missing or ['output head'])}; "
                "draftsmith needs a decoder-only model with .layers, .embed_tokens, .norm and a head"
            )
        rows = lm.get_input_embeddings().weight.shape[0]
        highest = max(self.tokenizer.get_vocab().values()) if self.tokenizer else 0
        if highest >= rows:
            raise TargetError(
                f"target.model: the tokenizer knows ids up to {highest} but the model has {rows} rows; "
                "give the model its own tokenizer"
            )
        self.head = lm.get_output_embeddings()
        self.logit_softcap = getattr(self.config, "final_logit_softcapping", None)
        eos = getattr(lm.generation_config, "eos_token_id", None) or self.config.eos_token_id
        self.eos_ids = frozenset([eos] if isinstance(eos, int) else eos or [])
        self.identity = TargetIdentity(
            model=name,
            revision=revision,
            dtype=dtype,
            architecture=type(lm).__name__,
            num_layers=len(self.decoder.layers),
            hidden_size=self.config.hidden_size,
            vocab_size=self.head.weight.shape[0],
            max_position_embeddings=self.config.max_position_embeddings,
            tokenizer_hash=tokenizer_hash(self.tokenizer) if self.tokenizer else "none",
        )
        self._check_hooks()

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
                    f"target.model: {self.identity.architecture} cannot be driven by draftsmith: {_first_line(error)}"
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

    @torch.inference_mode()
    def norm_gain(self) -> Tensor:
        """Gain [H] of the final norm as a plain RMSNorm has it: what it makes of a vector of ones.

        So a norm stored as 1 + w (Gemma) needs no special case.
        """
        ones = torch.ones(self.identity.hidden_size, dtype=self.head.weight.dtype, device=self.device)
        gain = self.decoder.norm(ones)
        if not bool(gain.any()) or not bool(gain.isfinite().all()):
            raise TargetError(f"target.model: the final norm of {self.identity.architecture} is no RMSNorm")
        return gain

    def _few_fp32_rows(self, hidden: Tensor) -> bool:
        """Where the CPU's fp32 product is twice as fast the other way round: a few rows against a whole vocabulary."""
        few = hidden.ndim == 2 and 1 < len(hidden) <= 16 and getattr(self.head, "bias", None) is None
        return few and hidden.dtype == torch.float32 and hidden.device.type == "cpu"

    def head_rows(self, ids: Tensor) -> Tensor:
        return self.head.weight[ids.to(self.device)]

    def embedding_rows(self) -> Tensor:
        return self.decoder.embed_tokens.weight

    @torch.inference_mode()
    def capture(self, documents: list[list[int]], taps: Sequence[int]) -> Capture:
        """One packed forward over all documents; time is linear in their tokens."""
        lengths = [len(d) for d in documents]
        ids = torch.tensor([i for d in documents for i in d], device=self.device)[None]
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths])[None]
        tapped, last = self._forward(ids, positions, None, PackedPlan(lengths), taps)
        return Capture(tapped[0], last[0])

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
    ) -> Iterator[tuple[int, Generation]]:
        """Continuous batching over `batch_size` cache rows; a pure function of its arguments.

        Free rows are refilled when a quarter of them stand empty, so that prompts are read in packs.
        """
        generator = torch.Generator().manual_seed(seed)
        waiting = list(range(len(prompts)))
        rows = min(self.batch_size, len(prompts))
        cache = StaticCache(rows, max(len(p) for p in prompts) + max_new_tokens)
        running: list[int | None] = [None] * rows  # prompt index in each cache row
        lengths = torch.zeros(rows, dtype=torch.long)
        outputs: dict[int, list[int]] = {}
        next_ids = torch.zeros(rows, dtype=torch.long)
        while waiting or any(r is not None for r in running):
            free = [i for i, r in enumerate(running) if r is None]
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
        if stop:
            tail = 12
            text = self.tokenizer.decode(output[-tail:])
            if any(s in text for s in stop):
                while output and any(s in self.tokenizer.decode(output[-tail:]) for s in stop):
                    output.pop()
                return "stop"
        if stop_loops and len(output) % 16 == 0 and loop_onset(output) is not None:
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
