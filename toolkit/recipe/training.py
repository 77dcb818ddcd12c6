"""How a stage trains whatever its method: batch, optimizer, engine, checkpoints, and what ends it."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from toolkit.recipe.section import Natural, Positive, Section, Text


class Batch(Section):
    pool: Annotated[int, Field(ge=2)] = Field(
        description="Rows compared with one another; what a row is, the method says."
    )
    span: Literal["rank", "world"] = Field(description="rank: a pool on one rank; world: spread over all ranks.")
    pools_per_step: Positive = Field(description="Pools per optimizer step, over all ranks.")
    forward_rows: Positive | None = Field(
        None, description="Texts per slice of gradient caching; null keeps all activations. Never changes the result."
    )
    forward_tokens: Positive | None = Field(
        None, description="Instead of forward_rows: padded tokens per slice, of texts sorted by length."
    )


class Optim(Section):
    """AdamW (decoupled weight decay)."""

    lr: Annotated[float, Field(gt=0)] = Field(description="Peak learning rate.")
    warmup_steps: Natural = Field(description="Optimizer steps until the peak.")
    warmup: Literal["linear", "linear_from_zero", "log"] = Field(
        description="Shape: linear (first step above 0), linear_from_zero (as Contriever), log (DeepSpeed's WarmupLR)."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(description="After warm-up; linear and cosine end at 0.")
    steps: Positive = Field(description="Optimizer steps of the stage.")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999], description="Adam betas."
    )
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Adam epsilon.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay.")
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="Largest gradient norm; 0 turns clipping off.")


class NvmeOffload(Section):
    nvme: Text = Field(description="Folder on a local NVMe disk.")


def _offload_kind(value: Any) -> str | None:
    if value == "cpu":
        return "cpu"
    return "nvme" if isinstance(value, NvmeOffload) or (isinstance(value, dict) and "nvme" in value) else None


Offload = Annotated[
    Annotated[Literal["cpu"], Tag("cpu")] | Annotated[NvmeOffload, Tag("nvme")],
    Discriminator(
        _offload_kind, custom_error_type="offload_kind", custom_error_message='write "cpu", {"nvme": "<path>"} or null'
    ),
]


class Zero(Section):
    stage: Literal[0, 1, 2, 3] = Field(
        description="What is sharded: 1 optimizer states, 2 + gradients, 3 + parameters."
    )
    offload_optimizer: Offload | None = Field(None, description="Optimizer states to cpu memory, or NVMe (stage 3).")
    offload_param: Offload | None = Field(None, description="Parameters to cpu memory or NVMe (stage 3).")


class Save(Section):
    every: Positive = Field(description="Optimizer steps between checkpoints; the last step is always saved.")
    keep: Positive = Field(description="Newest checkpoints kept.")


class Guard(Section):
    """What ends a stage that has gone wrong; never changes the result of one that has not."""

    stall_minutes: Annotated[float, Field(gt=0)] = Field(
        10.0,
        description="The run ends if a rank makes no progress for so long (the first step, saves, export and "
        "evaluation are not counted).",
    )
    compare_weights_every: Positive = Field(
        100, description="Steps between comparisons of the weights that ranks hold in common (ZeRO 0 to 2)."
    )
    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="A loss or gradient that is not finite changes no weight, and its rows are written down; then the "
        "run stops, or goes on and counts (skipped_steps).",
    )
