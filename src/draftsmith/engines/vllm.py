"""vLLM 0.32: how it is asked, read and started."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from draftsmith.core.errors import ServeError
from draftsmith.core.files import JsonObject
from draftsmith.core.recipe import Recipe
from draftsmith.core.shape import Shape
from draftsmith.decoding.generation import Generation
from draftsmith.engines.server import Purpose, ServerEngine, is_gemma3


class VLLM(ServerEngine):
    name = "vllm"
    title = "vLLM"
    program = ("vllm", "serve")
    chosen_on_gpus = True
    last_beside_taps = True
    drafts_trees = False
    tells_of_stopped = False
    tells_with = "--per-request-spec-decode-metrics detailed"

    path = "/v1/completions"
    seed = "seed"
    to_complete: ClassVar[JsonObject] = {"return_token_ids": True}
    to_score: ClassVar[JsonObject] = {"return_token_ids": True, "prompt_logprobs": 0}
    to_capture: ClassVar[JsonObject] = {}

    def body(self, model: str, ids: list[int], most: int, settings: JsonObject) -> JsonObject:
        return {"model": model, "prompt": ids, "max_tokens": most, **settings}

    def read_logprobs(self, answer: Any) -> list[float]:
        choice = answer["choices"][0]
        following = zip(choice["prompt_token_ids"][1:], choice["prompt_logprobs"][1:], strict=True)
        return [logprobs[str(token)]["logprob"] for token, logprobs in following]

    def read_completion(self, answer: Any) -> Generation:
        steps = ((answer.get("metrics") or {}).get("speculative_decoding") or {}).get("per_step_accepted")
        return Generation(answer["choices"][0]["token_ids"], self.finish_reason(answer), tuple(steps or ()))

    def finish_reason(self, answer: Any) -> Any:
        return answer["choices"][0]["finish_reason"]

    def read_capture(self, answer: Any) -> str | None:
        return (answer.get("kv_transfer_params") or {}).get("hidden_states_path")

    def arguments(
        self, recipe: Recipe, model: str, draft: Path, purpose: Purpose, layers: Sequence[int]
    ) -> tuple[list[str], dict[str, str]]:
        settings = recipe.serve
        flags = [model, "--tensor-parallel-size", str(settings.tensor_parallel)]
        if settings.context:
            flags += ["--max-model-len", str(settings.context)]
        if purpose == "draft":
            if settings.shape.topk != 1:
                chain = Shape.chain(settings.shape.steps)
                raise ServeError(f"serve.shape: {settings.shape} is a tree, and vLLM drafts chains; give {chain}")
            speculative = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": settings.shape.steps}
            if settings.draft_sampling == "sampled":
                speculative["draft_sample_method"] = "probabilistic"
            flags += ["--speculative-config", json.dumps(speculative), *self.tells_with.split()]
            if is_gemma3(model) and "--model-impl" not in settings.extra:
                flags += ["--model-impl", "transformers"]  # vLLM's own Gemma-3 has no taps
        if purpose == "last":
            raise ServeError("serve: vLLM keeps the last layer beside the taps; use --purpose capture")
        if purpose == "capture":
            keep = {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}}
            extract = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": keep}
            connector = {
                "kv_connector": "ExampleHiddenStatesConnector",
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {"shared_storage_path": str(settings.states)},
            }
            flags += ["--no-enable-prefix-caching", "--speculative-config", json.dumps(extract)]
            flags += ["--kv-transfer-config", json.dumps(connector)]
        if recipe.target.template_options:
            flags += ["--default-chat-template-kwargs", json.dumps(recipe.target.template_options)]
        return flags, {}
