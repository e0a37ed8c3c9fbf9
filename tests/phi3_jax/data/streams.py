"""Streamed rows for tests: files of them, configs, and batches."""

from __future__ import annotations

import gzip
import json

import datasets

from phi3_jax.config.data import DataConfig
from phi3_jax.config.training import TrainingConfig
from phi3_jax.data.batches import BatchPlan
from phi3_jax.data.loading import load_data
from phi3_jax.data.row_streams import Share
from phi3_jax.data.stream_batches import Rows, StreamBatches

ALONE = Rows(Share(), (0, 1))


def texts(prefix: str, count: int) -> list[dict]:
    return [{"text": f"{prefix} {i}"} for i in range(count)]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def put(folder, name: str, rows: list[dict]) -> None:
    """A file of rows, in the form that its name says."""
    file = folder / name
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(str(file), batch_size=4)
    elif name.endswith(".arrow"):
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
        next((folder / "saved").glob("*.arrow")).rename(file)
    elif name.endswith(".csv"):
        file.write_text("text\n" + "".join(row["text"] + "\n" for row in rows))
    elif name.endswith(".json"):
        file.write_text(json.dumps(rows, indent=1))
    else:
        file.write_bytes(gzip.compress(lines(rows)) if name.endswith(".gz") else lines(rows))


def config(tmp_path, **settings) -> DataConfig:
    defaults = {"streaming": True, "shuffle_buffer_size": 8, "max_length": 16}
    defaults |= {"pad_to_multiple_of": 4, "dataset_num_proc": 1}
    defaults |= {"cache_dir": str(tmp_path / "cache")}
    return DataConfig.model_validate(defaults | settings)


def batches_of(data: DataConfig, tokenizer, rows=ALONE, seed=3) -> StreamBatches:
    training = TrainingConfig(
        output_dir="x", per_device_train_batch_size=len(rows.places), gradient_accumulation_steps=2
    )
    train, _ = load_data(data, tokenizer)
    return StreamBatches(train.stream, BatchPlan.from_config(data, training), seed, rows)


def words(batch, tokenizer) -> list[str]:
    rows = batch["tokens"].reshape(-1, batch["tokens"].shape[-1])
    return [tokenizer.decode(row[row > 0], skip_special_tokens=True).strip() for row in rows]
