"""Reports of run folders: what they show, and that they need nothing else."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from phi3_jax import UserError
from phi3_jax.cli.main import main
from phi3_jax.report.curves import Chart, Series, thinned, to_png, to_svg
from phi3_jax.report.folder import read_run, read_runs
from phi3_jax.report.several import comparison_page, differences
from phi3_jax.report.write import write_report

HISTOGRAM = [[0, 10, 3], [10, 20, 1], [20, 30, 0]]


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run(folder: Path, rate: float = 1e-4, loss: float = 2.0, **attempt) -> Path:
    """What a run of four steps leaves, by hand."""
    folder.mkdir(parents=True)
    lines = [{"step": 0, "eval_loss": 3.0, "eval_perplexity": 20.1}]
    lines += [
        {"step": step, "loss": 3 - step / 4, "learning_rate": rate, "grad_norm": 0.5,
         "tokens_per_second": 1200.0, "tflops_per_second": 80.0, "utilization": 0.4}
        for step in (1, 2, 3)
    ]  # fmt: skip
    lines += [{"step": 4, "loss": None, "grad_norm": None, "skipped_steps": 1}]
    lines += [{"step": 4, "eval_loss": loss, "eval_perplexity": 7.4}]
    write_lines(folder / "metrics.jsonl", lines)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while it was writing
    config = {
        "model": {"path": "a/<model>"},
        "mesh": {"data": 4, "fsdp": 2},
        "training": {"learning_rate": rate, "output_dir": str(folder), "price_per_hour": None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_lines(
        folder / "samples.jsonl",
        [{"prompt": "<script>alert(1)</script> & so on", "before": "\x1b[31mno", "after": '"yes"'}],
    )
    split = {"rows": 5, "examples": 4, "tokens": 40, "learned tokens": 20, "histogram": HISTOGRAM}
    split |= {"skipped": {"unreadable": 1}, "first skipped": {"unreadable": "a.jsonl:2"}}
    record = {
        "command": "phi3-jax train --config 'my file.yaml'",
        "started": "2026-01-01T00:00:00+00:00",
        "state": "finished",
        "step": 4,
        "seconds": {"steps": 1500.0, "compiling": 300.0, "evaluation": 0.0},
        "memory": {"steps": {"host": 2**31, "device": 2**33}},
        "warnings": ["warning: short rows"],
        "hardware": {"devices": 8, "device": "TPU v5 lite", "platform": "tpu"},
        "versions": {"jax": "0.10.2"},
    }
    attempts = {"attempts": [record | attempt], "total_steps": 4, "data": {"training": split}}
    (folder / "run.json").write_text(json.dumps(attempts))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """A finished sweep, of which the second member is the best."""
    folder = tmp_path_factory.mktemp("runs") / "sweep"
    for rate, loss in ((1e-4, 2.0), (3e-4, 1.5), (1e-3, 1.75)):
        make_run(folder / f"learning_rate={rate:g}", rate, loss)
    shutil.move(folder / "learning_rate=0.0001" / "run.json", folder / "run.json")
    ranked = ["learning_rate=0.0003", "learning_rate=0.001", "learning_rate=0.0001"]
    (folder / "sweep.json").write_text(json.dumps({"members": [{"name": n} for n in ranked]}))
    return folder


class Page(html.parser.HTMLParser):
    """The text of a page, its ids, and whatever would ask the network."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.text, self.ids, self.links, self.tags, self._hidden = "", [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("src", "href", "xlink:href") if name in given]
        self._hidden = tag == "style"

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        self.text += "" if self._hidden else data


def parsed(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_a_page_about_a_run(run):
    text, page = parsed(write_report([run], price=2.0))
    for said in (
        "<script>alert(1)</script> & so on",  # as text
        "\\x1b[31mno",
        '"yes"',
        "base model a/<model>; 4 steps",
        "3.000 → 2.000",
        "30:00",
        "83%",
        "$1.00",
        "short rows",
        "1 steps were skipped",
        "training data: 1 rows left out: unreadable (first: a.jsonl:2)",
        "2.00 GiB",
        "8.00 GiB",
        "10 to 19",
        "phi3-jax train --config 'my file.yaml'",
        "8 x TPU v5 lite (tpu)",
        "data 4 x fsdp 2",
        "0.10.2",
    ):
        assert said in page.text, said
    assert page.tags.count("svg") == 5 and "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme: dark" in text and "var(--c1)" in text and "currentColor" in text


def test_the_exported_step_is_the_result(run, tmp_path):
    """Where the best checkpoint was exported, in the report of the run and in a comparison."""
    best = shutil.copytree(run, tmp_path / "best")
    with (best / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 6, "eval_loss": 2.5, "eval_mean_token_accuracy": 0.25}\n')
    _, page = parsed(write_report([best]))
    assert "3.000 → 2.500" in page.text and "exported step" not in page.text
    record = json.loads((best / "run.json").read_text())
    (best / "run.json").write_text(json.dumps(record | {"exported_step": 4}))
    _, page = parsed(write_report([best]))
    assert "3.000 → 2.000" in page.text and "held-out loss, exported step 4" in page.text
    text = comparison_page(read_runs([run, best]), "two")
    assert text.count("2.0000") == 2 and "25.0%" not in text


@pytest.mark.parametrize("which", ["run", "sweep"])
def test_a_page_needs_nothing_else(which, request):
    text, page = parsed(write_report([request.getfixturevalue(which)]))
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    styled = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?:|@import|url\((?!#)|#0102", styled)


def test_a_sweep_is_a_comparison_with_the_best_first(sweep):
    _, page = parsed(write_report([sweep]))
    assert (sweep / "report.html").is_file()
    assert "learning_rate=0.0003 (best)" in page.text
    names = [run.name for run in read_runs([sweep])]
    assert names == ["learning_rate=0.0003", "learning_rate=0.001", "learning_rate=0.0001"]
    assert differences(read_runs([sweep])) == [
        ["training.learning_rate", "0.0003", "0.001", "0.0001"]
    ]
    assert page.tags.count("svg") == 6 and page.text.count('"yes"') == 3


def test_runs_of_the_same_name_go_by_their_paths(run, tmp_path):
    other = make_run(tmp_path / "mine")
    assert [found.name for found in read_runs([run, other])] == [str(run), str(other)]


def test_a_run_that_was_killed_or_damaged(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "killed")
    (folder / "run.json").write_text("[")
    (folder / "config.yaml").write_text("a: [")
    (folder / "samples.jsonl").unlink()
    (folder / "checkpoints" / "20.damaged").mkdir(parents=True)
    _, page = parsed(write_report([folder], tmp_path / "r.html"))
    assert "the checkpoint of step 20 was damaged" in page.text and "svg" in page.tags
    (folder / "metrics.jsonl").write_text("")
    _, page = parsed(write_report([folder], tmp_path / "r.html"))
    assert "svg" not in page.tags


def test_a_stopped_run_says_why_and_how_far_it_came(tmp_path):
    folder = make_run(tmp_path / "run", state="stopped by SIGTERM", step=2)
    record = json.loads((folder / "run.json").read_text())
    record["attempts"] *= 2
    (folder / "run.json").write_text(json.dumps(record))
    _, page = parsed(write_report([folder]))
    assert "step 2 of 4: stopped by SIGTERM" in page.text and "2 starts" in page.text
    assert read_run(folder).seconds["steps"] == 3000.0


def test_not_a_run(run, tmp_path, capsys):
    with pytest.raises(UserError, match=f"{tmp_path}: no metrics.jsonl here"):
        write_report([tmp_path])
    with pytest.raises(UserError, match="cannot be written"):
        write_report([run], tmp_path / "none" / "r.html")
    assert main(["report", str(run), "--price", "-1"]) == 2
    assert "--price -1.0" in capsys.readouterr().err


def test_the_command(run, sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run), str(sweep)]) == 0
    assert capsys.readouterr().out == "report: report.html\n"
    _, page = parsed(tmp_path / "report.html")
    assert "Comparison of runs" in page.text and "4 runs" in page.text
    assert main(["report", str(run), "--output", "one.html", "--price", "3"]) == 0
    assert "$1.50" in (tmp_path / "one.html").read_text(encoding="utf-8")


def test_without_matplotlib_the_numbers_remain(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, page = parsed(write_report([run], tmp_path / "r.html"))
    assert "matplotlib is not installed" in page.text and "training 2.750 to 2.250" in page.text


def test_a_long_series_is_drawn_as_means():
    points = [(step, float(step % 2)) for step in range(1, 1001)]
    drawn = thinned(points)
    assert len(drawn) == 334 and drawn[0] == (3, pytest.approx(2 / 3)) and drawn[-1][0] == 1000
    assert thinned(points[:400]) == points[:400]


def test_pictures():
    chart = Chart("Loss", [Series("training", [(1, 4e-5), (2, 3e-5)]), Series("none", [], 1)])
    svg, png = to_svg(chart), to_png(chart)
    assert svg.startswith("<svg") and "3e-5" in svg and "training" in svg and ">none<" not in svg
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert (svg, png) == (to_svg(chart), to_png(chart))  # no date, no random ids


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FRAMES = """<!doctype html><body><script>
const widths = [390, 1440], pages = PAGES, found = [];
let left = widths.length * pages.length;
for (const page of pages) for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.srcdoc = page;
  frame.onload = () => {
    const d = frame.contentDocument, r = d.documentElement;
    const small = [...d.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height);
    found.push([width, r.scrollWidth, Math.min(...small)]);
    if (!--left) { document.body.textContent = "found " + JSON.stringify(found); }
  };
  document.body.append(frame);
}
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_it_on_a_phone_and_on_a_desk(run, sweep, tmp_path):
    """Nothing is wider than the screen, and the text of the charts stays readable."""
    pages = [write_report([folder], tmp_path / "r.html").read_text() for folder in (run, sweep)]
    text = json.dumps(pages).replace("</", "<\\/")
    (tmp_path / "frames.html").write_text(FRAMES.replace("PAGES", text), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000",
         f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{tmp_path}/frames.html"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = re.search(r"found (\[\[.*\]\])", done.stdout)
    assert found, done.stderr[-2000:]
    for width, wanted, height in json.loads(found[1]):
        assert wanted <= width and height >= 9, (width, wanted, height)
