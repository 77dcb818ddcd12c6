"""One backbone with two adapters, both trained: which of them a forward runs through. Called by the contextual encoder.

PEFT's set_adapter would freeze the one that does not run, and a layer that is recomputed in the backward pass would
run through whichever ran last.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

FIRST = "first"  # the adapter of the first stage; the other has PEFT's own name, "default"


def add_first(model: PeftModel, config: LoraConfig, seed: int) -> None:
    """Put a second adapter beside the one of a model, a function of (model, config, seed); both can be trained."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(FIRST, config)
    for name, parameter in model.named_parameters():
        if name in trained or f".{FIRST}." in name:
            parameter.requires_grad_(bool(trained))


@contextmanager
def through(model: PeftModel, adapter: str) -> Iterator[None]:
    """Run forwards of a model through one of its adapters; what is trained stays as it is."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [adapter]
        yield
    finally:
        for layer, name in zip(layers, before, strict=True):
            layer._active_adapter = name


def same_adapter(model: PeftModel) -> Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]:
    """The `context_fn` of checkpoints of layers: they are recomputed through the adapter that they ran through."""
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        (name,) = layer.active_adapters
        return nullcontext(), through(model, name)

    return contexts
