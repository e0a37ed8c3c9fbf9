"""lm-evaluation-harness: the scores of its own Hugging Face model, on tasks with local data."""

from __future__ import annotations

import json

import pytest
import yaml

import phi3_jax.cli.main
from phi3_jax import UserError
from tests.phi3_jax.conftest import checkpoint, save_base  # noqa: F401

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from phi3_jax.evaluation.lm_eval import Phi3LM  # noqa: E402  (registers the model)

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


@pytest.fixture(scope="module")
def model(checkpoint) -> Phi3LM:  # noqa: F811
    return Phi3LM(str(checkpoint), max_length=32, batch_size=2)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def test_sampled_answers_differ_and_are_reproducible(model):
    sampled = {"until": ["."], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    several = requests("generate_until", *[("Say something.", sampled)] * 5)
    model.seed = 0
    first, second = model.generate_until(several), model.generate_until(several)
    assert len({*first, *second}) == 10
    model.seed = 0
    assert model.generate_until(several) == first


def test_a_request_without_room_for_its_prompt(model):
    for count in (32, 40):
        long = requests("generate_until", ("Say", {"max_gen_toks": count, "do_sample": False}))
        with pytest.raises(UserError, match=f"max_gen_toks {count} leaves no room .* 32"):
            model.generate_until(long)
    with pytest.raises(UserError, match="a continuation has 33 tokens, more than max_length, 32"):
        model._loglikelihood_tokens([(None, [1], [5] * 33)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": "auto"}, "batch_size must be a number of at least 1, not auto"),
        ({"batch_size": "auto:4"}, "not auto:4"),
        ({"batch_size": 0, "max_length": "x"}, "1, not 0; max_length must be .* not x"),
        (
            {"load_in_4bit": True, "dtype": "int8"},
            "load_in_4bit is not one of .*; dtype must be one",
        ),
        ({"path": None, "pretrained": "m"}, "pretrained is not one of .*; path is missing"),
        ({"rope_factors": "longest"}, "rope_factors must be one of by_text"),
    ],
)
def test_wrong_model_args(checkpoint, arguments, said):  # noqa: F811
    with pytest.raises(UserError, match=said):
        Phi3LM(**{"path": str(checkpoint)} | arguments)


def test_a_full_row_has_the_short_factors(tmp_path):
    """The last token of a window is predicted, not read: it makes no row longer."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [1.0 + i for i in range(16)]}
    folder = save_base(
        tmp_path / "model",
        vocab_size=32064,
        num_hidden_layers=1,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_scaling={"type": "longrope"} | factors,
    )
    text = requests("loglikelihood_rolling", ("The quick brown fox jumps over it. " * 5,))
    ours = Phi3LM(str(folder), max_length=16, batch_size=1).loglikelihood_rolling(text)
    theirs = HFLM(str(folder), max_length=16, batch_size=1, device="cpu")
    assert ours == pytest.approx(theirs.loglikelihood_rolling(text), rel=1e-4)
