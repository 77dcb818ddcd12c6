"""The two-stage model of CDE in plain torch, by the published equations: NomicBERT's layers and a bidirectional Llama.

The yardstick of the parity tests where the authors' numbers hold no case; itself compared with them where they do.
Shares nothing with the code it measures. W: weights by the authors' names, fp64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, BASE, JOINED, PROMPTS = 4, 1000.0, 6, 8
Weights = dict[str, Tensor]


def rotated(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotate-half of [rows, heads, length, d] with a table in fp32."""
    d = x.shape[-1]
    inverse = 1.0 / (base ** (torch.arange(0, d, 2, dtype=torch.float32) / d))
    angles = torch.cat([positions.float()[:, None] * inverse] * 2, -1)
    half = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
    return x * angles.cos().to(x.dtype) + half * angles.sin().to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[rows, heads, length, d]; mask [rows, length] of keys."""
    scores = (q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(mask[:, None, None] == 0, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def nomic(w: Weights, embedded: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """States of the post-norm encoder for embeddings before their norm."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    x = norm(embedded, "emb_ln")
    for layer in ("encoder.layers.0.", "encoder.layers.1."):
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in (x @ w[layer + "attn.Wqkv.weight"].T).chunk(3, -1)
        )
        read = attention(rotated(q, positions, BASE), rotated(k, positions, BASE), v, mask)
        x = norm(x + read @ w[layer + "attn.out_proj.weight"].T, layer + "norm1")
        gate = F.silu(x @ w[layer + "mlp.fc12.weight"].T)
        x = norm(x + ((x @ w[layer + "mlp.fc11.weight"].T) * gate) @ w[layer + "mlp.fc2.weight"].T, layer + "norm2")
    return x


def words(w: Weights, ids: Tensor) -> Tensor:
    return w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]


def two_layers(w: Weights, name: str, x: Tensor, activation: object) -> Tensor:
    act = F.gelu if activation == "gelu" else F.relu
    return act(x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"]) @ w[f"{name}.2.weight"].T + w[f"{name}.2.bias"]


def below(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


def first_stage(w: Weights, ids: Tensor, mask: Tensor, parts: int = 1) -> Tensor:
    """Vectors of documents [rows * parts, d], document by document: slices of the padded length, each a mean."""
    own = below(w, "first_stage_model.embedder.")
    states = nomic(own, words(own, ids), mask, torch.arange(ids.shape[1])) * mask[:, :, None]
    length = ids.shape[1] + -ids.shape[1] % parts
    vectors = []
    for row, real in zip(states, mask.tolist(), strict=True):
        padded = F.pad(row, (0, 0, 0, length - len(row)))
        real = [*real, *[0] * (length - len(real))]
        for i in range(parts):
            part = slice(i * length // parts, (i + 1) * length // parts)
            count = sum(real[part])
            vectors.append(padded[part].sum(0) / (count + 1e-9 * (parts > 1)) if count else padded.sum(0) / length)
    return two_layers(below(w, "first_stage_model."), "mlp", torch.stack(vectors), "gelu")


def second_states(w: Weights, ids: Tensor, mask: Tensor, context: Tensor, ordered: bool = False) -> Tensor:
    """States [rows, 14 + length, d] of texts after a context [rows, 6, d]."""
    own, width = below(w, "second_stage_model.backbone."), context.shape[-1]
    soft = two_layers(below(w, "second_stage_model."), "prompt_projection", torch.ones(width).double(), "relu")
    joined = torch.cat([context, soft.view(1, PROMPTS, width).expand(len(ids), -1, -1), words(own, ids)], 1)
    positions = torch.arange(joined.shape[1])
    if not ordered:
        positions[:JOINED] = 0
    return nomic(own, joined, torch.cat([torch.ones(len(ids), JOINED + PROMPTS), mask], 1), positions)


def head(w: Weights, pooled: Tensor, residual: bool = True) -> Tensor:
    out = two_layers(below(w, "second_stage_model."), "output_projection", pooled, "relu")
    return out + pooled if residual else out


def llama(w: Weights, x: Tensor, mask: Tensor, heads: int, groups: int, base: float) -> Tensor:
    """States of two Llama layers that read both ways."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[name]

    positions = torch.arange(x.shape[1])
    for layer in ("layers.0.", "layers.1."):
        h = norm(x, layer + "input_layernorm.weight")
        q, k, v = (
            (h @ w[f"{layer}self_attn.{name}_proj.weight"].T).unflatten(-1, (count, -1)).transpose(1, 2)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        k, v = (part.repeat_interleave(heads // groups, 1) for part in (rotated(k, positions, base), v))
        x = x + attention(rotated(q, positions, base), k, v, mask) @ w[layer + "self_attn.o_proj.weight"].T
        h = norm(x, layer + "post_attention_layernorm.weight")
        gate = F.silu(h @ w[layer + "mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ w[layer + "mlp.up_proj.weight"].T)) @ w[layer + "mlp.down_proj.weight"].T
    return norm(x, "norm.weight")


def flattened_prefix(w: Weights, context: Tensor, width: int) -> Tensor:
    """[rows, n, width] of contexts [rows, J, w]: their numbers and those of the soft prompts, filled with ones."""
    soft = two_layers(w, "prompt_projection", torch.ones(context.shape[-1]).double(), "relu")
    numbers = torch.cat([context.flatten(1), soft.expand(len(context), -1)], 1)
    missing = width - numbers.shape[1] % width
    return torch.cat([numbers, torch.ones(len(numbers), missing)], 1).unflatten(1, (-1, width))
