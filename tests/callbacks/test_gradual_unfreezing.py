"""GradualUnfreezing: the contract, phases at their steps, resume, two ranks, and what it meets."""

import lightning.pytorch as pl
import pytest
import torch

import lightning_ft
from lightning_ft import Attachment, Freeze, LoRA, Refusal
from lightning_ft.callbacks.gradual_unfreezing import GradualUnfreezing
from tests.callbacks.unfreezing_jobs import Tower, Watch, train
from tests.contract import Case, checks_for
from tests.contract.subjects import chat_job, fit, trainer
from tests.models.architectures import build

# Every second layer of the net of linear layers stays frozen for good; two of its three thaw.
CASE = Case(GradualUnfreezing, small={"every": 1, "unit": "step", "layers": [-2, -1]})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


HEAD = "head"
ORDER = [
    HEAD,
    "blocks2 norm head",
    "blocks1 blocks2 norm head",
    "blocks0 blocks1 blocks2 norm head",
    "stem blocks0 blocks1 blocks2 norm head",
]


def phases_seen(folder, technique, *, accumulate=1, **options):
    """(step, epoch) -> what trained, which must be one thing within a window."""
    watch = Watch()
    fit(folder, Tower(), technique, watch, accumulate_grad_batches=accumulate, **{"max_epochs": -1, **options})
    found = {}
    for step, epoch, _, parts in watch.seen:
        assert found.setdefault((step, epoch), parts) == parts, "it thawed within an accumulation window"
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps(tmp_path, accumulate):
    found = phases_seen(tmp_path, GradualUnfreezing(2, unit="step"), accumulate=accumulate, max_steps=10)
    assert [parts for _, parts in sorted(found.items())] == [ORDER[min(step // 2, 4)] for step in range(10)]


def test_windows_that_an_epoch_cuts_short(tmp_path):
    """Four batches in windows of three: steps after batches 3, 4, 7, 8 ..."""
    found = phases_seen(tmp_path, GradualUnfreezing(1, unit="step"), accumulate=3, max_steps=5)
    assert found == {(step, step // 2): ORDER[step] for step in range(5)}


def test_epochs(tmp_path):
    found = phases_seen(tmp_path, GradualUnfreezing(), accumulate=2, max_epochs=6, max_steps=-1)
    assert found == {(2 * epoch + half, epoch): ORDER[min(epoch, 4)] for epoch in range(6) for half in (0, 1)}


def test_groups_start_and_embeddings(tmp_path):
    technique = GradualUnfreezing(1, unit="step", groups=2, start=["norm"], embeddings=False)
    found = phases_seen(tmp_path, technique, max_steps=5)
    expected = ["norm head", ORDER[2], ORDER[3], ORDER[3], ORDER[3]]
    assert [parts for _, parts in sorted(found.items())] == expected


def test_a_schedule_of_ones_own(tmp_path):
    file = tmp_path / "schedule.yaml"
    file.write_text(
        "- {at: 1, train: [blocks.0, head]}\n- {at: 3, train: ['re:stem.weight']}\n- {at: 0, train: [norm]}\n"
    )
    with pytest.raises(Refusal, match="entry 3, is at 0, not after"):
        GradualUnfreezing(schedule=str(file))
    file.write_text(
        "- {at: 0, train: [norm]}\n- {at: 1, train: [blocks.0, head]}\n- {at: 3, train: ['re:stem.weight']}\n"
    )
    found = phases_seen(tmp_path, GradualUnfreezing(schedule=str(file), unit="step"), max_steps=5)
    assert [parts for _, parts in sorted(found.items())] == [
        "norm",
        *["blocks0 norm head"] * 2,
        *["stem blocks0 norm head"] * 2,
    ]


def test_what_is_frozen_has_no_gradient_and_no_state(tmp_path):
    watch, net = Watch(), Tower()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    run = fit(tmp_path, net, GradualUnfreezing(2, unit="step"), watch, max_steps=3)
    for step, gradients in enumerate(watch.gradients):
        assert {n.split(".")[0] for n in gradients} == ({"head"} if step < 2 else {"head", "norm", "blocks"})
    counts = {n: run.optimizers[0].state.get(p, {}).get("step", 0) for n, p in net.named_parameters()}
    assert counts["head.weight"] == 3 and counts["blocks.2.weight"] == 1
    assert counts["blocks.1.weight"] == 0 and counts["stem.weight"] == 0
    for name, parameter in net.named_parameters():
        moved = name.startswith(("head", "norm", "blocks.2"))
        assert torch.equal(parameter, before[name]) != moved, name


def test_thawed_parts_are_in_train_mode(tmp_path):
    net = Tower().eval()
    with pytest.warns(UserWarning, match="module.* in eval mode"):
        fit(tmp_path, net, GradualUnfreezing(1, unit="step", embeddings=False), max_steps=4)
    assert all(block.training for block in net.blocks) and net.head.training and not net.stem.training


def test_an_optimizer_over_what_requires_a_gradient_gets_all(tmp_path):
    one, other = Tower(), Tower(only_trained=True)
    for net in (one, other):
        fit(tmp_path, net, GradualUnfreezing(1, unit="step"), max_steps=6)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_an_optimizer_that_lacks_them_is_refused(tmp_path):
    with pytest.raises(
        Refusal, match=r"stem.weight and 9 more .* no optimizer holds what thaws later; build it over self.parameters"
    ):
        fit(tmp_path, Tower(fewer=True), GradualUnfreezing())


def test_it_says_what_it_thaws(tmp_path, capsys):
    class Numbers(pl.Callback):
        logged = []

        def on_train_batch_end(self, trainer, *_):
            self.logged.append(int(trainer.callback_metrics["train/trainable_parameters"]))

    numbers = Numbers()
    net = Tower()
    fit(tmp_path, net, GradualUnfreezing(2, unit="step"), numbers, max_steps=4, enable_progress_bar=True)
    head = sum(p.numel() for p in net.head.parameters())
    more = sum(p.numel() for p in (*net.blocks[2].parameters(), *net.norm.parameters()))
    assert numbers.logged == [head, head, head + more, head + more]
    lines = [line for line in capsys.readouterr().out.splitlines() if "joins" in line]
    assert len(lines) == 1 and f"epoch 0, step 2: blocks.2, norm joins what is trained, now {head + more:,}" in lines[0]


# -- what it meets --------------------------------------------------------------------------------------------------


def trained_after(folder, *techniques, steps=9, net=None):
    net = net or Tower()
    fit(folder, net, *techniques, max_steps=steps, max_epochs=-1)
    return {n for n, p in net.named_parameters() if p.requires_grad}


def test_what_freeze_freezes_never_thaws(tmp_path):
    everything = {n for n, _ in Tower().named_parameters()}
    unfreezing = GradualUnfreezing(1, unit="step")
    for order in ((0, 1), (1, 0)):
        both = [unfreezing, Freeze(freeze=["blocks.1", "stem.bias"])]
        left = trained_after(tmp_path, *(both[i] for i in order))
        assert left == everything - {"blocks.1.weight", "blocks.1.bias", "stem.bias"}


def test_what_freeze_trains_trains_from_the_start(tmp_path):
    both = (GradualUnfreezing(1, unit="step"), Freeze(["stem"]))
    assert {n.split(".")[0] for n in trained_after(tmp_path, *both, steps=1)} == {"stem", "head"}


def test_what_the_module_froze_stays_frozen(tmp_path):
    net = Tower()
    net.blocks[0].requires_grad_(False)
    left = trained_after(tmp_path, GradualUnfreezing(1, unit="step"), net=net)
    assert "blocks.1.weight" in left and not any(n.startswith("blocks.0") for n in left)
    net = Tower()
    net.blocks[0].requires_grad_(False)
    assert "blocks.0.weight" in trained_after(tmp_path, GradualUnfreezing(start=["blocks.0"]), net=net, steps=1)


def test_beside_lora_the_base_thaws(tmp_path):
    watch, net = Watch(), Tower()
    both = (LoRA(2, target=["blocks.*"]), GradualUnfreezing(1, unit="step", layers="-1:", embeddings=False), watch)
    fit(tmp_path, net, *both, max_steps=3)
    first, second = set(watch.gradients[0]), set(watch.gradients[1])
    factors = {n for n, _ in net.named_parameters() if "lora_" in n}
    assert len(factors) == 6 and first == factors | {"head.weight", "head.bias"}
    assert second - first == {"blocks.2.base.weight", "blocks.2.base.bias", "norm.weight", "norm.bias"}


def test_two_of_them_add_up(tmp_path):
    one = GradualUnfreezing(1, unit="step", layers="2", embeddings=False, name="one")
    other = GradualUnfreezing(3, unit="step", layers="1-2", groups=2, embeddings=False, name="other")
    for order in ((one, other), (other, one)):
        watch = Watch()
        fit(tmp_path, Tower(), *order, watch, max_steps=4)
        assert [parts for *_, parts in watch.seen] == [HEAD, ORDER[1], ORDER[1], ORDER[2]]


def test_layer_decay_sets_rates(chat, tmp_path):
    module, data = chat_job(chat, tmp_path)
    run = trainer(tmp_path, GradualUnfreezing(1, unit="step", layer_decay=0.5), max_steps=1)
    run.fit(module, data)
    rates = {id(p): group["lr"] for group in run.optimizers[0].param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        depth = 2 - int(name.split(".")[3]) if ".layers." in name else 0
        assert rates[id(parameter)] == pytest.approx(module.lr * 0.5**depth), name
    with pytest.raises(Refusal, match="layer_decay sets rates in the optimizers of this library's modules"):
        fit(tmp_path, Tower(), GradualUnfreezing(layer_decay=0.5))


@pytest.mark.parametrize(
    "argument", [{"every": 2}, {"groups": 2}, {"start": ["a"]}, {"layers": "0"}, {"embeddings": False}]
)
def test_a_schedule_stands_alone(argument):
    with pytest.raises(Refusal, match=f"{next(iter(argument))}=.* would mean nothing; leave one of the two out"):
        GradualUnfreezing(schedule=[{"at": 0, "train": ["a"]}], **argument)


def test_names_without_a_match_name_the_nearest():
    module = pl.LightningModule()
    module.model = build("llama")
    with pytest.raises(Refusal, match="lm_haed.*lm_head"):
        Attachment.of(module).rebuild([GradualUnfreezing(schedule=[{"at": 0, "train": ["lm_haed"]}])], seed=0)


# -- resume and ranks -----------------------------------------------------------------------------------------------


def equal(one, other, path=""):
    """Bit for bit, through dictionaries and lists."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for number, pair in enumerate(zip(one, other, strict=True)):
            equal(*pair, f"{path}.{number}")
    else:
        assert one == other, path


@pytest.mark.parametrize("plan", [{"every": 2, "unit": "step"}, {"every": 1}], ids=["steps", "epochs"])
def test_a_resumed_run_ends_as_an_unbroken_one(chat, tmp_path, plan):
    """From a checkpoint after each step, those exactly at a boundary included."""
    job = {"chat": str(chat), "folder": str(tmp_path), "adam": True, "unfreezing": plan}
    whole = train(**job, save=True)
    states = {step: parts for step, _, _, parts in whole["seen"]}
    assert len(set(states.values())) == 3, "the run did not pass through all phases"
    for step in range(1, 7):
        (file,) = (tmp_path / "all").glob(f"step={step}.ckpt")
        resumed = train(**job, save=True, resume=str(file))
        later = [entry for entry in whole["seen"] if entry[0] >= step]
        assert [e[3] for e in resumed["seen"]] == [e[3] for e in later], step
        equal(resumed["weights"], whole["weights"], f"from step {step}")
        equal(resumed["optimizer"], whole["optimizer"], f"from step {step}")


def test_a_checkpoint_holds_what_will_be_thawed_and_loads(chat, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("- {at: 0, unit: step, train: [model.norm]}\n- {at: 5, train: [model.layers.1], unit: step}\n")
    train(str(chat), str(tmp_path), steps=1, save=True, unfreezing={"schedule": str(file)})
    file.unlink()
    (saved,) = (tmp_path / "all").glob("*.ckpt")
    keys = torch.load(saved, weights_only=True)["state_dict"]
    assert any("layers.1" in key for key in keys) and not any("layers.0" in key for key in keys)
    module = lightning_ft.load(saved)
    assert torch.equal(module.state_dict()["model.model.norm.weight"], keys["model.model.norm.weight"])


def test_what_thaws_later_is_float32_over_a_bfloat16_base(chat, tmp_path):
    module, data = chat_job(chat, tmp_path, model={"base_dtype": "bfloat16"})
    unfreezing = GradualUnfreezing(1, unit="step", layers="-1:")
    trainer(tmp_path, unfreezing, max_steps=1).fit(module, data)
    for name, parameter in module.named_parameters():
        expected = torch.bfloat16 if ".layers.0." in name else torch.float32
        assert parameter.dtype == expected, name
    trainer(tmp_path, unfreezing, max_steps=2).fit(module, data)


def test_what_thaws_later_survives_true_bfloat16(chat, tmp_path):
    """Lightning's bf16-true casts what it is given; what trains, now or later, is kept."""
    module, data = chat_job(chat, tmp_path, model={"base_dtype": "auto"})
    trainer(tmp_path, GradualUnfreezing(1, unit="step"), max_steps=2, precision="bf16-true").fit(module, data)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_a_reference_is_the_start_also_of_what_has_thawed(chat, tmp_path):
    class Keeps(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            Attachment.of(pl_module).want_reference()

        def on_train_end(self, trainer, pl_module):
            with Attachment.of(pl_module).reference():
                self.start = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    module, data = chat_job(chat, tmp_path)
    keeps = Keeps()
    trainer(tmp_path, GradualUnfreezing(1, unit="step"), keeps, max_steps=4).fit(module, data)
    fresh, _ = chat_job(chat, tmp_path)
    fresh.configure_model()
    for name, parameter in fresh.named_parameters():
        assert torch.equal(keeps.start[name], parameter), name
        assert not torch.equal(module.get_parameter(name), parameter), name


def test_a_second_fit_begins_again(tmp_path):
    net = Tower()
    fit(tmp_path, net, GradualUnfreezing(1, unit="step"), max_steps=3)
    watch = Watch()
    fit(tmp_path, net, GradualUnfreezing(1, unit="step"), watch, max_steps=3)
    assert [parts for *_, parts in watch.seen] == ORDER[:3]


@pytest.mark.xdist_group("two_ranks")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_are_one_process(chat, tmp_path, two_ranks, strategy):
    """Gradients of every step and the final weights, before and after each thaw, with accumulation and without."""
    job = {"chat": str(chat), "folder": str(tmp_path), "steps": 6}
    whole = train(**job, batch_size=8, accumulate=1)
    assert len({frozenset(g) for g in whole["gradients"]}) == 3, "nothing was thawed"
    for batch_size, accumulate in ((4, 1), (2, 2)):
        ranks = two_ranks.run(
            "tests.callbacks.unfreezing_jobs:train",
            **job, batch_size=batch_size, accumulate=accumulate, devices=2, strategy=strategy,
        )  # fmt: skip
        for rank in ranks:
            assert rank["world"] == 2
            torch.testing.assert_close(rank["gradients"], whole["gradients"], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(rank["weights"], whole["weights"], rtol=1e-6, atol=1e-6)


@pytest.mark.xdist_group("two_ranks")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_resume_after_a_thaw(chat, tmp_path, two_ranks, strategy):
    job = {"chat": str(chat), "folder": str(tmp_path), "batch_size": 4, "accumulate": 1, "steps": 6, "devices": 2}
    job |= {"strategy": strategy, "adam": True}
    whole = two_ranks.run("tests.callbacks.unfreezing_jobs:train", **job, save=True)
    (file,) = (tmp_path / "all").glob("step=3.ckpt")
    resumed = two_ranks.run("tests.callbacks.unfreezing_jobs:train", **job, save=True, resume=str(file))
    equal(resumed[0]["weights"], whole[0]["weights"])
    equal(resumed[1]["weights"], whole[0]["weights"])
