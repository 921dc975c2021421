"""Strangers' data need nothing but a config: a table of 150 classes, a folder of images; and other commands on episodes."""

import json

import pytest

from tests.cli.conftest import call
from tests.modules.tasks import WORDS, write_base

QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    return lambda *words: call(capsys, *words)


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log.*sync_dist")
@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has")
def test_a_table_of_150_classes(run, tmp_path):
    base = write_base("bert", tmp_path / "bert")
    lines = [
        f"{WORDS[k % 8]} {WORDS[k // 8 % 8]} {WORDS[k // 64]} {WORDS[n]},class {k}"
        for k in range(150)
        for n in range(4)
    ]
    (tmp_path / "my.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    config = [f"--model.base={base}", "--data=EpisodeData", "--data.path=my.csv", "--data.test_classes=50"]
    config += [
        "--data.shot=1",
        "--data.query=2",
        "--data.test_episodes=3",
        "--data.val_classes=40",
        "--data.val_episodes=2",
    ]
    model = [
        "--model=MAML",
        "--model.inner=adapter_and_head",
        "--model.steps=1",
        "--model.eval_steps=[0]",
        "--lora.r=2",
    ]
    outcome = run("fit", *model, *config, "--trainer.max_steps=2", *QUIET, "--name=few")
    assert outcome.code == 0, outcome.err
    last = "runs/few/checkpoints/last.ckpt"
    assert (
        f"lightning-ft test --ckpt_path {last}. Adapt it: lightning-ft adapt --ckpt_path {last} --supp"
        in outcome.out + outcome.err
    )
    tested = run("test", "--ckpt_path=runs/few/checkpoints/last.ckpt", *QUIET)
    assert tested.code == 0, tested.err
    assert "test/step_0/accuracy_ci95" in tested.out
    shown = run("inspect", *model, *config, "--rows=1")
    assert shown.code == 0, shown.err
    assert "my.csv, row" in shown.out and "classes: 60" in shown.out
    support = [{"text": f"{WORDS[0]} {WORDS[n]}", "label": "yes"} for n in range(3)]
    support += [{"text": f"{WORDS[3]} {WORDS[n]}", "label": "no"} for n in range(3)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in support))
    adapted = run("adapt", "--ckpt_path=runs/few/checkpoints/last.ckpt", "--support=mine.jsonl", "--output=out")
    assert adapted.code == 0 and (tmp_path / "out/adapted.ckpt").is_file(), adapted.err


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log.*sync_dist")
def test_a_folder_of_images(run, tmp_path):
    image = pytest.importorskip("PIL.Image")
    for k in range(6):
        (tmp_path / f"images/class {k}").mkdir(parents=True)
        for n in range(3):
            image.new("RGB", (20, 24), (40 * k, 80 * n, 0)).save(tmp_path / f"images/class {k}/{n}.png")
    (tmp_path / "few.yaml").write_text(
        """
model:
  class_path: lightning_ft.MAML
  init_args:
    net:
      class_path: lightning_ft.nn.small_nets.ConvNet
      init_args: {classes: 2, image_size: 16, width: 8}
    inner: head
data:
  class_path: lightning_ft.EpisodeData
  init_args: {path: images, way: 2, shot: 1, query: 2, val_classes: 2, image_size: 16, val_episodes: 2}
"""
    )
    outcome = run("fit", "--config=few.yaml", "--trainer.max_steps=2", *QUIET)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "runs/few/checkpoints/last.ckpt").is_file()
    tested = run("validate", "--ckpt_path=runs/few/checkpoints/last.ckpt", *QUIET)
    assert tested.code == 0 and "val/accuracy_ci95" in tested.out, tested.err
    assert run("inspect", "--config=few.yaml").code == 0
    wrong = run("fit", "--config=few.yaml", "--data.query=9", *QUIET)
    assert wrong.code == 2 and "shot + query = 10" in wrong.err
