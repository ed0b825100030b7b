"""Every error a user can cause, as one tree.

DraftsmithError            one line: what was given, what is allowed, which key or flag mends it
├── RecipeError            a recipe or flag that cannot be run
├── DataError              prompts, completions or a template that cannot be used
├── TargetError            a target or tokenizer that cannot be loaded or lacks a hook
├── CheckpointError        a checkpoint or draft directory that is damaged or belongs to another run
├── TrainingError          training that had to stop (non-finite gradients, no loss tokens)
├── ServeError             an engine that cannot be started or does not answer
└── PublishError           a hub that does not take the draft

The command line prints them without a traceback and exits with code 2; anything else is a bug.
"""


class DraftsmithError(ValueError):
    """Base of every error that the user, not the programmer, has to mend."""


class RecipeError(DraftsmithError):
    pass


class DataError(DraftsmithError):
    pass


class TargetError(DraftsmithError):
    pass


class CheckpointError(DraftsmithError):
    pass


class TrainingError(DraftsmithError):
    pass


class ServeError(DraftsmithError):
    pass


class PublishError(DraftsmithError):
    pass
