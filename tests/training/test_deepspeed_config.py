"""DeepSpeed's configuration, key by key."""

import pytest
from tiny import revela_stage

from toolkit.recipe.errors import RecipeError
from toolkit.training.deepspeed_config import ds_config


def test_every_key_of_a_plain_stage() -> None:
    stage = revela_stage(optim__lr=1e-4, optim__clip=1.0, precision="bf16", zero__stage=2)
    assert ds_config(stage, 2) == {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "adam_w_mode": True,
                "torch_adam": True,
            },
        },
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": 2, "contiguous_gradients": True, "overlap_comm": True, "reduce_scatter": True,
            "reduce_bucket_size": 50_000_000, "allgather_partitions": True, "allgather_bucket_size": 50_000_000,
            "round_robin_gradients": False,
        },
        "zero_allow_untested_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "dump_state": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("span", "ranks", "rows", "forwards"), [("rank", 2, 8, 2), ("world", 2, 4, 4), ("world", 8, 1, 4)]
)
def test_the_batch_is_the_same_on_any_number_of_ranks(span: str, ranks: int, rows: int, forwards: int) -> None:
    config = ds_config(revela_stage(batch__span=span), ranks)
    assert config["train_batch_size"] == 32
    assert config["train_micro_batch_size_per_gpu"] == rows and config["gradient_accumulation_steps"] == forwards


def test_offload_names_its_place_and_compiles_nothing_in_cpu_memory(tmp_path) -> None:
    nvme = {"nvme": str(tmp_path)}
    config = ds_config(revela_stage(zero={"stage": 3, "offload_optimizer": "cpu", "offload_param": nvme}), 1)
    section = config["zero_optimization"]
    assert section["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert section["offload_param"] == {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": True}
    adam = config["optimizer"]["params"]
    assert adam["torch_adam"] and adam["fused"]
    adam = ds_config(revela_stage(zero={"stage": 3, "offload_optimizer": nvme}), 1)["optimizer"]["params"]
    assert not adam["torch_adam"] and "fused" not in adam


def test_adapters_stay_whole_at_stage_3() -> None:
    keys = [ds_config(revela_stage(zero__stage=3, **change), 1)["zero_optimization"] for change in ({}, {"lora": None})]
    assert [key["stage3_param_persistence_threshold"] for key in keys] == [4_000_000, 100_000]


def test_bf16_at_stage_0_leaves_accumulation_to_deepspeed() -> None:
    assert "data_types" not in ds_config(revela_stage(zero__stage=0, precision="bf16"), 1)
    assert "data_types" not in ds_config(revela_stage(zero__stage=2), 1)


def test_ranks_that_do_not_fit() -> None:
    with pytest.raises(RecipeError, match=r"3 ranks do not divide batch.pool = 8 \(span world\); use 1, 2, 4, 8 ranks"):
        ds_config(revela_stage(batch__span="world"), 3)
