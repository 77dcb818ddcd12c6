"""What a generation will take, before anything is asked: calls, tokens, hours. Called by every kind of generation.

Rules of thumb, each said beside its figure: the tokens of prompts are counted where the model's tokenizer is at hand.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from toolkit.generate.requests import Request
from toolkit.recipe.errors import RecipeError

CHARACTERS_PER_TOKEN = 4
TOKENS_PER_SENTENCE = 20
_FRAME = 10  # tokens that a chat format puts around the texts


class Estimate(NamedTuple):
    """Without what is asked for a second time."""

    calls: int
    prompt_tokens: float
    tokens: float


def token_counter(model: Path | None) -> tuple[Callable[[Request], int], str]:
    """A function that counts the tokens of a request, and how it does that in words.

    Args:
        model: a folder with a tokenizer; None: by the number of characters.
    """
    if model is None:
        rule = f"{CHARACTERS_PER_TOKEN} characters a token and {_FRAME} a call"
        return lambda request: _FRAME + len(request.system + request.user) // CHARACTERS_PER_TOKEN, rule
    from transformers import AutoTokenizer  # seconds, where there is a tokenizer at hand

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RecipeError(
            f"{model}: holds no tokenizer ({str(error).splitlines()[0][:120]}); mend the folder"
        ) from None

    def count(request: Request) -> int:
        return _FRAME + len(tokenizer(request.system + "\n" + request.user, add_special_tokens=False)["input_ids"])

    return count, f"by the tokenizer of {model}, and {_FRAME} a call"


def total(requests: Iterable[tuple[Request, float]], count: Callable[[Request], int], scale: float) -> Estimate:
    """The sum over requests, each with the tokens that its answer is likely to have.

    Args:
        scale: how many queries stand behind each that is looked at.
    """
    calls, prompt_tokens, tokens = 0, 0, 0.0
    for request, expected in requests:
        calls += 1
        prompt_tokens += count(request)
        tokens += expected
    return Estimate(round(calls * scale), prompt_tokens * scale, tokens * scale)
