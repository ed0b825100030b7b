"""Speculative decoding against plain decoding, transformers, and the acceptance that training reports."""

import pytest
import torch
from models import VOCAB, tiny_lm, tiny_target, trained_draft

from draftsmith.core.records.data import Completion
from draftsmith.core.shape import Shape
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder
from draftsmith.decoding.tree import DraftTree, Sampled, first_choices
from draftsmith.drafts.eagle3.drafter import Eagle3Drafter
from draftsmith.drafts.eagle3.ttt import ttt_outputs
from draftsmith.drafts.objectives import pack_inputs
from draftsmith.drafts.packing import make_pack
from draftsmith.evaluation.acceptance import count
from draftsmith.training.metrics import chain_walk, evaluate_heldout, greedy_matches

ARCHITECTURES = ["llama", "qwen3", "gemma3", "minimax_m2"]
CHAIN, TREE = Shape(3, 1, 4), Shape(3, 4, 8)


def prompts(count=4, length=11):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, VOCAB, (length + i,), generator=generator).tolist() for i in range(count)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_captured_states_are_those_of_transformers(architecture):
    documents, taps = prompts(3), (0, 2, 5)
    expected = []
    lm = tiny_lm(architecture)
    with torch.no_grad():
        for document in documents:
            out = lm(torch.tensor([document]), output_hidden_states=True)
            expected.append((torch.stack([out.hidden_states[t][0] for t in taps], 1), out.hidden_states[-1][0]))
    captured = tiny_target(architecture).capture(documents, taps)
    torch.testing.assert_close(captured.taps_TKH, torch.cat([e[0] for e in expected]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(captured.last_TH, torch.cat([e[1] for e in expected]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_generation_is_transformers_generate(architecture):
    lm = tiny_lm(architecture)
    expected = [
        lm.generate(torch.tensor([p]), max_new_tokens=20, do_sample=False, use_cache=True)[0, len(p) :].tolist()
        for p in prompts(5)
    ]
    target = tiny_target(architecture, batch_size=2)  # fewer rows than prompts: rows are refilled
    got = dict(target.generate(prompts(5), Sampling(), 20))
    assert [got[i].ids for i in range(5)] == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [CHAIN, TREE, Shape(5, 3, 16)], ids=str)
def test_greedy_output_is_that_of_plain_decoding(architecture, shape):
    target, draft, ids = trained_draft(architecture)
    decoder = Decoder(target, Eagle3Drafter(draft, ids, target.embedding_rows()))
    accepted = 0
    for prompt in prompts():
        plain = Decoder(target).generate(prompt, Sampling(), 40)
        drafted = decoder.generate(prompt, Sampling(), 40, shape)
        assert drafted.ids == plain.ids
        assert drafted.finish_reason == plain.finish_reason
        accepted += sum(drafted.verified)
    assert accepted > 0, "a draft that is never right proves nothing"


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=str)
def test_what_is_sampled_comes_from_the_drafts_own_distribution(shape):
    """Of the real draft: at its temperature, over its own vocabulary, without the siblings before."""
    target, draft, ids = trained_draft()
    drafter, prompt = Eagle3Drafter(draft, ids, target.embedding_rows()), prompts(1)[0]
    drafter.start()
    drafter.extend(target.capture([prompt[:-1]], drafter.taps).taps_TKH, prompt[1:])
    logits = torch.full((VOCAB,), -torch.inf)
    logits[ids] = draft.logits(drafter._output)[0].float()
    for seed in range(20):
        tree = drafter.propose(prompt[-1], shape, Sampled(0.7, torch.Generator().manual_seed(seed)))
        first = tree.children[0]
        drawn = [node for node in first if node in tree.drawn]
        assert len(tree.tokens) == shape.draft_tokens
        assert drawn in ([], first[-1:])
        assert first[:-1] == [node for node in first if node not in tree.drawn] or not drawn
        for node in drawn:
            choices = logits.topk(shape.topk - 1).indices
            expected = torch.softmax(logits.scatter(0, choices, -torch.inf) / 0.7, 0)
            torch.testing.assert_close(tree.drawn[node], expected)
            assert expected[tree.tokens[node]] > 0
        assert shape == TREE or drawn == [1]


def test_a_tree_guesses_at_every_node_what_training_does_along_its_path():
    """However many beams grow side by side: each reads the output, the keys and the position of its own ancestors."""
    target, draft, ids = trained_draft()
    drafter, prompt, top = Eagle3Drafter(draft, ids, target.embedding_rows()), prompts(1)[0], 4
    drafter.start()
    drafter.extend(target.capture([prompt[:-1]], drafter.taps).taps_TKH, prompt[1:])
    levels = []

    def recorded(logits_KD, topk):
        levels.append(logits_KD)
        return first_choices(logits_KD, topk)

    tree = drafter.propose(prompt[-1], Shape(3, top, 1 + top + 2 * top**2), recorded)  # all that was ever considered
    grown = [node for node, children in enumerate(tree.children) if children]
    assert sorted(tree.depths[node] for node in grown) == [0, *[1] * top, *[2] * top]
    for node in grown:
        depth, path = tree.depths[node], tree.ancestors()[node].nonzero()[1:, 0]
        text = [*prompt, *(tree.tokens[i] for i in path), 1, 1]
        pack = make_pack([Completion(id="a", ids=text, spans=[(len(prompt) - 1, len(text))])])
        states = target.capture([text], draft.config.taps).taps_TKH.clone()
        with torch.no_grad():
            guesses = ttt_outputs(draft, pack, states, target.embedding_rows()[pack.ids_T], depth + 1)
            expected_D = draft.logits(guesses[depth][:1])[0]  # of the chain that begins where the tree does
        assert (levels[depth] - expected_D).abs().amax(1).min() < 1e-4
        assert [tree.tokens[child] for child in tree.children[node]] == ids[expected_D.topk(top).indices].tolist()


class OracleDrafter:
    """Knows the plain output and drafts it rightly (`always`), wrongly (`never`) or now and then."""

    taps = ()

    def __init__(self, text: list[int], mode: str):
        self.text, self.mode, self.count = text, mode, 0

    def start(self):
        self.at = 0

    def extend(self, taps, next_ids):
        self.at = 1 if self.at == 0 else self.at + len(next_ids)

    def propose(self, root, shape, take=None):
        assert root == self.text[self.at - 1]
        right = (self.text[self.at : self.at + shape.steps] + [5] * shape.steps)[: shape.steps]
        if self.mode == "never":
            right = [(token + 1) % VOCAB for token in right]
        elif self.mode == "sometimes":
            self.count += 1
            wrong_at = self.count % (shape.steps + 1)
            right = [(t + 1) % VOCAB if i == wrong_at else t for i, t in enumerate(right)]
        return DraftTree([root, *right], [-1, *range(shape.steps)])


@pytest.mark.parametrize("mode", ["always", "never", "sometimes"])
@pytest.mark.parametrize("limit", [1, 2, 7, 24])
def test_fake_drafts_drive_the_loop(mode, limit):
    target = tiny_target()
    for prompt in prompts(3):
        text = Decoder(target).generate(prompt, Sampling(), 24).ids
        drafted = Decoder(target, OracleDrafter(text, mode)).generate(prompt, Sampling(), limit, CHAIN)
        assert drafted.ids == text[:limit]
        if mode == "always":  # every step that the end does not cut short
            counted = count("", "", drafted, 3)
            assert counted.accepted + counted.looping_accepted == 3 * (counted.steps + counted.looping_steps)
        if mode == "never":
            assert not any(drafted.verified)
            assert len(drafted.verified) == len(drafted.ids) - 1


def test_an_end_token_inside_a_step_ends_the_text():
    target = tiny_target()
    prompt = prompts(1)[0]
    target.eos_ids = frozenset()
    text = Decoder(target).generate(prompt, Sampling(), 24).ids
    target.eos_ids = frozenset([text[5]])
    plain = Decoder(target).generate(prompt, Sampling(), 24)
    drafted = Decoder(target, OracleDrafter(text, "always")).generate(prompt, Sampling(), 24, CHAIN)
    assert drafted.ids == plain.ids == text[: text.index(text[5]) + 1]
    assert drafted.finish_reason == "eos"


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_acceptance_in_training_is_acceptance_when_decoding(architecture):
    target, draft, ids = trained_draft(architecture, fc_norm=True)
    decoder = Decoder(target, Eagle3Drafter(draft, ids, target.embedding_rows()))
    completions, accepted, verified = [], 0, 0
    for i, prompt in enumerate(prompts(8)):
        decoded = decoder.generate(prompt, Sampling(), 40, CHAIN)
        counted = count("", "", decoded, 3)
        accepted += counted.accepted + counted.looping_accepted
        verified += counted.steps + counted.looping_steps
        span = [len(prompt), len(prompt) + len(decoded.ids)]
        completions.append(Completion(id=str(i), ids=prompt + decoded.ids, spans=[span]))
    rows = target.head_rows(ids)

    def inputs_of(completions):
        pack = make_pack(completions)
        states = target.capture(pack.documents, draft.config.taps)
        return pack_inputs(
            pack, states.taps_TKH, states.last_TH, target.embedding_rows(), rows, None, None, torch.float32
        )

    inputs = inputs_of(completions)
    assert chain_walk(inputs.pack, greedy_matches(draft, inputs, ids, 3), 3) == (accepted, verified)
    assert 0 < accepted < 3 * verified
    # what is told of held-out text: the same whether in one pack or in two, and however many processes share them
    deep = greedy_matches(draft, inputs, ids, 4)
    packs = [inputs_of(completions[:3]), inputs_of(completions[3:])]
    held_out = evaluate_heldout(draft, packs, ids, 4, lambda sums: [2 * one for one in sums])
    assert held_out.match == pytest.approx([match.float().mean().item() for _, match, _ in deep])
    assert held_out.alpha == pytest.approx([alpha.mean().item() for _, _, alpha in deep], rel=1e-4)
    further, steps = chain_walk(inputs.pack, deep, 4)
    assert held_out.tau == pytest.approx({3: 1 + accepted / verified, 4: 1 + further / steps})
    assert held_out.verifications == 2 * verified
