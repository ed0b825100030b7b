"""Stage 4: train the draft by training-time test, on the target's own hidden states."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from draftsmith.data.packing import Pack, make_pack, schedule, trainable
from draftsmith.data.regenerate import read_completions
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.drafts.eagle3 import Eagle3Config, Eagle3Draft
from draftsmith.errors import CheckpointError, DataError, TargetError, TrainingError
from draftsmith.files import digest, write_json
from draftsmith.progress import Meter, say
from draftsmith.recipe import BOOKKEEPING, Recipe
from draftsmith.targets.base import Target
from draftsmith.targets.ends import DTYPES, default_taps
from draftsmith.training.capture import CaptureSource, OfflineCapture, OnlineCapture, StreamedCapture
from draftsmith.training.checkpoints import (
    checkpoint_paths,
    load_optimizers,
    load_state,
    load_weights,
    save_checkpoint,
)
from draftsmith.training.metrics import append_jsonl, converged, evaluate_heldout, truncate_jsonl
from draftsmith.training.muon import Muon
from draftsmith.training.objectives import Objective
from draftsmith.training.ttt_loss import PackInputs, TTTLoss, prepare
from draftsmith.training.world import World, whole


def draft_config(recipe: Recipe, target_config: Any, num_layers: int, draft_vocab_size: int) -> Eagle3Config:
    """The draft's shape: the recipe's values, and the target's (a `transformers` text config) where it has none."""
    wish = recipe.draft
    taps = wish.taps or default_taps(num_layers)
    beyond = [tap for tap in taps if not 0 <= tap < num_layers]
    if beyond:
        raise TargetError(f"draft.taps: {beyond[0]} given; {recipe.target.model} has layers 0..{num_layers - 1}")
    heads = wish.num_attention_heads or target_config.num_attention_heads
    kv_heads = wish.num_key_value_heads or target_config.num_key_value_heads
    if heads % kv_heads:
        raise TargetError(f"draft.num_attention_heads: {heads} is no multiple of num_key_value_heads {kv_heads}")
    rope = target_config.rope_parameters or {}
    rope = rope.get("full_attention", rope)
    return Eagle3Config(
        hidden_size=target_config.hidden_size,
        intermediate_size=wish.intermediate_size or target_config.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=wish.head_dim
        or getattr(target_config, "head_dim", None)
        or target_config.hidden_size // target_config.num_attention_heads,
        vocab_size=target_config.vocab_size,
        draft_vocab_size=draft_vocab_size,
        taps=tuple(taps),
        rope_theta=wish.rope_theta or rope.get("rope_theta", 10000.0),
        max_position_embeddings=target_config.max_position_embeddings,
        norm_before_fc=wish.norm_before_fc,
        fc_norm=wish.fc_norm,
    )


class Trainer:
    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        target_config: Any,
        completions: Path,
        vocabulary: DraftVocabulary,
        out: Path,
        world: World | None = None,
    ):
        settings = recipe.train
        self.world = world = world or World()
        if settings.accumulate % world.size:
            raise DataError(
                f"train.accumulate: {settings.accumulate} packs a step cannot be dealt out to {world.size} processes; "
                f"give a multiple of {world.size}"
            )
        self.recipe, self.settings, self.target, self.vocabulary, self.out = recipe, settings, target, vocabulary, out
        out.mkdir(parents=True, exist_ok=True)
        self.dtype = DTYPES[settings.dtype]
        self.device = target.head_rows(torch.tensor([0])).device
        rows = [c for c in read_completions(completions) if trainable(c, settings.max_document_tokens)]
        rows.sort(key=lambda c: digest(recipe.seed, c["id"]))  # held-out completions are a random choice
        if len(rows) < 2:
            raise DataError(f"train: {len(rows)} completions carry a loss; at least 2 are needed, regenerate more")
        held_out = min(settings.held_out, len(rows) // 2)
        self.heldout, self.rows = rows[:held_out], rows[held_out:]
        self.steps = schedule(
            [len(c["ids"]) for c in self.rows],
            settings.pack_tokens,
            settings.max_document_tokens,
            recipe.seed,
            settings.epochs,
            settings.accumulate,
        )[: settings.max_steps]
        config = draft_config(recipe, target_config, target.identity.num_layers, len(vocabulary.ids_D))
        self.draft = Eagle3Draft(config).to(self.device)
        self.draft.initialise(
            target.head_rows(vocabulary.ids_D), target.norm_gain(), torch.Generator().manual_seed(recipe.seed)
        )
        self.loss = TTTLoss(self.draft, settings.ttt_steps, Objective(settings.objective, settings.lk_eta))
        self.sharded = settings.shard and world.size > 1
        if self.sharded:
            if settings.optimizer == "muon":
                raise DataError("train.shard: Muon needs whole matrices; give train.optimizer adamw or shard false")
            world.shard(self.loss, self.dtype)
        self.optimizers = self._make_optimizers()
        self.head_rows = target.head_rows(vocabulary.ids_D).contiguous()
        everything = torch.arange(vocabulary.target_size)
        self.full_head = target.head_rows(everything) if settings.true_probabilities else None
        self.step = 0
        self.quarantined: list[str] = []
        self.sums: dict[str, Any] = {}
        self.taus: list[float] = []

    # --- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Run to the end of the schedule; returns the summary that is also written to summary.json."""
        self._resume()
        settings, world, capture = self.settings, self.world, self._capture_source()
        tokens = sum(
            min(len(self.rows[i]["ids"]), settings.max_document_tokens) for p in self.steps for q in p for i in q
        )
        say(
            f"train: {sum(p.numel() for p in self.draft.parameters()):,} parameters, {len(self.rows):,} completions, "
            f"{len(self.steps):,} steps, {tokens:,} tokens, {settings.dtype} on {self.device}"
            + (f", {world.size} processes" if world.size > 1 else "")
        )
        with Meter("train", len(self.steps)) as meter:
            meter.resume(self.step)
            while self.step < len(self.steps):
                started = time.perf_counter()
                step = self.steps[self.step]
                packs = [make_pack([self.rows[i] for i in p], settings.max_document_tokens) for p in world.share(step)]
                self._optimiser_step(packs, capture)
                self.step += 1
                last = self.step == len(self.steps)
                size = sum(min(len(self.rows[i]["ids"]), settings.max_document_tokens) for p in step for i in p)
                meter.advance(1, size, f"loss {self.sums['last_loss']:.3f}")
                self._write(
                    "timing.jsonl", {"step": self.step, "tokens": size, "seconds": time.perf_counter() - started}
                )
                if self.step % settings.log_every == 0 or last:
                    self._log()
                if self.step % settings.evaluate_every == 0 or last:
                    self._evaluate(capture)
                if self.step % settings.checkpoint_every == 0 or last:
                    self._checkpoint()
        summary = {
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.draft.parameters()),
            "completions": len(self.rows),
            "held_out_completions": len(self.heldout),
            "tokens": tokens,
            "quarantined": world.union(self.quarantined),
            "status": self.status,
            "tau_held_out": self.taus[-1] if self.taus else None,  # only rank 0 measures
            "checkpoint": checkpoint_paths(self.out)[-1].name,
        }
        if world.main:
            write_json(self.out / "summary.json", summary)
        return summary

    def _optimiser_step(self, packs: list[Pack], capture: CaptureSource) -> None:
        inputs = [made for pack in packs if (made := self._inputs(pack, capture)) is not None]
        if self.sharded and len(inputs) < len(packs):
            raise TrainingError(
                "train.shard: a whole pack was quarantined on one process, which sharded training cannot sit out; "
                "go on with train.shard false"
            )
        lr = self._learning_rate()
        for optimizer in self.optimizers:
            beside_muon = len(self.optimizers) > 1 and isinstance(optimizer, torch.optim.AdamW)
            for group in optimizer.param_groups:
                group["lr"] = lr * (self.settings.head_rate if beside_muon else 1.0)
        weights = self._step_weights([i.pack for i in inputs])
        total = 0.0
        alpha_sums, alpha_counts = [0.0] * self.settings.ttt_steps, [0] * self.settings.ttt_steps
        for pack_inputs in inputs:
            loss, alphas = self._forward(pack_inputs, weights)
            (loss * self.world.size if self.sharded else loss).backward()  # FSDP2 averages where we sum
            total += loss.item()
            for i, alpha in enumerate(alphas):
                alpha_sums[i] += alpha.sum().item()
                alpha_counts[i] += len(alpha)
        if not self.sharded:
            self.world.sum_gradients(list(self.draft.parameters()))
        total, *flat = self.world.sum([total, *alpha_sums, *alpha_counts])
        alpha_sums, alpha_counts = flat[: len(alpha_sums)], [round(n) for n in flat[len(alpha_sums) :]]
        norm = whole(torch.nn.utils.clip_grad_norm_(self.draft.parameters(), self.settings.clip_norm)).item()
        if not (math.isfinite(norm) and math.isfinite(total)):
            names = [name for pack in packs for name in pack.names]
            raise TrainingError(
                f"train: step {self.step + 1}: the gradient is not finite (norm {norm}, loss {total}); samples: "
                f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''}; the last checkpoint is untouched"
            )
        for optimizer in self.optimizers:
            if any(alpha_counts):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        sums = self.sums or {
            "loss": 0.0,
            "norm": 0.0,
            "count": 0,
            "alpha": [0.0] * len(alpha_sums),
            "alpha_n": [0] * len(alpha_sums),
        }
        sums["loss"] += total
        sums["norm"] += norm
        sums["count"] += 1
        sums["alpha"] = [a + b for a, b in zip(sums["alpha"], alpha_sums, strict=True)]
        sums["alpha_n"] = [a + b for a, b in zip(sums["alpha_n"], alpha_counts, strict=True)]
        self.sums = {**sums, "last_loss": total, "lr": lr}

    def _forward(self, inputs: PackInputs, weights: list[float]) -> tuple[Tensor, list[Tensor]]:
        """Loss with the parameters cast to the compute dtype; gradients arrive at the fp32 masters."""
        if self.dtype == torch.float32 or self.sharded:  # FSDP2 casts by itself
            return self.loss(inputs, weights)
        cast = {name: p.to(self.dtype) for name, p in self.loss.named_parameters()}
        return functional_call(self.loss, cast, (inputs, weights))

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for everything, or Muon for the layer's and fc's matrices and AdamW for the head and the norms.

        Muon's steps are scaled to AdamW's size, so one learning rate nearly serves both; `head_rate` is the rest.
        """
        settings = self.settings
        use_muon = settings.optimizer == "muon"
        matrices = [
            p for n, p in self.draft.named_parameters() if use_muon and p.ndim == 2 and not n.startswith("lm_head")
        ]
        chosen = {id(p) for p in matrices}
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [p for p in self.draft.parameters() if id(p) not in chosen],
                lr=settings.learning_rate,
                betas=settings.betas,
                weight_decay=settings.weight_decay,
                fused=True,
            )
        ]
        if matrices:
            optimizers.append(
                Muon(matrices, settings.learning_rate, settings.weight_decay, dtype=self.dtype),
            )
        return optimizers

    # --- the parts ----------------------------------------------------------------------------------------------

    def _inputs(self, pack: Pack, capture: CaptureSource) -> PackInputs | None:
        """Hidden states and teacher of a pack; documents with NaN or Inf among them are quarantined."""
        states = capture(pack.names, pack.documents)
        taps, last = states.taps_TKH.to(self.device), states.last_TH.to(self.device)
        if not (taps.isfinite().all() and last.isfinite().all()):
            good, start = [], 0
            by_name = {c["id"]: c for c in (*self.rows, *self.heldout)}
            for name, document in zip(pack.names, pack.documents, strict=True):
                part = slice(start, start + len(document))
                start += len(document)
                if taps[part].isfinite().all() and last[part].isfinite().all():
                    good.append((name, part))
                elif name not in self.quarantined:
                    self.quarantined.append(name)
                    say(f"train: {name} has NaN or Inf in its hidden states; quarantined")
            if not good:
                return None
            pack = make_pack([by_name[name] for name, _ in good], self.settings.max_document_tokens)
            taps, last = (torch.cat([x[part] for _, part in good]) for x in (taps, last))
        # Made under inference mode, and autograd saves only ordinary tensors.
        taps, last = taps.clone(), last.clone()
        return prepare(
            pack,
            taps,
            last,
            self.target.embedding_rows(),
            self.head_rows,
            self.full_head,
            self.target.logit_softcap,
            self.dtype,
        )

    def _step_weights(self, packs: list[Pack]) -> list[float]:
        """Weight of one scored row at every step: a mean over the whole batch, whatever its packing."""
        decay = [self.settings.step_decay**i for i in range(self.settings.ttt_steps)]
        counts = self.world.sum([sum(len(p.step_rows(i)) for p in packs) for i in range(self.settings.ttt_steps)])
        return [d / (sum(decay) * max(1, n)) for d, n in zip(decay, counts, strict=True)]

    def _learning_rate(self) -> float:
        """Linear warm-up, then a cosine to `final_share` of the peak."""
        settings, total = self.settings, len(self.steps)
        warmup = max(1, round(settings.warmup_share * total))
        if self.step < warmup:
            return settings.learning_rate * (self.step + 1) / warmup
        progress = (self.step - warmup) / max(1, total - warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return settings.learning_rate * (settings.final_share + (1 - settings.final_share) * cosine)

    def _capture_source(self) -> CaptureSource:
        taps = self.draft.config.taps
        if self.settings.capture == "online" and self.recipe.target.engine == "transformers":
            return OnlineCapture(self.target, taps)
        if self.settings.capture == "online":
            return StreamedCapture(self.target, taps, self._packs_to_come(), self.recipe.server.packs_ahead)
        limit = self.settings.max_document_tokens
        documents = {c["id"]: c["ids"][:limit] for c in (*self.heldout, *self.rows)}
        return OfflineCapture(self.out / "hidden_states", self.target, taps, documents, self.world)

    def _packs_to_come(self) -> Iterator[tuple[list[str], list[list[int]]]]:
        for step in self.steps[self.step :]:
            for indices in self.world.share(step):
                pack = make_pack([self.rows[i] for i in indices], self.settings.max_document_tokens)
                yield pack.names, pack.documents

    def _heldout_packs(self, capture: CaptureSource) -> Iterator[PackInputs]:
        settings = self.settings
        lengths = [len(c["ids"]) for c in self.heldout]
        for step in schedule(lengths, settings.pack_tokens, settings.max_document_tokens, 0, 1, 1):
            pack = make_pack([self.heldout[i] for i in step[0]], settings.max_document_tokens)
            inputs = self._inputs(pack, capture)
            if inputs is not None:
                yield inputs

    def _evaluate(self, capture: CaptureSource) -> None:
        steps = self.settings.ttt_steps
        weights = {name: whole(tensor).to(self.dtype) for name, tensor in self.draft.state_dict().items()}
        if not self.world.main:
            return
        cast = Eagle3Draft(self.draft.config).to(self.device, self.dtype)
        cast.load_state_dict(weights)
        result = evaluate_heldout(cast, self._heldout_packs(capture), self.vocabulary.ids_D, steps)
        self.taus.append(result[f"tau_{min(3, steps)}"])
        self._write("metrics.jsonl", {"step": self.step, "held_out": result})

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if self.world.main:
            append_jsonl(self.out / name, row)

    def _log(self) -> None:
        sums = self.sums
        self._write(
            "metrics.jsonl",
            {
                "step": self.step,
                "loss": sums["loss"] / sums["count"],
                "gradient_norm": sums["norm"] / sums["count"],
                "learning_rate": sums["lr"],
                "alpha": [a / max(1, n) for a, n in zip(sums["alpha"], sums["alpha_n"], strict=True)],
            },
        )
        self.sums = {}

    @property
    def status(self) -> str:
        return "converged" if converged(self.taus, self.settings.patience) else "preview"

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _belongs(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be continued by this run."""
        recipe = self.recipe
        return {
            "draft": self.draft.config.to_dict(),
            "vocabulary": self.vocabulary.name,
            "target": self.target.identity.__dict__,
            "train": recipe.train.model_dump(mode="json", exclude=BOOKKEEPING),
            "seed": recipe.seed,
            "data": digest([c["id"] for c in self.rows], [len(c["ids"]) for c in self.rows]),
        }

    def _checkpoint(self) -> None:
        state = {
            "step": self.step,
            **self._belongs(),
            "status": self.status,
            "taus": self.taus,
            "sums": self.sums,
            "quarantined": self.world.union(self.quarantined),
        }
        save_checkpoint(self.out, self.draft, self.optimizers, state, self.settings.keep_checkpoints, self.world.main)
        self.world.wait()

    def _resume(self) -> None:
        """Continue from the newest checkpoint, which must belong to this very run."""
        paths = checkpoint_paths(self.out)
        if paths:
            state = load_state(paths[-1])
            for key, value in self._belongs().items():
                if state.get(key) != value:
                    raise CheckpointError(
                        f"{paths[-1]}: was trained with another {key}; use another --out, or delete the directory"
                    )
            load_weights(paths[-1], self.draft)
            load_optimizers(paths[-1], self.draft, self.optimizers)
            self.step, self.taus = state["step"], state["taus"]
            self.sums, self.quarantined = state["sums"], state["quarantined"]
            say(f"train: continuing from {paths[-1].name}")
        self.world.wait()
        if self.world.main:
            for name in ("metrics.jsonl", "timing.jsonl"):
                truncate_jsonl(self.out / name, self.step)
