"""LossBalancing: the contract, and what only it does."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from lightning_ft import Attachment, LossBalancing, Refusal
from lightning_ft.engine.terms import Term
from lightning_ft.functional.loss_balancing import dwa_weights, famo_slope, famo_weights
from tests.contract import Case, checks_for
from tests.contract.subjects import QUIET, TermsNet, fit
from tests.seams import toy
from tests.seams.toy import ONE_DEVICE, Data, Module, Net, Run, Shape

CASE = Case(LossBalancing, small={"method": "dwa", "every_steps": 1, "temperature": 0.1}, idle={"method": "static"})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


def train(shape: Shape, folder: str, arguments: dict, **options) -> Run:
    return toy.fit(Module(), Data(shape.batch_size), shape, folder, [LossBalancing(**arguments)], **options)


def by_hand(weigh) -> dict[str, Tensor]:
    """``weigh(window number, the two mean losses) -> two factors``, and plain training with them."""
    net, seen = Net(), []

    def step(net: Net, rows: list[int]) -> None:
        means = torch.stack([toy.token_mean(net, rows), toy.row_mean(net, rows)])
        factors = weigh(len(seen), means.detach())
        seen.append(means.detach())
        (means * torch.tensor([1.0, 0.7], dtype=torch.float64) * factors).sum().backward()

    toy.by_hand(net, step)
    return {f"net.{n}": v for n, v in net.state_dict().items()}


def static(step: int, means: Tensor) -> Tensor:
    return torch.tensor([0.5, 2.0], dtype=torch.float64)


class DWA:
    """Periods of two windows."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, step: int, means: Tensor) -> Tensor:
        periods = [torch.stack(self.seen[n : n + 2]).mean(0) for n in range(0, step - step % 2, 2)]
        self.seen.append(means)
        return dwa_weights(periods[-2], periods[-1], 0.5) if len(periods) > 1 else torch.ones(2, dtype=torch.float64)


class FAMO:
    """Adam on the logits, from the losses of this batch and the last."""

    def __init__(self) -> None:
        self.logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        self.optimizer, self.last = torch.optim.Adam([self.logits], lr=0.5), None

    def __call__(self, step: int, means: Tensor) -> Tensor:
        if self.last is not None:
            self.logits.grad = famo_slope(self.logits.detach(), self.last, means)
            self.optimizer.step()
        self.last = means
        return famo_weights(self.logits.detach(), means)


JOBS = {
    "static": ({"method": "static", "weights": {"token": 0.5, "row": 2.0}}, lambda: static),
    "dwa": ({"method": "dwa", "every_steps": 2, "temperature": 0.5}, DWA),
    "famo": ({"method": "famo", "lr": 0.5}, FAMO),
}


@pytest.mark.parametrize("job", JOBS)
def test_one_device_trains_as_by_hand(job: str, tmp_path) -> None:
    arguments, weigh = JOBS[job]
    toy.assert_close(
        train(Shape(8), str(tmp_path), arguments).weights, by_hand(weigh()), 1e-6
    )  # losses are kept in float32


@pytest.mark.parametrize("shape", ONE_DEVICE[1:], ids=str)
def test_accumulation_changes_nothing(shape: Shape, tmp_path) -> None:
    whole = train(Shape(8), str(tmp_path), JOBS["dwa"][0])
    toy.assert_close(train(shape, str(tmp_path), JOBS["dwa"][0]).weights, whole.weights, 1e-6)


def test_two_ranks_are_one_process_with_the_joint_batch(tmp_path, two_ranks) -> None:
    job = {"shape": Shape(4, 1, 2), "folder": str(tmp_path), "arguments": {"method": "gradnorm", "lr": 0.1}}
    whole = train(Shape(8), str(tmp_path), job["arguments"])
    for run in two_ranks.run("tests.callbacks.test_loss_balancing:train", **job):
        toy.assert_close(run.weights, whole.weights, 1e-6)


@pytest.mark.parametrize(
    "arguments", [JOBS["dwa"][0], JOBS["famo"][0], {"method": "gradnorm"}], ids=lambda a: a["method"]
)
def test_a_resumed_run_is_bit_equal(arguments: dict, tmp_path) -> None:
    whole = train(Shape(8), str(tmp_path), arguments, save=[3])
    resumed = train(Shape(8), str(tmp_path), arguments, resume=str(tmp_path / "3.ckpt"))
    toy.assert_same(resumed.weights, whole.weights)


class Noisy(pl.LightningModule):
    """Two linear models of data with noise of deviation 10 and 1 (Kendall's toy, y = 2 x + 8 and 3 x + 3)."""

    def __init__(self, decay: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(10_000, generator=generator)
        noise = torch.randn(2, 10_000, generator=generator)
        self.y = torch.stack([2 * self.x + 8 + 10 * noise[0], 3 * self.x + 3 + noise[1]])
        self.line, self.decay = nn.Linear(1, 2), decay

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        squared = (self.line(self.x[:, None]).T - self.y).square().mean(1)  # (2,)
        Attachment.of(self).terms(
            [Term(name, loss, 1.0, "mean") for name, loss in zip(("a", "b"), squared, strict=True)]
        )
        return squared.sum()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(300, 1))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.2, betas=(0.9, 0.9), weight_decay=self.decay)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 300),
                "interval": "step",
            },
        }


def test_uncertainty_recovers_known_noise(tmp_path) -> None:
    """Within 2 %, and at the optimum log sigma^2 = log mean squared error."""
    module = Noisy()
    callback = LossBalancing("uncertainty", terms=["a", "b"], squared=["a", "b"])
    run = pl.Trainer(**{**QUIET, "max_steps": 300, "default_root_dir": tmp_path, "callbacks": [callback]})
    run.fit(module)
    s = module.balancing.values
    torch.testing.assert_close((s / 2).exp(), torch.tensor([10.0, 1.0]), rtol=0.02, atol=0)
    squared = (module.line(module.x[:, None]).T - module.y).square().mean(1).detach()
    torch.testing.assert_close(s, squared.log(), atol=1e-3, rtol=0)
    assert run.callback_metrics["train/weight/b"] == pytest.approx(0.5 * math.exp(-float(s[1])), rel=1e-2)


def test_gradnorm_gives_gradients_one_length(tmp_path) -> None:
    """Two losses of which one is a hundred times the other: without pull their weighted gradients become alike."""

    class Scaled(TermsNet):
        def training_step(self, batch, batch_idx):
            out = self(batch[0])
            losses = {"big": 100 * out[:, 0].square().mean(), "small": (out[:, 1] - 1).square().mean()}
            Attachment.of(self).terms([Term(name, loss, 1.0, "mean") for name, loss in losses.items()])
            return losses["big"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Scaled()
    lengths = {}
    callback = LossBalancing("gradnorm", alpha=0.0, lr=0.05)
    run = fit(tmp_path, module, callback, max_steps=120, max_epochs=-1)
    weights = {name: float(run.callback_metrics[f"train/weight/{name}"]) for name in ("big", "small")}
    assert sum(weights.values()) == pytest.approx(2.0)
    from tests.contract.subjects import rows

    out = module(rows()[0])
    shared = [p for n, p in module.named_parameters()]
    for name, loss in (("big", 100 * out[:, 0].square().mean()), ("small", (out[:, 1] - 1).square().mean())):
        lengths[name] = weights[name] * float(
            parameters_to_vector(torch.autograd.grad(loss, shared, retain_graph=True)).norm()
        )
    assert 0.5 < lengths["big"] / lengths["small"] < 2.0, lengths  # each batch has its own lengths


def test_gradnorm_keeps_the_sum_of_those_that_are_present() -> None:
    """Weights (2, 0.5, 0.5), of which the last is absent: the others keep 2.5, not 2."""
    callback = LossBalancing("gradnorm", lr=0.1)
    for name, weight in {"a": 2.0, "b": 0.5, "c": 0.5}.items():
        callback._learned[name] = torch.tensor([weight, 0.0, 0.0, 0.0], dtype=torch.float64)
    callback._descend(["a", "b"], torch.tensor([1.0, -1.0]), scale=True)
    a, b, c = callback._values(["a", "b", "c"], 1.0).tolist()
    assert (a, b) == pytest.approx((2.5 * 1.9 / 2.5, 2.5 * 0.6 / 2.5)) and c == 0.5


def test_refusals(tmp_path) -> None:
    with pytest.raises(Refusal, match=r"LossBalancing\.weights belongs to the method static"):
        LossBalancing("dwa", weights={"a": 1.0})
    for idle in ({"alpha": 0.1}, {"lr": 0.1}, {"terms": ["a"]}, {"squared": ["a"]}):
        with pytest.raises(
            Refusal, match=rf"LossBalancing\.{next(iter(idle))} belongs to the methods? .*dwa; leave it out"
        ):
            LossBalancing("dwa", **idle)
    with pytest.raises(Refusal, match=r"LossBalancing\.temperature belongs to the method dwa, and the method is famo"):
        LossBalancing("famo", temperature=3.0)
    with pytest.raises(Refusal, match="names 'sft', and the step's terms are own, other"):
        fit(tmp_path, TermsNet(), LossBalancing("static", weights={"sft": 1.0}))
    with pytest.raises(Refusal, match="famo cannot work with accumulation"):
        fit(tmp_path, TermsNet(), LossBalancing("famo"), accumulate_grad_batches=2)
    with pytest.raises(Refusal, match=r"TermsNet does not say which it has; name them \(balancing\.terms\)"):
        fit(tmp_path, TermsNet(), LossBalancing("uncertainty"))
    with pytest.raises(Refusal, match=r"The optimizer decays the parameters of module\.balancing"):
        pl.Trainer(
            **{**QUIET, "max_steps": 1, "default_root_dir": tmp_path}, callbacks=[LossBalancing(terms=["a", "b"])]
        ).fit(Noisy(decay=0.1))
