"""Training-time test: all steps of all chains of a pack, as serving would compute them.

The embedding half of the q, k and v projections depends on the token alone, so it is computed once per token and
looked up by every step. Positions that start no chain (the prompt) only ever serve as keys: they get no query, no
output projection and no MLP.

Shapes: T tokens, R chains, M scored rows of all steps, K taps, H hidden, N heads, D head dimension, of a
teacher the draft vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftsmith.core.recipe import TrainRecipe
from draftsmith.drafts.eagle3.chain_attention import ChainAttention
from draftsmith.drafts.eagle3.model import Eagle3Draft
from draftsmith.drafts.layers import rotate
from draftsmith.drafts.objectives import HeadLoss, Objective
from draftsmith.drafts.packing import Pack, PackInputs, to_device


def ttt_outputs(draft: Eagle3Draft, pack: Pack, taps_TKH: Tensor, embeds_TH: Tensor, steps: int) -> list[Tensor]:
    """Pre-norm outputs [R, H] of every step; row r of step i predicts token chains[r] + 2 + i."""
    layer, attn, config = draft.midlayer, draft.midlayer.self_attn, draft.config
    device, dtype = embeds_TH.device, embeds_TH.dtype
    index = pack.index(device)
    chains_R, positions_T = index.chains_R, index.positions_T
    last = len(pack.ids_T) - 1
    shape_q, shape_kv = (attn.num_heads, attn.head_dim), (attn.num_kv_heads, attn.head_dim)
    query_size = attn.num_heads * attn.head_dim

    # Once for all positions: the angles are fp64, of which GPUs have little.
    cos, sin = draft.rope(torch.arange(max(map(len, pack.documents)) + steps, device=device), dtype)

    weight = torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight])
    from_embed, from_feature = (half.contiguous() for half in weight.split(config.hidden_size, dim=1))

    # Token t + 1 + i stands beside feature t; past the end of the pack any row will do, those are never scored.
    embed_qkv = F.linear(layer.input_layernorm(embeds_TH), from_embed)
    following_T = (torch.arange(last + 1, device=device) + 1).clamp_(max=last)

    features_TH = draft.fuse(taps_TKH)
    kv = F.linear(layer.hidden_norm(features_TH), from_feature[query_size:]) + embed_qkv[following_T, query_size:]
    key0, value0 = kv.unflatten(-1, (2, *shape_kv)).unbind(1)
    key0 = rotate(key0, (cos[positions_T], sin[positions_T]))

    feature = features_TH[chains_R]
    own_keys = own_values = key0.new_zeros(0, len(chains_R), *shape_kv)
    outputs: list[Tensor] = []
    for step in range(steps):
        beside = (chains_R + 1 + step).clamp(max=last)
        positions_R = positions_T[chains_R] + step
        table = cos[positions_R], sin[positions_R]
        normed = layer.hidden_norm(feature)
        if step:
            query, kv = (F.linear(normed, from_feature) + embed_qkv[beside]).tensor_split([query_size], dim=-1)
            key, value = kv.unflatten(-1, (2, *shape_kv)).unbind(1)
            own_keys = torch.cat([own_keys, rotate(key, table)[None]])
            own_values = torch.cat([own_values, value[None]])
        else:  # its keys and values are among step 0's
            query = F.linear(normed, from_feature[:query_size]) + embed_qkv[beside, :query_size]
        query = rotate(query.unflatten(-1, shape_q), table)
        attended = ChainAttention.apply(query, key0, value0, own_keys, own_values, index)
        feature = draft.finish(feature, attended.flatten(1))
        outputs.append(feature)
    return outputs


class TTTLoss(nn.Module):
    """All depths of a pack's chains as one objective; a module, so that parameters can be swapped for bf16 copies."""

    def __init__(self, draft: Eagle3Draft, train: TrainRecipe):
        super().__init__()
        self.draft, self.steps = draft, train.ttt_steps
        self.objective = Objective(train.objective, train.lk_eta)

    def forward(self, inputs: PackInputs, step_weights: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        """(weighted loss, alpha of each step's scored rows).

        step_weights[i] weighs every scored row of step i, so their sums over packs give the batch's mean.
        """
        device = inputs.embeds_TH.device
        outputs = ttt_outputs(self.draft, inputs.pack, inputs.taps_TKH, inputs.embeds_TH, self.steps)
        rows = [to_device(inputs.pack.step_rows(step), device) for step in range(self.steps)]
        x = self.draft.norm(torch.cat([output[r] for output, r in zip(outputs, rows, strict=True)]))
        # The distribution after the root of chain r + i is the one that step i of chain r is judged by.
        teacher_rows = torch.cat([r + step for step, r in enumerate(rows)])
        weights = torch.cat([torch.full((len(r),), w, device=device) for r, w in zip(rows, step_weights, strict=True)])
        depths = [len(r) for r in rows]
        loss, alphas = HeadLoss.apply(
            x, self.draft.lm_head.weight, inputs.teacher_RD, teacher_rows, weights, self.objective, depths
        )
        return loss, list(alphas.split(depths))
