"""Stage 4: train the draft by training-time test, on the target's own hidden states."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from draftsmith.core import run_files
from draftsmith.core.errors import CheckpointError, DataError, TrainingError
from draftsmith.core.files import digest, sync
from draftsmith.core.progress import Meter, say
from draftsmith.core.recipe import BOOKKEEPING, Recipe
from draftsmith.core.records.data import Completion
from draftsmith.core.records.training import Belongs, Best, MetricsRow, StepTiming, TrainingState, TrainingSummary
from draftsmith.data.regenerate import read_completions
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.drafts import METHODS
from draftsmith.drafts.objectives import pack_inputs
from draftsmith.drafts.packing import Pack, PackInputs, epoch_packs, make_pack, on_prompts, to_device, trainable
from draftsmith.targets.base import Target
from draftsmith.targets.parts import DTYPES, tell_slow_products
from draftsmith.training.capture import CaptureSource, OfflineCapture, OnlineCapture, PrefetchedCapture
from draftsmith.training.checkpoints import (
    BEST,
    checkpoint_paths,
    load_optimizers,
    load_state,
    load_weights,
    save_best,
    save_checkpoint,
    tidy,
    whole_weights,
)
from draftsmith.training.metrics import Measured, converged, evaluate_heldout, step_flops, truncate_rows
from draftsmith.training.optimizers import make_optimizers
from draftsmith.training.processes import ProcessGroup
from draftsmith.training.start import first_draft, fit
from draftsmith.training.tracking import tracked


class Trainer:
    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        completions: Path,
        vocabulary: DraftVocabulary,
        out: Path,
        processes: ProcessGroup | None = None,
        peak_flops_s: float | None = None,
    ):
        """peak_flops_s: of a device in the dtype of training; with it the share that is reached is told."""
        settings = recipe.train
        self.processes = processes = processes or ProcessGroup()
        processes.require_possible(settings)
        self.recipe, self.settings, self.target, self.vocabulary, self.out = recipe, settings, target, vocabulary, out
        self.peak_flops_s = peak_flops_s
        out.mkdir(parents=True, exist_ok=True)
        self.dtype = DTYPES[settings.dtype]
        self.device = target.head_rows(torch.tensor([0])).device
        if target.identity.dtype != settings.dtype:  # else it was told of the target
            tell_slow_products(self.device, settings.dtype, "train.dtype")
        self.heldout, self.rows = self._split(list(read_completions(completions)))
        lengths, each, seed = [len(c.ids) for c in self.rows], settings.accumulate, recipe.seed
        packs = [pack for n in range(settings.epochs) for pack in epoch_packs(lengths, settings.pack_tokens, seed, n)]
        steps = [packs[i : i + each] for i in range(0, len(packs), each)]
        if len(steps) > 1 and (left := len(packs) % each):
            steps.pop()
            say(f"train: the last {left} of {len(packs)} packs are left out; a step takes {each}")
        self.steps = steps[: settings.max_steps]
        self.method = METHODS[recipe.draft.method]
        layers, rows = target.identity.num_layers, len(vocabulary.ids_D)
        if settings.max_steps and settings.max_steps > len(steps):
            say(f"train: {settings.epochs} epochs end after {len(steps):,} steps; max_steps is {settings.max_steps:,}")
        note = self.method.config_note(recipe.draft, target.config)
        if note and settings.from_draft is None:  # an earlier draft has its own shape
            say(note)
        usual = self.method.config(recipe.draft, target.config, layers, rows)
        self.draft, self.start = first_draft(recipe, target, usual, vocabulary.ids_D)
        self.draft.to(self.device)
        self.loss = self.method.loss(self.draft, settings)
        self.sharded = settings.shard and processes.size > 1
        if settings.shard and not self.sharded:
            say("train.shard: left out, as one process trains; start several by torchrun")
        if self.sharded:
            processes.shard(self.loss, self.dtype)
        self.optimizers = make_optimizers(self.draft, settings, self.dtype)
        self.head_rows = target.head_rows(vocabulary.ids_D).contiguous()
        full = settings.full_teacher and rows < vocabulary.target_size  # of a whole vocabulary the two are one
        self.full_head = target.head_rows(torch.arange(vocabulary.target_size)) if full else None
        self.step = 0
        self.quarantined: list[str] = []
        self.unlogged: list[Measured] = []  # of the steps since the last row of metrics
        self.taus: list[float] = []

    def _split(self, every: list[Completion]) -> tuple[list[Completion], list[Completion]]:
        """Completions that are held out, a random choice, and those to train on, all cut to max_document_tokens; counts
        and says what is left out."""
        longest = self.settings.max_document_tokens
        rows = [c for c in every if trainable(c, longest)]
        self.left_out = len(every) - len(rows)
        self.cut = sum(len(c.ids) > longest for c in rows)
        if self.left_out or self.cut:
            say(
                f"train: {self.left_out} of {len(every)} completions carry no loss within train.max_document_tokens "
                f"{longest} and are left out; {self.cut} are cut there"
            )
        rows.sort(key=lambda c: digest(self.recipe.seed, c.id))  # held-out completions are a random choice
        if len(rows) < 2:
            raise DataError(
                f"train: {len(rows)} completions have a loss, 2 have to; raise train.max_document_tokens or add prompts"
            )
        held_out = min(self.settings.held_out, len(rows) // 2)
        self.data = digest([c.id for c in rows[held_out:]], [len(c.ids) for c in rows[held_out:]])
        rows = [c.model_copy(update={"ids": c.ids[:longest]}) for c in rows]
        training = rows[held_out:]
        return rows[:held_out], on_prompts(training) if self.settings.on_prompts else training

    # --- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> TrainingSummary:
        with self.processes.together():
            return self._train()

    def _train(self) -> TrainingSummary:
        self._resume()
        settings, processes, source = self.settings, self.processes, self._capture_source()
        if self.step == 0 and self.start is None and self.draft.fits:
            self._fit(source)
        capture = self._ahead(source, self._packs_to_come())
        tokens = sum(len(self.rows[i].ids) for p in self.steps for q in p for i in q)
        say(
            f"train: {sum(p.numel() for p in self.draft.parameters()):,} parameters, {len(self.rows):,} completions, "
            f"{len(self.steps):,} steps, {tokens:,} tokens, {settings.dtype} on {self.device}"
            + (f", {processes.size} processes" if processes.size > 1 else "")
        )
        flops = seconds = 0.0
        with tracked(self.recipe, self.out, self.step, processes.main), Meter("train", len(self.steps)) as meter:
            meter.resume(self.step)
            while self.step < len(self.steps):
                started, cpu = time.perf_counter(), time.process_time()
                step = self.steps[self.step]
                packs = [make_pack([self.rows[i] for i in p]) for p in processes.share(step)]
                self._optimiser_step(packs, capture)
                self.step += 1
                last = self.step == len(self.steps)
                size = sum(len(self.rows[i].ids) for p in step for i in p)
                spent = time.perf_counter() - started
                flops, seconds = flops + step_flops(self.draft, settings, packs), seconds + spent
                share = f", {flops / seconds / self.peak_flops_s:.0%} MFU" if self.peak_flops_s else ""
                meter.advance(1, size, f"loss {self.unlogged[-1].loss:.3f}{share}")
                used = time.process_time() - cpu
                timing = StepTiming(step=self.step, tokens=size, seconds=spent, cpu_seconds=used)
                self._write(run_files.STEP_TIMING, timing)
                saves = self.step % settings.checkpoint_every == 0 or last
                if self.step % settings.log_every == 0 or saves:
                    self._log()
                if self.step % settings.evaluate_every == 0 or last:
                    self._evaluate(source)
                if saves:
                    self._checkpoint()
        best = self.out / BEST
        summary = TrainingSummary(
            steps=self.step,
            parameters=sum(p.numel() for p in self.draft.parameters()),
            completions=len({i for step in self.steps for pack in step for i in pack}),
            held_out_completions=len(self.heldout),
            completions_left_out=self.left_out,
            completions_cut=self.cut,
            tokens=tokens,
            quarantined=processes.union(self.quarantined),
            status=self.status,
            tau_held_out=self.taus[-1],
            best=load_state(best).best if best.exists() else None,
            checkpoint=checkpoint_paths(self.out)[-1].name,
        )
        if processes.main:
            summary.save(self.out / run_files.SUMMARY)
        return summary

    def _fit(self, source: CaptureSource) -> None:
        """By the first packs of one process, however many there are."""
        first = epoch_packs([len(c.ids) for c in self.rows], self.settings.pack_tokens, self.recipe.seed, epoch=0)
        packs = (make_pack([self.rows[i] for i in indices]) for indices in first)
        fit(self.draft, packs, source, self.target, self.processes)

    def _optimiser_step(self, packs: list[Pack], capture: CaptureSource) -> None:
        lr = self._learning_rate()
        for optimizer in self.optimizers:
            beside_muon = len(self.optimizers) > 1 and isinstance(optimizer, torch.optim.AdamW)
            for group in optimizer.param_groups:
                group["lr"] = lr * (self.settings.head_rate if beside_muon else 1.0)
        while (measured := self._gradients(packs, capture)) is None:
            self.draft.zero_grad()
        if not (math.isfinite(measured.gradient_norm) and math.isfinite(measured.loss)):
            names = [name for pack in packs for name in pack.names]
            raise TrainingError(
                f"train: step {self.step + 1}: the gradient is not finite (norm {measured.gradient_norm}, loss "
                f"{measured.loss}); samples: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}; the "
                "last checkpoint is untouched"
            )
        for optimizer in self.optimizers if any(measured.scored) else ():
            optimizer.step()
        self.draft.zero_grad()
        self.unlogged.append(measured)

    def _gradients(self, packs: list[Pack], capture: CaptureSource) -> Measured | None:
        """Gradients of all packs, one pack in memory at a time. None where hidden states were not finite: their
        documents are now quarantined, and the step has to be done again without them.
        """
        kept = [good for pack in packs if (good := self._without_quarantined(pack)) is not None]
        weights, counts = self._step_weights(kept)
        done = [seen for pack in packs if (seen := self._backward(pack, capture, weights)) is not None]
        if self.sharded:
            self._keep_pace(len(done))
        else:
            self.processes.sum_gradients(self.draft.parameters())
        clipped = torch.nn.utils.clip_grad_norm_(self.draft.parameters(), self.settings.clip_norm)
        norm = clipped.full_tensor() if isinstance(clipped, DTensor) else clipped
        # The step's one look at the device: until here the host only lays out work for it.
        *flat, measured_norm = torch.cat([*(measured for _, _, measured in done), norm.reshape(1)]).tolist()
        width = 2 + self.settings.ttt_steps
        broken, total, *alpha_sums = self.processes.sum([sum(flat[at::width], 0.0) for at in range(width)])
        if broken:
            for pack, finite_T, _ in done:
                self._quarantine(pack, finite_T)
            return None
        return Measured(total, measured_norm, alpha_sums, counts, self._learning_rate())

    def _backward(self, pack: Pack, capture: CaptureSource, weights: list[float]) -> tuple[Pack, Tensor, Tensor] | None:
        """(pack that was trained on, which of its tokens have finite states, and on the device: 1 where not all have,
        loss, sum of alpha by depth); None where nothing of it is left."""
        inputs = self._inputs(pack, capture)
        if inputs is None:
            return None
        loss, alphas = self._forward(inputs, weights)
        (loss * self.processes.size if self.sharded else loss).backward()  # FSDP2 averages where we sum
        broken = (~inputs.finite_T.all()).float()
        measured = torch.stack([broken, loss.detach(), *(alpha.sum() for alpha in alphas)])
        return inputs.pack, inputs.finite_T, measured

    def _keep_pace(self, done: int) -> None:
        """Sharded weights are gathered by all processes or by none, so one that has no pack where others have one, be
        it left over or quarantined, goes through one that weighs nothing."""
        most = math.ceil(len(self.steps[self.step]) / self.processes.size)
        for _ in range(most - done):
            pack, size = make_pack(self.rows[:1]), self.target.identity.hidden_size
            taps = self.head_rows.new_zeros(len(pack.ids_T), len(self.draft.config.taps), size)
            loss, _ = self._forward(self._pack_inputs(pack, taps, taps[:, 0]), [0.0] * self.settings.ttt_steps)
            loss.backward()

    def _forward(self, inputs: PackInputs, weights: list[float]) -> tuple[Tensor, list[Tensor]]:
        """Loss with the parameters cast to the compute dtype; gradients arrive at the fp32 masters."""
        if self.dtype == torch.float32 or self.sharded:  # FSDP2 casts by itself
            return self.loss(inputs, weights)
        cast = {name: p.to(self.dtype) for name, p in self.loss.named_parameters()}
        return functional_call(self.loss, cast, (inputs, weights))

    # --- the parts ----------------------------------------------------------------------------------------------

    def _inputs(self, pack: Pack, capture: CaptureSource) -> PackInputs | None:
        """Hidden states and teacher of a pack without its quarantined documents; None where it has no others."""
        states = capture(pack)
        good = self._without_quarantined(pack)
        if good is None:
            return None
        taps, last = to_device(states.taps_TKH, self.device), to_device(states.last_TH, self.device)
        if good is not pack:
            named = zip(pack.names, map(len, pack.documents), strict=True)
            kept = torch.tensor([name not in self.quarantined for name, size in named for _ in range(size)])
            taps, last = taps[kept.to(self.device)], last[kept.to(self.device)]
        return self._pack_inputs(good, taps, last)

    def _pack_inputs(self, pack: Pack, taps: Tensor, last: Tensor) -> PackInputs:
        rows, full, softcap = self.head_rows, self.full_head, self.target.logit_softcap
        return pack_inputs(pack, taps, last, self.target.embedding_rows(), rows, full, softcap, self.dtype)

    def _without_quarantined(self, pack: Pack) -> Pack | None:
        if not any(name in self.quarantined for name in pack.names):
            return pack
        by_name = {c.id: c for c in (*self.rows, *self.heldout)}
        good = [by_name[name] for name in pack.names if name not in self.quarantined]
        return make_pack(good) if good else None

    def _quarantine(self, pack: Pack, finite_T: Tensor) -> bool:
        """Leave the documents with NaN or Inf in their hidden states out from now on; whether there are any."""
        parts = finite_T.cpu().split([len(document) for document in pack.documents])
        broken = [name for name, part in zip(pack.names, parts, strict=True) if not part.all()]
        for name in broken:
            say(f"train: {name} has NaN or Inf in its hidden states; quarantined")
        self.quarantined += broken
        return bool(broken)

    def _step_weights(self, packs: list[Pack]) -> tuple[list[float], list[int]]:
        """(weight of one scored row, scored rows) at every step: a mean over the whole batch, whatever its packing."""
        decay = [self.settings.step_decay**i for i in range(self.settings.ttt_steps)]
        counts = self.processes.sum([sum(len(p.step_rows(i)) for p in packs) for i in range(self.settings.ttt_steps)])
        weights = [d / (sum(decay) * max(1, n)) for d, n in zip(decay, counts, strict=True)]
        return weights, [round(n) for n in counts]

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
        if self.settings.capture == "offline":
            documents = {c.id: c.ids for c in (*self.heldout, *self.rows)}
            return OfflineCapture(self.out / run_files.HIDDEN_STATES, self.target, taps, documents, self.processes)
        return OnlineCapture(self.target, taps)

    def _ahead(self, source: CaptureSource, packs: Iterator[Pack]) -> CaptureSource:
        online = isinstance(source, OnlineCapture)
        if online and not self.target.independent and self.device.type != "cuda":
            return source  # target and draft would only take each other's cores
        ahead = self.recipe.server.packs_ahead if online and self.target.independent else 1
        return PrefetchedCapture(source, packs, ahead, self.device)

    def _packs_to_come(self) -> Iterator[Pack]:
        for step in self.steps[self.step :]:
            for indices in self.processes.share(step):
                yield make_pack([self.rows[i] for i in indices])

    def _heldout_inputs(self, source: CaptureSource) -> Iterator[PackInputs]:
        """Of this process's share."""
        chosen = epoch_packs([len(c.ids) for c in self.heldout], self.settings.pack_tokens, seed=0, epoch=0)
        every = [make_pack([self.heldout[i] for i in indices]) for indices in chosen]
        packs = [good for p in self.processes.share(every) if (good := self._without_quarantined(p)) is not None]
        capture = self._ahead(source, iter(packs))
        for pack in packs:
            inputs = self._inputs(pack, capture)
            if inputs is not None and self._quarantine(inputs.pack, inputs.finite_T):
                inputs = self._inputs(pack, capture)
            if inputs is not None:
                yield inputs

    def _evaluate(self, source: CaptureSource) -> None:
        steps = self.settings.ttt_steps
        cast = self.method.build(self.draft.config).to(self.device, self.dtype)
        cast.load_state_dict(whole_weights(self.draft, everywhere=True))
        ids_D, inputs = self.vocabulary.ids_D, self._heldout_inputs(source)
        result = evaluate_heldout(cast, inputs, ids_D, steps, self.processes.sum)
        self.taus.append(result.tau[min(3, steps)])
        self._write(run_files.METRICS, MetricsRow(step=self.step, held_out=result))
        if self.taus[-1] > max(self.taus[:-1], default=0.0):
            best, masters = Best(step=self.step, tau_held_out=self.taus[-1]), whole_weights(self.draft)
            if self.processes.main:
                save_best(self.out, masters, TrainingState(belongs=self._belongs(), step=self.step, best=best))

    def _write(self, name: str, row: MetricsRow | StepTiming) -> None:
        if self.processes.main:
            with (self.out / name).open("ab") as file:
                file.write(row.line())

    def _log(self) -> None:
        steps = self.unlogged
        alpha = map(sum, zip(*(m.alpha for m in steps), strict=True))
        scored = map(sum, zip(*(m.scored for m in steps), strict=True))
        row = MetricsRow(
            step=self.step,
            loss=sum(m.loss for m in steps) / len(steps),
            gradient_norm=sum(m.gradient_norm for m in steps) / len(steps),
            learning_rate=steps[-1].learning_rate,
            alpha=[a / max(1, n) for a, n in zip(alpha, scored, strict=True)],
        )
        self._write(run_files.METRICS, row)
        self.unlogged = []

    @property
    def status(self) -> Literal["preview", "converged"]:
        return "converged" if converged(self.taus, self.settings.patience) else "preview"

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _belongs(self) -> Belongs:
        recipe = self.recipe
        return Belongs(
            method=self.method.name,
            draft=self.draft.config.model_dump(mode="json"),
            vocabulary=self.vocabulary.name,
            target=self.target.identity,
            train=recipe.train.model_dump(mode="json", exclude=BOOKKEEPING),
            seed=recipe.seed,
            data=self.data,
            start=self.start,
        )

    def _checkpoint(self) -> None:
        state = TrainingState(
            belongs=self._belongs(),
            step=self.step,
            status=self.status,
            taus=self.taus,
            quarantined=self.processes.union(self.quarantined),
        )
        for rows in (self.out / run_files.METRICS, self.out / run_files.STEP_TIMING):
            if self.processes.main and rows.exists():
                sync(rows)  # a run goes on from the checkpoint with the rows before it
        save_checkpoint(
            self.out, self.draft, self.optimizers, state, self.settings.keep_checkpoints, self.processes.main
        )
        self.processes.meet()

    def _resume(self) -> None:
        """Continue from the newest checkpoint, which must belong to this very run."""
        if self.processes.main:
            tidy(self.out, self.settings.keep_checkpoints)
        paths = checkpoint_paths(self.out)
        if paths:
            state, own = load_state(paths[-1]), self._belongs()
            for key in Belongs.model_fields:
                if getattr(state.belongs, key) != getattr(own, key):
                    raise CheckpointError(
                        f"{paths[-1]}: was trained with another {key}; give another --out, or train anew: draftsmith "
                        "run RECIPE --redo train"
                    )
            load_weights(paths[-1], self.draft)
            load_optimizers(paths[-1], self.draft, self.optimizers)
            self.step, self.taus = state.step, list(state.taus)
            self.quarantined = list(state.quarantined)
            say(f"train: continuing from {paths[-1].name}")
        self.processes.meet()
        if self.processes.main:
            truncate_rows(self.out / run_files.METRICS, MetricsRow, self.step)
            truncate_rows(self.out / run_files.STEP_TIMING, StepTiming, self.step)
