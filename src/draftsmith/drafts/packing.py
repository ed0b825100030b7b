"""Documents packed into one row, and the chains that training runs on them.

A *chain* starts at every position s from which serving would draft: the feature of token s is known, token s + 1 is
the verified root, and step i predicts token s + 2 + i. So a completion at [start, end) has the chains
start - 1 <= s < end - 2, and step i of chain s is scored while s + 2 + i < end.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from draftsmith.core.records.data import Completion
from draftsmith.decoding.flash import Sequences


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; nobody waits for a copy from this process's memory to a GPU, which needs it pinned."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@dataclass(frozen=True)
class Segment:
    """A run of chains [first, last) of one document that begins at `document` (all positions in the pack)."""

    document: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def pairs(self) -> int:
        """Keys of the target's tokens that its chains see, in all."""
        return len(self) * (self.first - self.document) + len(self) * (len(self) + 1) // 2


def segment_rows(segments: Iterable[Segment]) -> Iterator[tuple[Segment, slice]]:
    """Every segment with its rows among the chains of all of them."""
    offset = 0
    for segment in segments:
        yield segment, slice(offset, offset + len(segment))
        offset += len(segment)


@dataclass(frozen=True)
class PackIndex:
    """Where the parts of a pack lie, as tensors on the device that trains."""

    segments: list[Segment]
    ids_T: Tensor
    positions_T: Tensor  # inside each document
    chains_R: Tensor
    key_rows: Tensor
    """Pack positions that the chains of a segment see, segment after segment; `sequences` tells them apart."""
    sequences: Sequences


@dataclass(frozen=True)
class Pack:
    """T tokens of several documents; R chains."""

    names: list[str]
    documents: list[list[int]]
    segments: list[Segment]
    ids_T: Tensor
    _indices: dict[torch.device, PackIndex] = field(default_factory=dict, repr=False, compare=False)

    @property
    def chain_count(self) -> int:
        return sum(len(segment) for segment in self.segments)

    @property
    def chains_R(self) -> Tensor:
        """Pack position s of every chain."""
        return torch.cat([torch.arange(s.first, s.last) for s in self.segments])

    def step_rows(self, step: int) -> Tensor:
        """Rows (into R) of the chains that are scored at this step."""
        every = [rows for _, rows in segment_rows(self.segments)]
        return torch.cat([torch.arange(rows.start, max(rows.start, rows.stop - step)) for rows in every])

    def index(self, device: torch.device) -> PackIndex:
        """Made once for a device, and brought there by one copy that nobody waits for."""
        if device not in self._indices:
            keys = [torch.arange(s.document, s.last) for s in self.segments]
            starts = [torch.tensor([0, *map(len, runs)]).cumsum(0) for runs in (self.segments, keys)]
            positions = torch.cat([torch.arange(len(document)) for document in self.documents])
            parts = [self.ids_T, positions, self.chains_R, torch.cat(keys), *starts]
            there = to_device(torch.cat(parts), device).split([len(part) for part in parts])
            ids, positions, chains, key_rows, query_starts, key_starts = there
            longest = max(map(len, self.segments)), max(map(len, keys))
            sequences = Sequences(query_starts.int(), key_starts.int(), *longest)
            self._indices[device] = PackIndex(self.segments, ids, positions, chains, key_rows, sequences)
        return self._indices[device]


@dataclass
class PackInputs:
    """What the target contributes to one pack, in the compute dtype."""

    pack: Pack
    taps_TKH: Tensor
    embeds_TH: Tensor
    finite_T: Tensor  # whether all hidden states of a token are
    teacher_RD: Tensor  # row r is the target's distribution after the root of chain r


def make_pack(completions: Sequence[Completion]) -> Pack:
    """Spans may end after the ids do, where a document was cut."""
    segments, start = [], 0
    for completion in completions:
        for first, last in completion.spans:
            chains = range(first - 1, min(last, len(completion.ids)) - 2)  # none of a span beyond a cut
            if chains and first >= 1:
                segments.append(Segment(start, start + chains.start, start + chains.stop))
        start += len(completion.ids)
    documents = [completion.ids for completion in completions]
    ids_T = torch.tensor([i for document in documents for i in document])
    return Pack([completion.id for completion in completions], documents, segments, ids_T)


def trainable(completion: Completion, max_document_tokens: int) -> bool:
    """Whether any chain of the completion is scored."""
    return any(min(end, max_document_tokens) - start >= 2 and start >= 1 for start, end in completion.spans)


def on_prompts(completions: Sequence[Completion]) -> list[Completion]:
    """With the loss on prompts, too, but for what all texts begin with, such as a template's system turn."""
    texts = [c.ids for c in completions]  # what the first and the last in order begin with, all between them do
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(min(texts), max(texts), strict=False)))
    starts = [max(1, min(shared, c.spans[0][0])) for c in completions]
    return [c.model_copy(update={"spans": [(s, len(c.ids))]}) for s, c in zip(starts, completions, strict=True)]


def filled(order: Iterable[int], lengths: Sequence[int], most: int) -> list[list[int]]:
    """Documents in packs of at most so many tokens, greedily in this order; a longer one is a pack by itself."""
    packs: list[list[int]] = []
    room = 0
    for index in order:
        if not packs or lengths[index] > room:
            packs.append([])
            room = most
        packs[-1].append(index)
        room -= lengths[index]
    return packs


def epoch_packs(lengths: Sequence[int], pack_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Document indices of every pack of one epoch in a shuffled order; the same for the same seed."""
    order = list(range(len(lengths)))
    random.Random(f"{seed}-epoch-{epoch}").shuffle(order)
    return filled(order, lengths, pack_tokens)
