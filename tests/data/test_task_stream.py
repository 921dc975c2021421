"""Tasks one after the other in one fit: what is trained when, what hooks are called, what is measured, and resumed runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_ft.data.task_stream import TaskStream
from lightning_ft.functional.errors import Refusal
from tests.data.streams import EPOCHS, SIZES, Hooks, Layer, Points, Saves, stream, trainer, weights

CALLS = [
    ["start", "a", 0, 0],
    ["end", "a", 0, 3],
    ["start", "b", 1, 3],
    ["end", "b", 1, 7],
    ["start", "c", 2, 7],
    ["end", "c", 2, 10],
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run that saves a checkpoint wherever one can be saved."""
    folder = tmp_path_factory.mktemp("whole")
    module, data, hooks = Layer(), stream(), Hooks()
    run = trainer(folder, hooks, Saves(folder, "batch", "validation", "epoch", "end"))
    run.fit(module, data)
    return folder, module, data, hooks, run


def test_each_task_has_its_epochs_and_its_own_rows(whole) -> None:
    _, module, _, hooks, run = whole
    assert hooks.calls == CALLS
    sizes = [len(batch) for batch in module.seen]
    assert sizes == [4, 4, 2] + [4, 2] * 2 + [4, 4, 1]
    for name, first, last in (("a", 0, 3), ("b", 3, 5), ("b", 5, 7), ("c", 7, 10)):
        number = list(SIZES).index(name)
        rows = Points(number, SIZES[name]).points().tensors[0][:, 0].tolist()
        assert sorted(sum(module.seen[first:last], [])) == sorted(rows), "each row once an epoch"
    assert sum(module.seen[3:5], []) != sum(module.seen[5:7], []), "in a new order each epoch"
    assert run.max_epochs == -1 and not any(type(c).__name__.startswith("Task") for c in run.callbacks)


def by_hand() -> tuple[dict[str, torch.Tensor], list[list[float]], list[float]]:
    """The same training written out: a fresh optimizer and schedule for each task."""
    module = Layer()
    net, rows = module.net, []

    def score() -> list[float]:
        points = [Points(number, n).points().tensors for number, n in enumerate(SIZES.values())]
        return [float((net(x).argmax(-1) == y).float().mean()) for x, y in points]

    start = score()
    for number, (n, epochs) in enumerate(zip(SIZES.values(), EPOCHS, strict=True)):
        x, y = Points(number, n).points().tensors
        optimizer = torch.optim.Adam(net.parameters(), module.rate)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for epoch in range(epochs):
            from lightning_ft.data.plan import epoch_order

            order = torch.as_tensor(epoch_order(n, seed=0, epoch=epoch))
            for batch in order.split(4):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
                optimizer.step()
            schedule.step()
        rows.append(score())
    return weights(module), rows, start


def test_weights_and_matrix_are_those_of_the_training_written_out(whole) -> None:
    _, module, data, _, run = whole
    wanted, rows, start = by_hand()
    for name, value in weights(module).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7)
    matrix, before = data.scores.matrix()
    torch.testing.assert_close(torch.tensor(matrix), torch.tensor(rows))
    torch.testing.assert_close(torch.tensor(before), torch.tensor(start))
    backward = ((rows[2][0] - rows[0][0]) + (rows[2][1] - rows[1][1])) / 2
    forward = ((rows[0][1] - start[1]) + (rows[1][2] - start[2])) / 2
    logged = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("continual/")}
    assert logged == pytest.approx(
        {
            "continual/average": sum(rows[2]) / 3,
            "continual/backward_transfer": backward,
            "continual/forward_transfer": forward,
            "continual/forgetting_first": -backward,
            "continual/forgetting_max": (max(rows[0][0], rows[1][0]) - rows[2][0] + rows[1][1] - rows[2][1]) / 2,
        },
        abs=1e-6,
    )


POINTS = (
    [f"batch-{n}" for n in range(1, 11)]
    + [f"validation-{n}" for n in range(2, 6)]
    + [f"epoch-{n}" for n in range(1, 5)]
)


@pytest.mark.parametrize("file", POINTS)
def test_a_run_resumed_from_any_point_ends_as_the_unbroken_one(whole, tmp_path, file) -> None:
    folder, module, data, _, _ = whole
    again, rest, hooks = Layer(), stream(), Hooks()
    trainer(tmp_path, hooks).fit(again, rest, ckpt_path=folder / f"{file}.ckpt", weights_only=True)
    for name, value in weights(module).items():
        assert torch.equal(weights(again)[name], value), name
    assert hooks.calls == CALLS
    assert rest.scores.state() == data.scores.state()
    assert again.rates == module.rates[len(module.rates) - len(again.rates) :]
    assert again.seen == module.seen[len(module.seen) - len(again.seen) :]


def test_a_run_that_gets_more_steps_goes_on_in_the_middle_of_its_task(whole, tmp_path) -> None:
    _, module, _, _, _ = whole
    file, seen = None, []
    for steps in (2, 3, 5, 8, 100):
        again, hooks = Layer(), Hooks()
        run = trainer(tmp_path, hooks, max_steps=steps)
        run.fit(again, stream(), ckpt_path=file, weights_only=True)
        file = tmp_path / f"{steps}.ckpt"
        run.save_checkpoint(file)
        seen += again.seen
    assert seen == module.seen and hooks.calls == CALLS
    with pytest.raises(Refusal, match="stopped by max_steps in the middle of an epoch.*give trainer.max_steps"):
        trainer(tmp_path, Hooks()).fit(Layer(), stream(), ckpt_path=tmp_path / "8.ckpt", weights_only=True)
    for name, value in weights(module).items():
        assert torch.equal(weights(again)[name], value), name


def test_keeping_the_optimizer_leaves_its_moments_and_rates_alone(tmp_path) -> None:
    module = Layer()
    trainer(tmp_path).fit(module, stream(optimizer="keep"))
    assert module.rates == pytest.approx([0.05] * 3 + [0.005] * 2 + [0.0005] * 2 + [0.00005] * 3)
    restarted = Layer()
    trainer(tmp_path).fit(restarted, stream())
    assert restarted.rates == pytest.approx([0.05] * 3 + [0.05] * 2 + [0.005] * 2 + [0.05] * 3)


def test_steps_instead_of_epochs(tmp_path) -> None:
    module, hooks = Layer(), Hooks()
    trainer(tmp_path, hooks, accumulate_grad_batches=2).fit(module, stream(epochs=1, steps={"a": 2, "b": 1, "c": 3}))
    assert [call[3] for call in hooks.calls] == [0, 2, 2, 3, 3, 6]
    assert [len(rows) for rows in module.seen] == [4] * 12
    a = Points(0, 10).points().tensors[0][:, 0].tolist()
    assert set(sum(module.seen[:4], [])) == set(a), "a second pass begins only after the first"


def test_naive_and_joint_by_one_flag(tmp_path) -> None:
    naive, joint, hooks = stream(baseline="naive"), stream(baseline="joint", epochs=2), Hooks()
    plain, first = Layer(), Layer()
    trainer(tmp_path).fit(first, naive)
    trainer(tmp_path).fit(plain, stream())
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(plain).values(), strict=True))
    together = Layer()
    run = trainer(tmp_path, hooks)
    run.fit(together, joint)
    assert [call[:2] for call in hooks.calls] == [["start", "joint"], ["end", "joint"]]
    assert len(together.seen) == 14 and len(set(sum(together.seen[:7], []))) == 25
    row = joint.scores.matrix()[0][0]
    assert float(run.callback_metrics["continual/average"]) == pytest.approx(sum(row) / 3)
    assert "continual/backward_transfer" not in run.callback_metrics


def test_going_on_with_a_new_task_in_another_fit(tmp_path) -> None:
    """Two fits, the second from the checkpoint of the first, train and measure what one does."""
    one, whole = Layer(), stream()
    trainer(tmp_path).fit(one, whole)
    tasks = {name: Points(number, rows) for number, (name, rows) in enumerate(SIZES.items())}
    first, second, hooks = Layer(), Layer(), Hooks()
    run = trainer(tmp_path)
    run.fit(first, TaskStream({name: tasks[name] for name in "ab"}, epochs=[1, 2]))
    run.save_checkpoint(tmp_path / "ab.ckpt")
    going_on = TaskStream(dict(tasks), epochs=[7, 7, 1], continue_from=str(tmp_path / "ab.ckpt"))
    trainer(tmp_path, hooks).fit(second, going_on)
    assert hooks.calls == [["start", "c", 2, 0], ["end", "c", 2, 3]]
    for name, value in weights(one).items():
        assert torch.equal(weights(second)[name], value), name
    rows, _ = going_on.scores.matrix()
    assert going_on.scores.columns() == ["a", "b", "c"]
    assert rows[2] == whole.scores.matrix()[0][2] and rows[0] == [*whole.scores.matrix()[0][0][:2], None]


def test_what_a_new_task_scores_after_the_earlier_ones_is_no_start(tmp_path) -> None:
    """Measured before its training, it fills the row of the task that was learned last; the first start stays."""
    tasks = {name: Points(number, rows) for number, (name, rows) in enumerate(SIZES.items())}
    whole = stream()
    trainer(tmp_path).fit(Layer(), whole)
    first, start = TaskStream({name: tasks[name] for name in "ab"}, epochs=[1, 2]), None
    run = trainer(tmp_path)
    run.fit(Layer(), first)
    start = first.scores.matrix()[1]
    run.save_checkpoint(tmp_path / "ab.ckpt")
    going_on = TaskStream(dict(tasks), continue_from=str(tmp_path / "ab.ckpt"))
    run = trainer(tmp_path)
    run.fit(Layer(), going_on)
    rows, before = going_on.scores.matrix()
    assert rows[1] == whole.scores.matrix()[0][1] and rows[2] == whole.scores.matrix()[0][2]
    assert before == [*start, None], "what c scored before any training was not measured"
    assert "continual/forward_transfer" not in run.callback_metrics
    assert "continual/backward_transfer" in run.callback_metrics


@pytest.mark.parametrize("most", [1, 3])
def test_max_epochs_that_ends_a_stream_before_its_last_task_is_refused(tmp_path, most) -> None:
    module, hooks = Layer(), Hooks()
    with pytest.raises(
        Refusal, match=rf"trainer.max_epochs {most} ends the stream before its task c begins.*has 4 in all.*to -1"
    ):
        trainer(tmp_path, hooks, max_epochs=most).fit(module, stream())
    assert module.seen == [] and hooks.calls == []
    for options in ({"max_epochs": 4}, {"max_epochs": 9}, {}):
        hooks = Hooks()
        trainer(tmp_path, hooks, **options).fit(Layer(), stream())
        assert hooks.calls == CALLS


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"max_epochs": 1, "max_steps": 2}, 2), ({"max_epochs": -1, "max_steps": 4}, 4), ({"fast_dev_run": True}, 1)],
    ids=str,
)
def test_a_quick_try_may_end_before_the_last_task(tmp_path, options, steps) -> None:
    run = trainer(tmp_path, **options)
    run.fit(Layer(), stream())
    assert run.global_step == steps
    with pytest.raises(Refusal, match="trainer.max_epochs 1 ends the stream"):
        trainer(tmp_path, max_epochs=1, max_steps=100).fit(Layer(), stream())


def test_a_metric_that_is_not_logged_is_refused_at_the_first_validation(tmp_path) -> None:
    module = Layer()
    with pytest.raises(Refusal, match="TaskStream.metric is val_ac, which validation does not log: it logs val_acc"):
        trainer(tmp_path).fit(module, stream(metric="val_ac"))
    assert module.seen == []
    data = stream(metric="val_acc")
    trainer(tmp_path).fit(Layer(), data)
    assert len(data.scores.matrix()[0]) == 3


def test_another_head_is_told_to_give_labels(tmp_path) -> None:
    run = trainer(tmp_path)
    run.fit(Layer(), stream())
    run.save_checkpoint(tmp_path / "last.ckpt")
    module = Layer()
    module.net = nn.Linear(4, 5)
    with pytest.raises(Refusal, match=r"holds net.weight \(3, 4\), and this model does not; .* give labels"):
        trainer(tmp_path).fit(module, TaskStream({"d": Points(3, 8)}, continue_from=str(tmp_path / "last.ckpt")))


class Digits(Points):
    """Rows that say their class and nothing else."""

    def points(self):
        drawn = torch.Generator().manual_seed(self.seed)
        classes = torch.arange(self.rows) % 5
        return torch.utils.data.TensorDataset(torch.randn(self.rows, 4, generator=drawn), classes)


class Tasks(Callback):
    def __init__(self) -> None:
        self.tasks: list[Any] = []

    def on_task_start(self, trainer, module, task) -> None:
        self.tasks.append(
            (task.name, task.classes, task.seen, sorted({int(y) for _, ys in task.batches() for y in ys}))
        )


def test_one_data_set_cut_by_class(tmp_path) -> None:
    tasks, module = Tasks(), Layer()
    module.net = nn.Linear(4, 5)
    data = TaskStream(source=Digits(0, 20), by="class", groups=2, scenario="class")
    trainer(tmp_path, tasks).fit(module, data)
    assert tasks.tasks == [
        ("0+1", (0, 1), (0, 1), [0, 1]),
        ("2+3", (2, 3), (0, 1, 2, 3), [2, 3]),
        ("4", (4,), (0, 1, 2, 3, 4), [4]),
    ]


def test_rows_to_be_judged_by_that_belong_to_no_task_are_refused(tmp_path) -> None:
    class Fewer(Digits):
        def train_dataloader(self):
            data = self.points()
            return DataLoader(Subset(data, [n for n in range(self.rows) if n % 5 < 4]), batch_size=4)

    with pytest.raises(Refusal, match="the val rows have class 4, which no training row has"):
        trainer(tmp_path).fit(Layer(), TaskStream(source=Fewer(0, 20), by="class"))
    with pytest.raises(
        Refusal, match="TaskStream.by topic: the data set TensorDataset has no such column; it has no names"
    ):
        trainer(tmp_path).fit(Layer(), TaskStream(source=Digits(0, 20), by="topic"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": None}, "takes either tasks .* or source"),
        ({"groups": 2}, "TaskStream.groups says how source is cut, and there is none"),
        ({"epochs": [1, 2]}, r"TaskStream.epochs has 2 entries"),
        ({"epochs": [1, 2, 0]}, "TaskStream.epochs must be at least 1 for each task"),
        ({"epochs": 2, "steps": 3}, "TaskStream.epochs and TaskStream.steps both say"),
        ({"continue_from": "none.ckpt"}, "which is no file"),
        ({"epochs": 0}, "TaskStream.epochs must be at least 1"),
    ],
)
def test_refusals(tmp_path, options, says) -> None:
    with pytest.raises(Refusal, match=says):
        tasks = {name: Points(number, rows) for number, (name, rows) in enumerate(SIZES.items())}
        data = TaskStream(**{"tasks": tasks, **options})
        trainer(tmp_path).fit(Layer(), data)


def test_other_tasks_or_batches_cannot_be_resumed(whole, tmp_path) -> None:
    folder = whole[0]
    renamed = TaskStream({"x": Points(0, 10), "b": Points(1, 6), "c": Points(2, 9)}, epochs=EPOCHS)
    with pytest.raises(Refusal, match="learns the tasks a, b, c, and this one x, b, c"):
        trainer(tmp_path, Hooks()).fit(Layer(), renamed, ckpt_path=folder / "batch-4.ckpt", weights_only=True)
    other = TaskStream({"a": Points(0, 10), "b": Points(1, 6, batch_size=3), "c": Points(2, 9)}, epochs=EPOCHS)
    with pytest.raises(Refusal, match="in the middle of an epoch with batch_size 4 .now 3"):
        trainer(tmp_path, Hooks()).fit(Layer(), other, ckpt_path=folder / "batch-4.ckpt", weights_only=True)
    longer = TaskStream({"a": Points(0, 13), "b": Points(1, 6), "c": Points(2, 9)}, epochs=EPOCHS)
    with pytest.raises(Refusal, match="micro-batches in its epochs so far"):
        trainer(tmp_path, Hooks()).fit(Layer(), longer, ckpt_path=folder / "batch-4.ckpt", weights_only=True)


def test_a_free_stream_tells_no_tasks(tmp_path) -> None:
    hooks, data = Hooks(), stream(scenario="free")
    trainer(tmp_path, hooks).fit(Layer(), data)
    assert hooks.calls == [] and data.task is None and len(data.scores.rows) == 3


def test_the_first_callback_has_its_teardown_too(tmp_path):
    """The stream leaves the list of callbacks in its own, while Lightning goes through that list."""
    called = []

    class One(Callback):
        def teardown(self, trainer, pl_module, stage):
            called.append(self)

    both = [One(), One()]
    run = trainer(tmp_path, *both)
    run.fit(Layer(), stream(epochs=1))
    assert called == both and [c for c in run.callbacks if isinstance(c, One)] == both
