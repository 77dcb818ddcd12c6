"""The flags of a command that say who writes and how answers are drawn, and what of them cannot be.

Called by every kind of generation, before anything that takes seconds to import.
"""

import argparse
import math
from pathlib import Path

from toolkit.files import expanded
from toolkit.generate.requests import Sampling
from toolkit.recipe.errors import RecipeError

TOGETHER, ONE_BY_ONE = "together", "one-by-one"
FORMS = (TOGETHER, ONE_BY_ONE)
"""How passages are asked for: all grades in one call, or a call for each."""
REQUEST_SECONDS = 600.0
"""How long one answer of a server may take, where no flag says so."""


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the engine and of the sampling to a command."""
    group = parser.add_argument_group("who writes (one of --server, --batch-file, or --model alone)")
    group.add_argument("--server", metavar="URL", help="an OpenAI-compatible chat server, as http://host:8000/v1")
    batch = "a folder: requests are written there in the OpenAI batch format, and answers read from there"
    group.add_argument("--batch-file", type=Path, metavar="PATH", help=batch)
    model = "alone: a model in this process, a folder or hub id; with --server or --batch-file: the name it is asked by"
    group.add_argument("--model", metavar="NAME", help=model)
    key = "environment variable with the server's key (default: OPENAI_API_KEY, if it is set)"
    group.add_argument("--key-variable", metavar="NAME", help=key)
    seconds = f"of a server, for one answer (default: {REQUEST_SECONDS:g})"
    group.add_argument("--request-timeout", type=float, metavar="SECONDS", help=seconds)
    sampling = parser.add_argument_group("how answers are drawn")
    sampling.add_argument("--temperature", type=float, default=0.8, metavar="T", help="default: 0.8")
    sampling.add_argument("--top-p", type=float, default=0.95, metavar="P", help="default: 0.95")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="of an answer, at most; default: by the form")


def check_engine_flags(arguments: argparse.Namespace) -> None:
    """RecipeError for no engine, two of them, or a flag that says nothing to the one that is named."""
    if arguments.server is not None and arguments.batch_file is not None:
        raise RecipeError("--server and --batch-file: name one of them")
    if arguments.server is None and arguments.batch_file is None and arguments.model is None:
        raise RecipeError("who writes: name --server URL, --batch-file PATH, or --model FOLDER_OR_HUB_ID")
    if arguments.batch_file is not None and arguments.model is None:
        raise RecipeError("--batch-file: its requests name a model; add --model NAME, as its server will know it")
    if arguments.key_variable is not None and arguments.server is None:
        raise RecipeError("--key-variable: only a server is given a key; add --server, or leave it out")
    seconds = arguments.request_timeout
    if seconds is not None and arguments.server is None:
        raise RecipeError("--request-timeout: only a server is waited for; add --server, or leave it out")
    if seconds is not None and not 0 < seconds < math.inf:
        raise RecipeError(f"--request-timeout: {seconds} is no number of seconds above 0")


def sampling_of(arguments: argparse.Namespace, most_tokens: int) -> Sampling:
    """The sampling that the flags name; RecipeError for numbers that cannot be.

    Args:
        most_tokens: of an answer, where no flag says so.
    """
    tokens = most_tokens if arguments.max_tokens is None else arguments.max_tokens
    if tokens < 1:
        raise RecipeError(f"--max-tokens: {tokens} leaves no room for an answer; write 1 or more")
    if not 0 <= arguments.temperature <= 2:
        raise RecipeError(f"--temperature: {arguments.temperature} is not between 0 and 2")
    if not 0 < arguments.top_p <= 1:
        raise RecipeError(f"--top-p: {arguments.top_p} is not above 0 and at most 1")
    return Sampling(tokens, arguments.temperature, arguments.top_p)


def model_asked_for(arguments: argparse.Namespace) -> str | None:
    """The model as the command names it, a folder by its whole path; None where the server is to say it."""
    if arguments.model is None:
        return None
    folder = expanded(arguments.model)
    local = arguments.server is None and arguments.batch_file is None and folder.is_dir()
    return str(folder.resolve()) if local else arguments.model
