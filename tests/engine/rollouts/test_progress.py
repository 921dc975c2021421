"""While a round is written and measured, a line below Lightning's own bar says how far it is."""

import copy
import io
import re

import pytest
import rich
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar

from lightning_ft import LoRA
from tests.modules.rollouts import Stir, play, write_prompts

SEEN = {"data": {"passes": 2, "batch_size": 8, "draw_batch": 2}, "options": {"enable_progress_bar": True}}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture
def screen():
    """What a terminal would be sent; rich has one console for all."""
    yield io.StringIO()
    rich.reconfigure()


class Lines(Callback):
    """Of rich's display at the end of each round: its lines in order, what they count to and whether they are seen."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        tasks = trainer.progress_bar_callback.progress.tasks
        self.seen.append([(task.description.split(":")[0], task.completed, task.total, task.visible) for task in tasks])


def test_in_richs_bar_one_line_for_all_rounds(job, tmp_path, screen):
    bar = RichProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": 120})
    lines = Lines()
    module, *_ = play(job, tmp_path, LoRA(r=4), Stir(), bar, lines, **SEEN)
    shown = screen.getvalue()
    for what in ("Round 0: tokens", "Round 0: measured", "Round 1: tokens", "Round 1: measured"):
        assert what in shown
    assert "12/12" in shown, "two batches of six tokens"
    for number, ((epoch, *_), ours) in enumerate(lines.seen):
        assert epoch.startswith("Epoch"), "Lightning's line is the first, as it expects"
        assert ours == (f"Round {number}", 2, 2, False), "sixteen answers in micro-batches of eight, hidden again"
    copy.deepcopy(module)  # nothing of the display is left in it


def test_in_tqdms_bar(job, tmp_path, capsys):
    play(job, tmp_path, LoRA(r=4), Stir(), TQDMProgressBar(), **SEEN)
    shown = capsys.readouterr().out
    assert re.search(r"Round 1: tokens:\s+\d+%", shown) and re.search(r"Round 1: measured:\s+\d+%", shown)


def test_nothing_without_a_bar(job, tmp_path, capsys):
    play(job, tmp_path, LoRA(r=4), Stir(), data=SEEN["data"])
    seen = capsys.readouterr()
    assert "Round" not in seen.out + seen.err
