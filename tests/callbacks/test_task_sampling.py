"""TaskSampling: the contract, and what only it does."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import chisquare

from lightning_ft import Refusal, TaskSampling
from tests.contract import Case, checks_for
from tests.contract.subjects import Steps, differing, trainer
from tests.modules.multitask_jobs import fit, job, weights

CASE = Case(
    TaskSampling,
    small={"method": "uniform"},
    idle={"method": "proportional"},
    known={
        "idle": "rows of the contract's plain loader come in order, and a sampling draws them; see test_proportional"
    },
)
NAMES, SIZES = ["classes", "words", "numbers"], [24, 10, 7]


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


def test_proportional_is_what_the_data_do_by_themselves(tmp_path) -> None:
    module, data = job(tmp_path)
    fit(tmp_path, module, data)
    other, data = job(tmp_path)
    fit(tmp_path, other, data, TaskSampling("proportional"))
    assert not differing(weights(module), weights(other))


@pytest.mark.parametrize("batches", ["mixed", "homogeneous"])
@pytest.mark.parametrize("method", ["uniform", "temperature", "weighted"])
def test_batches_have_the_intended_tasks(method: str, batches: str, tmp_path) -> None:
    sampling = TaskSampling(
        method, weights=dict(zip(NAMES, (1.0, 2.0, 5.0), strict=True)) if method == "weighted" else None
    )
    module, data = job(tmp_path, batches=batches, batch_size=2, epoch_rows=1200, packing=True)
    data.use_tokenizer(module.tokenizer)
    data.setup("fit")
    data.use_sampling(sampling)
    drawn = torch.zeros(3)
    for batch in data.train_dataloader():
        tasks = batch.columns["task"]
        assert batches == "mixed" or len(tasks.unique()) == 1
        drawn += torch.bincount(tasks if batches == "mixed" else tasks[:1], minlength=3)
    assert chisquare(drawn.numpy(), float(drawn.sum()) * sampling.chances(NAMES, SIZES, 0)).pvalue > 0.01


def test_annealed_goes_from_proportional_to_nearly_uniform(tmp_path) -> None:
    sampling = TaskSampling("annealed")
    module, data = job(tmp_path, epoch_rows=8)
    fit(tmp_path, module, data, sampling, max_epochs=3, max_steps=-1, limit_val_batches=0)
    first, last = sampling.chances(NAMES, SIZES, 0), sampling.chances(NAMES, SIZES, 2)
    assert first.tolist() == pytest.approx([24 / 41, 10 / 41, 7 / 41])
    powers = [n**0.2 for n in SIZES]
    assert last.tolist() == pytest.approx([p / sum(powers) for p in powers])


def test_round_robin_takes_tasks_in_turn(tmp_path) -> None:
    seen: list[int] = []

    class Watch(Steps):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(int(batch.columns["task"][0]))

    module, data = job(tmp_path, batches="homogeneous", batch_size=2)
    fit(tmp_path, module, data, TaskSampling("round_robin"), Watch(), max_steps=6, limit_val_batches=0)
    assert seen == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("batches", ["mixed", "homogeneous"])
def test_round_robin_goes_on_where_the_last_epoch_ended(batches: str, tmp_path) -> None:
    """Four batches or eight rows an epoch are no whole turns of three tasks; over three epochs all come alike."""
    module, data = job(tmp_path, batches=batches, batch_size=2, epoch_rows=8)
    counted = torch.zeros(3, dtype=torch.long)

    class Watch(Steps):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            counted.add_(torch.bincount(batch.columns["task"], minlength=3))

    options = {"max_steps": 12, "max_epochs": 3, "limit_val_batches": 0}
    fit(tmp_path, module, data, TaskSampling("round_robin"), Watch(), **options)
    assert counted.tolist() == [8, 8, 8]


def test_loss_driven_follows_the_losses(tmp_path) -> None:
    """The share of a task in the second epoch is its base share times its loss relative to the first; by hand from the log."""
    losses: list[dict[str, float]] = []

    class Watch(Steps):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append({n: float(trainer.callback_metrics[f"train/{n}"]) for n in NAMES if batch.window[f"row:{n}"]})

    sampling = TaskSampling("loss_driven", temperature=1.0)
    module, data = job(tmp_path, epoch_rows=24, model={"lr": 0.2})
    fit(tmp_path, module, data, sampling, Watch(), max_steps=9, max_epochs=3, limit_val_batches=0)
    epochs = [[step for step in losses[n : n + 3]] for n in (0, 3)]
    means = [
        {n: sum(s[n] for s in e if n in s) / sum(n in s for s in e) for n in NAMES if any(n in s for s in e)}
        for e in epochs
    ]
    ratios = [means[1].get(n, means[0].get(n, 1.0)) / means[0].get(n, means[1].get(n, 1.0)) for n in NAMES]
    shares = [size * ratio for size, ratio in zip(SIZES, ratios, strict=True)]
    assert sampling.chances(NAMES, SIZES, 2).tolist() == pytest.approx([s / sum(shares) for s in shares], rel=1e-4)
    assert sampling.chances(NAMES, SIZES, 0).tolist() == pytest.approx([24 / 41, 10 / 41, 7 / 41])


def test_loss_driven_after_a_run_that_ended_in_an_epoch(tmp_path) -> None:
    """Three steps an epoch, stopped after five and extended: the data's third epoch follows the losses of the second."""
    seen: list[tuple[int, list[float], bool]] = []

    class Noting(TaskSampling):
        def chances(self, names, sizes, epoch):
            found = super().chances(names, sizes, epoch)
            seen.append((epoch, found.tolist(), epoch in self._ratios))
            return found

    options = {"epoch_rows": 24, "model": {"lr": 0.2}}
    keep = ModelCheckpoint(tmp_path / "files", save_last=True, save_top_k=0)
    module, data = job(tmp_path, **options)
    more = {"max_epochs": -1, "limit_val_batches": 0, "enable_checkpointing": True}
    fit(tmp_path, module, data, Noting("loss_driven"), keep, max_steps=5, **more)
    seen.clear()
    again, data = job(tmp_path, **options)
    run = trainer(tmp_path, Noting("loss_driven"), max_steps=12, use_distributed_sampler=False, **more)
    run.fit(again, data, ckpt_path=tmp_path / "files" / "last.ckpt")
    assert max(epoch for epoch, *_ in seen) >= 2
    assert all(known for epoch, _, known in seen if epoch > 0), [(epoch, known) for epoch, _, known in seen]


def test_refusals(tmp_path) -> None:
    with pytest.raises(
        Refusal, match=r"TaskSampling\.cap belongs to the methods proportional, temperature, loss_driven"
    ):
        TaskSampling("uniform", cap=10)
    with pytest.raises(Refusal, match=r"TaskSampling\.strength belongs to the method loss_driven, and the method is"):
        TaskSampling("temperature", strength=0.5)
    with pytest.raises(Refusal, match="weights and the method weighted belong together"):
        TaskSampling("weighted")
    with pytest.raises(Refusal, match=r"TaskSampling\.weights must be at least 0"):
        TaskSampling("weighted", weights={"a": -1.0})
    module, data = job(tmp_path)
    for epochs in (-1, 1):
        with pytest.raises(Refusal, match="annealed goes .* and needs at least two; set trainer.max_epochs"):
            fit(tmp_path, module, data, TaskSampling("annealed"), max_epochs=epochs)
    module, data = job(tmp_path)
    with pytest.raises(Refusal, match=r"TaskSampling\.weights names a, and the tasks are classes, words, numbers"):
        fit(tmp_path, module, data, TaskSampling("weighted", weights={"a": 1.0}))
    assert module.model is None, "before a model is loaded"
    module, data = job(tmp_path)
    with pytest.raises(Refusal, match="ClassificationData has no tasks; use MultiTaskData"):
        trainer(tmp_path, TaskSampling()).fit(module, data.tasks["classes"])
