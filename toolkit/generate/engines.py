"""Which engine a command asks, from its flags: a chat server, a batch file, or a model in this process.

Called by every kind of generation.
"""

import argparse

import torch

from toolkit.generate.batch_file import batch_engine
from toolkit.generate.flags import REQUEST_SECONDS
from toolkit.generate.requests import Engine, Sampling
from toolkit.generate.server import server_engine
from toolkit.ranks.last_words import is_first_rank, notice


def open_engine(arguments: argparse.Namespace, sampling: Sampling, device: torch.device, succeeded: bool) -> Engine:
    """The engine that the flags name.

    Args:
        succeeded: some request of an earlier start was answered.

    Raises:
        RecipeError: if it cannot be reached or loaded.
    """
    if arguments.server is not None:
        return server_engine(
            arguments.server,
            arguments.model,
            sampling,
            key_variable=arguments.key_variable,
            succeeded=succeeded,
            timeout=REQUEST_SECONDS if arguments.request_timeout is None else arguments.request_timeout,
        )
    if arguments.batch_file is not None:
        return batch_engine(arguments.batch_file, arguments.model, sampling)
    from toolkit.generate.local_model import local_engine  # seconds, which the other engines need not

    if is_first_rank():
        notice(f"--model {arguments.model}: is being loaded")  # which takes minutes for a large one
    return local_engine(arguments.model, sampling, device, succeeded=succeeded)
