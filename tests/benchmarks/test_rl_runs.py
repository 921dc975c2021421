"""The real run of GRPO plays two rounds on a tiny random model, keeps its cell, goes on where it was, and makes a page."""

import json

import pytest

from benchmarks import rl_report, rl_runs

pytestmark = pytest.mark.filterwarnings("ignore")


def test_held_out_tasks_are_none_of_the_learned():
    learned, held = rl_runs.split("sum_of_two", 50)
    questions = [row["question"] for row in held]
    assert len(set(questions)) == 50 and not set(questions) & {row["question"] for row in learned}
    assert all(row["prompt"].count("Answer:") == rl_runs.SHOTS + 1 for row in (*held, *learned[:50]))


def test_a_cell(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rl_runs, "PROMPTS", 4)
    monkeypatch.setattr(rl_runs, "SAMPLES", 2)
    words = ["--tiny", "--folder", str(tmp_path / "f"), "--output", str(tmp_path / "r.json"), "--seeds", "1"]
    assert rl_runs.main([*words, "--cell", "sum_of_two|0"]) == 0
    (run,) = json.loads((tmp_path / "r.json").read_text())["runs"].values()
    assert run["rounds"] == 2 and run["steps"] == 2 and run["held_out"] == 8
    assert [point["round"] for point in run["points"]] == [0, 1] and run["points"][0]["kl"] == 0
    assert list((tmp_path / "f" / "sum_of_two_0").glob("*.ckpt")), "nothing to go on from"
    page = rl_report.render(json.loads((tmp_path / "r.json").read_text()))
    assert "| sum_of_two | 0 | 2 | 2 |" in page

    # Once more without the result: the rounds are there already, and only the end is measured again.
    (tmp_path / "r.json").unlink()
    rl_runs.main([*words, "--cell", "sum_of_two|0"])
    (again,) = json.loads((tmp_path / "r.json").read_text())["runs"].values()
    assert again["points"] == run["points"] and again["after"] == run["after"]


def test_the_page_of_several_seeds(tmp_path):
    def run(gain):
        shares = {
            when: {"share": share, "interval": [0.1, 0.9]} for when, share in (("before", 0.4), ("after", 0.4 + gain))
        }
        points = [{"round": n, "rewards/right": 0.4 + n * gain, "kl": n} for n in range(2)]
        return {
            "rounds": 2, "steps": 4, "seconds_of_last_start": 90.0, "device": "cpu", "held_out": 9, **shares,
            "gain": {"mean": gain, "interval": [gain - 0.1, gain + 0.1]}, "answers": [["1", "2"]], "points": points,
        }  # fmt: skip

    data = {
        "settings": {"base": "some", "lr": 1e-4, "prompts": 4, "samples": 2, "new_tokens": 16},
        "machine": {"cpu": "some", "cores": 2, "versions": {}},
        "runs": {"sum|0": run(0.2), "sum|1": run(0.4)},
    }
    page = rl_report.render(data)
    assert (
        "| sum | 0 | 2 | 4 | 1.5 | 9 | 0.400 (0.100 to 0.900) | 0.600 (0.100 to 0.900) | 0.200 (0.100 to 0.300) |"
        in page
    )
    assert "| sum | mean of 2, interval over seeds | | | | | | | 0.300 (-0.971 to 1.571) |" in page
    rl_report.plot(data, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
