"""The only writer of DeepSpeed configurations: a pure function of a stage and the number of ranks.

Called by the training loop and by --dry-run. Every key that decides a result, memory or speed is written out.
"""

from typing import Any

from toolkit.recipe.stage import Stage, batch_numbers
from toolkit.recipe.training import NvmeOffload, Offload

# Above every adapter matrix of a 7B model at rank 256 (256 x 14,336), below its projections: at ZeRO-3 each adapter
# matrix would otherwise be a fetch of its own.
LORA_PERSISTENCE = 4_000_000
FULL_PERSISTENCE = 100_000
BUCKET = 50_000_000


def ds_config(stage: Stage, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a stage on `world_size` ranks; raises RecipeError if the batch does not fit them."""
    numbers = batch_numbers(stage, world_size)
    optim, zero, bf16 = stage.optim, stage.zero, stage.precision == "bf16"
    config: dict[str, Any] = {
        "train_batch_size": numbers["rows_per_step_global"],
        "train_micro_batch_size_per_gpu": numbers["rows_per_forward_per_rank"],
        "gradient_accumulation_steps": numbers["accumulation_per_rank"],
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optim.lr,
                "betas": optim.betas,
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
                "adam_w_mode": True,
                **_adam(zero.offload_optimizer),
            },
        },
        "gradient_clipping": optim.clip,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},  # a step that is not finite is left out
        "fp16": {"enabled": False},
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "zero_optimization": _zero(stage),
        "zero_allow_untested_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "dump_state": False,
    }
    if bf16 and zero.stage > 0:  # stage 0 refuses the key and accumulates in fp32 by itself
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _adam(place: Offload | None) -> dict[str, bool]:
    """Which AdamW: torch's, which compiles nothing and resumes bit for bit; on NVMe alone DeepSpeed's.

    In CPU memory torch's fused form, as fast as DeepSpeed's CPU kernel. That kernel multiplies its bias correction up
    from step to step but takes a power after a checkpoint, so that a resumed run would round otherwise.
    """
    match place:
        case None:
            return {"torch_adam": True}
        case "cpu":
            return {"torch_adam": True, "fused": True}
        case NvmeOffload():
            return {"torch_adam": False}


def _zero(stage: Stage) -> dict[str, Any]:
    zero = stage.zero
    section: dict[str, Any] = {
        "stage": zero.stage,
        "contiguous_gradients": True,
        "overlap_comm": zero.stage > 0,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET,
        "allgather_partitions": True,
        "allgather_bucket_size": BUCKET,
        "round_robin_gradients": False,
    }
    if zero.stage == 3:
        section |= {
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": FULL_PERSISTENCE if stage.lora is None else LORA_PERSISTENCE,
            "sub_group_size": 1_000_000_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if zero.offload_optimizer is not None:
        section["offload_optimizer"] = _offload(zero.offload_optimizer)
    if zero.offload_param is not None:
        section["offload_param"] = _offload(zero.offload_param)
    return section


def _offload(place: Offload) -> dict[str, Any]:
    if isinstance(place, NvmeOffload):
        return {"device": "nvme", "nvme_path": place.nvme, "pin_memory": True}
    return {"device": "cpu", "pin_memory": True}
