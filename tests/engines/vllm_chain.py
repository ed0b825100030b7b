"""Run by the vLLM environment's Python: greedy decoding, with or without a draft, as JSON lines on stdout."""

import json
import os
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
from vllm import LLM, SamplingParams


def main() -> None:
    job = json.loads(sys.argv[1])
    options = {}
    if job["draft"]:
        options["speculative_config"] = {
            "method": "eagle3",
            "model": job["draft"],
            "num_speculative_tokens": job["steps"],
        }
    llm = LLM(
        job["target"],
        dtype="float32",
        max_model_len=512,
        max_num_seqs=1,
        enforce_eager=True,
        disable_log_stats=False,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        **options,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=job["max_new_tokens"], detokenize=False)
    for prompt in job["prompts"]:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        print(json.dumps({"ids": list(output.outputs[0].token_ids)}), flush=True)
    counters = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode"):
            counters[metric.name] = getattr(metric, "value", None) or getattr(metric, "values", None) or 0
    print(json.dumps({"counters": counters}), flush=True)


if __name__ == "__main__":
    main()
