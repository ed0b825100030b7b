"""Stage 2 against servers: as many conversations at once as the replicas take, each kept the moment it ends.

A prompt's file is known before it is answered; its row is appended when its last turn is written, so a kill loses
only what was in flight. When all is done the files are sorted, so that they do not depend on who answered first.
"""

import itertools
from pathlib import Path
from typing import Any

import orjson

from draftsmith.data.regenerate import Completion, Conversation, Tally, longest_prompt, loss_tokens, open_conversations
from draftsmith.data.templates import ChatFormat
from draftsmith.decoding.sampling import Sampling
from draftsmith.files import digest, read_jsonl, write_json, write_jsonl
from draftsmith.progress import Meter
from draftsmith.recipe import Recipe, RegenerateRecipe
from draftsmith.targets.servers import ServedTarget, all_or_none


def prompt_sampling(settings: RegenerateRecipe, seed: int, name: str) -> Sampling:
    """Greedy for `greedy_share` of the prompts, chosen by their names."""
    greedy = int(digest(seed, "greedy", name), 16) < settings.greedy_share * 2**64
    return Sampling() if greedy else Sampling(settings.temperature, settings.top_p, settings.top_k)


def held_rows(path: Path) -> list[Completion]:
    """Rows of an append-only file; a last line that a kill tore is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return list(read_jsonl(path))


class ServedRegeneration:
    def __init__(self, recipe: Recipe, target: ServedTarget, chat: ChatFormat, prompts_file: Path, out: Path):
        self.recipe, self.settings = recipe, recipe.regenerate
        self.target, self.chat, self.out = target, chat, out
        out.mkdir(parents=True, exist_ok=True)
        self.prompts = list(read_jsonl(prompts_file))
        self.total = self.settings.max_tokens
        self.longest = longest_prompt(self.settings, target.identity.max_position_embeddings)
        self.tally = Tally()
        self.meter = Meter("regenerate", self.total or len(self.prompts), "tokens" if self.total else "prompts")

    def path(self, place: int) -> Path:
        return self.out / f"{place // self.settings.shard_prompts:05d}.jsonl"

    def run(self) -> dict[str, Any]:
        paths = sorted({self.path(i) for i in range(len(self.prompts))})
        done = set()
        for path in paths:
            for row in held_rows(path):
                done.add(row["id"])
                self.tally.add(row)
                self.meter.resume(self.meter.done + (len(loss_tokens(row)) if self.total else row["document"] == 0))
        self.waiting = iter([(i, p) for i, p in enumerate(self.prompts) if p["id"] not in done])
        known = self.out / "server.json"
        with self.meter:
            self.target.run(self._all)
        write_json(known, {"fingerprint": self.target.fingerprint})
        for path in paths:
            if path.exists():
                write_jsonl(path, sorted(read_jsonl(path), key=lambda row: row["id"]))
        return self.tally.finish(self.out)

    async def _all(self) -> None:
        write_json(self.out / "server.json", {"fingerprint": self.target.fingerprint})
        await all_or_none(self._work() for _ in range(min(self.target.capacity, len(self.prompts))))

    async def _work(self) -> None:
        for place, prompt in self.waiting:
            if self.total and self.tally.tokens >= self.total:
                return
            opened = open_conversations(
                [prompt], self.chat, self.longest, self.recipe.prompts.skip_bad, self.tally.left_out
            )
            if not opened:
                continue
            rows = await self._converse(opened[0])
            for row in rows:
                self.tally.add(row)
            with self.path(place).open("ab") as file:  # in one write, the first row last: it says that all are there
                file.write(b"".join(orjson.dumps(row) + b"\n" for row in reversed(rows)))

    async def _converse(self, conversation: Conversation) -> list[Completion]:
        name = conversation.prompt["id"]
        sampling = prompt_sampling(self.settings, self.recipe.seed, name)
        for turn in itertools.count():
            generation = await self.target.complete(
                list(conversation.ids),
                sampling,
                self.settings.max_new_tokens,
                self.chat.stop,
                int(digest(self.recipe.seed, name, turn), 16) % 2**31,
                self.settings.stop_loops,
            )
            self.tally.written += len(generation.ids)
            self.meter.advance(len(generation.ids) if self.total else 0, len(generation.ids))
            if not conversation.extend(generation, self.chat, self.settings.max_prompt_tokens):
                break
        if not self.total:
            self.meter.advance(1)
        return conversation.rows(sampling)
