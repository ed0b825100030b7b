"""The accept profile: how often the target's own token is the draft's first, second, ... choice, depth by depth.

Measured teacher-forced on the target's own text, from every position and for all depths at once (as training does), so
one pass tells the accept length of any shape, also of those that nobody decoded with. Above temperature 0 it tells
sampled drafts, too: of a text that speculative sampling wrote, a token x was the draft's own with chance
min(p, q) / p = min(1, q(x) / p(x)), given what came before it (arXiv 2211.17192); its mean is sum_v min(p, q).

Shapes: T positions, R chains, D draft vocabulary.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from draftsmith.core.progress import Meter
from draftsmith.core.records.data import Completion
from draftsmith.core.records.evaluation import CERTAIN, Profile
from draftsmith.decoding.sampling import Sampling, probabilities
from draftsmith.decoding.stopping import loop_onset
from draftsmith.drafts import METHODS
from draftsmith.drafts.directories import ReadyDraft
from draftsmith.drafts.packing import Pack, make_pack, segment_rows
from draftsmith.targets.local import LocalTarget

DEPTH, RANKS = 7, 9  # one digit per rank
PACK_PROMPTS = 8
WHOLE_ROWS = 64  # whose distributions over the whole vocabulary lie in memory at once
GREEDY = Sampling()


def token_ranks(logits_RD: Tensor, ids_D: Tensor, wanted_R: Tensor, ranks: int) -> Tensor:
    """[R] rank (1 is the first choice) of each wanted token; 0 where it is not among the first `ranks`."""
    choices = ids_D[logits_RD.topk(min(ranks, logits_RD.shape[1]), dim=-1).indices]
    hits = choices == wanted_R[:, None]
    return torch.where(hits.any(-1), hits.int().argmax(-1) + 1, 0)


@torch.inference_mode()
def walks_of(
    target: LocalTarget, ready: ReadyDraft, texts: Sequence[tuple[list[int], list[int]]], sampling: Sampling = GREEDY
) -> tuple[list[list[str]], list[list[str]]]:
    """(ranks, chances) as `Profile` has them, of every position of every text that can draft; no chances when greedy.

    texts: (prompt ids, ids that the target continued it with). Position s of a text is a root with token s + 1 known;
    its strings end where the text does, at DEPTH at the latest.
    """
    ranks: list[list[str]] = []
    chances: list[list[str]] = []
    with Meter("accept profile", len(texts), "prompts") as meter:
        for start in range(0, len(texts), PACK_PROMPTS):
            chosen = texts[start : start + PACK_PROMPTS]
            rows = [Completion(id="", ids=[*p, *new], spans=[(len(p), len(p) + len(new))]) for p, new in chosen]
            pack = make_pack(rows)
            meter.advance(len(rows), sum(len(new) for _, new in chosen))
            ranked, likely = _digits(target, ready, pack, sampling) if pack.segments else ([], [])
            for _, chains in segment_rows(pack.segments):
                ranks.append(ranked[chains])
                chances.append(likely[chains])
    return ranks, [] if sampling.greedy else chances


def _digits(target: LocalTarget, ready: ReadyDraft, pack: Pack, sampling: Sampling) -> tuple[list[str], list[str]]:
    """Of every chain of the pack."""
    draft, embedding = ready.draft, ready.embedding_VH
    weight = next(draft.parameters())
    device, dtype = weight.device, weight.dtype
    states = target.capture(pack.documents, draft.config.taps)
    embeds = embedding[pack.ids_T.to(embedding.device)].to(device, dtype)
    outputs = METHODS[draft.method].guesses(draft, pack, states.taps_TKH.to(device, dtype), embeds, DEPTH)
    ids_D, ids_T, chains_R = ready.ids_D.to(device), pack.ids_T.to(device), pack.chains_R.to(device)
    p_T = None if sampling.greedy else token_chances(target, states.last_TH, pack.ids_T, sampling).to(device)
    ranked, likely = [""] * pack.chain_count, [""] * pack.chain_count
    for step, output in enumerate(outputs):
        rows_R = pack.step_rows(step).to(device)
        at_R = chains_R[rows_R] + 2 + step
        logits_RD, wanted_R = draft.logits(output[rows_R]), ids_T[at_R]
        for row, rank in zip(rows_R.tolist(), token_ranks(logits_RD, ids_D, wanted_R, RANKS).tolist(), strict=True):
            ranked[row] += str(rank)
        if p_T is None:
            continue
        q_R = drafted_chances(logits_RD, ids_D, wanted_R, sampling.temperature)
        for row, chance in zip(rows_R.tolist(), (q_R / p_T[at_R]).clamp(max=1.0).tolist(), strict=True):
            likely[row] += f"{round(CERTAIN * chance):02d}"
    return ranked, likely


def token_chances(target: LocalTarget, last_TH: Tensor, ids_T: Tensor, sampling: Sampling) -> Tensor:
    """[T] probability of every token after what is before it, as it is drawn, never 0: rounding may put one that was
    drawn outside the filters. Of the first tokens of documents it means nothing."""
    p_T = torch.ones(len(ids_T))
    for rows in torch.arange(1, len(ids_T)).split(WHOLE_ROWS):
        p_RV = probabilities(target.logits(last_TH[rows - 1]), sampling).cpu()
        p_T[rows] = p_RV.gather(1, ids_T[rows].cpu()[:, None])[:, 0]
    return p_T.clamp(min=torch.finfo(p_T.dtype).tiny)


def drafted_chances(logits_RD: Tensor, ids_D: Tensor, wanted_R: Tensor, temperature: float) -> Tensor:
    """[R] probability that a sampled draft is the wanted token; 0 of what is outside its vocabulary."""
    place_R = torch.searchsorted(ids_D, wanted_R).clamp_(max=len(ids_D) - 1)
    q_R = torch.softmax(logits_RD.float() / temperature, -1).gather(1, place_R[:, None])[:, 0]
    return q_R.masked_fill(ids_D[place_R] != wanted_R, 0.0)


def rank_table(walks: Sequence[Sequence[str]]) -> list[list[float]]:
    """table[d][r]: share of choice r + 1 at depth d + 1 where the first choices before it were right."""
    table = []
    for d in range(DEPTH):
        seen = Counter(digits[d] for walk in walks for digits in walk if len(digits) > d and digits[:d] == "1" * d)
        if seen:
            table.append([seen[str(r + 1)] / seen.total() for r in range(RANKS)])
    return table


def accept_profile(
    target: LocalTarget,
    ready: ReadyDraft,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> Profile | None:
    """None where no answer is long enough to draft for. Text after the onset of a loop is left out."""
    answers = dict(target.generate(list(prompts), sampling, max_new_tokens, stop, seed, stop_loops=True))
    written = [answers[index].ids for index in range(len(prompts))]
    texts = [(prompt, ids[: loop_onset(ids)]) for prompt, ids in zip(prompts, written, strict=True)]
    walks, chances = walks_of(target, ready, texts, sampling)
    if not walks:
        return None
    return Profile(
        temperature=sampling.temperature,
        prompts=len(walks),
        positions=sum(len(walk) for walk in walks),
        table=rank_table(walks),
        walks=walks,
        chances=chances,
    )
