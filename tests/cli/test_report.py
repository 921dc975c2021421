"""The report of a run: valid HTML that needs nothing else, charts inside their frames, and runs in every state."""

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ft.cli.report import report
from lightning_ft.cli.report_parts.chart import HEIGHT, MOST, WIDTH, Line, chart, smooth, thin, tick_label, ticks
from lightning_ft.cli.report_parts.curves import quantity_of
from lightning_ft.cli.report_parts.run_files import RunFiles, read_metrics
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
VOID = {"meta", "br", "hr", "img", "link", "input"}
EVIL = "<script>alert('x')</script>&\"<b>"


class Page(HTMLParser):
    """Tags must close in order; keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []  # innermost tag, text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append((self.open[-1] if self.open else "", data))

    def texts(self, tag: str) -> list[str]:
        return [text for inside, text in self.words if inside == tag]


def written(folder: Path, metrics: str = "", **files: object) -> Path:
    """A run's folder with these files; dictionaries are written as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    if metrics:
        (folder / "metrics.csv").write_text(metrics)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def page_of(*folders: Path) -> Page:
    return Page(report([RunFiles.read(folder) for folder in folders]))


# ---------------------------------------------------------------- a run of fit


def test_a_real_run(trained: Path, real: Run, tmp_path: Path) -> None:
    folder = trained.parents[1]
    outcome = real("report", str(folder), "--output", "page.html")
    assert outcome.code == 0 and outcome.out.startswith("page.html: ")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    headings = ["What was trained", "Curves", "Speed", "A row, as the model sees it", "Configuration"]
    assert page.texts("h2") == headings
    assert {"loss", "learning rate", "gradient norm", "accuracy", "perplexity"} <= set(page.texts("h3"))
    row = json.loads((folder / "row.json").read_text())
    assert [p["text"] for p in row["pieces"] if p["scored"]] == page.texts("mark")[1:]  # the first explains the colour
    assert "".join(page.texts("pre")).find("lora:") >= 0
    # Nothing is fetched from anywhere: no address, and no element that could hold one.
    assert not re.search(r"https?:|url\(|@import|src=", text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}


def test_default_places(real: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(tmp_path / "runs" / name, "step,train/loss\n0,1.0\n")
    assert real("report", "runs/a").code == 0 and (tmp_path / "runs/a/report.html").is_file()
    assert real("report", "runs/a", "runs/b").code == 0 and (tmp_path / "runs/report.html").is_file()


# ---------------------------------------------------------------- runs in every state


def test_all_that_a_run_says_is_escaped(tmp_path: Path) -> None:
    folder = written(
        tmp_path / f"run {EVIL.replace('/', '')}",
        f"step,{EVIL.replace(',', '').replace(chr(34), '')}\n0,1.0\n",
        config__yaml=f"model:\n  init_args:\n    base: {json.dumps(EVIL)}\n",
        summary__json={
            "base": EVIL, "data": EVIL, "techniques": [EVIL], "task": EVIL, "status": EVIL, "metrics": {f"val/{EVIL}": 1.0},
            "versions": {EVIL: EVIL}, "checkpoints": {"best": EVIL, "last": EVIL}, "device": EVIL, "precision": EVIL,
        },
        row__json={"where": EVIL, "tokens": EVIL, "scored": 1, "pieces": [{"text": EVIL, "scored": s} for s in (0, 1)]},
        samples__jsonl="".join(json.dumps({"step": s, "prompt": EVIL, "answer": EVIL}) + "\n" for s in (0, 1, 2)),
    )  # fmt: skip
    text = report([RunFiles.read(folder)])
    assert "<script" not in text and "<b>x" not in text
    assert not {"script"} & {tag for tag, _ in Page(text).tags}
    assert sum(EVIL in words for _, words in Page(text).words) > 10


def test_a_run_that_is_still_being_written(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", "epoch,step,train/loss,val/loss\n0,0,2.5,\n0,9,1.5,\n0,9,,1.25\n0,19,0.1")
    run = RunFiles.read(folder)
    assert run.metrics == {"train/loss": [(1, 2.5), (10, 1.5)], "val/loss": [(10, 1.25)]}  # 0.1 may have been 0.123
    assert page_of(folder).texts("h3") == ["loss"]


@pytest.mark.parametrize(
    "text", ["", "epoch,step,train/loss\n", "epoch,step", "step\n1\n", "\x00\n", "a,b\n1\n2,3,4\n"]
)
def test_metrics_without_a_number(tmp_path: Path, text: str) -> None:
    folder = written(tmp_path / "run", config__yaml="name: x\n")
    (folder / "metrics.csv").write_text(text)
    assert "Nothing was logged yet." in page_of(folder).texts("p")


def test_values_that_are_no_numbers_are_gaps_and_are_counted(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", "step,train/loss\n0,1\n1,2\n2,nan\n3,inf\n4,3\n5,4\n")
    page = page_of(folder)
    paths = [a["d"] for tag, a in page.tags if tag == "path" and a["class"] == "line c0" and "H" not in str(a["d"])]
    assert [str(d).count("L") for d in paths] == [1, 1]
    assert "2 logged values are NaN or infinite: left out." in page.texts("figcaption")[0]
    only = page_of(written(tmp_path / "other", "step,train/loss\n0,nan\n"))
    assert "No number was logged." in only.texts("p")


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", config__yaml="a: [", summary__json="{", row__json="[1]", samples__jsonl="{\n")
    says = page_of(folder).texts("p")
    for sentence in ("config.yaml is not valid YAML.", "summary.json is not valid JSON."):
        assert sentence in says
    assert "samples.jsonl has a line that is not valid JSON." in says


def test_answers_stand_side_by_side(tmp_path: Path) -> None:
    lines = [{"step": s, "prompt": p, "answer": f"{p} {s}"} for s in (0, 5, 9) for p in ("one", "two")]
    folder = written(tmp_path / "run", config__yaml="a: 1\n", mine__jsonl="".join(json.dumps(x) + "\n" for x in lines))
    cells = page_of(folder).texts("td")
    assert cells[:6] == ["one", "one 0", "one 9", "two", "two 0", "two 9"]
    assert "two 5" in cells[6:]


def test_a_score_has_its_interval(tmp_path: Path) -> None:
    facts = {"metrics": {"val/accuracy": 0.9, "val/loss": 0.5}, "val_rows": 10, "techniques": []}
    cells = page_of(written(tmp_path / "run", summary__json=facts)).texts("td")
    assert "0.9 (95 %: 0.596 to 0.982)" in cells  # Wilson by hand: (0.9 + .19207 -+ .23233) / 1.38415 at z^2 = 3.8415
    assert "0.5" in cells and "none: everything is trained" in cells


def test_a_meta_learned_run_shows_how_it_adapts(tmp_path: Path) -> None:
    names = [f"val/step_{n}/accuracy{end}" for n in (0, 5) for end in ("", "_ci95")]
    rows = f"step,train/loss,val/accuracy,val/accuracy_ci95,{','.join(names)}\n"
    rows += "0,2,.3,.1,.2,.05,.3,.1\n9,1,.6,.1,.2,.05,.6,.1\n"
    page = page_of(written(tmp_path / "run", rows))
    assert page.texts("h3") == ["loss", "accuracy", "accuracy"] and "Adapting, step by step" in page.texts("h2")
    titles = page.texts("title")
    labels = ["accuracy, last validation", "accuracy, upper end of 95 %", "accuracy, first validation"]
    for label, end in zip(labels, ("0.6", "0.7", "0.3"), strict=True):
        assert any(label in title and end in title for title in titles), label
    two = page_of(written(tmp_path / "a", rows), written(tmp_path / "b", rows))
    assert not [title for title in two.texts("title") if "first validation" in title]
    assert "Adapting, step by step" not in page_of(written(tmp_path / "c", "step,val/loss\n0,1\n1,2\n")).texts("h2")


def test_two_runs_lie_over_one_another(tmp_path: Path) -> None:
    rows = "step,train/loss,val/loss\n0,1,2\n1,2,1\n"
    first = written(tmp_path / "first", rows, config__yaml="a: {init_args: {r: 1, s: 2}}\n")
    page = page_of(first, written(tmp_path / "second", rows, config__yaml="a: {init_args: {r: 3, s: 2}}\n"))
    curves = [a for tag, a in page.tags if tag == "path" and str(a["class"]).startswith("line")]
    styles = [a["class"] for a in curves if "H26" not in str(a["d"])]  # without the legend's
    assert sorted(map(str, styles)) == ["line c0", "line c0 dashed", "line c1", "line c1 dashed"]
    assert "What the runs were told differently" in page.texts("h2")
    assert page.texts("td")[:3] == ["a.r", "1", "3"]


def test_reward_stands_against_kl(tmp_path: Path) -> None:
    """Round by round, in order, also where the KL falls; rows with only one of both are no points."""
    rows = "step,train/loss,train/reward,train/kl\n0,1,,\n3,,0.5,0.0\n7,,2.5,1.5\n11,,2.0,0.75\n12,1,,\n15,,3,\n"
    first = written(tmp_path / "first", rows)
    page = page_of(first)
    assert page.texts("h2") == ["Curves", "Reward and KL"] and "reward against KL" in page.texts("h3")
    says = [text for text in page.texts("title") if ", KL " in text]
    assert says == ["reward, KL 0: 0.5", "reward, KL 1.5: 2.5", "reward, KL 0.75: 2"]
    both = page_of(first, written(tmp_path / "second", rows.replace("2.5", "4")))
    says = [text for text in both.texts("title") if ", KL " in text]
    assert says[:2] == ["first, KL 0: 0.5", "first, KL 1.5: 2.5"] and "second, KL 1.5: 4" in says
    labels = {text for text in both.texts("text")}
    assert "KL from the reference, nats an answer" in labels and "0.5" in labels, (
        "ticks between whole numbers are wanted"
    )
    other = written(tmp_path / "other", "step,train/rewards/chosen,train/kl\n0,1,2\n")
    assert "Reward and KL" not in page_of(other).texts("h2")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "Say which run: lightning-ft report runs/NAME."),
        (("x",), "There is no run x; did you mean runs/x?"),
        (("nowhere",), "There is no run nowhere."),
        (("empty",), "empty is not a run: it holds neither config.yaml nor metrics.csv"),
        (("file",), "file is a file, not the folder of a run."),
        (("runs/x", "--output", "runs"), "Cannot write the report to runs: Is a directory"),
        (("runs/x", "--ouput", "y"), "Unknown flag --ouput; did you mean --output?"),
    ],
)
def test_refusals(real: Run, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    written(tmp_path / "runs" / "x", "step,a\n0,1\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    outcome = real("report", *words)
    assert outcome.code == 2 and says in outcome.err and len(outcome.err.splitlines()) == 1


# ---------------------------------------------------------------- charts

VALUES = st.floats(allow_nan=True, allow_infinity=True, width=32)
CURVE = st.lists(st.tuples(st.integers(1, 10**6), VALUES), max_size=60).map(sorted)


@given(st.lists(CURVE, min_size=1, max_size=3))
def test_every_point_lies_inside_the_frame(curves: list[list[tuple[int, float]]]) -> None:
    text = chart("t", [Line(f"l{at}", points, colour=at) for at, points in enumerate(curves)])
    page = Page(text)
    number = sum(math.isfinite(y) for points in curves for _, y in points)
    if not number:
        assert "No number was logged." in text
        return
    places = [(a["cx"], a["cy"]) for tag, a in page.tags if tag == "circle"]
    drawn = re.sub(r"<svg class=.*?</svg>", "", text)
    for path in re.findall(r'class="line[^"]*" d="M([^"]*)"', drawn):
        places += [tuple(pair.split()) for pair in path.split("L")]
    assert len(places) >= number
    for x, y in places:
        assert 0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT  # type: ignore[arg-type]
    labels = [
        (a, words) for (tag, a), words in zip([t for t in page.tags if t[0] == "text"], page.texts("text"), strict=True)
    ]
    assert len(labels) >= 2 and all(words for _, words in labels)


def test_a_point_lies_where_its_ticks_say() -> None:
    """The place of a value is read off the drawn ticks, not off the chart's own arithmetic."""
    text = chart("t", [Line("l", [(1, 0.0), (50, 7.0), (101, 10.0)])])
    across = {
        float(w): float(x)
        for x, w in re.findall(r'class="tick" x="([\d.]+)" y="[\d.]+" text-anchor="middle">(\d+)<', text)
    }
    up = {
        float(w): float(y) - 4
        for y, w in re.findall(r'class="tick" x="[\d.]+" y="([\d.]+)" text-anchor="end">(\d+)<', text)
    }
    x = across[40] + (50 - 40) * (across[60] - across[40]) / 20
    y = up[6] + (7 - 6) * (up[8] - up[6]) / 2
    dots = re.findall(r'class="dot c0" cx="([\d.]+)" cy="([\d.]+)"', text)
    assert (float(dots[1][0]), float(dots[1][1])) == pytest.approx((x, y), abs=0.2)
    assert up[8] < up[6]  # more is higher


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert len(found) <= 7
    assert all(low - span * 1e-6 - 1e-6 <= value <= low + span * (1 + 1e-6) + 1e-6 for value in found)
    if span > abs(low) * 1e-6:
        assert len(found) >= 2
        step = found[1] - found[0]
        assert step / 10 ** math.floor(math.log10(step * 1.0001)) == pytest.approx(1, rel=1e-3) or any(
            step / 10 ** math.floor(math.log10(step * 1.0001)) == pytest.approx(k, rel=1e-3) for k in (2, 5)
        )


def test_tick_labels_tell_neighbours_apart() -> None:
    assert [tick_label(v, 0.05) for v in ticks(0.1, 0.3)] == ["0.10", "0.15", "0.20", "0.25", "0.30"]
    assert [tick_label(v, 5e-5) for v in (0.0, 5e-5, 1e-4, 1.5e-4)] == ["0", "5e-5", "0.0001", "0.00015"]
    assert tick_label(12000, 2000) == "12,000"


def test_smoothing_keeps_a_straight_line_and_the_ends() -> None:
    straight = [0.5 * x for x in range(50)]
    assert smooth(straight, 7) == pytest.approx(straight)
    assert smooth([0, 0, 9, 0, 0], 3) == pytest.approx([0, 3, 3, 3, 0])


def test_thinning_keeps_the_spike() -> None:
    points = [(x, 0.0) for x in range(100_000)]
    points[54_321] = (54_321, 7.0)
    kept = thin(points)
    assert len(kept) <= MOST and (54_321, 7.0) in kept and kept == sorted(kept)


def test_long_runs_stay_small_pages(tmp_path: Path) -> None:
    rows = "".join(f"{step},{math.sin(step / 500)}\n" for step in range(50_000))
    folder = written(tmp_path / "run", "step,train/loss\n" + rows)
    assert len(report([RunFiles.read(folder)])) < 120_000


def test_names_of_quantities() -> None:
    names = {
        "train/loss": "loss", "val/loss": "loss", "train/loss_step": "loss", "train/lr": "learning rate",
        "lr-AdamW/pg1": "learning rate", "train/grad_norm": "gradient norm", "grad_2.0_norm_total": "gradient norm",
        "train/ewc": "ewc", "own": "own", "rewards/chosen": "rewards/chosen",
    }  # fmt: skip
    assert {name: quantity_of(name) for name in names} == names


def test_the_tasks_of_a_stream_share_a_chart() -> None:
    names = ["val/loss", "val/loss/films", "val/loss/books", "continual/average", "val/rewards/margins", "train/loss"]
    found = [quantity_of(name, names) for name in names]
    assert found == ["loss", "loss by task", "loss by task", "continual learning", "rewards/margins", "loss"]


def test_a_cut_line_is_left_out() -> None:
    assert read_metrics("step,a\n0,1.25\n1,1.5") == {"a": [(1, 1.25)]}
