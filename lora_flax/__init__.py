"""LoRA for any Flax NNX model, with PEFT's options and PEFT's file format.

lora_flax.wrap(model, lora_flax.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
trains = lora_flax.mark_only_lora_as_trainable(model)
graphdef, trainable, frozen = nnx.split(model, trains, ...)
...                                    # train `trainable` with jax and optax, then
nnx.update(model, trainable)
lora_flax.save_peft(model, "adapter")
"""

from lora_flax.axes import Axis, axes_of
from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError
from lora_flax.files import remove_durably, write_atomically
from lora_flax.fused_lora import time_fused_lora, use_fused_lora
from lora_flax.host import on_host
from lora_flax.init.eva import initialize_lora_eva_weights
from lora_flax.init.loftq import replace_lora_weights_loftq
from lora_flax.init.qera import initialize_lora_qera_weights
from lora_flax.kernels.product import Shards
from lora_flax.kernels.timing import MatmulChoice
from lora_flax.layers.adapter import Adapter, LoRAScale
from lora_flax.layers.dense import LoRADense
from lora_flax.layers.trained_whole import UntiedEmbedding
from lora_flax.layers.wrappers import LoRAConv, LoRAEmbed
from lora_flax.optimizers.lora_muon import lora_muon
from lora_flax.optimizers.parts import Parts, array_parts, per_part
from lora_flax.peft.loading import load_peft, read_peft_config
from lora_flax.peft.saving import PeftAdapter, save_peft, to_peft
from lora_flax.quant.array import QuantizedArray
from lora_flax.quant.autotune import choose_matmul, use_fused_matmul
from lora_flax.quant.layer import BitsAndBytesConfig, QuantizedDense, dequantize, quantize
from lora_flax.summary import Report, format_table, report
from lora_flax.surgery.combinations import add_weighted_adapter
from lora_flax.surgery.ensemble import Many, put_one, wrap_many
from lora_flax.surgery.merge import merge, merge_and_unload, unmerge
from lora_flax.surgery.named_adapters import (
    active_adapters,
    adapter_names,
    add_adapter,
    delete_adapter,
    disable_adapter,
    mixed_batch,
    set_adapter,
)
from lora_flax.surgery.wrap import unwrap, wrap
from lora_flax.trainable import (
    decay_mask,
    is_factor,
    load_lora_state_dict,
    lora_state_dict,
    loraplus,
    mark_only_lora_as_trainable,
    mask_optimizer,
    param_label,
    trainable_mask,
)

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Axis",
    "BitsAndBytesConfig",
    "LoRAConv",
    "LoRADense",
    "LoRAEmbed",
    "LoRAScale",
    "LoraConfig",
    "LoraError",
    "Many",
    "MatmulChoice",
    "Parts",
    "PeftAdapter",
    "QuantizedArray",
    "QuantizedDense",
    "Report",
    "Shards",
    "UntiedEmbedding",
    "active_adapters",
    "adapter_names",
    "add_adapter",
    "add_weighted_adapter",
    "array_parts",
    "axes_of",
    "choose_matmul",
    "decay_mask",
    "delete_adapter",
    "dequantize",
    "disable_adapter",
    "format_table",
    "initialize_lora_eva_weights",
    "initialize_lora_qera_weights",
    "is_factor",
    "load_lora_state_dict",
    "load_peft",
    "lora_muon",
    "lora_state_dict",
    "loraplus",
    "mark_only_lora_as_trainable",
    "mask_optimizer",
    "merge",
    "merge_and_unload",
    "mixed_batch",
    "on_host",
    "param_label",
    "per_part",
    "put_one",
    "quantize",
    "read_peft_config",
    "remove_durably",
    "replace_lora_weights_loftq",
    "report",
    "save_peft",
    "set_adapter",
    "time_fused_lora",
    "to_peft",
    "trainable_mask",
    "unmerge",
    "unwrap",
    "use_fused_lora",
    "use_fused_matmul",
    "wrap",
    "wrap_many",
    "write_atomically",
]
