"""The data module inside a real Trainer: what batches come, in which order, and after a resume."""

import copy
import json
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ft.data.sft_data import SFTData
from lightning_ft.functional.errors import Refusal
from tests.data.tiny_tokenizers import CHATML, tiny_tokenizer

TOKENIZER = tiny_tokenizer(CHATML)


class Recorder(LightningModule):
    """Learns a bag of tokens, so that its weights depend on every batch and its place in the window."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(len(TOKENIZER), 1)
        torch.nn.init.zeros_(self.table.weight)
        self.seen = []
        self.validated = []

    @property
    def tokenizer(self):
        return TOKENIZER

    def training_step(self, batch, batch_idx):
        window = tuple(sorted(batch.window.items()))
        self.seen.append((self.current_epoch, batch_idx, tuple(batch.rows.tolist()), window))
        logit = self.table(batch.ids.reshape(-1)[batch.scored]).squeeze(-1)
        # Lightning divides by the accumulation, and DDP by the ranks.
        nominal = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return (logit - batch.labels).square().sum() / batch.window["token"] * nominal

    def validation_step(self, batch, batch_idx):
        self.validated += batch.rows.tolist()

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return batch.rows.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@pytest.fixture
def path(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hello " * (n % 5 + 1)},
                {"role": "assistant", "content": "yes " * (n % 4 + 1)},
            ]
        }
        for n in range(23)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def data_of(path, tmp_path, **options):
    return SFTData(path, cache_dir=str(tmp_path / "cache"), **{"batch_size": 3, "val_fraction": 0.2, **options})


def trainer_of(tmp_path, callbacks=(), **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {
        "max_epochs": 3,
        "accumulate_grad_batches": 2,
        "default_root_dir": tmp_path,
        "enable_checkpointing": False,
    }
    return Trainer(**{**quiet, **options}, callbacks=list(callbacks))


class KeepAll(Callback):
    """Saves at every place where somebody might: after a batch, after validation, at the end of an epoch."""

    def __init__(self, folder):
        self.folder, self.kept = folder, []

    def keep(self, trainer, module, where):
        if trainer.sanity_checking:
            return
        file = self.folder / f"{len(self.kept)}-{where}.ckpt"
        trainer.save_checkpoint(file)
        self.kept.append((file, where, len(module.seen)))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        last = batch_idx + 1 == trainer.num_training_batches
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or last:  # saves fall on accumulation boundaries
            self.keep(trainer, module, "batch")

    def on_validation_end(self, trainer, module):
        self.keep(trainer, module, "validation")

    def on_train_epoch_end(self, trainer, module):
        self.keep(trainer, module, "epoch")


@pytest.mark.filterwarnings("error:.*not resumable.*")
@pytest.mark.parametrize("options", [{}, {"max_tokens": 60}, {"packing": False}], ids=["rows", "bins", "padded"])
@pytest.mark.parametrize(
    "placing", [{}, {"val_check_interval": 2}, {"limit_train_batches": 5}], ids=["plain", "val", "limit"]
)
def test_a_resumed_fit_sees_what_an_unbroken_one_sees(path, tmp_path, options, placing):
    keep = KeepAll(tmp_path)
    straight = Recorder()
    trainer_of(tmp_path, [keep], **placing).fit(straight, data_of(path, tmp_path, **options))
    epochs = {epoch for epoch, *_ in straight.seen}
    assert epochs == {0, 1, 2} and {where for _, where, _ in keep.kept} == {"batch", "validation", "epoch"}
    for file, where, done in keep.kept:
        resumed = Recorder()
        trainer_of(tmp_path, **placing).fit(
            resumed, data_of(path, tmp_path, **options), ckpt_path=file, weights_only=False
        )
        assert resumed.seen == straight.seen[done:], (where, done)
        assert torch.equal(resumed.table.weight, straight.table.weight), (where, done)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_checkpoints_of_model_checkpoint_resume(path, tmp_path):
    straight = Recorder()
    saver = ModelCheckpoint(dirpath=tmp_path / "kept", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    trainer_of(tmp_path, [saver], enable_checkpointing=True, max_epochs=2).fit(straight, data_of(path, tmp_path))
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) >= 6
    for file in files:
        resumed = Recorder()
        trainer_of(tmp_path, max_epochs=2).fit(resumed, data_of(path, tmp_path), ckpt_path=file, weights_only=False)
        assert torch.equal(resumed.table.weight, straight.table.weight), file.name


def test_batches_of_eight_and_four_accumulated_twice_train_alike(path, tmp_path):
    runs = []
    for batch_size, accumulate, packing in ((8, 1, True), (4, 2, True), (2, 4, True), (8, 1, False), (4, 2, False)):
        module = Recorder()
        data = data_of(path, tmp_path, batch_size=batch_size, packing=packing)
        trainer_of(tmp_path, accumulate_grad_batches=accumulate).fit(module, data)
        runs.append(module)
    for other in runs[1:]:
        torch.testing.assert_close(other.table.weight, runs[0].table.weight, atol=1e-6, rtol=1e-5)


def test_every_row_is_trained_on_once_an_epoch_in_a_new_order_and_none_held_out(path, tmp_path):
    module = Recorder()
    data = data_of(path, tmp_path)
    trainer_of(tmp_path, num_sanity_val_steps=0).fit(module, data)
    by_epoch = [[row for epoch, _, rows, _ in module.seen for row in rows if epoch == e] for e in range(3)]
    held = set(module.validated)
    assert len(held) == 5 and len(module.validated) == 15
    for rows in by_epoch:
        assert sorted(rows) == sorted(set(range(23)) - held)
    assert by_epoch[0] != by_epoch[1] != by_epoch[2]
    again = Recorder()
    trainer_of(tmp_path).fit(again, data_of(path, tmp_path))
    assert again.seen == module.seen


def test_validate_alone_holds_out_the_same_rows(path, tmp_path):
    module, fitted = Recorder(), Recorder()
    trainer_of(tmp_path, num_sanity_val_steps=0, max_epochs=1).fit(fitted, data_of(path, tmp_path))
    trainer_of(tmp_path).validate(module, data_of(path, tmp_path), verbose=False)
    assert sorted(module.validated) == sorted(fitted.validated)


def test_test_and_predict_read_their_own_files(path, tmp_path):
    module = Recorder()
    data = data_of(path, tmp_path, test_path=path)
    trainer_of(tmp_path).test(module, data, verbose=False)
    assert module.validated == list(range(23))
    predicted = trainer_of(tmp_path).predict(module, data_of(path, tmp_path, predict_path=path))
    assert [row for rows in predicted for row in rows] == list(range(23))
    with pytest.raises(Refusal, match="no rows for test: set SFTData.test_path"):
        trainer_of(tmp_path).test(module, data_of(path, tmp_path), verbose=False)


def test_a_fit_without_validation_rows_runs_without(path, tmp_path):
    module = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer_of(tmp_path, max_epochs=1).fit(module, data_of(path, tmp_path, val_fraction=0.0))
    assert len({row for _, _, rows, _ in module.seen for row in rows}) == 23 and not module.validated


def test_overfit_batches_sees_the_same_rows_each_epoch(path, tmp_path):
    module = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer_of(tmp_path, overfit_batches=2).fit(module, data_of(path, tmp_path))
    seen = [[rows for epoch, _, rows, _ in module.seen if epoch == e] for e in range(3)]
    assert len(seen[0]) == 2 and seen[0] == seen[1] == seen[2]


def test_resuming_in_mid_epoch_with_other_batches_is_refused(path, tmp_path):
    keep = KeepAll(tmp_path)
    trainer_of(tmp_path, [keep], max_epochs=1).fit(Recorder(), data_of(path, tmp_path))
    middle, end = keep.kept[0][0], keep.kept[-1][0]
    with pytest.raises(Refusal, match="middle of an epoch with batch_size 3 .now 4"):
        trainer_of(tmp_path).fit(
            Recorder(), data_of(path, tmp_path, batch_size=4), ckpt_path=middle, weights_only=False
        )
    with pytest.raises(Refusal, match="accumulate_grad_batches 2 .now 1"):
        other = trainer_of(tmp_path, accumulate_grad_batches=1)
        other.fit(Recorder(), data_of(path, tmp_path), ckpt_path=middle, weights_only=False)
    module = Recorder()
    trainer_of(tmp_path, max_epochs=2).fit(
        module, data_of(path, tmp_path, batch_size=4), ckpt_path=end, weights_only=False
    )
    assert {epoch for epoch, *_ in module.seen} == {1}


def test_padded_batches_are_bucketed_and_say_so(path, tmp_path):
    def shares(**options):
        data = data_of(path, tmp_path, val_fraction=0.0, **options)
        data._tokenizer = TOKENIZER
        return data.reports()["train"].packing_efficiency

    assert shares() == 1.0
    assert 0.8 < shares(packing=False, batch_size=4) < 1.0
    assert 0.8 < shares(max_tokens=60) <= 1.0


def test_preview_marks_what_is_scored(path, tmp_path):
    data = data_of(path, tmp_path, val_fraction=0.0)
    data._tokenizer = TOKENIZER
    (first,) = data.preview(1)
    assert first.where == f"{path}, line 1"
    assert [(piece.text, piece.scored) for piece in first.pieces] == [
        ("<|im_start|>user\nhello <|im_end|>\n<|im_start|>assistant\n", False),
        ("yes <|im_end|>", True),
        ("\n", False),
    ]
    assert (first.tokens, first.scored) == (sum(p.tokens for p in first.pieces), first.pieces[1].tokens)


def test_constructor_only_stores_and_shows_what_differs(tmp_path):
    data = SFTData("rows.jsonl", batch_size=4)
    assert repr(data) == "SFTData(path='rows.jsonl', batch_size=4)"
    assert repr(copy.deepcopy(data)) == repr(data) == str(data)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"batch_size": 0}, "SFTData.batch_size must be at least 1, got 0"),
        ({"val_fraction": 1.0}, "SFTData.val_fraction must be less than 1"),
        ({"val_fraction": -0.1}, "SFTData.val_fraction must be at least 0"),
        ({"max_length": 1}, "SFTData.max_length must be at least 2"),
        ({"truncation": "cut"}, "SFTData.truncation must be one of"),
        ({"loss_on": "user"}, "SFTData.loss_on must be one of"),
        ({"val_fraction": 0.1, "val_path": "b.jsonl"}, "both name validation rows"),
        ({"max_tokens": 64, "packing": False}, "set packing true"),
        ({"max_tokens": 64, "truncation": "keep_end"}, "max_length 1024 lets rows through"),
    ],
)
def test_bad_arguments_are_refused_in_the_constructor(options, match):
    with pytest.raises(Refusal, match=match):
        SFTData("rows.jsonl", **options)


def test_files_are_checked_without_a_model(path, tmp_path):
    data_of(path, tmp_path).check_files()
    with pytest.raises(Refusal, match="There is no data file"):
        data_of(path, tmp_path, test_path=str(tmp_path / "none.jsonl")).check_files()
    data_of(path, tmp_path, test_path=str(tmp_path / "none.jsonl")).check_files("fit")
    with pytest.raises(Refusal, match="loss_on 'completion' has no meaning"):
        data_of(path, tmp_path, loss_on="completion").check_files("fit")


def test_no_tokenizer_is_refused(path, tmp_path):
    with pytest.raises(Refusal, match="SFTData has no tokenizer"):
        data_of(path, tmp_path).setup("fit")
    with pytest.raises(Refusal, match="There is no folder"):
        data_of(path, tmp_path, tokenizer=str(tmp_path / "none")).setup("fit")


@pytest.mark.parametrize("packing", [True, False])
def test_two_ranks_share_each_window(path, tmp_path, two_ranks, packing):
    alone = Recorder()
    data = data_of(path, tmp_path, batch_size=8, packing=packing)
    trainer_of(tmp_path, accumulate_grad_batches=1, max_epochs=2, num_sanity_val_steps=0).fit(alone, data)
    options = {
        "batch_size": 2,
        "packing": packing,
        "trainer": {"accumulate_grad_batches": 2, "num_sanity_val_steps": 0},
    }
    job = "tests.data.sft_data_jobs:fit"
    ranks = two_ranks.run(job, path=path, cache=tmp_path, folder=str(tmp_path), **options)
    (seen, validated, weight), (other_seen, other_validated, other_weight) = ranks
    assert len(seen) == len(other_seen) and torch.equal(weight, other_weight)
    assert [window for *_, window in seen] == [window for *_, window in other_seen]
    for epoch in range(2):
        rows = [
            row for part in (seen, other_seen) for e, _, found, _ in part for row in found if e == epoch and row >= 0
        ]
        assert sorted(rows) == sorted(row for e, _, found, _ in alone.seen for row in found if e == epoch)
    both = [row for row in validated + other_validated if row >= 0]
    assert sorted(both) == sorted(alone.validated)
    torch.testing.assert_close(weight, alone.table.weight, atol=1e-6, rtol=1e-5)
