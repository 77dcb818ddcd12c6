"""How long an input a model reads. Called where a model meets the lengths of a recipe or of a command."""

from transformers import PretrainedConfig

LEARNED_POSITIONS = ("bert", "roberta", "xlm-roberta", "distilbert")  # an embedding per position, so a longest input


def longest_input(config: PretrainedConfig) -> int | None:
    """The most tokens that a retriever has positions for; None: its positions are relative, and have no end (T5)."""
    if config.model_type == "t5":
        return None
    # RoBERTa's first token has the position after that of padding
    taken = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
    return config.max_position_embeddings - taken


def check_length(
    config: PretrainedConfig, max_tokens: int, keys: str = "encoder.max_tokens and encoder.eval_max_tokens"
) -> None:
    """Raise ValueError if a retriever with learned positions has fewer of them than the longest input has tokens.

    `keys`: what the user has to set instead.
    """
    positions = longest_input(config)
    if positions is not None and config.model_type in LEARNED_POSITIONS and max_tokens > positions:
        raise ValueError(
            f"the model ({config.model_type}) has learned positions for {positions} tokens; set {keys} to at most "
            f"{positions} (found {max_tokens})"
        )


def check_window(config: PretrainedConfig, max_tokens: int) -> None:
    """Raise ValueError if a layer's sliding window is shorter than the input.

    The paper does not say how a window and in-batch attention go together, so neither do we.
    """
    windowed = config.model_type in ("mistral", "qwen2", "qwen3")
    window = config.sliding_window if windowed else None  # also None where the window is switched off
    if window is not None and window < max_tokens:
        raise ValueError(
            f"a sliding window of {window} tokens is shorter than max_tokens {max_tokens}; shorten the input"
        )
