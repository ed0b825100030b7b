"""`draftsmith export --check ENGINE`: does an engine read the exported directory as we mean it?

Two looks. The directory is compared with what the best checkpoint exports to, which names any damage. Then the engine
decodes a few prompts with it, and so does the embedded engine with the checkpoint's own weights: greedy tokens and the
acceptance at every depth have to agree; where drafts are sampled, the acceptance at the highest temperature, too.
"""

from pathlib import Path

import torch

from draftsmith.core.errors import TargetError
from draftsmith.core.progress import say
from draftsmith.core.recipe import EngineName
from draftsmith.data.vocabulary import DraftVocabulary
from draftsmith.decoding.sampling import Sampling
from draftsmith.drafts.directories import ReadyDraft
from draftsmith.engines import ENGINES
from draftsmith.engines.base import Setup
from draftsmith.evaluation.asking import complete
from draftsmith.evaluation.check import Agreement, compare_engines
from draftsmith.evaluation.draft_sampling import taking
from draftsmith.evaluation.evaluate import Evaluation
from draftsmith.runs.run import Run
from draftsmith.training.export import damages, trained_draft

PROMPTS, TOKENS = 6, 48


def check(run: Run, engine: EngineName, directory: Path | None = None) -> bool:
    """True if the directory (the run's own export if none is given) is whole and the engine serves it as the embedded
    engine does; says what is wrong."""
    directory, checkpoints = directory or run.draft_for(engine), run.files.train
    vocabulary = DraftVocabulary.load(run.files.vocabulary)
    found = damages(directory, checkpoints, vocabulary)
    for problem in found:
        say(f"check: {directory}: {problem}")
    if found:
        say("check: the directory is damaged; export again: draftsmith run RECIPE --redo export")
        return False
    say(f"check: {directory} is what {checkpoints} exports to")
    agreements = agreements_with(run, engine, vocabulary, directory)
    for agreement in agreements:
        say(f"check: {agreement}")
        for problem in agreement.problems:
            say(f"check: {problem}")
    return not any(agreement.problems for agreement in agreements)


def agreements_with(run: Run, name: EngineName, vocabulary: DraftVocabulary, directory: Path) -> list[Agreement]:
    """Start the engine with the directory and compare it with the embedded engine and the checkpoint's own weights."""
    recipe, engine = run.recipe, ENGINES[name]
    if recipe.target.engine != "transformers":
        raise TargetError(
            "export --check: compares with the embedded engine, which needs the target in this process; where it "
            "fits, give --target.engine transformers, else use: draftsmith evaluate RECIPE"
        )
    shape = next((s for s in recipe.evaluate.shapes if s.topk == 1 or engine.drafts_trees), recipe.serve.shape)
    changed = {"prompts": PROMPTS, "max_new_tokens": TOKENS, "shapes": (shape,)}
    short = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=changed)})
    drafts, hottest = run.serving_drafts(name, shape), max(recipe.evaluate.temperatures, default=0.0)
    setup = taking(Setup(short, directory, run.files.root), drafts)
    evaluation = Evaluation(engine, setup, run.files.evaluation_prompts, run.files.root)
    with engine.open(setup, shape) as drafted:
        questions = evaluation.questions(drafted)
        warm = drafts == "sampled" and hottest and evaluation.draws(drafted, questions, hottest)
        samplings = [Sampling(), *([evaluation.sampling(hottest)] if warm else [])]
        theirs = [complete(drafted, questions, f"check {shape} on {name}", s, TOKENS, 1) for s in samplings]
    target = run.target
    with torch.no_grad():
        draft = trained_draft(run.files.train, vocabulary)[0].to(target.device, target.head.weight.dtype).eval()
    ready = ReadyDraft(draft, vocabulary.ids_D, target.embedding_rows())
    here = target.session(ready.drafter(), shape, drafts)
    ours = [complete(here, questions, f"check {shape} here", s, TOKENS, 1) for s in samplings]
    return [
        compare_engines(name, shape, questions, a, b, sampling.temperature)
        for sampling, a, b in zip(samplings, ours, theirs, strict=True)
    ]
