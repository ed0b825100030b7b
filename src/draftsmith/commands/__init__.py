"""One file per command: its flags, its help, what it does. `cli.py` finds them by these names."""

# What `draftsmith --help` prints; a command's file and class are named like it, those of stages are `stages.Stages`.
GROUPS = {
    "begin": {
        "init": "write a commented recipe for any model",
        "plan": "bytes, memory, hours and machines of a run, before anything runs",
        "probe": "measure what a speed-up depends on, here or on a running server",
        "predict": "tell the speed-up of every shape and batch, here or on a named machine",
    },
    "make a draft": {"run": "all stages, then the model card"},
    "its stages": {
        "prompts": "gather, de-duplicate and decontaminate prompts",
        "regenerate": "let the target answer them",
        "vocab": "choose the draft vocabulary",
        "train": "train the draft",
        "export": "write the engine directory",
        "evaluate": "measure accept length, speed and losslessness",
        "report": "write report.html",
        "card": "write the model card",
    },
    "use it": {
        "serve": "start an engine with the draft",
        "tune": "find the fastest shape by measuring; serve takes it",
        "compare": "decode with several drafts on the same prompts",
        "inspect": "name every problem of a draft directory that an engine would swallow silently",
        "publish": "upload the draft and its card to the Hugging Face hub",
    },
}
NAMES = [name for group in GROUPS.values() for name in group]
STAGES = ("run", *(name for name in GROUPS["its stages"] if name != "card"))
