"""What a rank holds of the optimizer: fp32 weights and Adam's moments of the trainable parameters, in flat pieces.

Called by checkpoint: pieces are written with their place in the whole parameter, so that any number of ranks, at any
ZeRO stage, can take up what any other wrote. No rank gathers what is another's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from toolkit.collectives import rank, world_size

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
KEYS = (WEIGHT, *MOMENTS)


class Piece(NamedTuple):
    """A run of elements of one flattened parameter that this rank holds."""

    name: str
    start: int  # of the first element
    size: int
    own: bool  # this rank writes it: False where another rank that holds the same does
    read: Callable[[str], Tensor]  # key -> fp32 [size]
    write: Callable[[str, Tensor], None]


def pieces(engine: Any) -> Iterator[Piece]:
    """This rank's pieces of every trainable parameter; together the ranks' own ones are all. Each is to be read or
    written before the next is asked for: at ZeRO 3 it may lie on NVMe.
    """
    zero, optimizer = engine.zero_optimization_stage(), engine.optimizer
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if zero == 0:
        masters = _masters(optimizer)
        for place, (name, parameter) in enumerate(named):
            yield _whole(
                name, masters[parameter] if masters else parameter, _adam(engine), place % world_size() == rank()
            )
    elif zero < 3:
        for name, parameter in named:
            if parameter._hp_mapping is not None:  # else all of it is other ranks'
                yield _fragment(name, parameter._hp_mapping, _adam(engine))
    else:
        names = {parameter: name for name, parameter in named}
        for number, group in enumerate(optimizer.fp16_groups):
            with _in_memory(engine, number):
                place = 0
                for parameter in group:
                    part = parameter.ds_tensor.ds_numel  # every parameter is cut into equal parts, the last filled up
                    start = part * rank()
                    size = min(part, parameter.ds_numel - start)
                    if size > 0:
                        flat = optimizer.fp32_partitioned_groups_flat[number]
                        yield _run(names[parameter], start, size, flat, place, _adam(engine))
                    place += part


def steps_taken(engine: Any) -> int:
    """Steps that Adam has taken, the same on all ranks; those left out do not count."""
    found = [int(state["step"]) for state in _adam(engine).state.values() if "step" in state]
    return max(found, default=0)


def begin(engine: Any, steps: int) -> None:
    """Give Adam moments of zeros that count as those after `steps` steps, to be overwritten through `pieces`."""
    adam = _adam(engine)
    of_torch = isinstance(adam, torch.optim.AdamW)  # else DeepSpeed's, for states on NVMe
    for number, flat in enumerate(_flat_parameters(engine)):
        with _in_memory(engine, number):
            on_device = of_torch and bool(adam.param_groups[0].get("fused"))  # as torch's own first step does
            count = torch.tensor(float(steps), dtype=torch.float32, device=flat.device if on_device else "cpu")
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            adam.state[flat] = {"step": count if of_torch else steps, **moments}


def refresh(engine: Any) -> None:
    """Make the model's weights those of the optimizer, rounded to the model's number format; called on all ranks."""
    zero, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if zero == 0:
        with torch.no_grad():
            for parameter, master in _masters(optimizer).items():
                parameter.copy_(master)
    elif zero < 3:
        optimizer.update_lp_params()
    else:
        optimizer.checkpoint_event_prologue()  # parameters that every rank keeps whole are given up, to be made anew
        for number in range(len(_flat_parameters(engine))):
            with _in_memory(engine, number):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)  # as after every step
        optimizer.checkpoint_event_epilogue()


@contextmanager
def _in_memory(engine: Any, number: int) -> Iterator[None]:
    """What lies on NVMe of group `number` is read, and written again."""
    zero3 = engine.optimizer if engine.zero_optimization_stage() == 3 else None
    if zero3 is None or not zero3._swappable_optimizer_subgroup(number):
        yield
        return
    zero3._optimizer_states_and_gradient_swap_in(number)
    yield
    zero3._optimizer_states_and_gradient_swap_out(number)


def _adam(engine: Any) -> Any:
    """torch's optimizer inside DeepSpeed's, which at ZeRO 0 in fp32 is itself."""
    return engine.optimizer if isinstance(engine.optimizer, torch.optim.Optimizer) else engine.optimizer.optimizer


def _flat_parameters(engine: Any) -> list[Tensor]:
    """What torch's optimizer steps on."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return [parameter for group in _adam(engine).param_groups for parameter in group["params"]]


def _masters(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """At ZeRO 0 in bf16: parameter -> its fp32 copy. In fp32 there are none: the parameters are stepped on."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return {}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {low: high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}


def _whole(name: str, master: Tensor, adam: Any, own: bool) -> Piece:
    def tensor(key: str) -> Tensor:
        return (master.detach() if key == WEIGHT else adam.state[master][key]).view(-1)

    return Piece(name, 0, master.numel(), own, tensor, _into(tensor))


def _into(tensor: Callable[[str], Tensor]) -> Callable[[str, Tensor], None]:
    def write(key: str, value: Tensor) -> None:
        tensor(key).copy_(value)

    return write


def _fragment(name: str, mapping: Any, adam: Any) -> Piece:
    """ZeRO 1 and 2: a rank's part of all parameters lies in one flat tensor a group."""
    flat = adam.param_groups[mapping.param_group_index]["params"][0]
    whole, own = mapping.lp_fragment_address, mapping.hp_fragment_address
    return _run(name, whole.start, own.numel, flat, own.start, adam)


def _run(name: str, start: int, size: int, flat: Tensor, place: int, adam: Any) -> Piece:
    """The piece that lies at `place` of a flat tensor."""

    def tensor(key: str) -> Tensor:
        return (flat.detach() if key == WEIGHT else adam.state[flat][key]).narrow(0, place, size)

    return Piece(name, start, size, True, tensor, _into(tensor))
