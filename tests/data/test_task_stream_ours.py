"""Task streams of this library's own data and modules: cut by column and class, masks, measures by name, ranks, resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

from lightning_ft import EWC, SFT, ClassificationData, LoRA, LwF, Refusal, Replay, SFTData, TaskStream
from lightning_ft.cli.report_parts.run_files import RunFiles
from lightning_ft.cli.report_parts.task_matrix import task_matrix
from lightning_ft.data.task_scores import MATRIX, read_matrix
from lightning_ft.engine.scoring import MASKED, row_logits
from lightning_ft.engine.strategies import FSDP2Strategy
from tests.contract.subjects import state, trainer
from tests.modules.tasks import WORDS, write_base

DOMAINS, CLASSES = ["films", "books", "tea"], ["bad", "fair", "good"]


def write(folder: Path, n: int = 36) -> Path:
    """Rows of three domains and three classes, of uneven lengths."""
    rows = []
    for number in range(n):
        words = [WORDS[(number * 7 + k * 3) % len(WORDS)] for k in range(3 + number % 5)]
        rows.append(
            {
                "text": " ".join(words),
                "label": CLASSES[(number // 3) % 3],
                "domain": DOMAINS[number % 3 if number < 30 else 0],
            }
        )
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    write_base("bert", folder / "bert")
    write(folder)
    return folder


def classifier(place: Path, **options: Any) -> SFT:
    settings = {"lr": 5e-3, "schedule": "cosine", "warmup_steps": 1, "base_dtype": "float32"}
    return SFT(str(place / "bert"), task="sequence_classification", **{**settings, **options})


def data(place: Path, **options: Any) -> ClassificationData:
    settings = {"val_fraction": 0.25, "batch_size": 4, "cache_dir": str(place / "cache"), "seed": 3}
    return ClassificationData(str(place / "rows.jsonl"), **{**settings, **options})


class Rows(Callback):
    """Which rows were trained, the rates, and the tasks that were told."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.rates: list[float] = []
        self.tasks: list[Any] = []
        self.masks: list[list[bool] | None] = []

    def on_task_start(self, run, module, task) -> None:
        self.tasks.append((task.name, task.classes, task.seen))

    def on_train_batch_start(self, run, module, batch, batch_idx) -> None:
        self.rows.append([row for row in batch.rows.tolist() if row >= 0])
        self.rates.append(run.optimizers[0].param_groups[0]["lr"])
        mask = batch.columns.get("class_mask")
        self.masks.append(None if mask is None else mask[0].tolist())


def fit(
    place: Path,
    folder: Path,
    stream: TaskStream,
    *callbacks: Callback,
    model: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[SFT, Any]:
    module = classifier(place, **(model or {}))
    settings = {"max_steps": -1, "max_epochs": -1, "limit_val_batches": None, "use_distributed_sampler": False}
    run = trainer(folder, *callbacks, **{**settings, **options})
    run.fit(module, stream)
    return module, run


def test_a_column_makes_tasks_and_each_metric_has_the_task_s_name(place, tmp_path):
    rows = Rows()
    stream = TaskStream(source=data(place), by="domain", groups=["books", "films", "tea"], epochs=[1, 2, 1])
    _, run = fit(place, tmp_path, stream, rows, LoRA(2))
    raw = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    domains = [{raw[row]["domain"] for row in batch} for batch in rows.rows]
    assert [next(iter(one)) for one in domains] == sorted(
        (next(iter(one)) for one in domains), key=["books", "films", "tea"].index
    )
    assert all(len(one) == 1 for one in domains)
    names = {f"val/accuracy/{task}" for task in DOMAINS} | {"val/accuracy", "val/loss/tea", "continual/average"}
    assert names <= set(run.callback_metrics)
    mean = sum(float(run.callback_metrics[f"val/accuracy/{task}"]) for task in DOMAINS) / 3
    assert float(run.callback_metrics["val/accuracy"]) == pytest.approx(mean)
    matrix, start = stream.scores.matrix()
    assert stream.scores.chosen() == "val/accuracy" and len(matrix) == 3 and len(start) == 3
    assert stream.scores.columns() == ["books", "films", "tea"]
    assert [t[0] for t in rows.tasks] == ["books", "films", "tea"] and rows.tasks[0][1] == (0, 1, 2)


def test_the_first_task_is_trained_as_it_would_be_alone(place, tmp_path):
    """The same rows in the same order, and the same schedule, as ClassificationData with those rows gives by itself."""
    lines = (place / "rows.jsonl").read_text().splitlines(keepends=True)
    whole = Rows()
    fit(place, tmp_path, TaskStream(source=data(place, val_fraction=0.0), by="domain"), whole, limit_val_batches=0)
    alone = Rows()
    (tmp_path / "films.jsonl").write_text("".join(line for line in lines if json.loads(line)["domain"] == "films"))
    own = ClassificationData(
        str(tmp_path / "films.jsonl"), batch_size=4, cache_dir=str(tmp_path), seed=3, labels=CLASSES
    )
    module = classifier(place)
    trainer(tmp_path, alone, max_steps=-1, max_epochs=1, limit_val_batches=0).fit(module, own)
    numbers = [n for n, line in enumerate(lines) if json.loads(line)["domain"] == "films"]
    steps = len(alone.rows)
    assert whole.rows[:steps] == [[numbers[row] for row in batch] for batch in alone.rows]
    assert whole.rates[:steps] == pytest.approx(alone.rates)
    assert whole.rates[steps] == pytest.approx(whole.rates[0]), "the next task warms up again"


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_classes_that_do_not_compete_are_masked(place, tmp_path, scenario):
    rows = Rows()
    stream = TaskStream(source=data(place), by="class", groups=[["bad", "good"], ["fair"]], scenario=scenario, epochs=1)
    module, run = fit(place, tmp_path, stream, rows)
    assert rows.tasks == [("bad+good", (0, 2), (0, 2)), ("fair", (1,), (0, 1, 2))]
    first = rows.masks.index(rows.masks[-1]) if rows.masks[0] != rows.masks[-1] else 0
    assert set(map(tuple, rows.masks[:first])) == {(True, False, True)}
    assert set(map(tuple, rows.masks[first:])) == {(True, True, True) if scenario == "class" else (False, True, False)}
    if scenario == "class":
        assert stream.scores.rows["bad+good"]["fair"]["val/accuracy"] == 0.0, "a class not yet seen cannot be chosen"
    else:
        assert stream.scores.rows["bad+good"]["fair"]["val/accuracy"] == 1.0, "of one class there is no doubt"
    batch = next(iter(stream._parts["fair"].loader("train")))
    logits = row_logits(module.view, batch)
    assert bool((logits[~batch.columns["class_mask"]] == MASKED).all())


def test_the_head_s_rows_of_classes_not_yet_seen_are_free(place, tmp_path):
    """Trap 8: a head that grows has its full size, and what no task has used has no importance."""
    technique = EWC(1.0, labels="sample")
    found = []

    class Look(Callback):
        def on_task_end(self, run, module, task) -> None:
            found.append({n: v for n, v in technique._held.importance.items() if "classifier" in n})

    stream = TaskStream(source=data(place), by="class", groups=[["bad", "good"], ["fair"]], scenario="class")
    fit(place, tmp_path, stream, technique, Look())
    for name, value in found[0].items():
        assert not bool(value[1].any()) and all(bool(value[n].any()) for n in (0, 2)), name
    assert all(bool(value[1].any()) for value in found[1].values()) and len(found[0]) == 2


@pytest.mark.parametrize("mode", ["der", "der++"])
def test_what_was_said_is_kept_of_all_classes_whether_they_competed_or_not(place, tmp_path, mode):
    """A head that grows: what is masked in the loss has a logit all the same, which later tasks are held to."""
    technique = Replay(50, mode=mode, rows=4, balance="task")
    said = []

    class Look(Callback):
        def on_task_end(self, run, module, task) -> None:
            said.append({n: [r["logits"].clone() for r in g] for n, g in technique._memory.buffer.groups.items()})

    stream = TaskStream(source=data(place), by="class", groups=[["bad", "good"], ["fair"]], scenario="class")
    _, run = fit(place, tmp_path, stream, technique, Look(), log_every_n_steps=1)
    first = said[0]["bad+good"]
    assert first and all(one.shape == (1, 3) and bool((one.abs() < 50).all()) for one in first)
    assert all(torch.equal(a, b) for a, b in zip(first, said[1]["bad+good"], strict=False)), "kept as it was said then"
    name = "train/replay" if mode == "der" else "train/replay/logits"
    assert 0 < float(run.callback_metrics[name]) < 1e4


def test_replayed_rows_compete_with_the_classes_that_do_now(place, tmp_path):
    seen: list[torch.Tensor] = []

    class See(SFT):
        def training_step(self, batch, batch_idx):
            seen.append(batch.columns["class_mask"].clone())
            return super().training_step(batch, batch_idx)

    stream = TaskStream(source=data(place), by="class", groups=[["bad"], ["fair", "good"]], scenario="class")
    module = classifier(place)
    module.__class__ = See
    run = trainer(tmp_path, Replay(20, rows=4), max_steps=-1, max_epochs=-1, limit_val_batches=None)
    run.fit(module, stream)
    first = next(n for n, mask in enumerate(seen) if bool(mask.all()))
    assert first > 0 and not any(bool(mask[:, 1:].any()) for mask in seen[:first])
    assert all(bool(mask.all()) for mask in seen[first:])


def test_a_run_killed_in_the_middle_of_a_task_ends_bit_for_bit_as_the_unbroken_one(place, tmp_path):
    """With replay, distillation, LoRA's dropout, a cosine in each task and accumulation; resumed in its third task."""

    def techniques() -> list[Any]:
        return [LoRA(2, dropout=0.2), Replay(6, balance="task"), LwF()]

    class Keep(Callback):
        def setup(self, run, module, stage):
            run.callbacks.remove(self)
            run.callbacks.append(self)

        def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
            if run.global_step in (5, 7) and not run.fit_loop.epoch_loop._should_accumulate():
                run.save_checkpoint(tmp_path / f"{run.global_step}.ckpt")

    def stream() -> TaskStream:
        return TaskStream(source=data(place), by="domain", epochs=[1, 2, 4])

    whole, run = fit(place, tmp_path, (first := stream()), *techniques(), Keep(), accumulate_grad_batches=2)
    assert run.global_step == 8 and first.begun == 3
    for step in (5, 7):
        again, rest = classifier(place), stream()
        options = {"max_steps": -1, "max_epochs": -1, "limit_val_batches": None, "accumulate_grad_batches": 2}
        trainer(tmp_path, *techniques(), **options).fit(
            again, rest, ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True
        )
        assert all(torch.equal(value, state(again)[name]) for name, value in state(whole).items())
        assert rest.scores.state() == first.scores.state()


def one_each(place: Path, folder: Path, by: str, values: list[str], **options: Any) -> dict[str, ClassificationData]:
    """A data module for each value of a column, which all know all classes."""
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    found = {}
    for value in values:
        file = folder / f"{value}.jsonl"
        if not file.exists():
            file.write_text("".join(json.dumps(row) + "\n" for row in rows if row[by] == value))
        settings = {"batch_size": 4, "cache_dir": str(folder / "cache"), "seed": 3, "labels": CLASSES}
        found[value] = ClassificationData(str(file), **{**settings, **options})
    return found


def test_earlier_classes_compete_though_the_next_run_does_not_list_their_tasks(place, tmp_path):
    _, run = fit(
        place,
        tmp_path,
        TaskStream(one_each(place, tmp_path, "label", CLASSES[:2]), scenario="class"),
        limit_val_batches=0,
    )
    file = tmp_path / "two.ckpt"
    run.save_checkpoint(file)
    rows = Rows()
    last = TaskStream(one_each(place, tmp_path, "label", CLASSES[2:]), scenario="class", continue_from=str(file))
    _, run = fit(place, tmp_path, last, rows, limit_val_batches=0)
    assert rows.tasks == [("good", (2,), (0, 1, 2))]
    assert set(map(tuple, rows.masks)) == {(True, True, True)}
    run.save_checkpoint(tmp_path / "three.ckpt")
    kept = torch.load(tmp_path / "three.ckpt", weights_only=True)["TaskStream"]
    assert kept["classes"] == {"bad": [0], "fair": [1], "good": [2]} and kept["labels"] == CLASSES
    turned = one_each(place, tmp_path, "label", CLASSES[2:], labels=CLASSES[::-1])
    with pytest.raises(
        Refusal, match="had the classes bad, fair, good, and the data here have good, fair, bad. Give labels"
    ):
        fit(place, tmp_path, TaskStream(turned, scenario="class", continue_from=str(file)))


def went_on(place: str, folder: str, *, devices: int = 1, sharded_files: bool = True, first: str | None = None) -> Any:
    """Two domains with EWC, then a third in another fit, from the file of the first or from one that is given."""
    torch.set_num_threads(1)
    where, technique = Path(folder), EWC(5.0, labels="all")

    def one(stream: TaskStream, *techniques: Callback) -> Any:
        options: dict[str, Any] = {"limit_val_batches": 0}
        if devices > 1:
            strategy = FSDP2Strategy(save_distributed_checkpoint=sharded_files)
            options |= {"devices": devices, "strategy": strategy}
        return fit(Path(place), where, stream, *techniques, model={"optimizer": torch.optim.SGD, "lr": 0.1}, **options)

    size = 4 // devices
    if first is None:
        first = str(where / "first.ckpt")
        tasks = one_each(Path(place), Path(place), "domain", DOMAINS[:2], batch_size=size)
        one(TaskStream(tasks), EWC(5.0, labels="all"))[1].save_checkpoint(first)
    third = TaskStream(one_each(Path(place), Path(place), "domain", DOMAINS[2:], batch_size=size), continue_from=first)
    module, _ = one(third, technique)
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
    return {
        "state": {n: p.detach().clone() for n, p in whole.items()},
        "tasks": technique._held.tasks,
        "sharded": any(isinstance(p, DTensor) for p in module.parameters()),
    }


@pytest.mark.parametrize("sharded_files", [True, False], ids=["folder", "file"])
def test_sharded_training_goes_on_from_a_checkpoint(place, tmp_path, two_ranks, sharded_files):
    one_each(place, place, "domain", DOMAINS)
    one = went_on(str(place), str(tmp_path / "one"))
    both = tmp_path / "both"
    job = {"place": str(place), "folder": str(both), "devices": 2, "sharded_files": sharded_files}
    for other in two_ranks.run("tests.data.test_task_stream_ours:went_on", **job):
        assert other["sharded"] and other["tasks"] == one["tasks"] == 3
        for name, value in one["state"].items():
            torch.testing.assert_close(other["state"][name], value, rtol=2e-3, atol=2e-4)
    assert (both / "first.ckpt").is_dir() == sharded_files
    if sharded_files:
        again = went_on(str(place), str(tmp_path / "again"), first=str(both / "first.ckpt"))
        for name, value in one["state"].items():
            torch.testing.assert_close(again["state"][name], value, rtol=2e-3, atol=2e-4)


def losses(
    place: str, folder: str, *, batch_size: int, accumulate: int = 1, devices: int = 1, sharded: bool = False
) -> dict[str, Any]:
    """A stream with replay (without where sharded is compared), for one or two ranks."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    if devices > 1:
        fsdp2 = FSDP2Strategy(save_distributed_checkpoint=False)
        options |= {"devices": devices, "strategy": fsdp2 if sharded else "ddp"}
    source = data(Path(place), batch_size=batch_size, packing=True, cache_dir=f"{place}/cache")
    stream = TaskStream(source=source, by="domain", epochs=1)
    techniques = [] if sharded else [Replay(6, mode="der++", rows=5, balance="task"), LwF()]
    model = {"optimizer": torch.optim.SGD, "lr": 0.1}  # Adam's division blows rounding up
    module, run = fit(Path(place), Path(folder), stream, *techniques, model=model, **options)
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
    return {
        "state": {n: p.detach().clone() for n, p in whole.items()},
        "scores": stream.scores.state(),
        "calls": run.global_step,
    }


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_ranks_train_and_measure_what_one_does(place, tmp_path, two_ranks, sharded):
    job = {"place": str(place), "folder": str(tmp_path), "sharded": sharded}
    one = losses(**job, batch_size=4)
    for other in two_ranks.run("tests.data.test_task_stream_ours:losses", **job, batch_size=2, devices=2):
        assert other["calls"] == one["calls"]
        for name, value in one["state"].items():
            torch.testing.assert_close(other["state"][name], value, rtol=2e-3, atol=2e-4)
        for task, row in one["scores"]["rows"].items():
            for column, scores in row.items():
                assert other["scores"]["rows"][task][column] == pytest.approx(scores, abs=2e-3)


def test_the_matrix_is_written_and_drawn(place, tmp_path, capsys):
    from lightning.pytorch.loggers import CSVLogger

    stream = TaskStream(source=data(place), by="domain", epochs=1)
    fit(place, tmp_path, stream, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    what, rows, columns, values = read_matrix(tmp_path / MATRIX)
    assert what == "val/accuracy (more is better)" and rows == ["(start)", *columns] and columns == DOMAINS
    matrix, start = stream.scores.matrix()
    assert values == [start, *matrix]
    html = task_matrix([RunFiles(path=tmp_path)]) or ""
    assert html.count("<rect") == 12 and "val/accuracy" in html
    assert "films" in (tmp_path / "task_matrix.svg").read_text()


def test_sft_rows_of_two_files_and_a_quantised_base(chat, tmp_path):
    """Packed chats, LoRA over a base in nf4, replay with what was said: the base stays as it is."""
    rows_of = {name: tmp_path / f"{name}.jsonl" for name in ("one", "two")}
    lines = (chat / "rows.jsonl").read_text().splitlines(keepends=True)
    rows_of["one"].write_text("".join(lines[:8]))
    rows_of["two"].write_text("".join(lines[8:]))
    tasks = {
        name: SFTData(str(file), val_path=str(file), batch_size=4, packing=True, cache_dir=str(tmp_path / "cache"))
        for name, file in rows_of.items()
    }
    module = SFT(str(chat / "model"), lr=1e-2, quantize="nf4")
    technique = Replay(6, mode="der++", top_k=3)
    run = trainer(tmp_path, technique, LoRA(2), LwF(), max_steps=-1, max_epochs=-1, limit_val_batches=None)
    stream = TaskStream(tasks)
    run.fit(module, stream)
    assert len(technique._memory.buffer) == 6 and "val/loss/two" in run.callback_metrics
    assert stream.scores.chosen() == "val/accuracy"
