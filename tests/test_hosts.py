"""What docs/hosts.md tells people to run: shell that parses, YAML with the fields that exist."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import pytest
import yaml

from tests.conftest import ROOT

PAGE = (ROOT / "docs/hosts.md").read_text(encoding="utf-8")
SHELL = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
# The documented fields of a SkyPilot task, with their types (docs.skypilot.co, "SkyPilot YAML").
SKYPILOT = {
    "name": str, "workdir": str, "num_nodes": int, "envs": dict, "secrets": dict,
    "file_mounts": dict, "volumes": dict, "setup": str, "run": str, "config": dict,
    "resources": {
        "infra": str, "cloud": str, "region": str, "zone": str, "accelerators": str,
        "accelerator_args": {"runtime_version": str, "tpu_name": str, "tpu_vm": bool},
        "cpus": str, "memory": str, "instance_type": str, "use_spot": bool, "disk_size": int,
        "disk_tier": str, "network_tier": str, "image_id": str, "ports": int, "labels": dict,
        "autostop": dict, "any_of": list, "ordered": list,
        "job_recovery": {
            "strategy": str, "max_restarts_on_errors": int, "recover_on_exit_codes": list,
        },
    },
}  # fmt: skip


def yaml_of(section: str) -> list[dict]:
    """The documents of the first YAML block of a section."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return list(yaml.safe_load_all(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0]))


@pytest.mark.parametrize("script", SHELL, ids=lambda text: text.split("\n")[0][:30])
def test_shell_parses(script):
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def check(value, fields, where: str) -> None:
    if isinstance(fields, dict):
        for key, inside in value.items():
            assert key in fields, f"{where}: {key} is no field"
            check(inside, fields[key], f"{where}.{key}")
    else:
        assert isinstance(value, fields), f"{where}: {value!r}"


def test_skypilot():
    (task,) = yaml_of("SkyPilot")
    check(task, SKYPILOT, "task")
    recovery = task["resources"]["job_recovery"]
    assert recovery["strategy"] in ("FAILOVER", "EAGER_NEXT_REGION")
    assert task["resources"]["use_spot"] and "--resume=auto" in task["run"]
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)


def test_gke():
    service, job = yaml_of("GKE")
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"] == 4 and spec["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy needs
    codes = spec["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (codes["operator"], codes["values"]) == ("In", [1, 2])
    (container,) = pod["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert {"--distributed", "--resume=auto"} <= set(container["command"])


def test_exit_codes_that_are_started_again(tmp_path):
    """Any code but those that need a person, until the run ends."""
    script = ROOT / "scripts/supervise.sh"
    run = "echo x >> runs; read -r code < codes; sed -i 1d codes; exit $code"
    for codes, last in (([143, 3, 137, 0], 0), ([3, 2], 2), ([1], 1), ([129, 130, 0], 130)):
        (tmp_path / "runs").write_text("")
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        done = subprocess.run(
            ["bash", script, "bash", "-c", run],
            cwd=tmp_path, capture_output=True, env=os.environ | {"RESTART_SECONDS": "0"},
        )  # fmt: skip
        assert done.returncode == last
        expected = codes.index(last) + 1
        assert len((tmp_path / "runs").read_text().split()) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_is_passed_on(tmp_path, number, popen):
    """And the script waits until the run has saved."""
    run = (
        f"trap 'sleep 0.3; touch saved; exit {128 + number}' TERM HUP; touch up; "
        "while :; do sleep 0.05; done"
    )
    script = ["bash", str(ROOT / "scripts/supervise.sh"), "bash", "-c", run]
    process = popen(script, cwd=tmp_path)
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert (tmp_path / "saved").exists()
