"""SGLang 0.5: how it is asked, read and started."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from draftsmith.core.files import JsonObject, read_json
from draftsmith.core.progress import say
from draftsmith.core.recipe import Recipe
from draftsmith.core.shape import Shape
from draftsmith.core.taps import to_outputs
from draftsmith.decoding.generation import Generation
from draftsmith.engines.answers import checked_steps
from draftsmith.engines.server import Purpose, ServerEngine, is_gemma3

RESIDUAL = "draftsmith_residual"  # said by a server whose Gemma-3 captures the residual stream (sglang_models)


class SGLang(ServerEngine):
    name = "sglang"
    title = "SGLang"
    program = (sys.executable, "-m", "sglang.launch_server")
    drafts_trees = True
    last_beside_taps = False
    always_draws = False  # it lacks its sampling kernel on CPUs
    models = Path(__file__).parent / "sglang_models"
    models_note = (
        "SGLang's own Gemma-3 class leaves the residual stream out of the hidden states; the variables above load a "
        "class that adds it and comes with draftsmith (`DRAFTSMITH` is the package's directory)."
    )

    path = "/generate"
    seed = "sampling_seed"
    to_complete: ClassVar[JsonObject] = {}
    to_score: ClassVar[JsonObject] = {"return_logprob": True, "logprob_start_len": 0}
    to_capture: ClassVar[JsonObject] = {"return_hidden_states": True}

    def body(self, model: str, ids: list[int], most: int, settings: JsonObject) -> JsonObject:
        return {"input_ids": ids, "sampling_params": {"max_new_tokens": most, **settings}}

    def read_logprobs(self, answer: Any) -> list[float]:
        return [logprob for logprob, *_ in answer["meta_info"]["input_token_logprobs"][1:]]

    def read_completion(self, answer: Any) -> Generation:
        told = answer["meta_info"].get("spec_correct_drafts_histogram") or []
        histogram = checked_steps(told, len(answer["output_ids"]), counts=True)
        accepted = tuple(accepted for accepted, steps in enumerate(histogram) for _ in range(steps))
        return Generation(answer["output_ids"], self.finish_reason(answer), accepted, in_order=False)

    def finish_reason(self, answer: Any) -> Any:
        return answer["meta_info"]["finish_reason"]["type"]

    def read_capture(self, answer: Any) -> list[list[float]] | None:
        forwards = answer["meta_info"].get("hidden_states")  # the prompt's rows, then one list for each token written
        return forwards and forwards[0]

    def capture_check(self, model_type: str) -> tuple[str, str, str] | None:
        fault = (
            "runs SGLang's own Gemma-3, which returns its taps without the residual stream (docs/engines.md); start "
            "it with `draftsmith serve RECIPE --purpose capture`"
        )
        return ("/server_info", RESIDUAL, fault) if model_type.startswith("gemma3") else None

    def serves(self, taps: Sequence[int]) -> bool:
        return to_outputs(taps) is not None

    def greedy_because(self, shape: Shape, draft: Path) -> str | None:
        if shape.topk > 1:
            return "SGLang samples chains only"
        config = read_json(draft / "config.json")
        if (size := config.get("draft_vocab_size")) and size != config["vocab_size"]:
            return f"SGLang samples whole vocabularies only, and the draft's is {size:,} of {config['vocab_size']:,}"
        return None

    def arguments(
        self, recipe: Recipe, model: str, draft: Path, purpose: Purpose, layers: Sequence[int]
    ) -> tuple[list[str], dict[str, str]]:
        settings = recipe.serve
        environment: dict[str, str] = {}
        flags = ["--model-path", model, "--tp-size", str(settings.tensor_parallel)]
        if settings.context:
            flags += ["--context-length", str(settings.context)]
        if purpose == "draft":
            shape = settings.shape
            flags += ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(draft)]
            flags += ["--speculative-num-steps", str(shape.steps), "--speculative-eagle-topk", str(shape.topk)]
            flags += ["--speculative-num-draft-tokens", str(shape.draft_tokens)]
            if settings.draft_sampling == "sampled":
                flags += ["--speculative-use-rejection-sampling"]
            if settings.draft_quantization != "inherit":
                flags += ["--speculative-draft-model-quantization", "unquant"]
        if purpose == "capture":
            flags += ["--enable-return-aux-hidden-states", "--speculative-algorithm", "EAGLE3"]
            flags += ["--return-aux-hidden-state-layer-ids", *map(str, to_outputs(layers[:-1]) or ())]
        if purpose == "last":
            flags += ["--return-hidden-states-mode", "full"]
        if purpose in ("capture", "last"):
            flags += ["--disable-radix-cache", "--chunked-prefill-size", "-1"]
        if purpose in ("draft", "capture") and is_gemma3(model):
            flags += ["--json-model-override-args", json.dumps({RESIDUAL: True})]  # tells clients what runs here
            path = os.pathsep.join(filter(None, [str(self.models), os.environ.get("PYTHONPATH")]))
            environment |= {"SGLANG_EXTERNAL_MODEL_PACKAGE": "draftsmith_sglang", "PYTHONPATH": path}
        if settings.peer_to_peer and settings.tensor_parallel > 1:
            flags += ["--enable-p2p-check"]  # SGLang takes for granted that it works
        if settings.pcie:
            environment["SGLANG_ENABLE_PCIE_IPC_ALLREDUCE"] = "1"
        if recipe.target.template_options:
            say(
                "serve: SGLang takes the chat template's options from each request: send chat_template_kwargs "
                + json.dumps(recipe.target.template_options)
            )
        return flags, environment
