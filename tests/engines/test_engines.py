"""The exported directory on the real engines: same greedy tokens, same acceptance as the embedded decoder.

Each engine lives in a virtual environment of its own: the one named by DRAFTSMITH_VLLM_VENV or DRAFTSMITH_SGLANG_VENV,
else one that the CPU installers under DRAFTSMITH_ENGINE_TOOLS (../shared/tools) make in .venv-vllm and .venv-sglang.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from engine import TOOLS, VOCAB, engine_environment, engine_python, save_target

from draftsmith.data.packing import make_pack
from draftsmith.decoding.sampling import Sampling
from draftsmith.decoding.speculate import Decoder, Eagle3Drafter
from draftsmith.decoding.tree import Shape
from draftsmith.drafts.checkpoint import load_draft, write_draft
from draftsmith.drafts.eagle3 import Eagle3Config, Eagle3Draft
from draftsmith.targets.local import LocalTarget
from draftsmith.training.objectives import Objective
from draftsmith.training.ttt_loss import TTTLoss, prepare

pytestmark = pytest.mark.engines
NEW_TOKENS = 48


@pytest.fixture(scope="module", params=[{}, {"fc_norm": True}], ids=["plain", "fc_norm"])
def served(request, tmp_path_factory):
    """(target directory, draft directory, prompts): a small Llama and a draft trained on its own text."""
    out = tmp_path_factory.mktemp("served")
    save_target(out / "target", eos=False)
    target = LocalTarget(str(out / "target"), dtype="fp32", device="cpu")
    target.eos_ids = frozenset()
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(6, VOCAB, (10,), generator=generator).tolist() for _ in range(24)]
    completions = [
        {"id": str(i), "ids": prompts[i] + g.ids, "spans": [[10, 10 + len(g.ids)]]}
        for i, g in target.generate(prompts, Sampling(), NEW_TOKENS)
    ]
    draft = Eagle3Draft(
        Eagle3Config(
            hidden_size=128,
            intermediate_size=192,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=64,
            vocab_size=VOCAB,
            draft_vocab_size=48,
            taps=(2, 4, 5),
            rope_theta=10000.0,
            max_position_embeddings=512,
            **request.param,
        )
    )
    ids = torch.arange(8, 56)
    draft.initialise(target.head_rows(ids), target.norm_gain(), generator)
    pack = make_pack(completions, 512)
    states = target.capture(pack.documents, draft.config.taps)
    rows = target.head_rows(ids)
    inputs = prepare(
        pack, states.taps_TKH.clone(), states.last_TH.clone(), target.embedding_rows(), rows, None, None, torch.float32
    )
    loss = TTTLoss(draft, 3, Objective())
    optimizer = torch.optim.AdamW(draft.parameters(), lr=2e-3)
    for _ in range(80):
        loss(inputs, [1e-3] * 3)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    identity = {"model": "tiny", "dtype": "fp32", "num_layers": 8, "max_position_embeddings": 512}
    write_draft(out / "draft", draft, ids, None, {"version": "test", "commit": None, "target": identity})
    return out / "target", out / "draft", prompts[:4]


def embedded(served, shape: Shape | None):
    """(ids per prompt, accepted, verifications) of the embedded decoder on the exported files."""
    target_dir, draft_dir, prompts = served
    target = LocalTarget(str(target_dir), dtype="fp32", device="cpu")
    target.eos_ids = frozenset()
    draft, ids = load_draft(draft_dir, torch.float32)
    decoder = Decoder(target, Eagle3Drafter(draft, ids, target.embedding_rows()) if shape else None)
    decoded = [decoder.generate(prompt, Sampling(), NEW_TOKENS, shape) for prompt in prompts]
    steps = [step for d in decoded for step in d.steps]
    return [d.ids for d in decoded], sum(s.accepted for s in steps), len(steps)


def test_vllm_serves_the_draft(served):
    python = engine_python("vllm")
    target, draft, prompts = served
    environment = os.environ | engine_environment(python)

    def run(with_draft):
        job = {"target": str(target), "draft": str(draft) if with_draft else None, "steps": 3, "prompts": prompts}
        command = [
            str(python),
            str(Path(__file__).with_name("vllm_chain.py")),
            json.dumps({**job, "max_new_tokens": NEW_TOKENS}),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return [line["ids"] for line in lines[:-1]], lines[-1]["counters"]

    with_draft, counters = run(True)
    without, _ = run(False)
    ids, accepted, steps = embedded(served, Shape(3, 1, 4))
    assert with_draft == without == ids
    engine_tau = 1 + counters["vllm:spec_decode_num_accepted_tokens"] / counters["vllm:spec_decode_num_drafts"]
    print(f"vllm tau {engine_tau:.3f}, embedded {1 + accepted / steps:.3f}")
    assert accepted > steps // 4
    assert engine_tau == pytest.approx(1 + accepted / steps, abs=0.08)  # they count the cut last step differently


def test_sglang_serves_the_draft(served, tmp_path):
    python = engine_python("sglang")
    if not (TOOLS / "sglang_cpu" / "run_eagle3.py").exists():
        pytest.skip(f"{TOOLS}/sglang_cpu/run_eagle3.py is not there; DRAFTSMITH_ENGINE_TOOLS names its folder")
    target, draft, prompts = served
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"id": str(i), "input_ids": p}) + "\n" for i, p in enumerate(prompts))
    )
    command = [str(python), str(TOOLS / "sglang_cpu" / "run_eagle3.py"), "--target", str(target), "--draft", str(draft)]
    command += ["--prompts", str(tmp_path / "p.jsonl"), "--max-new-tokens", str(NEW_TOKENS), "--dtype", "float32"]
    done = subprocess.run([*command, "--context", "512"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ids, accepted, steps = embedded(served, Shape(3, 4, 8))
    assert [row["output_ids"] for row in rows[:-1]] == ids
    engine_tau = rows[-1]["summary"]["tau"]
    print(f"sglang tau {engine_tau:.3f}, embedded {1 + accepted / steps:.3f}")
    assert engine_tau == pytest.approx(1 + accepted / steps, abs=0.08)
