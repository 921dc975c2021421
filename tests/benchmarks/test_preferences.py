"""The benchmark of preferences: its pairs, its cells on tiny models, its restart, and its tables."""

import json

import pytest

from benchmarks import preference_cells, preferences, preferences_report
from benchmarks.lexicon import Lexicon
from benchmarks.preference_cells import GAP, LEARNED, UNSEEN
from benchmarks.row_files import read
from benchmarks.vader_cells import Kept
from lightning_ft.data.vader import ratings
from tests.data.tiny_tokenizers import tiny_tokenizer
from tests.modules.rewards import write_base

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"TRAIN": 8, "VAL": 4, "TEST": 6, "BATCH": 4, "PROMPTS": 4, "HELD_OUT": 3, "NEW_TOKENS": 4, "TOGETHER": 2}


@pytest.fixture
def ground(tmp_path, monkeypatch):
    """(folder, files, tiny encoder, tiny decoder, lexicon)."""
    for name, value in SMALL.items():
        monkeypatch.setattr(preference_cells, name, value)
    words = tmp_path / "lexicon.txt"
    words.write_text("yes\t2.0\t0.5\t[2]\nno\t-1.0\t0.5\t[-1]\n:)\t3.0\t0\t[3]\n")
    bases = [str(write_base(kind, tmp_path / kind)) for kind in ("bert", "llama")]
    return tmp_path, preference_cells.write_pairs(tmp_path), *bases, Lexicon(words)


def test_pairs_are_apart_and_no_sentence_is_seen_twice(tmp_path):
    files = preference_cells.write_pairs(tmp_path)
    texts = {}
    for split, domains in (("train", LEARNED), ("val", LEARNED), *((domain, (domain,)) for domain in UNSEEN)):
        rated = {text: rating for domain in domains for rating, text in ratings(domain)}
        rows = read(files[split])
        for row in rows:
            better, worse = row["chosen"].removeprefix(" "), row["rejected"].removeprefix(" ")
            assert rated[better] - rated[worse] >= GAP
        texts[split] = [row[which] for row in rows for which in ("chosen", "rejected")]
    every = [text.lower() for found in texts.values() for text in found]
    assert len(set(every)) == len(every) and len(texts["train"]) == 2 * preference_cells.TRAIN
    assert len(read(files["beginnings"])) == preference_cells.PROMPTS
    assert len(read(files["held_out"])) == preference_cells.HELD_OUT


def test_the_judge_by_hand(ground):
    lexicon = ground[-1]
    assert lexicon.score("Yes! no, other (yes)") == pytest.approx(3 / (9 + 15) ** 0.5)
    assert lexicon.score(":) nothing") == pytest.approx(3 / (9 + 15) ** 0.5) and lexicon.score("") == 0


def test_every_cell_and_its_tables(ground, monkeypatch, capsys):
    folder, files, encoder, decoder, lexicon = ground
    real = {
        name: getattr(preference_cells, name) for name in ("probe_cell", "reward_cell", "policy_cell", "write_answers")
    }
    monkeypatch.setattr(preference_cells, "probe_cell", lambda rows: real["probe_cell"](rows, base=encoder))
    monkeypatch.setattr(preference_cells, "reward_cell", lambda *a: real["reward_cell"](*a, base=encoder))
    monkeypatch.setattr(preference_cells, "policy_cell", lambda *a: real["policy_cell"](*a, base=decoder))
    monkeypatch.setattr(preference_cells, "write_answers", lambda _, *a: real["write_answers"](decoder, *a))
    output = folder / "preferences.json"
    arguments = ["--output", str(output), "--work", str(folder / "work"), "--lexicon", str(folder / "lexicon.txt")]
    preferences.main(arguments)
    kept = json.loads(output.read_text())
    assert not [key for key, cell in kept["cells"].items() if "failed" in cell], kept["cells"]
    assert len(kept["cells"]) == 1 + 2 + 2 + 7
    for domain in UNSEEN:  # by a way of its own: one reward a sentence
        rater = preference_cells.Rater(folder / "work/reward_minilm_5e-05_0.ckpt")
        rows = read(files[domain])
        w, lose = (rater.rewards([row[which].strip() for row in rows]) for which in ("chosen", "rejected"))
        scores = kept["cells"]["reward|minilm|5e-05|0"]["scores"]
        assert scores[f"{domain}/right"] == sum(a > b for a, b in zip(w, lose, strict=True))
        assert len(rows) == scores[f"{domain}/rows"] == SMALL["TEST"]
    start = kept["cells"]["policy|start|0|0"]["scores"]
    assert start["kl"] == 0 and start["rows"] == SMALL["HELD_OUT"]
    trained = kept["cells"]["policy|DPO|0.0003|0"]
    assert trained["scores"]["kl"] != 0 and "last train/rewards/margins" in trained["last"]
    page = output.with_suffix(".md").read_text()
    for words in (
        "| logistic probe | films |",
        "| RewardModel, ",
        "| DPO | 0.0003 |",
        "| KTO | 0.0001 |",
        preference_cells.OWN[0],
    ):
        assert words in page
    monkeypatch.setattr(preference_cells, "policy_cell", None)
    preferences.main(arguments)  # nothing is left to be done
    assert output.with_suffix(".md").read_text() == page


def test_an_answer_ends_with_its_sentence_and_is_scored_to_there(ground):
    _, _, _, decoder, _ = ground
    tokenizer = tiny_tokenizer()
    ids = tokenizer("hello world. thank you")["input_ids"]
    stop = next(n for n, token in enumerate(ids) if "." in tokenizer.decode([token]))
    assert preference_cells._length(tokenizer, ids) == stop + 1
    module = preference_cells.started(decoder)
    texts, apart = preference_cells.sampled(module, ["hello", "hello world thank you", "you"], seed=0, trained=False)
    assert len(texts) == 3 and apart == [0.0] * 3
    assert (
        preference_cells.sampled(module, ["hello", "hello world thank you", "you"], seed=0, trained=False)[0] == texts
    )


def test_the_pages_of_the_docs_show_what_lies_in_the_results():
    kept = Kept(preferences.RESULTS / "preferences.json", preferences.SETTING).content
    arguments = (kept, preferences.PROBE, preferences.reward_keys, preferences.policy_keys)
    for name in ("reward_model", "dpo", "kto"):
        page = (preferences.PAGES / f"{name}.md").read_text(encoding="utf-8")
        assert "<!-- measured: " in page
        assert preferences_report.filled(page, *arguments) == page, "run: python -m benchmarks.preferences --render"
    rendered = preferences_report.render(*arguments)
    assert (preferences.RESULTS / "preferences.md").read_text(encoding="utf-8") == rendered
