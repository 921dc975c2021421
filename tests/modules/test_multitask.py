"""MultiTask with MultiTaskData: one trunk for the rows of all, each task's exact mean, and what is each task's own."""

import copy
import csv
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_ft
from lightning_ft import (
    SFT,
    ClassificationData,
    GradientSurgery,
    LoRA,
    LossBalancing,
    MultiTaskData,
    PrefixTuning,
    Refusal,
    SampleGenerations,
    TaskSampling,
)
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.module import FineTuningModule
from lightning_ft.nn.adapters import set_adapters
from lightning_ft.nn.registry import injected_layers
from tests.contract.subjects import Steps, differing, trainer
from tests.modules.multitask_jobs import TASKS, by_hand, fit, job, on_ranks, weights
from tests.tolerances import assert_gradient


def batches(data: MultiTaskData) -> list:
    return list(data.train_dataloader())


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weigh", ["rows", "tasks"])
def test_loss_and_gradients_are_those_by_hand(weigh: str, packing: bool, tmp_path) -> None:
    module, data = job(tmp_path, model={"weigh": weigh}, packing=packing, batch_size=30)
    steps = Steps()
    start = {}

    class Start(ModelCheckpoint):
        def on_train_start(self, trainer, pl_module):
            start.update(copy.deepcopy(pl_module.state_dict()))

    fit(tmp_path, module, data, steps, Start(), max_steps=1, enable_checkpointing=True)
    assert set(steps.batches[0].columns["task"].tolist()) == {0, 1, 2}
    module.load_state_dict(start)
    module.zero_grad()
    loss = by_hand(module, steps.batches[0], weigh)
    loss.backward()
    assert steps.losses[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, parameter in module.named_parameters():
        assert_gradient(steps.gradients[0][name], parameter.grad, name)


def test_a_mixed_batch_runs_the_trunk_once(tmp_path) -> None:
    module, data = job(tmp_path, batch_size=12)
    runs, tasks = [], []

    class Count(Steps):
        def on_train_start(self, trainer, pl_module):
            pl_module.view.backbone.register_forward_hook(lambda *_: runs.append(1))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            tasks.append(len(set(batch.columns["task"].tolist())))

    fit(tmp_path, module, data, Count(), max_steps=3, limit_val_batches=0)
    assert len(runs) == 3 and max(tasks) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("multitask")
    job(path)
    return path


def assert_close(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=2e-6, msg=name)


def test_eight_rows_are_four_twice_are_two_ranks(folder: Path, two_ranks) -> None:
    """Rows and tokens in one step, each divided by its own count."""
    whole = on_ranks(str(folder), 8)
    assert_close(on_ranks(str(folder), 4, accumulate=2), whole)
    for ranks in two_ranks.run("tests.modules.multitask_jobs:on_ranks", folder=str(folder), batch_size=4, devices=2):
        assert_close(ranks, whole)


def test_two_ranks_with_surgery_are_one_process_with_the_joint_batch(folder: Path, two_ranks) -> None:
    whole = on_ranks(str(folder), 8, surgery="upgrad")
    differs = on_ranks(str(folder), 8)
    assert differing(whole, differs)
    job = {"folder": str(folder), "batch_size": 4, "devices": 2, "surgery": "upgrad"}
    for ranks in two_ranks.run("tests.modules.multitask_jobs:on_ranks", **job):
        assert_close(ranks, whole)


@pytest.mark.parametrize("fsdp2", [False, True])
def test_one_task_a_batch_on_two_ranks(fsdp2: bool, folder: Path, two_ranks) -> None:
    """Heads of absent tasks take part on both ranks, and nothing waits."""
    whole = on_ranks(str(folder), 8, batches="homogeneous")
    job = {"folder": str(folder), "batch_size": 4, "devices": 2, "batches": "homogeneous", "fsdp2": fsdp2}
    for ranks in two_ranks.run("tests.modules.multitask_jobs:on_ranks", **job):
        assert_close(ranks, whole)


def test_all_ranks_deal_the_same_task(folder: Path) -> None:
    from lightning_ft.data.loader import Placement

    module, data = job(folder, batches="homogeneous", batch_size=3, packing=True, epoch_rows=90)
    data.use_tokenizer(module.tokenizer)
    data.setup("fit")
    data.use_sampling(TaskSampling("uniform"))
    seen = []
    for rank in (0, 1):
        loader = data.train_dataloader()
        loader.placement = lambda rank=rank: Placement(world_size=2, rank=rank)
        seen.append([set(batch.columns["task"].tolist()) - {-1} for batch in loader])
    assert all(len(one | other) == 1 for one, other in zip(*seen, strict=True))
    assert len(set().union(*seen[0])) == 3


def test_a_head_rests_while_its_task_is_absent(tmp_path) -> None:
    """Not even AdamW's momentum moves it."""
    module, data = job(
        tmp_path, model={"optimizer": torch.optim.AdamW, "lr": 1e-2}, batches="homogeneous", batch_size=4
    )
    moved = []

    class Watch(Steps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = copy.deepcopy(pl_module.heads.state_dict())

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            (task,) = set(batch.columns["task"].tolist())
            changed = {name.split(".")[0] for name in differing(self.before, pl_module.heads.state_dict())}
            moved.append((TASKS[task], changed))

    fit(tmp_path, module, data, Watch(), max_steps=8, limit_val_batches=0)
    assert all(changed == {task} for task, changed in moved) and len({task for task, _ in moved}) > 1


@pytest.mark.parametrize("batches", ["mixed", "homogeneous"])
@pytest.mark.parametrize("callback", [None, TaskSampling("loss_driven"), LossBalancing("uncertainty")], ids=str)
def test_a_run_resumed_in_mid_epoch_is_bit_equal(batches: str, callback, tmp_path) -> None:
    options = {
        "model": {"weigh": "tasks", "optimizer": torch.optim.AdamW, "lr": 1e-3},
        "batches": batches,
        "batch_size": 4,
    }
    options |= {"epoch_rows": 12}  # three batches an epoch
    more = [copy.deepcopy(callback)] if callback else []
    module, data = job(tmp_path, **options)
    keep = ModelCheckpoint(tmp_path / "files", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    fit(tmp_path, module, data, keep, *more, max_steps=10, enable_checkpointing=True, limit_val_batches=0)
    again, data = job(tmp_path, **options)
    more = [copy.deepcopy(callback)] if callback else []
    keep = ModelCheckpoint(tmp_path / "again", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    options = {"max_steps": 10, "use_distributed_sampler": False, "limit_val_batches": 0, "enable_checkpointing": True}
    run = trainer(tmp_path, keep, *more, **options)
    run.fit(again, data, ckpt_path=tmp_path / "files" / "step=5.ckpt")
    assert not differing(weights(module), weights(again))


def test_measures(tmp_path) -> None:
    module, data = job(tmp_path, model={"baselines": {"classes": 0.5, "words": 0.5, "numbers": 0.5}}, epoch_rows=16)
    run = fit(tmp_path, module, data, max_steps=2, limit_val_batches=None)
    measured = {name: float(value) for name, value in run.callback_metrics.items()}
    main = [measured["val/classes/accuracy"], measured["val/words/f1"], measured["val/numbers/pearson"]]
    assert measured["val/macro"] == pytest.approx(sum(main) / 3)
    assert measured["val/relative_improvement"] == pytest.approx(sum((m - 0.5) / 0.5 for m in main) / 3, rel=1e-5)
    losses = [measured[f"val/{name}/loss"] for name in TASKS]
    assert measured["val/loss"] == pytest.approx(sum(losses) / 3)


def test_a_task_without_held_out_rows_has_no_part_in_means(tmp_path) -> None:
    module, data = job(tmp_path, epoch_rows=16)
    data.tasks["classes"].val_path = None
    run = fit(tmp_path, module, data, max_steps=2, limit_val_batches=None)
    measured = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")}
    assert not any("classes" in name for name in measured)
    assert measured["val/macro"] == pytest.approx((measured["val/words/f1"] + measured["val/numbers/pearson"]) / 2)
    assert measured["val/loss"] == pytest.approx((measured["val/words/loss"] + measured["val/numbers/loss"]) / 2)


def test_a_step_tells_nothing_of_tasks_that_it_lacks(tmp_path) -> None:
    module, data = job(tmp_path, batches="homogeneous", batch_size=4)
    steps, log = Steps(), CSVLogger(tmp_path)
    run = fit(tmp_path, module, data, TaskSampling("round_robin"), steps, max_steps=3, logger=log, log_every_n_steps=1)
    run.logger.save()
    with open(Path(log.log_dir) / "metrics.csv") as file:
        told = [row for row in csv.DictReader(file) if row["train/loss"]]
    tasks = [TASKS[int(batch.columns["task"][0])] for batch in steps.batches]
    assert len(told) == 3 and sorted(tasks) == sorted(TASKS)
    for task, row in zip(tasks, told, strict=True):
        values = {name: float(row[f"train/{name}"]) for name in TASKS}
        assert [name for name, value in values.items() if not math.isnan(value)] == [task]
        assert values[task] == float(row["train/loss"])


def test_another_sampler_in_mid_epoch_is_refused(tmp_path) -> None:
    module, data = job(tmp_path, batch_size=4)
    keep = ModelCheckpoint(tmp_path / "files", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fit(tmp_path, module, data, keep, TaskSampling("uniform"), max_steps=2, enable_checkpointing=True)
    module, data = job(tmp_path, batch_size=4)
    run = trainer(tmp_path, TaskSampling("temperature"), max_steps=4, use_distributed_sampler=False)
    with pytest.raises(Refusal, match=r"sampling .*uniform.* \(now 'TaskSampling\(\)'\)"):
        run.fit(module, data, ckpt_path=tmp_path / "files" / "step=2.ckpt")


def test_a_task_alone_is_a_flag(tmp_path) -> None:
    module, data = job(tmp_path, only="numbers")
    run = fit(tmp_path, module, data, limit_val_batches=None, max_steps=1, val_check_interval=1)
    assert module.task_names == ["numbers"] and set(module.heads) == {"numbers"}
    assert run.callback_metrics["val/loss"] == run.callback_metrics["val/numbers/loss"]


def test_with_lora_the_factors_and_heads_are_trained_and_kept(tmp_path) -> None:
    module, data = job(tmp_path, model={"lr": 0.5})
    keep = ModelCheckpoint(tmp_path / "files", save_last=True, save_top_k=0)
    start = {}

    class Start(Steps):
        def on_train_start(self, trainer, pl_module):
            start.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    fit(tmp_path, module, data, LoRA(2), Start(), keep, enable_checkpointing=True)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == {"model", "heads"} and all(
        "lora_" in n or n.startswith("heads.") for n in trained
    )
    assert not differing(
        {n: start[n] for n in start if n not in trained},
        {n: p.detach() for n, p in module.named_parameters() if n not in trained},
    )
    loaded = lightning_ft.load(tmp_path / "files" / "last.ckpt")
    assert not differing(weights(module), weights(loaded)) and loaded.task_names == TASKS


def test_an_adapter_of_a_task_is_its_own(tmp_path) -> None:
    """Rows of the task see the shared adapter and its own, other rows the shared one alone."""
    module, data = job(tmp_path, batches="homogeneous", batch_size=4, model={"lr": 0.5})
    seen: dict[str, set[str]] = {}

    class Watch(Steps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = weights(pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            (task,) = set(batch.columns["task"].tolist())
            names = {
                id(p): layer.adapter_name
                for layer in injected_layers(pl_module).values()
                for p in layer.injected_parameters().values()
            }
            own = {n: names[id(p)] for n, p in pl_module.named_parameters() if id(p) in names}
            seen.setdefault(TASKS[task], set()).update(
                own[n] for n in differing(self.before, weights(pl_module)) if n in own
            )

    adapters = [LoRA(2, name="shared"), LoRA(2, name="classes"), LoRA(2, name="numbers")]
    fit(tmp_path, module, data, *adapters, Watch(), max_steps=8, limit_val_batches=0)
    assert seen["classes"] == {"shared", "classes"}
    assert seen.get("words", {"shared"}) == {"shared"}
    assert all(layer.enabled for layer in injected_layers(module).values())
    mixed, data = job(tmp_path)
    with pytest.raises(Refusal, match="The adapter 'classes' is one task's own, and prefix computes on whole"):
        fit(tmp_path, mixed, data, PrefixTuning(2, name="classes"))


def test_a_task_is_added_to_a_trained_model(tmp_path) -> None:
    module, data = job(tmp_path)
    keep = ModelCheckpoint(tmp_path / "files", save_last=True, save_top_k=0)
    fit(tmp_path, module, data, keep, enable_checkpointing=True)
    loaded = lightning_ft.load(tmp_path / "files" / "last.ckpt")
    before = weights(loaded)
    loaded.train()
    loaded.add_task("stars", "regression")
    rows = ClassificationData(
        str(tmp_path / "numbers.jsonl"), task="regression", val_fraction=0.3, cache_dir=str(tmp_path / "cache")
    )
    run = fit(tmp_path, loaded, MultiTaskData({**data.tasks, "stars": rows}, batch_size=12))
    assert run.global_step == 4 and loaded.task_names == [*TASKS, "stars"]
    assert set(weights(loaded)) == {*before, "heads.stars.out.weight", "heads.stars.out.bias"}
    with pytest.raises(Refusal, match="has a task 'stars' already"):
        loaded.add_task("stars", "regression")


def test_a_language_model_beside_heads(tmp_path) -> None:
    """The term of texts is that of SFT on the same rows."""
    from lightning_ft.objectives.causal_lm import causal_lm

    module, data = job(tmp_path, "llama", batch_size=30)
    found = {}

    class Watch(Steps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            tasks = pl_module._tasks()
            outcome = pl_module._outcomes(batch, tasks)["texts"]
            rows = data._train_rows.parts["texts"]
            begin = int(data._train_rows._begins[3])
            numbers = [row - begin for row in batch.rows.tolist() if row >= begin]
            alone = data.tasks["texts"].collate(rows.segments(numbers), packed=True, window=None, task=None)
            found["texts"] = (
                float(outcome.losses.detach().sum()),
                float(causal_lm(pl_module.view, alone).sum.detach()),
            )

    fit(tmp_path, module, data, Watch(), max_steps=1)
    assert found["texts"][0] == pytest.approx(found["texts"][1], rel=1e-5) and found["texts"][0] > 0
    assert module.generate(["hello"], max_new_tokens=2)


def test_balancing_and_surgery_find_the_tasks(tmp_path) -> None:
    module, data = job(tmp_path, model={"weigh": "tasks"}, batch_size=12)
    run = fit(tmp_path, module, data, LossBalancing("uncertainty"), GradientSurgery("pcgrad"), limit_val_batches=0)
    assert {f"train/weight/{name}" for name in TASKS} | {"train/conflict_rate"} <= set(run.callback_metrics)
    assert module.balancing.values.abs().sum() > 0
    assert Attachment.of(module).seed == 0


def test_a_name_that_torch_would_trip_over_is_refused(tmp_path) -> None:
    _, data = job(tmp_path)
    for name in ("type", "values", "training", "float"):
        with pytest.raises(Refusal, match=rf"no task can be called '{name}', .*; call it {name}_task"):
            MultiTaskData({name: data.tasks["numbers"]})
        module, _ = job(tmp_path, model={"objectives": {"numbers": "regression"}})
        with pytest.raises(Refusal, match=rf"add_task: no task can be called '{name}'"):
            module.add_task(name, "regression")


def test_misspelt_tasks_are_refused_before_a_model_is_loaded(tmp_path) -> None:
    for argument, value in {
        "weights": {"toon": 5.0},
        "labels": {"toon": ["a", "b"]},
        "several": ["toon"],
        "baselines": {"classes": 1.0, "words": 1.0, "numbers": 1.0, "toon": 1.0},
    }.items():
        module, data = job(tmp_path, model={argument: value})
        with pytest.raises(
            Refusal, match=rf"MultiTask\.{argument} names 'toon', and the tasks are classes, words, numbers"
        ):
            fit(tmp_path, module, data)
        assert module.model is None
    module, data = job(tmp_path, model={"objectives": {"toon": "dpo"}}, only="numbers")
    with pytest.raises(Refusal, match=r"MultiTask\.objectives names 'toon'"):
        fit(tmp_path, module, data)
    module, data = job(tmp_path, model={"baselines": {"classes": 0.5}})
    with pytest.raises(Refusal, match=r"MultiTask\.baselines has no measure of 'numbers'"):
        fit(tmp_path, module, data)
    module, data = job(tmp_path, model={"weights": {"classes": 5.0}, "baselines": {"numbers": 0.5}}, only="numbers")
    assert fit(tmp_path, module, data, max_steps=1, limit_val_batches=0).global_step == 1


def test_numbers_alone_with_one_row_have_no_measure(tmp_path) -> None:
    """One row has no pearson: there is no mean, and nothing to compare, which is no reason to end the run."""
    (tmp_path / "one.jsonl").write_text('{"text": "hello", "label": 0.5}\n')
    module, data = job(tmp_path, model={"baselines": {"numbers": 0.5}}, only="numbers")
    data.tasks["numbers"].val_path = str(tmp_path / "one.jsonl")
    run = fit(tmp_path, module, data, max_steps=1, limit_val_batches=None, val_check_interval=1)
    assert math.isnan(run.callback_metrics["val/relative_improvement"])
    assert "val/macro" not in run.callback_metrics and run.callback_metrics["val/loss"] >= 0


def test_a_loaded_model_goes_on_with_one_of_its_tasks(tmp_path) -> None:
    """The steps have the term of that task alone, in what is logged, too; the heads of the others rest."""
    module, data = job(tmp_path)
    keep = ModelCheckpoint(tmp_path / "files", save_last=True, save_top_k=0)
    fit(tmp_path, module, data, keep, enable_checkpointing=True, limit_val_batches=0, max_steps=2)
    loaded = lightning_ft.load(tmp_path / "files" / "last.ckpt")
    loaded.train()
    before = weights(loaded)
    _, rows = job(tmp_path, only="numbers")
    balancing = LossBalancing("static", weights={"numbers": 2.0})
    run = fit(tmp_path, loaded, rows, balancing, max_steps=2, limit_val_batches=0)
    assert {n for n in run.callback_metrics if n.startswith("train/")} == {"train/loss", "train/weight/numbers"}
    changed = differing(before, weights(loaded))
    assert {n.split(".")[1] for n in changed if n.startswith("heads.")} == {"numbers"}


def test_a_run_of_one_task_leaves_other_tasks_adapters_out(tmp_path) -> None:
    """Else an adapter with another task's name would be one more that is shared, and the baseline larger than meant."""
    adapters = [LoRA(2, name="shared"), LoRA(2, name="classes"), LoRA(2, name="numbers")]
    module, data = job(tmp_path, batches="homogeneous", only="numbers")
    keep = ModelCheckpoint(tmp_path / "files", save_last=True, save_top_k=0)
    fit(tmp_path, module, data, *adapters, keep, max_steps=1, enable_checkpointing=True, limit_val_batches=0)
    assert {layer.adapter_name for layer in injected_layers(module).values()} == {"shared", "numbers"}
    loaded = lightning_ft.load(tmp_path / "files" / "last.ckpt")
    assert not differing(weights(module), weights(loaded))
    module, data = job(tmp_path, batches="homogeneous", only="numbers")
    fit(tmp_path, module, data, LoRA(2, name="classes"), max_steps=1, limit_val_batches=0)
    assert {n.split(".")[0] for n in weights(module)} == {"heads"}, "its base stays as frozen as beside the adapter"


def speaking(folder: Path, *names: str, **data):
    """A tiny Llama that has been taught texts twice and numbers, with adapters of these names that change what it says."""
    _, some = job(folder, "llama")
    parts = {"texts": some.tasks["texts"], "more": copy.deepcopy(some.tasks["texts"]), "numbers": some.tasks["numbers"]}
    module, _ = job(folder, "llama")
    rows = MultiTaskData({n: parts[n] for n in data.get("tasks", parts)}, batches="homogeneous", batch_size=4, seed=1)
    fit(folder, module, rows, *(LoRA(2, name=name) for name in names), max_steps=1, limit_val_batches=0)
    generator = torch.Generator().manual_seed(0)
    for layer in injected_layers(module).values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    module.eval()
    return module, rows


def test_the_task_that_speaks_answers_by_its_own_adapter(tmp_path) -> None:
    module, rows = speaking(tmp_path, "shared", "texts", "numbers", tasks=["texts", "numbers"])
    said = module.generate(["hello"], max_new_tokens=8)
    set_adapters(module.model, {"shared": 1.0, "texts": 1.0})
    assert module.generate(["hello"], max_new_tokens=8) == said
    set_adapters(module.model, {"shared": 1.0, "texts": 1.0, "numbers": 1.0})
    assert FineTuningModule.generate(module, ["hello"], max_new_tokens=8) != said, "the test could not tell"
    with pytest.raises(Refusal, match="task must be one that writes texts"):
        module.generate(["hello"], task="numbers")


def test_where_several_speak_one_is_to_be_named(tmp_path) -> None:
    module, rows = speaking(tmp_path, "texts", "more")
    with pytest.raises(Refusal, match="texts and more write texts, by adapters of their own: say which task"):
        module.generate(["hello"])
    one, other = (module.generate(["hello"], task=task, max_new_tokens=8) for task in ("texts", "more"))
    assert one != other and all(layer.enabled for layer in injected_layers(module).values())
    adapters = [LoRA(2, name="texts"), LoRA(2, name="more")]
    fresh, _ = job(tmp_path, "llama")
    with pytest.raises(Refusal, match="texts and more write texts, by adapters of their own: say which task"):
        fit(tmp_path, fresh, rows, *adapters, SampleGenerations(["hello"]), max_steps=1)
    assert fresh.model is None
    fresh, _ = job(tmp_path, "llama")
    samples = SampleGenerations(["hello"], max_new_tokens=2, task="more")
    fit(tmp_path, fresh, rows, *adapters, samples, max_steps=1, limit_val_batches=0)
    assert list(tmp_path.rglob("samples.jsonl"))
    with pytest.raises(Refusal, match=r"SampleGenerations\.task chooses a task of MultiTask, and SFT has none"):
        sft = SFT(str(tmp_path / "llama"))
        fit(tmp_path, sft, rows.tasks["texts"], SampleGenerations(["hello"], task="more"), max_steps=1)


def test_refusals(tmp_path) -> None:
    module, data = job(tmp_path)
    with pytest.raises(Refusal, match="MultiTask reads batches of MultiTaskData, got ClassificationData"):
        fit(tmp_path, module, data.tasks["classes"])
    module, data = job(tmp_path, model={"objectives": {"other": "regression"}})
    with pytest.raises(Refusal, match="The data's tasks are classes, words, numbers, the module's other"):
        fit(tmp_path, module, data)
    module, data = job(tmp_path, model={"objectives": dict.fromkeys(TASKS, "regression")})
    with pytest.raises(Refusal, match="The task 'classes' is regression"):
        fit(tmp_path, module, data)
    with pytest.raises(Refusal, match=r"MultiTaskData\.only must be one of classes, words, numbers, got 'x'"):
        job(tmp_path, only="x")
    with pytest.raises(Refusal, match=r"MultiTask\.weights must be at least 0"):
        job(tmp_path, model={"weights": {"classes": -1.0}})
    module, data = job(tmp_path, model={"dpo_beta": 5.0})
    with pytest.raises(Refusal, match=r"MultiTask\.dpo_beta is 5\.0, but no task is dpo; leave it out"):
        fit(tmp_path, module, data)
    module, data = job(tmp_path)
    with pytest.raises(Refusal, match="overfit_batches sees the same batches again and again, and MultiTaskData draws"):
        fit(tmp_path, module, data, overfit_batches=2)
    module, data = job(tmp_path)
    data.tasks["words"].path = "nowhere.jsonl"
    with pytest.raises(Refusal, match=r"The task 'words' of MultiTaskData: There is no .*nowhere\.jsonl"):
        data.check_files("fit")
