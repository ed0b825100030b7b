"""The accept profile: how often the target's own token is the draft's first, second, ... choice, depth by depth.

Measured teacher-forced on the target's greedy text, from every position and for all depths at once
(as training does), so one pass tells the accept length of any shape, also of those that nobody decoded with.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from draftsmith.core.progress import Meter
from draftsmith.core.records.data import Completion
from draftsmith.core.records.evaluation import Profile
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.stopping import loop_onset
from draftsmith.drafts import METHODS
from draftsmith.drafts.directories import ReadyDraft
from draftsmith.drafts.packing import make_pack
from draftsmith.targets.base import Target

DEPTH, RANKS = 7, 9  # one digit per rank
PACK_PROMPTS = 8


def token_ranks(logits_RD: Tensor, ids_D: Tensor, wanted_R: Tensor, ranks: int) -> Tensor:
    """[R] rank (1 is the first choice) of each wanted token; 0 where it is not among the first `ranks`."""
    choices = ids_D[logits_RD.topk(min(ranks, logits_RD.shape[1]), dim=-1).indices]
    hits = choices == wanted_R[:, None]
    return torch.where(hits.any(-1), hits.int().argmax(-1) + 1, 0)


@torch.inference_mode()
def rank_walks(target: Target, ready: ReadyDraft, texts: Sequence[tuple[list[int], list[int]]]) -> list[list[str]]:
    """For every text, and every position in it that can draft, the ranks of the tokens that came: a digit per depth.

    texts: (prompt ids, ids that the target continued it with). Position s of a text is a root with token s + 1 known;
    its string is shorter than DEPTH where the text ends.
    """
    walks: list[list[str]] = []
    draft, embedding = ready.draft, ready.embedding_VH
    method, device, dtype = METHODS[draft.method], draft.device, draft.dtype
    ids_D = ready.ids_D.to(device)
    with Meter("accept profile", len(texts), "prompts") as meter:
        for start in range(0, len(texts), PACK_PROMPTS):
            chosen = texts[start : start + PACK_PROMPTS]
            rows = [Completion(id="", ids=[*p, *new], spans=[(len(p), len(p) + len(new))]) for p, new in chosen]
            pack = make_pack(rows, max(len(row.ids) for row in rows))
            meter.advance(len(rows), sum(len(new) for _, new in chosen))
            if not pack.segments:
                continue
            states = target.capture(pack.documents, draft.config.taps)
            embeds = embedding[pack.ids_T.to(embedding.device)].to(device, dtype)
            outputs = method.guesses(draft, pack, states.taps_TKH.to(device, dtype), embeds, DEPTH)
            ids_T, chains_R = pack.ids_T.to(device), pack.chains_R.to(device)
            digits = [""] * pack.chain_count
            for step, output in enumerate(outputs):
                scored_R = pack.step_rows(step).to(device)
                ranks = token_ranks(draft.logits(output[scored_R]), ids_D, ids_T[chains_R[scored_R] + 2 + step], RANKS)
                for row, rank in zip(scored_R.tolist(), ranks.tolist(), strict=True):
                    digits[row] += str(rank)
            first = 0
            for segment in pack.segments:
                walks.append(digits[first : first + len(segment)])
                first += len(segment)
    return walks


def rank_table(walks: Sequence[Sequence[str]]) -> list[list[float]]:
    """table[d][r]: share of choice r + 1 at depth d + 1 where the first choices before it were right."""
    table = []
    for d in range(DEPTH):
        seen = Counter(digits[d] for walk in walks for digits in walk if len(digits) > d and digits[:d] == "1" * d)
        if seen:
            table.append([seen[str(r + 1)] / seen.total() for r in range(RANKS)])
    return table


def accept_profile(
    target: Target, ready: ReadyDraft, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[str] = ()
) -> Profile | None:
    """None where no answer is long enough to draft for. Text after the onset of a loop is left out."""
    answers = dict(target.generate(list(prompts), Sampling(), max_new_tokens, stop, stop_loops=True))
    texts = []
    for index, prompt in enumerate(prompts):
        ids = answers[index].ids
        texts.append((prompt, ids[: loop_onset(ids)]))
    walks = rank_walks(target, ready, texts)
    if not walks:
        return None
    positions = sum(len(walk) for walk in walks)
    return Profile(prompts=len(walks), positions=positions, table=rank_table(walks), walks=walks)
