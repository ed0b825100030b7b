"""An EAGLE-3 draft as decoding drives it, step by step."""

import torch
from torch import Tensor

from draftsmith.core.shape import Shape
from draftsmith.decoding.cache import StaticCache
from draftsmith.decoding.products import pack_weights
from draftsmith.decoding.tree import DraftTree, Take, first_choices, grow_tree
from draftsmith.drafts.eagle3.model import Eagle3Draft


class Eagle3Drafter:
    """Implements `Drafter` of decoding/speculate.py. K beam nodes, W newly verified tokens, H hidden, V vocabulary."""

    def __init__(self, draft: Eagle3Draft, ids_D: Tensor, embedding_VH: Tensor):
        self.draft = draft.eval()
        pack_weights(self.draft)
        self.taps = draft.config.taps
        self.embedding_VH = embedding_VH
        self.dtype = draft.fc.weight.dtype
        self.device = draft.fc.weight.device
        self.ids_D = ids_D.to(self.device)
        self.start()

    def start(self) -> None:
        self._cache = StaticCache(1, 256)  # rows beyond `_verified` are of guesses
        self._verified = 0
        self._output: Tensor | None = None

    def _embed(self, ids: list[int]) -> Tensor:
        return self.embedding_VH[torch.tensor(ids, device=self.embedding_VH.device)].to(self.device, self.dtype)

    @torch.inference_mode()
    def extend(self, taps_WKH: Tensor, next_ids: list[int]) -> None:
        width, start = len(next_ids), self._verified
        positions = torch.arange(start, start + width, device=self.device)
        visible = None
        if width > 1:
            visible = torch.arange(start + width, device=self.device)[None] <= positions[:, None]
        features = self.draft.fuse(taps_WKH.to(self.dtype))
        self._output = self.draft.step(self._embed(next_ids), features, positions, self._cache, start, visible)[-1:]
        self._verified = start + width

    @torch.inference_mode()
    def propose(self, root: int, shape: Shape, take: Take = first_choices) -> DraftTree:
        assert self._output is not None, "extend comes first"
        k, base = shape.topk, self._verified
        outputs = self._output
        own = torch.zeros(k, 0, dtype=torch.bool, device=self.device)  # guess rows that each beam node sees

        def expand(tokens: list[int], beam_parents: list[int]) -> Tensor:
            nonlocal outputs, own
            step = own.shape[1] // k
            parents = torch.tensor(beam_parents, device=self.device)  # -1 is the root, whose output is the only one
            features = outputs[parents]
            own = torch.cat([own[parents], torch.eye(k, dtype=torch.bool, device=self.device)], dim=1)
            visible = None
            if k > 1:
                visible = torch.cat([own.new_ones(k, base), own], dim=1)
            positions = torch.full((k,), base + step, device=self.device)
            outputs = self.draft.step(self._embed(tokens), features, positions, self._cache, base + step * k, visible)
            return self.draft.logits(outputs).float()

        first = self.draft.logits(self._output)[0].float()
        return grow_tree(root, first, expand, self.ids_D, self.draft.config.vocab_size, shape, take)
