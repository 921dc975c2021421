"""O-LoRA: the contract, its steps against the formula in float64, who trains when, and where it may run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import nn

import lightning_ft
from lightning_ft import AGEM, EWC, SFT, LoRA, LwF, OrthogonalLoRA, Refusal, Replay, SFTData, TaskStream
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.formats.adapter_folder import adapter_files
from lightning_ft.nn.registry import injected_layers
from tests.contract import Case, checks_for
from tests.contract.subjects import trainer
from tests.data.streams import SIZES, Hooks, Layer, Points, Saves, stream
from tests.data.streams import trainer as run_of
from tests.data.streams import weights as weights_of
from tests.data.test_task_stream_ours import classifier, data, write
from tests.modules.tasks import write_base

CASE = Case(OrthogonalLoRA, small={"r": 2})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


class Two(Layer):
    """A user's module with two layers, stepped by plain SGD."""

    def __init__(self, rate: float = 0.3) -> None:
        super().__init__(rate)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def logits(self, batch: Any) -> torch.Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.rate)


BOTH = ["net.0", "net.2"]


def technique(**options: Any) -> OrthogonalLoRA:
    return OrthogonalLoRA(**{"r": 2, "alpha": 3.0, "lam": 0.7, "target": BOTH, "name": "o", **options})


class Watch(Callback):
    """All parameters before and after each optimizer step, the batches between, and what was logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.batches: list[Any] = []
        self.before: dict[str, torch.Tensor] | None = None

    def on_train_batch_start(self, run, module, batch, batch_idx) -> None:
        if not self.batches:
            self.before = weights_of(module)
        self.batches.append([t.clone() for t in batch])

    def on_train_batch_end(self, run, module, outputs, batch, batch_idx) -> None:
        if run.fit_loop.epoch_loop._should_accumulate():
            return
        logged = {n: float(v) for n, v in run.callback_metrics.items()}
        step = {"before": self.before, "after": weights_of(module), "batches": self.batches, "logged": logged}
        step["trains"] = sorted(n for n, p in module.named_parameters() if p.requires_grad)
        self.steps.append(step)
        self.batches = []


def formula(weights, x, y, task, *, measure, scale):
    """(loss of one micro-batch, overlap) at given weights, float64, by the paper's equations."""
    room = max(n.count("base") for n in weights)
    hidden, term = x.double(), torch.zeros((), dtype=torch.float64)
    for layer in (0, 2):
        base = f"net.{layer}.{'base.' * room}"
        matrix = weights[f"{base}weight"]
        for i in range(task + 1):
            a, b = (weights[f"net.{layer}.{'base.' * i}lora_{kind}"] for kind in "AB")
            matrix = matrix + scale * b @ a
        hidden = hidden @ matrix.T + weights[f"{base}bias"]
        hidden = torch.tanh(hidden) if layer == 0 else hidden
        new = weights[f"net.{layer}.{'base.' * task}lora_A"]
        for i in range(task):
            old = weights[f"net.{layer}.{'base.' * i}lora_A"]
            for j in range(len(new)):
                for k in range(len(old)):
                    product = (new[j] * old[k]).sum()
                    if measure == "squared":
                        term = term + product**2
                    elif measure == "absolute":
                        term = term + product.abs()
                    else:
                        term = term + product**2 / ((new[j] ** 2).sum() * (old[k] ** 2).sum())
    return nn.functional.cross_entropy(hidden, y), term


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("measure", ["cosine", "squared", "absolute"])
def test_each_step_is_that_of_the_formula(tmp_path, measure, accumulate):
    module, watch = Two(), Watch()
    run = run_of(tmp_path, watch, technique(overlap=measure), accumulate_grad_batches=accumulate, log_every_n_steps=1)
    run.fit(module, stream())
    batches = [(0, 3), (1, 2), (1, 2), (2, 3)]  # task and micro-batches of each epoch
    order = [task for task, count in batches for _ in range(-(-count // accumulate))]
    assert len(watch.steps) == len(order)
    for task, step in zip(order, watch.steps, strict=True):
        weights = {n: v.double().requires_grad_() for n, v in step["before"].items()}
        found = [formula(weights, x, y, task, measure=measure, scale=1.5) for x, y in step["batches"]]
        term = found[0][1]
        (sum(loss for loss, _ in found) / accumulate + 0.7 * term).backward()  # Lightning divides by the nominal length
        trained = sorted(f"net.{n}.{'base.' * task}lora_{kind}" for n in (0, 2) for kind in "AB")
        assert step["trains"] == trained
        for name, value in weights.items():
            wanted = value.detach() - 0.3 * value.grad if name in trained else value.detach()
            torch.testing.assert_close(step["after"][name].double(), wanted, rtol=1e-4, atol=1e-6, msg=name)
        assert (float(term.detach()) > 0) == (task > 0)
        if task:
            assert step["logged"]["train/o"] == pytest.approx(float(term.detach()), rel=1e-4)


def test_a_large_weight_turns_the_new_factors_and_does_not_make_them_vanish(tmp_path):
    """Trap 12: with the paper's measure the way out is a factor of zeros; with the cosine it is another direction."""

    def ends(**options):
        module = Two(0.05)
        run_of(tmp_path, technique(r=1, lam=3.0, **options)).fit(module, stream(steps=100, epochs=1))
        old, new = (module.get_submodule(n).lora_A.detach() for n in ("net.0", "net.0.base.base"))
        cosines = nn.functional.normalize(new) @ nn.functional.normalize(old).T
        return float(new.norm() / old.norm()), float(cosines.abs().max())

    turned, near = ends()
    shrunk, _ = ends(overlap="squared")
    assert turned > 0.5 and near < 0.1
    assert shrunk < 0.5 * turned


def test_a_factor_without_a_partner_is_no_overlap_of_zero(tmp_path):
    """Trap 12: names that do not meet made a peer's term 0 without a word; here the fit ends."""

    class Lose(Callback):
        def on_task_start(self, run, module, task) -> None:
            if task.index == 1:
                module.get_submodule("net.2").adapter_name = "other"

    with pytest.raises(KeyError):
        run_of(tmp_path, Lose(), technique()).fit(Two(), stream())


def test_an_adapter_computes_from_its_task_on_and_begins_as_nothing(tmp_path):
    starts = []

    class Look(Callback):
        def on_task_start(self, run, module, task) -> None:
            x = torch.ones(2, 4)
            own = {f"o_{n}": [x for x in injected_layers(module, f"o_{n}").values()] for n in range(3)}
            starts.append(([own[name][0].enabled for name in own], module.net(x)))
            for layer in own[f"o_{task.index}"]:
                layer.enabled = False
            torch.testing.assert_close(module.net(x), starts[-1][1], rtol=0, atol=0)
            for layer in own[f"o_{task.index}"]:
                layer.enabled = True

    class Last(Look):  # after the technique has opened it
        pass

    run_of(tmp_path, technique(), Last()).fit(Two(), stream())
    assert [on for on, _ in starts] == [[True, False, False], [True, True, False], [True, True, True]]


def test_dropout_is_of_the_new_adapter_alone(tmp_path):
    class Look(Callback):
        def on_train_batch_start(self, run, module, *_) -> None:
            now = next(n for n in "012" if next(iter(injected_layers(module, f"o_{n}").values())).lora_A.requires_grad)
            for layer in injected_layers(module).values():
                assert layer.dropout == (0.25 if layer.adapter_name == f"o_{now}" else 0.0) and layer.training

    run_of(tmp_path, technique(dropout=0.25), Look()).fit(Two(), stream())


# -- resume, going on, loading ---------------------------------------------------------------------------------------


def test_a_run_resumed_anywhere_is_the_unbroken_one(tmp_path):
    whole = Two()
    run_of(tmp_path, technique(dropout=0.2), Hooks(), Saves(tmp_path, "batch", "validation")).fit(whole, stream())
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) > 10
    for file in files[::3]:
        again = Two()
        run_of(tmp_path, technique(dropout=0.2), Hooks()).fit(again, stream(), ckpt_path=file, weights_only=True)
        assert all(torch.equal(v, weights_of(again)[n]) for n, v in weights_of(whole).items()), file.name


def test_going_on_from_a_checkpoint_is_one_run(tmp_path):
    whole, first, second = Two(), Two(), Two()
    run_of(tmp_path, technique()).fit(whole, stream(epochs=1))
    tasks = stream().tasks
    run = run_of(tmp_path, technique())
    run.fit(first, TaskStream({n: tasks[n] for n in "ab"}))
    run.save_checkpoint(tmp_path / "ab.ckpt")
    run_of(tmp_path, technique()).fit(second, TaskStream(dict(tasks), continue_from=str(tmp_path / "ab.ckpt")))
    assert all(torch.equal(v, weights_of(second)[n]) for n, v in weights_of(whole).items())


def test_a_stream_that_goes_on_is_measured_with_all_adapters_learned_so_far(tmp_path):
    tasks = {name: Points(number, rows) for number, (name, rows) in enumerate(SIZES.items())}
    run = run_of(tmp_path, technique(tasks=3))
    run.fit(Two(), first := TaskStream({name: tasks[name] for name in "ab"}))
    run.save_checkpoint(tmp_path / "ab.ckpt")
    seen = []

    class Look(Callback):
        def on_validation_start(self, run, module) -> None:
            layers = {name: [x.enabled for x in injected_layers(module, name).values()] for name in names}
            seen.append([all(layers[name]) for name in names])

    names = [f"o_{index}" for index in range(3)]
    going_on = TaskStream(dict(tasks), continue_from=str(tmp_path / "ab.ckpt"))
    run_of(tmp_path, technique(tasks=3), Look()).fit(Two(), going_on)
    assert seen[0] == [True, True, False] and seen[-1] == [True, True, True]
    after_b = going_on.scores.matrix()[0][1]
    assert after_b[:2] == first.scores.matrix()[0][1] and after_b[2] is not None


def test_fits_one_after_another_are_tasks_where_there_is_room(tmp_path):
    module, one = Two(), technique(tasks=2)
    run_of(tmp_path, one, max_epochs=2).fit(module, Points(0, 8))
    first = weights_of(module)
    run_of(tmp_path, one, max_epochs=2).fit(module, Points(1, 8))
    moved = {n for n, v in weights_of(module).items() if not torch.equal(v, first[n])}
    assert moved == {f"net.{n}.base.lora_{kind}" for n in (0, 2) for kind in "AB"}
    with pytest.raises(Refusal, match="has room for 2 tasks, and this fit comes to number 3; give tasks=3"):
        run_of(tmp_path, one, max_epochs=2).fit(module, Points(2, 8))
    module, one = Two(), technique()
    run_of(tmp_path, one).fit(module, stream(epochs=1))
    with pytest.raises(Refusal, match="has room for 3 tasks, and this fit comes to number 6; give tasks=6"):
        run_of(tmp_path, one).fit(module, stream(epochs=1))


@pytest.mark.parametrize("baseline", ["naive", "joint"])
def test_a_baseline_trains_one_adapter_throughout(tmp_path, baseline):
    """Not all weights, which sitting out would mean."""
    module, plain = Two(), Two()
    run_of(tmp_path, technique(name="x")).fit(module, stream(baseline=baseline))
    run_of(tmp_path, LoRA(2, alpha=3.0, target=BOTH, name="x_0")).fit(plain, stream(baseline=baseline))
    assert all(torch.equal(v, weights_of(plain)[n]) for n, v in weights_of(module).items())


# -- beside others ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [LwF(0.5), Replay(6), Replay(6, mode="der++"), AGEM(6)], ids=repr)
def test_beside_techniques_of_the_function_space(tmp_path, other):
    """Each acts, and past factors stay as they were."""
    module, alone, watch = Two(), Two(), Watch()
    run_of(tmp_path, technique(), other, watch).fit(module, stream())
    run_of(tmp_path, technique()).fit(alone, stream())
    assert any(not torch.equal(v, weights_of(alone)[n]) for n, v in weights_of(module).items())
    for before, after in zip(watch.steps, watch.steps[1:], strict=False):
        changed = {n for n, v in after["after"].items() if not torch.equal(v, before["after"][n])}
        assert changed <= set(after["trains"])


def test_beside_a_lora_of_another_name(tmp_path):
    """It trains all the time, and is no part of any overlap."""
    module, watch = Two(), Watch()
    run_of(tmp_path, LoRA(1, target=["net.0"]), technique(), watch).fit(module, stream())
    lora = [n for n, p in module.named_parameters() if p.requires_grad and p.shape[0] == 1 and n.endswith("lora_A")]
    assert len(lora) == 1 and all(lora[0] in step["trains"] for step in watch.steps)


def test_refusals(tmp_path):
    with pytest.raises(Refusal, match="OrthogonalLoRA acts between tasks, and a stream with scenario free"):
        run_of(tmp_path, technique()).fit(Two(), stream(scenario="free"))
    with pytest.raises(Refusal, match="EWC cannot work with the orthogonal_lora technique, because each task trains"):
        run_of(tmp_path, technique(), EWC()).fit(Two(), stream())
    with pytest.raises(Refusal, match="has room for 2 tasks, and this fit comes to number 3"):
        run_of(tmp_path, technique(tasks=2)).fit(Two(), stream())
    with pytest.raises(Refusal, match="OrthogonalLoRA.r must be at least 1"):
        OrthogonalLoRA(0)


# -- our modules, many devices, few bits -------------------------------------------------------------------------------


def measured(
    place: str, folder: str, *, batch_size: int, accumulate: int = 1, devices: int = 1, sharded: bool = False
) -> dict[str, Any]:
    """A classifier on three domains; its factors, and the overlap at each step."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 1, "max_epochs": -1}
    options |= {"max_steps": -1, "use_distributed_sampler": False, "limit_val_batches": None}
    if devices > 1:
        fsdp2 = FSDP2Strategy(save_distributed_checkpoint=False)
        options |= {"devices": devices, "strategy": fsdp2 if sharded else "ddp"}
    seen: list[float] = []

    class See(Callback):
        def on_train_batch_end(self, run, *_) -> None:
            if "train/orthogonal_lora" in run.callback_metrics:
                seen.append(float(run.callback_metrics["train/orthogonal_lora"]))

    where = Path(place)
    module = classifier(where, optimizer=torch.optim.SGD, lr=0.1)
    source = data(where, batch_size=batch_size, packing=True, cache_dir=f"{place}/cache")
    run = trainer(Path(folder), OrthogonalLoRA(2, lam=0.5, target=["query", "value"]), See(), **options)
    run.fit(module, TaskStream(source=source, by="domain", epochs=2))
    whole = {n: getattr(p.detach(), "full_tensor", p.detach().clone)() for n, p in module.named_parameters()}
    run.save_checkpoint(Path(folder) / "last.ckpt")
    return {"state": {n: p for n, p in whole.items() if "lora_" in n or "classifier" in n}, "overlap": seen}


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    write_base("bert", folder / "bert")
    write(folder)
    return folder


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_ranks_and_accumulation_train_what_one_does(ours, tmp_path, two_ranks, sharded):
    job = {"place": str(ours), "folder": str(tmp_path), "sharded": sharded}
    one = measured(**job, batch_size=4)
    others = two_ranks.run("tests.callbacks.test_orthogonal_lora:measured", **job, batch_size=2, devices=2)
    others += [measured(**job, batch_size=2, accumulate=2)]
    assert len(set(one["overlap"])) > 5
    for other in others:
        assert one["state"].keys() == other["state"].keys()
        for name, value in one["state"].items():
            torch.testing.assert_close(other["state"][name], value, rtol=2e-3, atol=2e-5, msg=name)
    assert others[0]["overlap"] == pytest.approx(one["overlap"], rel=1e-3)
    loaded = lightning_ft.load(tmp_path / "last.ckpt")
    found = {n: p.detach() for n, p in loaded.named_parameters()}
    assert all(torch.equal(found[n], value) for n, value in others[-1]["state"].items())


def test_a_language_model_over_a_base_in_few_bits_and_its_adapters_in_peft(chat, tmp_path):
    """Packed chats over nf4; the base stays as it is, and each task's adapter is exported by name."""
    lines = (chat / "rows.jsonl").read_text().splitlines(keepends=True)
    tasks = {}
    for name, part in (("one", lines[:8]), ("two", lines[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
        tasks[name] = SFTData(str(tmp_path / f"{name}.jsonl"), batch_size=4, packing=True, cache_dir=str(tmp_path))
    module = SFT(str(chat / "model"), lr=1e-2, quantize="nf4")
    run = trainer(tmp_path, OrthogonalLoRA(2), max_steps=-1, max_epochs=-1, limit_val_batches=0, log_every_n_steps=1)
    run.fit(module, TaskStream(tasks))
    assert float(run.callback_metrics["train/orthogonal_lora"]) > 0
    layers = injected_layers(module).values()
    assert {x.adapter_name for x in layers} == {"orthogonal_lora_0", "orthogonal_lora_1"}
    assert all(float(x.lora_B.detach().abs().sum()) > 0 and x.enabled for x in layers)
    for index in (0, 1):
        files = adapter_files(module.model, f"orthogonal_lora_{index}")
        files.write(tmp_path / str(index))
        assert len(load_file(tmp_path / str(index) / "adapter_model.safetensors")) == len(layers)
