"""The services that metrics are sent to: what is refused, what is sent, and what a failure does."""

from __future__ import annotations

import contextlib
import json
import struct
import types
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from phi3_jax import UserError
from phi3_jax.training import trackers
from phi3_jax.training.metrics import open_metrics
from phi3_jax.training.trackers import check_trackers
from tests.phi3_jax.conftest import make_config


def test_trackers_asked_for_and_not_there(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(trackers.importlib, "import_module", missing)
    check_trackers(["tensorboard"])
    for name in ("wandb", "trackio", "mlflow"):
        with pytest.raises(UserError, match=f"{name} is not installed: pip install"):
            check_trackers([name])


@pytest.mark.parametrize(
    ("mode", "answer", "said"),
    [
        ("online", True, None),
        ("offline", False, None),
        ("disabled", False, None),
        ("online", False, "wandb cannot be used (no API key): run `wandb login`"),
        (
            "online",
            RuntimeError("Failed to\nauthenticate"),
            "wandb cannot be used (Failed to): run",
        ),
    ],
)
def test_wandb_without_a_key(monkeypatch, mode, answer, said):
    """As wandb 0.31 answers: without a key, offline, and with a key that it cannot verify."""

    def login(prompt):
        assert prompt is False
        if isinstance(answer, Exception):
            raise answer
        return answer

    settings = types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))
    errors = types.SimpleNamespace(Error=RuntimeError)
    wandb = types.SimpleNamespace(setup=lambda: settings, login=login, errors=errors)
    monkeypatch.setattr(trackers, "_import", lambda name: wandb)
    if said is None:
        check_trackers(["wandb"])
        return
    with pytest.raises(UserError) as error:
        check_trackers(["wandb"])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_members_of_a_sweep_are_runs_of_their_own_in_wandb(tmp_path, monkeypatch):
    """wandb 0.31 returns the run that is open already, unless it is asked for a new one."""
    opened, logged = [], []

    class Run:
        def __init__(self, name):
            self.name = name

        def log(self, values, step):
            logged.append((self.name, step, values))

        def finish(self):
            opened.remove(self)

    def init(name, reinit="return_previous", **_):
        if not opened or reinit == "create_new":
            opened.append(Run(name))
        return opened[-1] if reinit == "create_new" else opened[0]

    wandb = types.SimpleNamespace(init=init)
    monkeypatch.setattr(trackers, "_import", lambda name: wandb)
    config = make_config(Path("x"), Path("y"), tmp_path, report_to=["wandb"])
    with contextlib.ExitStack() as stack:
        writers = []
        for name in ("r=2", "r=4"):
            (tmp_path / name).mkdir()
            writers.append(stack.enter_context(open_metrics(config, tmp_path / name, 0)))
        for value, writer in enumerate(writers):
            writer.write(1, {"loss": value})
    assert logged == [("r=2", 1, {"loss": 0}), ("r=4", 1, {"loss": 1})]
    assert opened == []


def test_resumed_run_is_the_same_wandb_run(tmp_path, monkeypatch):
    ids, finished = [], []

    class Wandb:
        def init(self, **kwargs):
            assert (kwargs["resume"], kwargs["project"], kwargs["name"]) == ("allow", "p", "run-1")
            ids.append(kwargs["id"])
            return self

        def finish(self):
            finished.append(True)

    monkeypatch.setattr(trackers, "_import", lambda name: Wandb())
    config = make_config(
        Path("x"), Path("y"), tmp_path, report_to=["wandb"], project="p", run_name="run-1"
    )
    for first_step in (0, 3, 0):
        with open_metrics(config, tmp_path, first_step):
            pass
    assert ids[0] == ids[1] != ids[2]
    assert len(finished) == 3


def events(file: Path) -> list[tuple[str, int]]:
    """What TensorBoard finds in a file: the kind and step of each event."""
    data, found = file.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        found.append((event.WhichOneof("what"), event.step))
        data = data[16 + length :]
    return found


@pytest.mark.parametrize("first_step", [0, 3])
def test_tensorboard_drops_what_an_earlier_attempt_left(tmp_path, first_step):
    """Where a session starts, TensorBoard purges all events from its step on."""
    config = make_config(Path("x"), Path("y"), tmp_path, report_to=["tensorboard"])
    with open_metrics(config, tmp_path, first_step) as writer:
        writer.write(first_step + 1, {"loss": 1.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    first_dropped = first_step + 1 if first_step else 0  # the evaluation at the start has step 0
    assert events(file)[1:] == [("session_log", first_dropped), ("summary", first_step + 1)]


class Fake:
    """Trackio and MLflow's client as they are used here, in memory."""

    def __init__(self):
        self.runs, self.logged, self.broken = [], [], False
        self.tracking = self.entities = self
        self.Metric = lambda key, value, time, step: (key, value, step)

    # --- Trackio -------------------------------------------------------------------------------
    def init(self, *, project, name, config, resume, embed):
        assert (resume, embed) == ("allow", False) and config["training"]
        self.runs.append((project, name))
        return self

    def log(self, values, step):
        if self.broken:
            raise ConnectionError("no answer\nfrom there")
        self.logged.append((step, values))

    def finish(self):
        self.logged.append("finished")

    # --- MLflow --------------------------------------------------------------------------------
    def MlflowClient(self):  # noqa: N802 (its name)
        return self

    def search_experiments(self, max_results):
        if self.broken:
            raise ConnectionError("no answer\nfrom there")

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return f"of {name}"

    def create_run(self, experiment, run_name):
        self.runs.append((experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"run {len(self.runs)}"))

    def update_run(self, run_id, status):
        self.runs.append((run_id, status))

    def log_param(self, run_id, key, value): ...

    def log_batch(self, run_id, metrics):
        self.logged.append((run_id, metrics))

    def set_terminated(self, run_id):
        self.logged.append("finished")


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(trackers, "_import", lambda name: fake)
    return fake


def write(tmp_path, name, first_step, warn=print, **training) -> None:
    config = make_config(Path("x"), Path("y"), tmp_path, report_to=[name], **training)
    with open_metrics(config, tmp_path, first_step, warn) as writer:
        writer.write(first_step + 1, {"loss": 1.5, "examples/a,b": 2, "eval_loss": float("nan")})


def test_trackio(fake, tmp_path):
    for first_step in (0, 1, 0):
        write(tmp_path, "trackio", first_step)
    (first, again, other) = fake.runs
    assert first == again != other
    assert first[0] == "phi3-jax" and first[1].startswith(f"{tmp_path.name}-")
    assert fake.logged[:2] == [(1, {"loss": 1.5, "examples/a,b": 2}), "finished"]


def test_mlflow(fake, tmp_path):
    write(tmp_path, "mlflow", 0, project="p", run_name="n")
    write(tmp_path, "mlflow", 1)
    write(tmp_path, "mlflow", 0)
    named = ("of Default", tmp_path.name)
    assert fake.runs == [("of p", "n"), ("run 1", "RUNNING"), named]
    assert fake.logged[0] == ("run 1", [("loss", 1.5, 1), ("examples/a_b", 2, 1)])


def test_an_mlflow_server_that_does_not_answer_is_one_line(fake):
    check_trackers(["mlflow"])
    fake.broken = True
    with pytest.raises(
        UserError, match="mlflow cannot be used .no answer.: set MLFLOW_TRACKING_URI"
    ):
        check_trackers(["mlflow"])


def test_a_space_for_trackio_needs_a_token(fake, monkeypatch):
    check_trackers(["trackio"])
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="there is no token.: run `hf auth login`"):
        check_trackers(["trackio"])


def test_a_service_that_fails_does_not_end_the_run(fake, tmp_path):
    warned, fake.broken = [], True
    write(tmp_path, "trackio", 0, warned.append)
    assert warned == [
        "warning: trackio takes no more metrics (no answer); metrics.jsonl has all of them"
    ]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.5
    assert fake.logged == []
