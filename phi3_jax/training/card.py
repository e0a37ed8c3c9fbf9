"""The model card of an exported adapter: what it is, how it was trained, how to load it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

import lora_flax
from phi3_jax.checkpoint.cards import PICTURE, card_data, card_text, terms_of
from phi3_jax.checkpoint.hub import is_repo_id
from phi3_jax.checkpoint.readers import readers, rope_note
from phi3_jax.config.loader import RunConfig
from phi3_jax.model.config import Phi3Config
from phi3_jax.report.charts import of_run
from phi3_jax.report.curves import to_png
from phi3_jax.report.folder import RunFolder
from phi3_jax.report.text import fixed
from phi3_jax.training.interrupt import report

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
{rope}
## Results

{results}
{picture}
## Training
{data}{command}{versions}
## Settings

```yaml
{settings}```
"""

PLAIN = "base = AutoModelForCausalLM.from_pretrained({base})"
# The file is next to the adapter; see `phi3_jax.checkpoint.adapters`.
QUANTIZED = """import json
from transformers import BitsAndBytesConfig

with open("PATH_OF_THIS_FOLDER/quantization_config.json") as file:
    quantization = BitsAndBytesConfig.from_dict(json.load(file))
base = AutoModelForCausalLM.from_pretrained({base}, quantization_config=quantization)"""
# What the hub calls our metrics: type and name.
_METRICS = {
    "eval_loss": ("loss", "held-out loss"),
    "eval_perplexity": ("perplexity", "held-out perplexity"),
    "eval_mean_token_accuracy": ("accuracy", "held-out token accuracy"),
}


def write_card(
    directory: Path,
    config: RunConfig,
    adapter: Mapping[str, Any],
    step: int,
    evaluations: Mapping[int, Mapping[str, float]],
    network: Phi3Config,
    run: RunFolder,
) -> None:
    """Write README.md with Hugging Face front matter, and the picture of the loss beside it.

    Args:
        directory: the adapter folder.
        config: the run's config.
        adapter: the fields of adapter_config.json.
        step: the step that is exported.
        evaluations: held-out metrics, keyed by the step they were measured after. The card has
            those of the first step and of this one.
        network: the base model's config.
        run: what the run's folder holds so far.
    """
    base = str(adapter["base_model_name_or_path"])
    data = card_data(
        base,
        "adapter",
        "peft",
        ["lora", "phi3", "jax"],
        model_name=config.training.run_name or run.name,
        datasets=_datasets(config) or None,
        eval_results=_eval_results(config, evaluations.get(step, {})) or None,
        **terms_of(base, adapter.get("revision")),
    )
    load = PLAIN if config.model.quantization is None else QUANTIZED
    revision = adapter.get("revision")
    named = f'"{base}"' + (f', revision="{revision}"' if revision else "")
    train: dict[str, Any] = run.record.get("data", {}).get("training", {})
    # The record of a stream counts its first rows only.
    longest = config.data.max_length if config.data.streaming else train.get("longest")
    note = rope_note(network, longest)
    body = BODY.format(
        base=base,
        load=load.format(base=named),
        readers="\n".join(f"- {name}: {text}" for name, text in readers(adapter).items()),
        rope="" if note is None else f"\n{note}\n",
        results=_table(evaluations, step),
        picture=_picture(directory, run),
        data=_data(config, train),
        command=_command(run),
        versions=_versions(run),
        settings=config.to_yaml(),
    )
    lora_flax.write_atomically(directory / "README.md", card_text(data, body))


def _datasets(config: RunConfig) -> list[str]:
    """The data sets that are on the hub."""
    return [source.path for source in config.data.data_sets if is_repo_id(source.path)]


def _eval_results(config: RunConfig, values: Mapping[str, float]) -> list[EvalResult]:
    """The metrics of the exported step, for the hub."""
    path = config.data.test_path or (config.data.data_sets[0].path)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=path if is_repo_id(path) else "custom",
            dataset_name=f"held-out rows of {Path(path).name}",
            dataset_split=config.data.test_split,
            metric_type=kind,
            metric_name=title,
            metric_value=round(values[name], 6),
        )
        for name, (kind, title) in _METRICS.items()
        if math.isfinite(values.get(name, math.nan))
    ]


def _picture(directory: Path, run: RunFolder) -> str:
    """Markdown of the loss curve, once the file is written; empty where it cannot be drawn."""
    try:
        drawn = [to_png(chart) for chart in of_run(run) if chart.title == "Loss"]
    except ImportError:
        return ""
    except Exception as error:  # matplotlib's are many, and the adapter is worth more
        report(f"warning: the model card has no picture ({type(error).__name__}: {error})")
        return ""
    if not drawn:
        return ""
    lora_flax.write_atomically(directory / PICTURE, drawn[0])
    return f"\n![Training and held-out loss over steps]({PICTURE})\n"


def _data(config: RunConfig, train: dict[str, Any]) -> str:
    if not train:
        return ""
    paths = ", ".join(source.path for source in config.data.data_sets)
    return (
        f"\n{train['examples']:,} examples with {train['tokens']:,} tokens, "
        f"{train['learned tokens']:,} of them learned, from {paths}.\n"
    )


def _command(run: RunFolder) -> str:
    commands = [attempt["command"] for attempt in run.attempts if attempt.get("command")]
    text = "\n".join(dict.fromkeys(commands))
    return f"\n```bash\n{text}\n```\n" if text else ""


def _versions(run: RunFolder) -> str:
    if not run.attempts:
        return ""
    versions: dict[str, str] = run.attempts[-1].get("versions", {})
    return "\nVersions: " + ", ".join(f"{n} {v}" for n, v in versions.items()) + ".\n"


def _table(evaluations: Mapping[int, Mapping[str, float]], step: int) -> str:
    if not evaluations:
        return "No examples were held out."
    shown = {taken: evaluations[taken] for taken in sorted({0, step}) if taken in evaluations}
    parts = []
    if shown:
        # A resumed run may measure other metrics than its first evaluation did.
        names = list(dict.fromkeys(name for values in shown.values() for name in values))
        lines = [f"| held-out | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for taken, values in shown.items():
            cells = [fixed(values.get(name, math.nan), 4) for name in names]
            lines.append(f"| after {taken} steps | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    if step not in shown:
        parts.append(f"This adapter, of step {step}, was not evaluated.")
    return "\n\n".join(parts)
