"""Training-time test: all steps of all chains of a pack, as serving would compute them.

The embedding half of the q, k and v projections depends on the token alone, so it is computed once per token and
looked up by every step. Positions that start no chain (the prompt) only ever serve as keys: they get no query, no
output projection and no MLP.

Shapes: T tokens, R chains, K taps, H hidden, N heads, D head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from draftsmith.data.packing import Pack
from draftsmith.drafts.chain_attention import ChainAttention
from draftsmith.drafts.eagle3 import Eagle3Draft
from draftsmith.drafts.layers import rope_table, rotate


def ttt_outputs(draft: Eagle3Draft, pack: Pack, taps_TKH: Tensor, embeds_TH: Tensor, steps: int) -> list[Tensor]:
    """Pre-norm outputs [R, H] of every step; row r of step i predicts token chains[r] + 2 + i."""
    layer, attn, config = draft.midlayer, draft.midlayer.self_attn, draft.config
    device, dtype = embeds_TH.device, embeds_TH.dtype
    chains_R = pack.chains_R.to(device)
    positions_T = pack.positions_T.to(device)
    last = len(pack.ids_T) - 1
    shape_q, shape_kv = (attn.num_heads, attn.head_dim), (attn.num_kv_heads, attn.head_dim)

    def halves(weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight[:, : config.hidden_size], weight[:, config.hidden_size :]

    query_e, query_h = halves(attn.q_proj.weight)
    kv_e, kv_h = halves(torch.cat([attn.k_proj.weight, attn.v_proj.weight]))

    # Token t + 1 + i stands beside feature t; past the end of the pack any row will do, those are never scored.
    normed_embeds = layer.input_layernorm(embeds_TH)
    embed_query = F.linear(normed_embeds, query_e)
    embed_kv = F.linear(normed_embeds, kv_e)
    following_T = (torch.arange(last + 1, device=device) + 1).clamp_(max=last)

    features_TH = draft.fuse(taps_TKH)
    kv = F.linear(layer.hidden_norm(features_TH), kv_h) + embed_kv[following_T]
    key0, value0 = kv.unflatten(-1, (2, *shape_kv)).unbind(1)
    key0 = rotate(key0, rope_table(positions_T, attn.head_dim, config.rope_theta, dtype))

    feature = features_TH[chains_R]
    own_keys: list[Tensor] = []
    own_values: list[Tensor] = []
    outputs: list[Tensor] = []
    for step in range(steps):
        beside = (chains_R + 1 + step).clamp(max=last)
        table = rope_table(positions_T[chains_R] + step, attn.head_dim, config.rope_theta, dtype)
        normed = layer.hidden_norm(feature)
        query = F.linear(normed, query_h) + embed_query[beside]
        query = rotate(query.unflatten(-1, shape_q), table)
        if step:
            key, value = (F.linear(normed, kv_h) + embed_kv[beside]).unflatten(-1, (2, *shape_kv)).unbind(1)
            own_keys.append(rotate(key, table))
            own_values.append(value)
        empty = key0.new_zeros(0, len(chains_R), *shape_kv)
        attended = ChainAttention.apply(
            query,
            key0,
            value0,
            torch.stack(own_keys) if own_keys else empty,
            torch.stack(own_values) if own_values else empty,
            pack.segments,
        )
        feature = draft.finish(feature, attended.flatten(1))
        outputs.append(feature)
    return outputs
