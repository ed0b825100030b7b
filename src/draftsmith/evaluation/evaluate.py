"""Stage 6: measure the exported draft by decoding with it; writes results.json.

Schema of results.json (version 1); every tau comes as {tau, low, high, prompts, steps}, low and high null under ten
prompts:
    schema, created_with      version of this schema; package versions, commit, hardware
    settings                  prompts used and available, max_new_tokens, target and its dtype
    acceptance[]              one entry per shape and temperature: shape, temperature, all, by_category,
                              acceptance_by_depth, looping_share, tau_with_loops, tokens, prompts[] (raw counts);
                              for chains at temperature > 0 also oracle {tau, ...} and share_of_oracle
    lossless                  greedy identity in fp32: prompts, tokens, shapes, differences[], identical
    speed[]                   per shape: plain_tokens_per_s, drafted_tokens_per_s, speedup (median over prompts),
                              tau on the same tokens, differences[] of the bf16 outputs with their logit gaps
    profile                   ranks of the target's own tokens among the draft's choices: prompts, positions,
                              table[depth][rank], walks[prompt][position] (evaluation/profile.py); null without text
    partial                   true where fewer prompts were used than the set holds
"""

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from draftsmith.data.loops import loop_onset
from draftsmith.data.regenerate import longest_prompt, open_conversations
from draftsmith.data.templates import ChatFormat
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder, Eagle3Drafter
from draftsmith.decoding.tree import Shape
from draftsmith.drafts.checkpoint import Reading, load_draft, own_embedding
from draftsmith.errors import CheckpointError, DataError, TargetError
from draftsmith.evaluation.acceptance import PromptAcceptance, bootstrap_tau, count, oracle_walk, summarise, tau_text
from draftsmith.evaluation.lossless import compare, greedy_identity, lossless_verdict
from draftsmith.evaluation.profile import accept_profile
from draftsmith.files import read_json, read_jsonl, write_json
from draftsmith.progress import Meter, say
from draftsmith.recipe import Recipe
from draftsmith.targets.endings import stop_length
from draftsmith.targets.ends import DTYPES
from draftsmith.targets.local import LocalTarget

SCHEMA = 1
SHORTEST_TIMED = 8  # tokens
PROFILE_PROMPTS = 48


def balanced(prompts: list[dict], limit: int | None) -> list[dict]:
    """The first prompts of every category in turn, so that a few are as many of each."""
    queues = defaultdict(list)
    for prompt in prompts:
        queues[prompt["category"]].append(prompt)
    order: list[dict] = []
    while any(queues.values()):
        order += [queue.pop(0) for queue in queues.values() if queue]
    return order[:limit]


def drafter_for(target: LocalTarget, directory: Path, dtype: str, reading: Reading | None = None) -> Eagle3Drafter:
    """`reading`: how to take the taps of a draft that others made (drafts/checkpoint.py)."""
    draft, ids = load_draft(directory, DTYPES[dtype], target.identity.num_layers, reading)
    if draft.config.tap_size != target.identity.hidden_size or draft.config.vocab_size != target.identity.vocab_size:
        raise CheckpointError(
            f"{directory}: made for hidden size {draft.config.tap_size} and {draft.config.vocab_size} tokens, but "
            f"{target.identity.model} has {target.identity.hidden_size} and {target.identity.vocab_size}"
        )
    target.check_taps(draft.config.taps)
    embedding = own_embedding(directory)
    if embedding is None:
        embedding = target.embedding_rows()
    if embedding.shape[1] != draft.config.hidden_size:
        raise CheckpointError(
            f"{directory}: the draft reads embeddings {draft.config.hidden_size} wide, but those of "
            f"{target.identity.model} are {embedding.shape[1]} wide; it needs an embed_tokens.weight of its own"
        )
    return Eagle3Drafter(draft.to(target.device), ids, embedding)


class Evaluation:
    def __init__(
        self, recipe: Recipe, target: LocalTarget, directory: Path, prompts_file: Path, reading: Reading | None = None
    ):
        self.recipe, self.settings, self.target, self.directory = recipe, recipe.evaluate, target, directory
        chat = ChatFormat.of(recipe, target)
        available = list(read_jsonl(prompts_file))
        chosen = balanced(available, self.settings.prompts)
        self.available = len(available)
        longest = longest_prompt(recipe.regenerate, target.context)
        opened = open_conversations(chosen, chat, longest, recipe.prompts.skip_bad)
        self.prompts = [(c.prompt["id"], c.prompt["category"], c.ids) for c in opened]
        if not opened:
            raise DataError("evaluate: no evaluation prompt is shorter than regenerate.max_prompt_tokens; raise it")
        self.stop = chat.stop
        self.ends = partial(stop_length, target.tokenizer, stop=chat.stop) if chat.stop else None
        self.shapes = [Shape(s.steps, s.topk, s.draft_tokens) for s in self.settings.shapes]
        if target.library is not None:
            self._only_what_the_library_verifies(target.library.can_cut_back)
        self.plain = Decoder(target)
        self.drafter = drafter_for(target, directory, recipe.target.dtype, reading)
        self.speculative = Decoder(target, self.drafter)

    def _only_what_the_library_verifies(self, chains: bool) -> None:
        """Chains where a rejected token can be forgotten, else nothing."""
        if not chains:
            raise TargetError(
                f"evaluate.engine: {self.target.identity.architecture} keeps a state that cannot be cut back, so only "
                "an engine verifies its drafts; give --evaluate.engine vllm or sglang"
            )
        left_out = [str(shape) for shape in self.shapes if shape.topk > 1]
        self.shapes = [shape for shape in self.shapes if shape.topk == 1]
        if left_out:
            say(f"evaluate: {', '.join(left_out)} left out; transformers' own forward verifies chains only")
        if not self.shapes:
            raise TargetError("evaluate.shapes: none that can be verified here; add steps: 3, topk: 1, draft_tokens: 4")

    def answers(self) -> list[list[int]]:
        """Greedy answers of the target alone to the prompts that `profile` reads."""
        prompts = [ids for _, _, ids in self.prompts[:PROFILE_PROMPTS]]
        made = dict(self.target.generate(prompts, Sampling(), self.settings.max_new_tokens, self.stop))
        return [made[i].ids for i in range(len(prompts))]

    def profile(self) -> dict[str, Any] | None:
        prompts = [ids for _, _, ids in self.prompts[:PROFILE_PROMPTS]]
        ids_D = torch.tensor(self.drafter.ids)
        length = self.settings.max_new_tokens
        drafter = self.drafter
        return accept_profile(self.target, drafter.draft, ids_D, prompts, length, self.stop, drafter.embedding_VH)

    def acceptance(self, shape: Shape, temperature: float) -> dict[str, Any]:
        settings = self.settings
        sampling = Sampling(temperature, settings.top_p, settings.top_k) if temperature else Sampling()
        rows: list[PromptAcceptance] = []
        oracle: list[tuple[int, int]] = []
        with Meter(f"tau {shape} T={temperature:g}", len(self.prompts), "prompts") as meter:
            for number, (name, category, prompt) in enumerate(self.prompts):
                decoded = self.speculative.generate(
                    prompt, sampling, settings.max_new_tokens, shape, seed=self.recipe.seed + number, ends=self.ends
                )
                rows.append(count(name, category, decoded, shape.steps))
                if shape.topk == 1 and temperature:
                    oracle.append(self._oracle(prompt, decoded.ids, shape.steps))
                meter.advance(
                    1,
                    len(decoded.ids),
                    f"tau {1 + sum(r.accepted for r in rows) / max(1, sum(r.steps for r in rows)):.2f}",
                )
        result = {
            "shape": str(shape),
            "temperature": temperature,
            **summarise(rows),
            "prompts": [row.to_dict() for row in rows],
        }
        if oracle:
            result["oracle"] = bootstrap_tau([a for a, _ in oracle], [v for _, v in oracle])
            own = result["all"]["tau"]
            best = result["oracle"]["tau"]
            result["share_of_oracle"] = (own - 1) / (best - 1) if own and best and best > 1 else None
        return result

    @torch.inference_mode()
    def _oracle(self, prompt: list[int], ids: list[int], steps: int) -> tuple[int, int]:
        last = self.target.capture([[*prompt, *ids]], ()).last_TH[len(prompt) - 1 : -1]
        hits = (self.target.logits(last).argmax(-1).cpu() == torch.tensor(ids)).tolist()
        onset = loop_onset(ids)
        return oracle_walk(hits, steps, len(ids) if onset is None else onset)

    def speed(self, shape: Shape) -> dict[str, Any] | None:
        """Plain and drafted decoding alternate on the same prompts; the prompt's own forward is not counted.

        None where every answer is too short to be timed.
        """
        ratios: list[float] = []
        plain_s = drafted_s = 0.0
        plain_tokens = drafted_tokens = accepted = steps = 0
        differences = []
        chosen = self.prompts[: self.settings.speed_prompts]
        longest = self.settings.max_new_tokens
        self.plain.generate(chosen[0][2], Sampling(), 8)
        self.speculative.generate(chosen[0][2], Sampling(), 8, shape)
        with Meter(f"speed {shape}", len(chosen), "prompts") as meter:
            for name, _, prompt in chosen:
                plain = self.plain.generate(prompt, Sampling(), longest, ends=self.ends)
                drafted = self.speculative.generate(prompt, Sampling(), longest, shape, ends=self.ends)
                meter.advance(1, len(plain.ids) + len(drafted.ids))
                difference = compare(self.target, name, prompt, plain.ids, drafted.ids)
                if difference:
                    differences.append(difference)
                if min(len(plain.ids), len(drafted.ids)) < SHORTEST_TIMED:
                    continue  # an answer of a few tokens times the clock, not the decoder
                # the first token comes from the prompt's forward, which is not in the seconds
                per_token = plain.seconds / (len(plain.ids) - 1), drafted.seconds / (len(drafted.ids) - 1)
                ratios.append(per_token[0] / per_token[1])
                plain_s, drafted_s = plain_s + plain.seconds, drafted_s + drafted.seconds
                plain_tokens, drafted_tokens = plain_tokens + len(plain.ids) - 1, drafted_tokens + len(drafted.ids) - 1
                accepted += sum(s.accepted for s in drafted.steps)
                steps += len(drafted.steps)
        if not ratios:
            say(f"speed {shape}: no answer is long enough to be timed")
            return None
        return {
            "shape": str(shape),
            "prompts": len(ratios),
            "tokens": plain_tokens,
            "plain_tokens_per_s": plain_tokens / plain_s,
            "drafted_tokens_per_s": drafted_tokens / drafted_s,
            "speedup": statistics.median(ratios),
            "tau": 1 + accepted / max(1, steps),
            "dtype": self.target.identity.dtype,
            "differences": differences,
        }


def lossless(recipe: Recipe, evaluation: Evaluation) -> dict[str, Any]:
    """Greedy identity in fp32, where ties do not hide behind rounding."""
    settings, target_recipe = recipe.evaluate, recipe.target
    target = LocalTarget(
        target_recipe.model, target_recipe.revision, "fp32", recipe.device, target_recipe.trust_remote_code
    )
    speculative = Decoder(target, drafter_for(target, evaluation.directory, "fp32"))
    prompts = [(name, ids) for name, _, ids in evaluation.prompts[: settings.lossless_prompts]]
    return greedy_identity(
        target, Decoder(target), speculative, evaluation.shapes, prompts, settings.lossless_tokens, "fp32"
    )


def verdict_line(result: dict[str, Any]) -> str:
    verdict = lossless_verdict(result)
    word = {"yes": "yes", "ties": "up to ties", "no": "NO", "untested": "not tested"}[verdict.state]
    return f"lossless: {word}; {verdict.detail}"


def tau_line(entry: dict[str, Any]) -> str:
    """`tau 2.10 [2.02, 2.19] at 3/1/4, T=0 (chat 1.9, code 2.3, math 2.2)`"""

    def short(value: dict[str, Any]) -> str:
        return "-" if value["tau"] is None else f"{value['tau']:.2f}"

    categories = ", ".join(f"{name} {short(value)}" for name, value in entry["by_category"].items())
    line = f"tau {tau_text(entry['all'])} at {entry['shape']}, T={entry['temperature']:g} ({categories})"
    if entry.get("share_of_oracle") is not None:
        line += f"; oracle {short(entry['oracle'])}, share {entry['share_of_oracle']:.0%}"
    return line


def measured_once(out: Path, name: str, measure: Callable[[], Any]) -> Any:
    """The measurement, from `parts/` if it was made before: an interruption loses one."""
    path = out / "parts" / f"{name.replace('/', '-')}.json"
    if not path.exists():
        write_json(path, measure())
    return read_json(path)


def evaluate(
    recipe: Recipe, target: LocalTarget, directory: Path, prompts_file: Path, out: Path, created_with: dict[str, Any]
) -> dict[str, Any]:
    """Stage `evaluate` on the embedded engine."""
    evaluation = Evaluation(recipe, target, directory, prompts_file)
    once = partial(measured_once, out)
    acceptance = []
    for temperature in recipe.evaluate.temperatures:
        for shape in evaluation.shapes:
            name = f"tau-{shape}-T{temperature:g}"
            acceptance.append(once(name, partial(evaluation.acceptance, shape, temperature)))
            say(tau_line(acceptance[-1]))
    profile = once("profile", evaluation.profile)
    measured = [once(f"speed-{shape}", partial(evaluation.speed, shape)) for shape in evaluation.shapes]
    speed = [entry for entry in measured if entry]
    for entry in speed:
        say(
            f"speed {entry['shape']}: {entry['drafted_tokens_per_s']:.1f} tokens/s against "
            f"{entry['plain_tokens_per_s']:.1f} plain, {entry['speedup']:.2f}x"
        )
    proof = once("lossless", partial(lossless, recipe, evaluation))
    say(verdict_line(proof))
    results = {
        "schema": SCHEMA,
        "created_with": created_with,
        "settings": {
            "prompts": len(evaluation.prompts),
            "prompts_available": evaluation.available,
            "max_new_tokens": recipe.evaluate.max_new_tokens,
            "top_p": recipe.evaluate.top_p,
            "top_k": recipe.evaluate.top_k,
            "target": recipe.target.model,
            "dtype": recipe.target.dtype,
            "threads": torch.get_num_threads(),
        },
        "acceptance": acceptance,
        "lossless": proof,
        "speed": speed,
        "profile": profile,
        "partial": len(evaluation.prompts) < evaluation.available,
    }
    write_json(out / "results.json", results)
    return results
