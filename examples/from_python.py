"""A draft from Python: train it, then decode with and without it.

python examples/from_python.py recipes/smollm2-135m-quick.yaml "What is the capital of France?"
"""

import sys
from pathlib import Path

import draftsmith
from draftsmith.core.recipe_file import load_recipe
from draftsmith.data.templates import ChatFormat
from draftsmith.targets.local import LocalTarget


def main(recipe_file: str, question: str, out: Path | None = None) -> tuple[str, float]:
    """The target's answer, and the tokens that a verification step yielded on average."""
    recipe = load_recipe(Path(recipe_file))
    directory = draftsmith.train(recipe, out)  # finished stages are skipped
    draft, ids = draftsmith.load_draft(directory)
    print(f"{directory}: {sum(p.numel() for p in draft.parameters()):,} parameters, {len(ids):,} tokens")
    target = LocalTarget(recipe.target)
    prompt = ChatFormat.of(recipe, target).first_turn(question, None, None)
    plain = draftsmith.decode(target, prompt, max_new_tokens=48)
    drafted = draftsmith.decode(target, prompt, directory, "3/4/8", max_new_tokens=48)
    assert drafted.ids == plain.ids, "drafting changes nothing"
    print(f"{target.tokenizer.decode(plain.ids)!r}\nplain {plain.seconds:.2f} s, drafted {drafted.seconds:.2f} s")
    print(f"tau {drafted.tau:.2f}")
    return target.tokenizer.decode(plain.ids), drafted.tau


if __name__ == "__main__":
    main(*sys.argv[1:3])
