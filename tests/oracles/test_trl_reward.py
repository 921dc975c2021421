"""TRL's RewardTrainer as an oracle: its loss and accuracy of the same rewards, with and without margins and centring; the same
loss and gradients of one batch of uneven pairs, and 20 steps learned alike.
"""

import json
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from benchmarks.random_model import write_model
from lightning_ft.engine.batch import Batch
from lightning_ft.objectives import reward
from tests.tolerances import TOL

pytestmark = pytest.mark.filterwarnings("ignore")
P = 7


def trl_loss(chosen, rejected, margin, coefficient):
    """(loss, accuracy, margin) as `RewardTrainer.compute_loss` finds them; its rows are all chosen, then all rejected."""
    from trl import RewardTrainer

    def gather(x):
        return x

    me = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=SimpleNamespace(gather=gather, gather_for_metrics=gather),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(2 * P, 3), **({"margin": margin} if margin is not None else {})}
    loss = RewardTrainer.compute_loss(
        me, lambda **_: SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None]), inputs
    )
    return loss, me._metrics["train"]["accuracy"][0], me._metrics["train"]["margin"][0]


@pytest.mark.parametrize("coefficient", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_loss_and_what_is_logged_are_trls(with_margin, coefficient):
    generator = torch.Generator().manual_seed(3)
    rewards = (2 * torch.randn(2 * P, generator=generator, dtype=torch.float64)).requires_grad_()
    margin = torch.rand(P, generator=generator, dtype=torch.float64) if with_margin else None
    empty = torch.zeros(1, 0, dtype=torch.int64)
    columns = {} if margin is None else {"margin": margin}
    batch = Batch(empty, empty, None, None, empty, empty, empty, empty, {"pair": P}, columns=columns)
    chosen, rejected = reward.pairs(batch, rewards)
    ours = sum(t.weight * t.sum / t.count for t in reward.terms(batch, chosen, rejected, coefficient))
    measured = {name: float(value / count) for name, (value, count) in reward.measured(chosen, rejected).items()}
    theirs, accuracy, ahead = trl_loss(rewards[0::2], rewards[1::2], margin, coefficient)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, rewards)[0] for loss in (ours, theirs)), rtol=1e-12, atol=0)
    assert measured["accuracy"] == pytest.approx(accuracy)
    assert measured["rewards/margins"] == pytest.approx(ahead)


# -- the whole trainer --------------------------------------------------------------------------------------------------------

STEPS, BATCH, RATE = 20, 4, 1e-3


def rows():
    """Uneven pairs; better answers say yes."""
    return [
        {
            "prompt": f"Is it {n % 7}{'?' * (n % 3 + 1)}",
            "chosen": " yes" * (1 + n % 5),
            "rejected": " no," * (1 + n * 3 % 7),
        }
        for n in range(STEPS * BATCH)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with ``model``, whose head is the same for both and whose padding ends no row, and ``pairs.jsonl``."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("trl_reward")
    write_model(folder / "causal", initializer_range=0.1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "causal")
    tokenizer.pad_token = next(token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "causal", num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return folder


@pytest.fixture(scope="module")
def theirs(files, tmp_path_factory):
    """What TRL did: the loss of each step, and the gradients of the first."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    seen = {"losses": [], "gradients": {}}

    class Recording(RewardTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            seen["losses"].append(loss.item())
            return loss

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not seen["gradients"]:
                seen["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters()}

    config = RewardConfig(
        output_dir=str(tmp_path_factory.mktemp("out")),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        max_steps=STEPS,
        max_length=None,
        center_rewards_coefficient=0.01,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    Recording(
        model=AutoModelForSequenceClassification.from_pretrained(files / "model", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows()),
        processing_class=AutoTokenizer.from_pretrained(files / "model"),
        callbacks=[Gradients()],
    ).train()
    return seen


@pytest.fixture(scope="module")
def ours(files, tmp_path_factory):
    """The same of this library, prompts shared."""
    from lightning import Callback, Trainer

    from lightning_ft import PreferenceData, RewardModel

    seen = {"losses": [], "gradients": {}}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            seen["losses"].append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))
            assert batch.shared, "prompts were not shared"

        def on_before_optimizer_step(self, trainer, module, optimizer):
            if not seen["gradients"]:
                trained = module.model.named_parameters()
                seen["gradients"] = {name: p.grad.clone() for name, p in trained}

    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=[Watch()],
        default_root_dir=tmp_path_factory.mktemp("ours"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    fixed = {"lr": RATE, "warmup_steps": 0, "schedule": "constant", "base_dtype": "float32"}
    module = RewardModel(str(files / "model"), center_rewards_coefficient=0.01, **fixed)
    data = {"batch_size": BATCH, "shuffle": False, "cache_dir": str(tmp_path_factory.mktemp("cache"))}
    trainer.fit(module, datamodule=PreferenceData(str(files / "pairs.jsonl"), **data))
    return seen


def test_same_loss_of_one_batch(theirs, ours):
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], abs=TOL[torch.float32])


def test_same_gradients_of_one_batch(theirs, ours):
    assert theirs["gradients"].keys() == ours["gradients"].keys()
    for name, gradient in theirs["gradients"].items():
        torch.testing.assert_close(ours["gradients"][name], gradient, rtol=0, atol=TOL[torch.float32], msg=name)
    assert max(float(gradient.abs().max()) for gradient in theirs["gradients"].values()) > 1e-2


def test_same_curve_over_twenty_steps(theirs, ours):
    assert len(ours["losses"]) == len(theirs["losses"]) == STEPS
    assert max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)) < 1e-3
    assert theirs["losses"][-1] < 0.7 * theirs["losses"][0]
