"""The sentiment experiment runs through all its stages on tiny random models, keeps each, and goes on where it was."""

import json
import math

import pytest

from benchmarks import sentiment_cells, sentiment_rl
from benchmarks.lexicon import Lexicon

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_lexicon_judges_by_words(tmp_path):
    file = tmp_path / "lexicon.txt"
    file.write_text("good\t2.0\t0.5\t[2]\nbad\t-2.5\t0.5\t[-2]\n", encoding="utf-8")
    judge = Lexicon(file)
    assert list(map(judge.score, ["Good, good film!", "bad", "no word"])) == pytest.approx(
        [4 / math.sqrt(31), -2.5 / math.sqrt(21.25), 0.0]
    )


def test_all_cells(tmp_path, monkeypatch, capsys):
    made = [
        (n % 9 - 4.0, f"This film {n} is really {'good' if n % 9 > 4 else 'bad'} and it lasts long") for n in range(80)
    ]
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sentiment_cells, "sentences", lambda plan: made)
    monkeypatch.setattr(sentiment_rl, "BETAS", {"ppo": (0.1,), "dpo": (0.5,)})
    (tmp_path / "lexicon.txt").write_text("good\t1.9\t1\t[]\nbad\t-2.5\t1\t[]\n", encoding="utf-8")
    words = ["--tiny", "--folder", str(tmp_path / "f"), "--output", str(tmp_path / "r.json")]
    words += ["--lexicon", str(tmp_path / "lexicon.txt")]
    for key in sentiment_rl.needs():
        assert sentiment_rl.main([*words, "--cell", key]) == 0
    runs = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert list(runs) == ["rater", "sft", "pairs", "reward", "ppo 0.1", "dpo 0.5"]
    assert "val/loss" in runs["rater"] and "val/accuracy" in runs["reward"]
    for name in ("ppo 0.1", "dpo 0.5"):
        points = runs[name]["points"]
        assert [point["at"] for point in points] == ([0, 1, 2] if name.startswith("ppo") else [0, 2, 4])
        assert runs[name]["steps"] == 4 and points[0]["kl"] == 0 and points[-1]["kl"] != 0
        assert {"rater", "model", "lexicon", "tokens"} <= points[0].keys()

    monkeypatch.setattr(sentiment_rl, "make", lambda *_: pytest.fail("a cell that was done ran again"))
    assert sentiment_rl.main(words) == 0
    kept = json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**kept, "machine": {**kept["machine"], "cpu": "another machine's"}}))
    (tmp_path / "r.md").unlink()
    assert sentiment_rl.main([*words, "--render"]) == 0, "figures of another machine can be shown"
    assert "another machine's" in (tmp_path / "r.md").read_text()
    assert (tmp_path / "r.png").stat().st_size > 0
    table = (tmp_path / "r.md").read_text()
    assert (
        "| SFT |  | 0 | 0.00 (0.00 to 0.00)" in table and "| PPO | 0.1 | 4 |" in table and "| DPO | 0.5 | 4 |" in table
    )


def test_the_kl_of_a_batch_is_that_of_rows_alone(tmp_path):
    import torch

    import lightning_ft
    from benchmarks.random_model import write_model
    from lightning_ft.engine.attachment import Attachment

    module = lightning_ft.DPO(str(write_model(tmp_path / "model")))
    Attachment.of(module).rebuild([], seed=0)
    prompts, answers = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14, 15]]
    for prompt, answer, found in zip(prompts, answers, sentiment_cells.logps(module, prompts, answers), strict=True):
        logits = module.model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
        wanted = sum(float(logits[len(prompt) + n - 1, token]) for n, token in enumerate(answer))
        assert found == pytest.approx(wanted, abs=1e-4)
