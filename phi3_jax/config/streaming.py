"""What `data.streaming` needs, and what it excludes."""

from __future__ import annotations

from phi3_jax.config.data import DataConfig
from phi3_jax.config.sections import SweepConfig
from phi3_jax.config.training import TrainingConfig


def streaming_problems(data: DataConfig, training: TrainingConfig, sweep: SweepConfig) -> list[str]:
    """Settings that contradict `data.streaming`, each in a line."""
    if not data.streaming:
        default = DataConfig.model_fields["shuffle_buffer_size"].default
        if data.shuffle_buffer_size != default:
            return ["data.shuffle_buffer_size: needs data.streaming: true"]
        return []
    problems = []
    if training.max_steps < 1:
        problems.append(
            "training.max_steps: data.streaming needs it, for the length of a stream is not known"
        )
    problems += [
        f"training.{key}: epoch: the length of a stream is not known; with data.streaming use steps"
        for key in ("logging_strategy", "eval_strategy", "save_strategy")
        if getattr(training, key) == "epoch"
    ]
    if training.train_sampling_strategy == "group_by_length":
        problems.append(
            "training.train_sampling_strategy: group_by_length needs the lengths of all rows; with "
            "data.streaming use random"
        )
    if data.test_size is not None:
        problems.append(
            "data.test_size: data.streaming cannot hold out a part of the rows; set data.test_path "
            "or data.test_split"
        )
    if data.stopping_strategy != "first_exhausted":
        problems.append(
            "data.stopping_strategy: with data.streaming, each source begins again by itself"
        )
    if any(source.max_samples is not None for source in data.data_sets):
        problems.append("data.max_samples: not with data.streaming; limit training.max_steps")
    problems += [
        f"data.split: {source.split}: data.streaming reads whole splits, not slices"
        for source in data.data_sets
        if "[" in source.split or "+" in source.split
    ]
    if sweep.values:
        problems.append("data.streaming: a sweep needs data that can be read in any order")
    return problems
