"""The sentiment experiment runs through all its stages on tiny random models, keeps each, and goes on where it was."""

import json
import math

import pytest

from benchmarks import sentiment_rl
from benchmarks.lexicon import Lexicon

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_lexicon_judges_by_words(tmp_path):
    file = tmp_path / "lexicon.txt"
    file.write_text("good\t2.0\t0.5\t[2]\nbad\t-2.5\t0.5\t[-2]\n", encoding="utf-8")
    judge = Lexicon(file)
    assert list(map(judge.score, ["Good, good film!", "bad", "no word"])) == pytest.approx(
        [4 / math.sqrt(31), -2.5 / math.sqrt(21.25), 0.0]
    )


def test_all_stages(tmp_path, monkeypatch):
    made = [
        (n % 9 - 4.0, f"This film {n} is really {'good' if n % 9 > 4 else 'bad'} and it lasts long") for n in range(80)
    ]
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sentiment_rl, "sentences", lambda plan: made)
    monkeypatch.setattr(sentiment_rl, "BETAS", {"ppo": (0.1,), "dpo": (0.5,)})
    (tmp_path / "lexicon.txt").write_text("good\t1.9\t1\t[]\nbad\t-2.5\t1\t[]\n", encoding="utf-8")
    words = ["--tiny", "--folder", str(tmp_path / "f"), "--output", str(tmp_path / "r.json")]
    words += ["--lexicon", str(tmp_path / "lexicon.txt")]
    plot = sentiment_rl.main([*words, "--only", "reward"])
    kept = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert set(kept) == {"rater", "sft", "pairs", "reward"} and plot.is_file()
    assert "val/loss" in kept["rater"] and "val/accuracy" in kept["reward"]
    sentiment_rl.main(words)
    runs = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert {name: runs[name] for name in kept} == kept, "a stage that was done ran again"
    for name in ("ppo 0.1", "dpo 0.5"):
        points = runs[name]["points"]
        assert [point["at"] for point in points] == [0, 1, 2] and points[0]["kl"] == 0 and points[-1]["kl"] != 0
        assert {"rater", "model", "lexicon", "tokens"} <= points[0].keys()
