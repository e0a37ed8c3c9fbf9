"""LoRA for any Flax NNX model, with PEFT's options and PEFT's files.

lora_flax.wrap(model, lora_flax.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
graphdef, trainable, frozen = nnx.split(model, lora_flax.trainable_filter(model), ...)
...                                    # train `trainable` with jax and optax, then
nnx.update(model, trainable)
lora_flax.save_peft(model, "adapter")
"""

from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError
from lora_flax.inject import merge, merge_and_unload, unmerge, unwrap, wrap
from lora_flax.layers import LoRADense
from lora_flax.peft import load_peft, save_peft
from lora_flax.select import mask_optimizer, trainable_filter, trainable_mask
from lora_flax.table import Report, format_table, report

__all__ = [
    "LoRADense",
    "LoraConfig",
    "LoraError",
    "Report",
    "format_table",
    "load_peft",
    "mask_optimizer",
    "merge",
    "merge_and_unload",
    "report",
    "save_peft",
    "trainable_filter",
    "trainable_mask",
    "unmerge",
    "unwrap",
    "wrap",
]
