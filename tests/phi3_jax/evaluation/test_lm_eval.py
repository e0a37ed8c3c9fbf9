"""lm-evaluation-harness: the scores of its own Hugging Face model, on tasks with local data."""

from __future__ import annotations

import json

import pytest
import yaml

import phi3_jax.cli.main
from tests.phi3_jax.conftest import checkpoint  # noqa: F401

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

import phi3_jax.evaluation.lm_eval  # noqa: E402, F401  (registers the model)

QUESTIONS = [
    {"question": f"What is {i} and {i}?", "choices": [str(2 * i), str(3 * i), "none"], "answer": 0}
    for i in range(1, 6)
] + [{"question": "", "choices": ["a", "bee"], "answer": 1}]


@pytest.fixture
def tasks(tmp_path) -> TaskManager:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    definitions = {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "local_perplexity": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}} It is {{choices[0]}} and {{choices[1]}}.",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
        },
        "local_answer": {
            "output_type": "generate_until",
            "doc_to_text": "Say something. {{question}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, definition in definitions.items():
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, **common} | definition)
        )
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.mark.slow
def test_scores_of_the_hf_model(checkpoint, tasks):  # noqa: F811
    names = ["local_choice", "local_perplexity", "local_answer"]

    def evaluate(model: str, arguments: dict) -> dict:
        return lm_eval.simple_evaluate(
            model, arguments, tasks=names, task_manager=tasks, log_samples=True, bootstrap_iters=0
        )

    ours = evaluate("phi3-jax", {"path": str(checkpoint), "max_length": 64, "batch_size": 4})
    theirs = evaluate(
        "hf", {"pretrained": str(checkpoint), "max_length": 64, "batch_size": 4, "device": "cpu"}
    )
    for name in names:
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), metric
        for mine, their in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert mine["doc"] == their["doc"]
            for a, b in zip(mine["filtered_resps"], their["filtered_resps"], strict=True):
                if name == "local_answer":
                    assert a == b
                elif name == "local_choice":
                    assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-3)
                    assert a[1] == b[1]


def test_command_line(checkpoint, tasks, tmp_path, capsys):  # noqa: F811
    code = phi3_jax.cli.main.main([
        "lm-eval", "--model_args", f"path={checkpoint},max_length=64", "--tasks", "local_choice",
        "--include_path", str(tmp_path), "--batch_size", "4", "--limit", "2",
    ])  # fmt: skip
    assert code == 0
    assert "local_choice" in capsys.readouterr().out
