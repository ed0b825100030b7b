"""How vLLM and SGLang are asked, and how their answers are read; facts of vLLM 0.32 and SGLang 0.5."""

from collections.abc import Sequence
from typing import Any, Protocol

from draftsmith.decoding.sampling import Sampling
from draftsmith.targets.base import Generation

RESIDUAL = "draftsmith_residual"  # said by an SGLang whose Gemma-3 captures the residual stream (sglang_models)
Request = tuple[str, dict[str, Any]]  # path and JSON body


class Dialect(Protocol):
    def probe(self, model: str, ids: list[int]) -> Request:
        """Ask what the model thinks of every token of a text."""
        ...

    def read_probe(self, answer: dict[str, Any]) -> list[float]:
        """Log-probability of every token after the first."""
        ...

    def completion(
        self, model: str, ids: list[int], sampling: Sampling, max_new_tokens: int, stop: Sequence[str], seed: int
    ) -> Request: ...

    def read_completion(self, answer: dict[str, Any]) -> Generation:
        """Token ids as generated, with the server's own finish reason."""
        ...

    def finish_reason(self, answer: dict[str, Any]) -> str:
        """`stop` or `length`; anything else means that the server gave up in between."""
        ...

    def capture(self, model: str, ids: list[int]) -> Request:
        """Ask for the hidden states of a text."""
        ...

    def read_capture(self, answer: dict[str, Any]) -> str | list[list[float]] | None:
        """Path of the safetensors file that the server writes or has written, or the numbers, one list a token.

        None if the server keeps no hidden states.
        """
        ...


def _sampling(sampling: Sampling, stop: Sequence[str]) -> dict[str, Any]:
    """Said in full, because servers take what is left out from the model's generation_config."""
    settings = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    return {**settings, "stop": list(stop)} if stop else settings


class VLLM:
    def probe(self, model: str, ids: list[int]) -> Request:
        body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        return "/v1/completions", {**body, "return_token_ids": True}

    def read_probe(self, answer: dict[str, Any]) -> list[float]:
        choice = answer["choices"][0]
        following = zip(choice["prompt_token_ids"][1:], choice["prompt_logprobs"][1:], strict=True)
        return [logprobs[str(token)]["logprob"] for token, logprobs in following]

    def completion(
        self, model: str, ids: list[int], sampling: Sampling, max_new_tokens: int, stop: Sequence[str], seed: int
    ) -> Request:
        body = {"model": model, "prompt": ids, "max_tokens": max_new_tokens, "return_token_ids": True, "seed": seed}
        return "/v1/completions", body | _sampling(sampling, stop)

    def read_completion(self, answer: dict[str, Any]) -> Generation:
        choice = answer["choices"][0]
        told = ((answer.get("metrics") or {}).get("speculative_decoding") or {}).get("per_step_accepted")
        return Generation(choice["token_ids"], choice["finish_reason"], tuple(told or ()), in_order=True)

    def finish_reason(self, answer: dict[str, Any]) -> str:
        return answer["choices"][0]["finish_reason"]

    def capture(self, model: str, ids: list[int]) -> Request:
        return "/v1/completions", {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0}

    def read_capture(self, answer: dict[str, Any]) -> str | None:
        return (answer.get("kv_transfer_params") or {}).get("hidden_states_path")


class SGLang:
    def probe(self, model: str, ids: list[int]) -> Request:
        settings = {"temperature": 0.0, "max_new_tokens": 1}
        body = {"input_ids": ids, "sampling_params": settings, "return_logprob": True, "logprob_start_len": 0}
        return "/generate", body

    def read_probe(self, answer: dict[str, Any]) -> list[float]:
        return [logprob for logprob, *_ in answer["meta_info"]["input_token_logprobs"][1:]]

    def completion(
        self, model: str, ids: list[int], sampling: Sampling, max_new_tokens: int, stop: Sequence[str], seed: int
    ) -> Request:
        settings = {"max_new_tokens": max_new_tokens, "sampling_seed": seed}
        return "/generate", {"input_ids": ids, "sampling_params": settings | _sampling(sampling, stop)}

    def read_completion(self, answer: dict[str, Any]) -> Generation:
        meta = answer["meta_info"]
        histogram = meta.get("spec_correct_drafts_histogram") or []
        told = tuple(accepted for accepted, steps in enumerate(histogram) for _ in range(steps))
        return Generation(answer["output_ids"], meta["finish_reason"]["type"], told)

    def finish_reason(self, answer: dict[str, Any]) -> str:
        return answer["meta_info"]["finish_reason"]["type"]

    def capture(self, model: str, ids: list[int]) -> Request:
        body = {"input_ids": ids, "sampling_params": {"temperature": 0.0, "max_new_tokens": 1}}
        return "/generate", {**body, "return_hidden_states": True}

    def read_capture(self, answer: dict[str, Any]) -> list[list[float]] | None:
        forwards = answer["meta_info"].get("hidden_states")  # the prompt's rows, then one list for each token written
        return forwards and forwards[0]


DIALECTS: dict[str, Dialect] = {"vllm": VLLM(), "sglang": SGLang()}
