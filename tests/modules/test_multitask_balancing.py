"""Balancing and surgery of several tasks: values by hand, their numbers from run to run, and what cannot work."""

from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_ft
from lightning_ft import (
    Attachment,
    ClassificationData,
    GradientSurgery,
    LoRA,
    LossBalancing,
    MultiTaskData,
    Refusal,
    TaskSampling,
)
from lightning_ft.engine.terms import Term
from lightning_ft.functional.gradient_surgery import pcgrad, upgrad
from tests.contract.subjects import QUIET, Steps, differing, trainer
from tests.modules.multitask_jobs import fit, job, on_ranks, pairs_job, weights

TASKS = ["classes", "words", "numbers"]


class TwoHeads(pl.LightningModule):
    """A trunk and two linear heads whose tasks disagree; plain SGD."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(16, 3, generator=generator, dtype=torch.float64)
        self.y = torch.randn(16, generator=generator, dtype=torch.float64)
        torch.manual_seed(0)
        self.trunk = nn.Linear(3, 4).double()
        self.heads = nn.ModuleList([nn.Linear(4, 1).double() for _ in range(2)])
        with torch.no_grad():
            self.heads[1].weight.copy_(self.heads[0].weight)

    def losses(self) -> list[Tensor]:
        """The second wants the opposite, and is thrice as large."""
        hidden = self.trunk(self.x).tanh()
        a, b = (head(hidden)[:, 0] for head in self.heads)
        return [(a - self.y).square().mean(), 3 * (b + self.y).square().mean()]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        losses = self.losses()
        Attachment.of(self).terms([Term(n, one, 1.0, "mean") for n, one in zip("ab", losses, strict=True)])
        return losses[0] + losses[1]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(8, 1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def train(folder: Path, module: pl.LightningModule, steps: int, *callbacks: pl.Callback) -> Steps:
    seen = Steps()
    more = {"max_steps": steps, "default_root_dir": folder, "callbacks": [*callbacks, seen]}
    seen.losses = [0.0] * steps  # a module of one's own logs no sum
    pl.Trainer(**{**QUIET, **more}).fit(module)
    return seen


def test_uncertainty_with_pcgrad_is_by_hand(tmp_path) -> None:
    """PCGrad sees the trunk alone; each head has its own weighed gradient, each s its own slope."""
    module = TwoHeads()
    train(tmp_path, module, 4, LossBalancing(terms=["a", "b"], squared=["a"]), GradientSurgery("pcgrad"))
    hand, s = TwoHeads(), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    trunk, conflicts = list(hand.trunk.parameters()), 0
    for _ in range(4):
        share = torch.tensor([0.5, 1.0], dtype=torch.float64)
        weighed = share * torch.exp(-s) * torch.stack(hand.losses())
        rows = [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(one, trunk, retain_graph=True)]) for one in weighed
        ]
        gram = torch.stack(rows) @ torch.stack(rows).T
        conflicts += int(gram[0, 1] < 0)
        combined = pcgrad(gram) @ torch.stack(rows)
        own = torch.autograd.grad((weighed + 0.5 * s).sum(), [*hand.heads.parameters(), s])
        with torch.no_grad():
            for p, g in zip([*hand.heads.parameters(), s], own, strict=True):
                p -= 0.05 * g
            for p, g in zip(trunk, combined.split([p.numel() for p in trunk]), strict=True):
                p -= 0.05 * g.view_as(p)
    assert conflicts == 4
    for (name, p), q in zip(module.named_parameters(), [*hand.parameters(), *s.detach()], strict=True):
        torch.testing.assert_close(p.double(), q.double(), rtol=1e-5, atol=1e-7, msg=name)  # s is kept in float32


class ByHand(Steps):
    """Of the first window: each task's gradient by one ``autograd.grad`` in the run's own precision, added up in ``dtype``."""

    def __init__(self, dtype: torch.dtype = torch.float64, autocast: bool = True) -> None:
        super().__init__()
        self.dtype, self.autocast = dtype, autocast
        self.rows = self.reached = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step:
            return
        tasks = pl_module._tasks()
        self.parameters = [p for p in pl_module.parameters() if p.requires_grad]
        with trainer.precision_plugin.forward_context() if self.autocast else nullcontext():
            found = pl_module._outcomes(batch, tasks)
            losses = [one and one.losses.sum() / batch.window[t.unit] for t in tasks for one in [found[t.name]]]
        here = torch.zeros(len(tasks), sum(p.numel() for p in self.parameters), dtype=self.dtype)
        reached = torch.zeros(len(tasks), len(self.parameters), dtype=torch.bool)
        for k, loss in enumerate(losses):
            if loss is not None:
                grads = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
                reached[k] = torch.tensor([g is not None for g in grads])
                whole = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, self.parameters, strict=True)]
                here[k] = torch.cat([g.reshape(-1) for g in whole])
        self.rows = here if self.rows is None else self.rows + here
        self.reached = reached if self.reached is None else self.reached | reached

    def combined(self, weigh) -> Tensor:
        """What is stepped with, (P,) in float64."""
        several = self.reached.sum(0) > 1
        shared = torch.cat([n.expand(p.numel()) for p, n in zip(self.parameters, several, strict=True)])
        rows = self.rows.double()
        weights = weigh(rows[:, shared] @ rows[:, shared].T)
        return torch.where(shared, weights @ rows, rows.sum(0))


def surgery(folder: Path, precision: str, base_dtype: str, hand: ByHand, *callbacks, accumulate: int = 1) -> Tensor:
    """The gradient of one step with upgrad, (P,), beside what a callback finds by hand."""
    options = {"weigh": "tasks", "base_dtype": base_dtype}
    module, data = job(folder, model=options, batch_size=12)
    more = {"max_steps": 1, "limit_val_batches": 0, "accumulate_grad_batches": accumulate, "precision": precision}
    fit(folder, module, data, GradientSurgery("upgrad"), *callbacks, hand, **more)
    named = hand.gradients[0]
    return torch.cat([named[n].reshape(-1) for n, p in module.named_parameters() if p.requires_grad])


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("precision", "base_dtype", "adapter"),
    [("bf16-mixed", "float32", False), ("bf16-mixed", "bfloat16", True), ("32-true", "bfloat16", True)],
    ids=["mixed", "mixed, bf16 base", "bf16 base"],
)
def test_surgery_of_bf16_gradients_is_by_hand(precision: str, base_dtype: str, adapter: bool, tmp_path) -> None:
    """Gradients that came through bf16 are combined in float32: no further off than that, while float32 itself is, and the sum."""
    hand, loras = ByHand(), [LoRA(4)] if adapter else []
    found = surgery(tmp_path, precision, base_dtype, hand, *loras, accumulate=2)
    assert found.dtype == torch.float32
    wanted = hand.combined(lambda gram: 3 * upgrad(gram))
    assert off(found, wanted) < 1e-6
    assert off(hand.combined(lambda gram: torch.ones(3, dtype=torch.float64)), wanted) > 0.01, "nothing to combine"
    exact = ByHand(autocast=False)
    surgery(tmp_path, "32-true", "float32", exact, *([LoRA(4)] if adapter else []), accumulate=2)
    assert off(exact.combined(lambda gram: 3 * upgrad(gram)), wanted) > 1e-3, "bf16 took no part"


def test_surgery_of_bf16_weights_rounds_once(tmp_path) -> None:
    """Pure bf16: four micro-batches are added up in float32 and rounded when the step is written; added in bf16 they differ."""
    hand, coarse = ByHand(torch.float32), ByHand(torch.bfloat16)
    found = surgery(tmp_path, "32-true", "pure_bfloat16", hand, coarse, accumulate=4)
    trunk = sum(p.numel() for p in hand.parameters if p.dtype == torch.bfloat16)  # comes first; new heads are float32
    right, wrong = (
        (one.combined(lambda gram: 3 * upgrad(gram)).to(torch.bfloat16) == found)[:trunk].float().mean()
        for one in (hand, coarse)
    )
    assert trunk > 10_000 and float(right) > 0.99 and float(wrong) < 0.9


def test_gradnorm_weighs_heads_too(tmp_path) -> None:
    """As in the paper, whose weights are of the losses: the heads' gradients are the plain ones times the weights."""
    module, weights = TwoHeads(), []

    class Watch(Steps):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            weights.append([float(trainer.callback_metrics[f"train/weight/{name}"]) for name in "ab"])

    start = TwoHeads()
    seen = train(tmp_path, module, 1, LossBalancing("gradnorm", lr=0.3), Watch())
    plain = torch.autograd.grad(sum(start.losses()), [head.weight for head in start.heads])
    assert weights[0] != [1.0, 1.0]
    for number, (weight, gradient) in enumerate(zip(weights[0], plain, strict=True)):
        torch.testing.assert_close(seen.gradients[0][f"heads.{number}.weight"], weight * gradient)


def test_a_short_last_window_counts_s_once(tmp_path) -> None:
    """Three micro-batches an epoch, two a window: the slope of s is 1/2 - m exp(-s) L in the window of one as in that of two."""
    module, data = job(tmp_path, model={"weigh": "tasks"}, batch_size=4, epoch_rows=12)
    before: list[Tensor] = []
    losses: list[dict[str, float]] = []
    steps = Steps()

    class Watch(Steps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.s = pl_module.balancing.values.clone()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if len(steps.gradients) > len(losses):
                before.append(self.s)
                here = [n for n in TASKS if batch.window[f"row:{n}"]]
                losses.append({n: float(trainer.callback_metrics[f"train/{n}"]) for n in here})

    fit(
        tmp_path,
        module,
        data,
        LossBalancing("uncertainty"),
        Watch(),
        steps,
        max_steps=4,
        accumulate_grad_batches=2,
        limit_val_batches=0,
    )
    assert len(losses) == 4
    for s, loss, gradients in zip(before, losses, steps.gradients, strict=True):
        for number, name in enumerate(TASKS):
            share = 0.5 if name == "numbers" else 1.0
            slope = 0.5 - share * float(torch.exp(-s[number])) * loss[name] if name in loss else 0.0
            found = gradients.get(
                f"balancing.log_variance.{number}", torch.zeros(())
            )  # none where the window lacks the task
            assert float(found) == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", [None, "pcgrad"], ids=["plain", "surgery"])
def test_s_rests_while_its_task_is_absent(method: str | None, tmp_path) -> None:
    """Tasks in turn, or under surgery two in each window, with AdamW, whose momentum would move all of them in every step."""
    options = {"weigh": "tasks", "optimizer": torch.optim.AdamW, "lr": 1e-2}
    module, data = job(tmp_path, model=options, batches="homogeneous", batch_size=4)
    seen: list[tuple[set[str], set[str]]] = []

    class Watch(Steps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = (
                pl_module.balancing.values if batch_idx % trainer.accumulate_grad_batches == 0 else self.before
            )

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if not trainer.fit_loop.epoch_loop._should_accumulate():
                here = {name for name in TASKS if batch.window[f"row:{name}"]}
                changed = (pl_module.balancing.values != self.before).tolist()
                seen.append((here, {name for name, moved in zip(TASKS, changed, strict=True) if moved}))

    callbacks = [LossBalancing("uncertainty"), TaskSampling("round_robin"), Watch()]
    callbacks += [GradientSurgery(method)] if method else []
    more = {"accumulate_grad_batches": 2 if method else 1, "limit_val_batches": 0}
    fit(tmp_path, module, data, *callbacks, max_steps=6, **more)
    assert all(here == changed for here, changed in seen), seen
    assert len({frozenset(here) for here, _ in seen}) >= 3


@pytest.mark.parametrize("packing", [True, False])
def test_with_a_backward_pass_a_task_each_is_as_long_as_its_rows(packing: bool, tmp_path) -> None:
    """The same steps as of one joint pass, of numbers, a reward with margins, a policy against its reference and texts."""
    read: list[list[int]] = []

    class Count(Steps):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            backbone = pl_module.view.backbone
            first = backbone.layers[0]
            first.register_forward_pre_hook(lambda _, args: read[-1].append(args[0].shape[0] * args[0].shape[1]))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            read.append([])

    after = []
    for surgery in ([], [GradientSurgery("sum")]):
        module, data = pairs_job(tmp_path, model={"weigh": "tasks"}, batch_size=20, packing=packing)
        steps = Count()
        loras = [LoRA(2, name=name) for name in ("shared", "policy", "texts")]
        fit(tmp_path, module, data, *loras, *surgery, steps, max_steps=3, limit_val_batches=0)
        after.append(weights(module))
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-4, atol=1e-6, msg=name)
    for together, apart, batch in zip(read[:3], read[3:], steps.batches, strict=True):
        of_policy, whole, *none = together  # the reference's own pass comes first
        tasks = len(set(batch.columns["task"].tolist()))
        assert not none and tasks == 4 and apart[0] == of_policy and len(apart) == 1 + tasks
        assert sum(apart[1:]) == whole == batch.ids.numel()


def test_recomputed_activations_find_the_adapters_of_their_rows(tmp_path) -> None:
    """With adapters of tasks and checkpointing the batch is read at once, and each backward pass goes through the whole of it."""
    after = []
    for checkpointing, surgery in ((False, []), (True, [GradientSurgery("sum")])):
        options = {"weigh": "tasks", "gradient_checkpointing": checkpointing}
        module, data = pairs_job(tmp_path, model=options, batch_size=20)
        loras = [LoRA(2, name=name) for name in ("shared", "policy", "texts")]
        fit(tmp_path, module, data, *loras, *surgery, max_steps=3, limit_val_batches=0)
        after.append(weights(module))
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["uncertainty", "famo", "dwa"])
def test_two_ranks_balance_as_one_process(method: str, tmp_path, two_ranks) -> None:
    """Weights follow the means over all ranks, which see other rows each; and they do change what is learned."""
    job(tmp_path)
    options = {"method": method} | ({"every_steps": 1} if method == "dwa" else {"lr": 0.5})
    whole = on_ranks(str(tmp_path), 8, balancing=options)
    assert differing(whole, on_ranks(str(tmp_path), 8))
    asked = {"folder": str(tmp_path), "batch_size": 4, "devices": 2, "balancing": options}
    for ranks in two_ranks.run("tests.modules.multitask_jobs:on_ranks", **asked):
        assert ranks.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(ranks[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_s_has_a_group_and_a_rate_of_its_own(tmp_path) -> None:
    """With AdamW at 5e-5 each s moves by about its own 0.025 a step."""
    module, data = job(
        tmp_path,
        model={"weigh": "tasks", "optimizer": torch.optim.AdamW, "lr": 5e-5, "weight_decay": 0.1},
        batch_size=30,
    )
    run = fit(tmp_path, module, data, LossBalancing("uncertainty"), max_steps=3, limit_val_batches=0)
    own = {id(p) for p in module.balancing.parameters()}
    groups = [g for g in run.optimizers[0].param_groups if own & {id(p) for p in g["params"]}]
    assert len(groups) == 1 and own == {id(p) for p in groups[0]["params"]}
    assert groups[0]["lr"] == pytest.approx(0.025) and groups[0]["weight_decay"] == 0.0
    assert (module.balancing.values.abs() > 0.04).all()


def later(folder: Path, module, data, *callbacks) -> pl.Trainer:
    """A fit that has one task more."""
    rows = str(folder / "numbers.jsonl")
    stars = ClassificationData(rows, task="regression", val_path=rows, cache_dir=str(folder / "cache"))
    return fit(folder, module, MultiTaskData({**data.tasks, "stars": stars}, batch_size=30), *callbacks, max_steps=2)


def test_what_balancing_learned_follows_the_tasks(tmp_path) -> None:
    """A loaded run goes on with its numbers, a task that was added begins at 0, and a fit without balancing drops them."""
    module, data = job(tmp_path, model={"weigh": "tasks"}, batch_size=30)
    keep = ModelCheckpoint(tmp_path / "files", save_last=True, save_top_k=0)
    balancing = LossBalancing("uncertainty", lr=0.1)
    fit(tmp_path, module, data, balancing, keep, max_steps=2, enable_checkpointing=True, limit_val_batches=0)
    learned = module.balancing.values
    starts: list[Tensor] = []

    class Start(Steps):
        def on_train_start(self, trainer, pl_module):
            starts.append(pl_module.balancing.values.clone())

    loaded = lightning_ft.load(tmp_path / "files" / "last.ckpt")
    assert torch.equal(loaded.balancing.values, learned) and (learned != 0).all()
    loaded.train()
    loaded.add_task("stars", "regression")
    later(tmp_path, loaded, data, LossBalancing("uncertainty"), Start())
    assert torch.equal(starts[0], torch.cat([learned, torch.zeros(1)]))
    assert (loaded.balancing.values != starts[0]).all()
    for callbacks in ((), (LossBalancing("dwa", every_steps=1),)):
        again = lightning_ft.load(tmp_path / "files" / "last.ckpt")
        again.train()
        _, rows = job(tmp_path, batch_size=30)
        assert fit(tmp_path, again, rows, *callbacks, max_steps=2).global_step == 2
        assert not hasattr(again, "balancing")


def test_a_file_with_the_variances_as_one_vector_says_so(tmp_path) -> None:
    """As earlier versions wrote them; whatever reads it says the same."""
    module, data = job(tmp_path, model={"weigh": "tasks"}, batch_size=30)
    file = tmp_path / "last.ckpt"
    run = fit(tmp_path, module, data, LossBalancing("uncertainty"), max_steps=1, limit_val_batches=0)
    run.save_checkpoint(file)
    checkpoint = torch.load(file, weights_only=True)
    name, state, keys = "balancing.log_variance", checkpoint["state_dict"], checkpoint["lightning_ft"]["keys"]
    state[name] = torch.stack([state.pop(f"{name}.{number}") for number in range(len(TASKS))])
    checkpoint["lightning_ft"]["keys"] = sorted({*keys} - {f"{name}.{k}" for k in range(len(TASKS))} | {name})
    torch.save(checkpoint, file)
    said = (
        r"written by an earlier version, which kept the variances of uncertainty balancing as one vector .*train anew"
    )
    with pytest.raises(Refusal, match=said):
        lightning_ft.load(file)
    for run in ("fit", "validate"):
        module, data = job(tmp_path, model={"weigh": "tasks"}, batch_size=30)
        made = trainer(tmp_path, LossBalancing("uncertainty"), use_distributed_sampler=False)
        with pytest.raises(Refusal, match=said):
            getattr(made, run)(module, data, ckpt_path=file, weights_only=True)


def test_refusals(tmp_path) -> None:
    for callback in (LossBalancing("gradnorm"), LossBalancing("famo"), GradientSurgery("pcgrad")):
        module, data = job(tmp_path, batches="homogeneous")
        with pytest.raises(Refusal, match="with homogeneous batches and no accumulation each step has one; set"):
            fit(tmp_path, module, data, callback)
        assert module.model is None
    for arguments in ({"weights": {"toon": 5.0}, "method": "static"}, {"squared": ["toon"]}):
        module, data = job(tmp_path)
        with pytest.raises(Refusal, match="names 'toon', and the step's terms are classes, words, numbers"):
            fit(tmp_path, module, data, LossBalancing(**arguments))
        assert module.model is None
