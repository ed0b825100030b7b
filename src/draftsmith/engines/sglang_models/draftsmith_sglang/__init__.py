"""Models that SGLang loads in place of its own; see SGLANG_EXTERNAL_MODEL_PACKAGE."""
