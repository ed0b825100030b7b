"""Gemma-3 for SGLang 0.5 with the residual stream in what EAGLE-3 captures.

SGLang's own class appends `hidden_states` of a layer and leaves the residual beside it out, so drafts are fed features
that no trainer has seen. This class runs inside SGLang's processes: it imports nothing of draftsmith. `draftsmith
serve` names it by an environment variable; an SGLang that adds the residual itself will not need it.
"""

from typing import Any

from sglang.srt.models.gemma3_causal import Gemma3ForCausalLM as Stock


class Gemma3ForCausalLM(Stock):  # type: ignore[misc]
    def set_eagle3_layers_to_capture(self, layer_ids: Any = None) -> None:
        super().set_eagle3_layers_to_capture(layer_ids)
        wanted = sorted(self.model.layers_to_capture)  # layer i stands for what enters it: the output of layer i - 1
        streams: dict[int, Any] = {}

        def keep(index: int) -> Any:
            def hook(layer: Any, args: Any, output: Any) -> None:
                hidden_states, residual = output
                streams[index] = hidden_states + residual

            return hook

        for index in wanted:
            self.model.layers[index - 1].register_forward_hook(keep(index))
        self.model.register_forward_hook(lambda model, args, output: (output[0], [streams[i] for i in wanted]))


EntryClass = Gemma3ForCausalLM
