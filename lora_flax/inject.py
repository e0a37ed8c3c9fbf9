"""Surgery on a loaded model: put the update in, fold it in, take it out.

    wrap ──> merge ──> unmerge ──> unwrap          in place, and bitwise reversible
      └────────┴──> merge_and_unload               plain layers that hold the update

No call changes what the model computes, up to rounding, but training in between.
"""

from __future__ import annotations

from flax import nnx

from lora_flax.config import LoraConfig
from lora_flax.errors import LoraError
from lora_flax.layers import LoRADense
from lora_flax.table import Report, report
from lora_flax.targets import Path, replace, select_layers, wrappers


def wrap(model: nnx.Module, config: LoraConfig, rngs: nnx.Rngs | None = None) -> Report:
    """Replaces the chosen dense layers of `model`, in place, by `LoRADense` around them.

    Gives the same outputs as before, bitwise, until the first step.

    Args:
        model: any NNX module. Layers are those with a `kernel` `[in, out]`, such as `nnx.Linear`;
            below a module with a static int attribute `stack_size` they have `[stack_size, in,
            out]`.
        config: which layers, and the update.
        rngs: for A, one key a layer; `nnx.Rngs(0)` if None.

    Returns:
        What was wrapped, with parameter counts; `format_table` prints it.

    Raises:
        LoraError: if the model is wrapped already, a target matches nothing, or `r` is above the
            smaller side of a kernel.
    """
    if wrappers(model):
        raise LoraError("the model has LoRA layers already; unwrap it first")
    layers = select_layers(model, config.target_modules)
    small = [
        f"{layer.name} [{layer.features_in}, {layer.features_out}]"
        for layer in layers
        if config.r > min(layer.features_in, layer.features_out)
    ]
    if small:
        raise LoraError(f"r={config.r} is above the smaller side of {', '.join(small)}")
    rngs = nnx.Rngs(0) if rngs is None else rngs
    for layer in layers:
        replace(model, layer.path, LoRADense(layer.module, config, rngs=rngs))
    return report(model)


def unwrap(model: nnx.Module) -> None:
    """Takes the update away and puts the base layers back, the very modules that were there.

    A merged model is unmerged first. Kernels are bitwise those of before `wrap`; biases keep what
    training with `bias="all"` or `"lora_only"` made of them, as in PEFT.

    Raises:
        LoraError: if the model has no LoRA layers.
    """
    for path, layer in _wrapped(model):
        if layer.merged:
            layer.unmerge()
        replace(model, path, layer.base)


def merge(model: nnx.Module) -> None:
    """Adds each update to its base kernel: `W + A B scale` in float32, cast to the dtype of W.

    While merged the layers run at the cost of plain ones, and the original kernels are kept beside
    the merged ones, so that `unmerge` gives them back bitwise: the memory of the wrapped kernels
    doubles. `merge_and_unload` does not keep them.

    Raises:
        LoraError: if the model has no LoRA layers or is merged already; nothing is changed then.
    """
    layers = _wrapped(model)
    if any(layer.merged for _, layer in layers):
        raise LoraError("the model is merged already; a second merge would add the update twice")
    for _, layer in layers:
        layer.merge()


def unmerge(model: nnx.Module) -> None:
    """Undoes `merge`: the base kernels are bitwise those of before.

    Raises:
        LoraError: if the model is not merged; nothing is changed then.
    """
    layers = _wrapped(model)
    if not all(layer.merged for _, layer in layers):
        raise LoraError("the model is not merged")
    for _, layer in layers:
        layer.unmerge()


def merge_and_unload(model: nnx.Module) -> None:
    """Merges and puts the plain layers back, now holding the update: the model to save or serve.

    The original kernels are dropped one layer at a time.

    Raises:
        LoraError: if the model has no LoRA layers.
    """
    for path, layer in _wrapped(model):
        if not layer.merged:
            layer.merge()
        replace(model, path, layer.base)


def _wrapped(model: nnx.Module) -> list[tuple[Path, LoRADense]]:
    layers = wrappers(model)
    if not layers:
        raise LoraError(f"{type(model).__name__} has no LoRA layers; call wrap first")
    return layers
