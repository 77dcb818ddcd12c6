"""Settings of a config.json under the names of code that came with the weights, where the stock class reads others.

Called by whatever reads a config: the stock class keeps its defaults in their place without a word.
"""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

# NomicBERT's: their name -> ours, and what the stock class does where they leave a choice.
_NOMIC = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
    "embd_pdrop": "hidden_dropout_prob",
    "resid_pdrop": "hidden_dropout_prob",
    "attn_pdrop": "attention_probs_dropout_prob",
}
_NOMIC_DOES: dict[str, Any] = {
    "activation_function": "swiglu",
    "causal": False,
    "prenorm": False,
    "parallel_block": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "use_rms_norm": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "num_experts": 0,
}


def check_own_names(config: PretrainedConfig, folder: str | Path) -> None:
    """Raise ValueError where a setting under another name is not what the stock class does."""
    if config.model_type != "nomic_bert":
        return
    given = config.to_dict()
    wanted = {name: (ours, given[ours]) for name, ours in _NOMIC.items()}
    wanted |= {name: ("", value) for name, value in _NOMIC_DOES.items()}
    wanted["rotary_emb_base"] = ("rope_parameters.rope_theta", given["rope_parameters"]["rope_theta"])
    for name, (ours, value) in wanted.items():
        if name in given and given[name] != value:
            fix = f"write it as {ours} too" if ours else "name a model without that"
            raise ValueError(
                f"{folder}/config.json: {name} is {given[name]!r}, a name that the stock class does not read: it has "
                f"{value!r}; {fix}"
            )
