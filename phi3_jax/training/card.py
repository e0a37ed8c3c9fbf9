"""The model card of an exported adapter: what it is, how it was trained, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import lora_flax
from phi3_jax.checkpoint.push import card_front
from phi3_jax.checkpoint.readers import readers
from phi3_jax.config.loader import RunConfig

BODY = """# LoRA adapter for {base}

Trained with phi3-jax. It is an ordinary PEFT adapter:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

{load}
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
```

## Other programs

{readers}

"Merge first" means `phi3-jax merge --model BASE --adapter THIS_FOLDER --output FOLDER`.

## Results

{results}

## Settings

```yaml
{settings}```
"""

PLAIN = 'base = AutoModelForCausalLM.from_pretrained("{base}")'
# The file is next to the adapter; see `phi3_jax.checkpoint.adapters`.
QUANTIZED = """import json
from transformers import BitsAndBytesConfig

with open("PATH_OF_THIS_FOLDER/quantization_config.json") as file:
    quantization = BitsAndBytesConfig.from_dict(json.load(file))
base = AutoModelForCausalLM.from_pretrained("{base}", quantization_config=quantization)"""


def write_card(
    directory: Path,
    config: RunConfig,
    adapter: Mapping[str, Any],
    results: dict[str, dict[str, float]],
) -> None:
    """Write README.md with Hugging Face front matter.

    Args:
        directory: the adapter folder.
        config: the run's config.
        adapter: the fields of adapter_config.json.
        results: held-out metrics keyed by when they were measured ("before", "after"); may be
            empty.
    """
    base = str(adapter["base_model_name_or_path"])
    front = card_front(base, "adapter", "peft", ["lora", "phi3", "jax"])
    load = PLAIN if config.model.quantization is None else QUANTIZED
    text = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + BODY.format(
        base=base,
        load=load.format(base=base),
        readers="\n".join(f"- {name}: {text}" for name, text in readers(adapter).items()),
        results=_table(results),
        settings=config.to_yaml(),
    )
    lora_flax.write_atomically(directory / "README.md", text)


def _table(results: dict[str, dict[str, float]]) -> str:
    if not results:
        return "No examples were held out."
    names = list(next(iter(results.values())))
    lines = [f"| held-out | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {when} | {' | '.join(f'{values[name]:.4f}' for name in names)} |"
        for when, values in results.items()
    ]
    return "\n".join(lines)
