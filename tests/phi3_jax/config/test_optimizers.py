"""Names and settings of optimizers: which are known, and which are refused with what message."""

from __future__ import annotations

import pytest
from transformers.training_args import OptimizerNames

from phi3_jax.config.loader import RunConfig
from phi3_jax.config.optimizers import NAMES, OPTIMIZERS, REFUSED, optimizer_note
from tests.conftest import ROOT


def test_every_name_of_transformers_is_known():
    theirs = {name.value for name in OptimizerNames}
    assert theirs <= NAMES.keys() | REFUSED.keys()
    earlier = {"adamw_hf", "adamw_apex_fused"}
    assert NAMES.keys() - theirs == {"prodigy", "muon", "lora_muon"} | earlier
    assert not NAMES.keys() & REFUSED.keys()
    for name in NAMES:
        plain = name in {"adamw_torch", "lion_32bit", *OPTIMIZERS}
        assert (optimizer_note(name) is None) == (plain and name != "prodigy"), name
    assert optimizer_note("paged_adamw_8bit") == (
        "optimizer: paged_adamw_8bit is adamw_torch here, with its state in float32"
    )


def test_every_refused_name_has_its_reason_in_the_docs():
    page = (ROOT / "docs" / "settings.md").read_text()
    for name in OptimizerNames:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name.value}` |"))
        assert ("refused" in row) == (name.value in REFUSED)
        assert REFUSED.get(name.value, "") in row


def config_of(sections=None, **fields):
    run = {"model": {"path": "m"}, "data": {"path": "d"}, "training": {"output_dir": "o"} | fields}
    return RunConfig.model_validate(run | (sections or {}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optim": "adamw_troch"}, "'adamw_troch' is no optimizer; did you mean adamw_torch"),
        ({"optim": "AdaFactor"}, "did you mean adafactor"),
        ({"optim": "adamw"}, r"'adamw' is no optimizer; did you mean adamw_torch\?"),
        ({"optim": "shampoo"}, "'shampoo' is no optimizer; use one of .*lora_muon"),
        ({"optim": "galore_adamw"}, "galore_adamw cannot be used: it projects the gradients"),
        ({"optim": "lomo"}, "lomo cannot be used: it updates whole weights"),
        ({"optim": "grokadamw"}, "grokadamw cannot be used: the momentum of its parameter"),
        (
            {"optim": "schedule_free_radam", "lr_scheduler_type": "constant", "adam_beta2": 0.6},
            "adam_beta2: schedule_free_radam needs one above 0.6",
        ),
        ({"optim_args": "beta3"}, "'beta3' is not of the form key=value"),
        ({"optim_args": {"beta3": 0.9}}, "beta3 is no setting of adamw_torch; it has none"),
        ({"optim": "sgd", "optim_args": "momentum=fast"}, "optim_args: momentum: Input should be"),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "optim_args: nesterov needs momentum"),
        ({"optim": "schedule_free_adamw"}, "lr_scheduler_type: schedule_free_adamw averages"),
        (
            {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "adam_beta1": 0.0},
            "adam_beta1: schedule_free_adamw needs one above 0",
        ),
        (
            {"optim": "lora_muon", "loraplus_lr_ratio": 16.0},
            "loraplus_lr_ratio: lora_muon does not support it",
        ),
        (
            {"optim": "lora_muon", "learning_rate": 2.0, "weight_decay": 0.5},
            "weight_decay: lora_muon needs learning_rate . weight_decay below 1, not 1",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_of(**fields)


@pytest.mark.parametrize(
    ("sweep", "fields"),
    [
        ({"learning_rate": [0.1, 0.2]}, {"optim": "prodigy"}),
        ({"seed": [1, 2]}, {"optim": "schedule_free_sgd", "lr_scheduler_type": "constant"}),
        ({"learning_rate": [0.1, 0.2]}, {"optim": "lora_muon", "weight_decay": 0.1}),
        ({"r": [2, 4]}, {"optim": "adafactor"}),
        ({"r": [2, 4]}, {"optim": "muon"}),
        ({"r": [2, 4]}, {"optim": "stable_adamw"}),
    ],
    ids=str,
)
def test_what_a_sweep_cannot_scale_is_refused(sweep, fields):
    with pytest.raises(ValueError, match=r"training.optim: .* train the members as separate runs"):
        config_of({"sweep": sweep}, **fields)


def test_seeds_of_a_sweep_are_those_of_a_run():
    with pytest.raises(ValueError, match="less than 2147483648"):
        config_of({"sweep": {"seed": [1, 2**31]}})


def test_a_sweep_may_have_the_others():
    config_of({"sweep": {"r": [2, 4], "learning_rate": [0.1, 0.2]}}, optim="lora_muon")
    config_of({"sweep": {"learning_rate": [0.1, 0.2]}}, optim="adafactor")
