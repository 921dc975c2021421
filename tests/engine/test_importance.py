"""Importances against a backward pass for each example, for every kind of layer, layout and placement."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft import Refusal
from tests.contract.subjects import AttentionNet, PlainNet, WordNet, rows, trainer
from tests.engine.importances import AtTheEnd, chat_fisher, loop, nll, seq2seq_fisher
from tests.modules.tasks import write_base
from tests.tolerances import TOL

KINDS = ["sample", "empirical", "predicted"]


def close(found, expected, dtype=torch.float64):
    assert found.keys() == expected.keys()
    assert any(v.abs().sum() > 0 for v in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=TOL[dtype], atol=TOL[dtype] * float(value.max()), msg=name
        )


def floats(tensors, dtype):
    return [x.to(dtype) if x.is_floating_point() else x for x in tensors]


def double_rows(batch_size=4, **options):
    return DataLoader(TensorDataset(*floats(rows(), torch.float64)), batch_size, **options)


def measured(tmp_path, net, labels="sample", batches=None, batch_size=4, before=()):
    """One step, then the importances over ``batches`` in float64."""
    batches = batches or double_rows(batch_size)
    few = [x[:4] for x in floats(batches.dataset.tensors, torch.float32)]
    data, measure = DataLoader(TensorDataset(*few), 4), AtTheEnd(labels, batches)
    trainer(tmp_path, *before, measure, max_steps=1, limit_val_batches=0).fit(net, data, data)
    return measure.found


def by_loop(net, kind="sample", data=None):
    x, y = data or rows()
    net.eval()
    return loop(net, (nll(net(x[i : i + 1].double()), y[i : i + 1], kind, i) for i in range(len(x))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", [PlainNet, WordNet, AttentionNet])
def test_linear_embedding_and_norm_are_a_loop_over_examples(net, kind, tmp_path):
    net = net()
    found = measured(tmp_path, net, kind)
    assert found.examples == 16 and not found.slow
    close(found.diagonal, by_loop(net, kind))
    assert found.trace == pytest.approx(sum(float(v.sum()) for v in found.diagonal.values()), rel=1e-9)


def test_all_labels_are_the_expectation(tmp_path):
    net = PlainNet()
    found = measured(tmp_path, net, "all")
    net.eval()
    expected = {}
    for x in rows()[0].double():
        logp = net(x[None])[0].log_softmax(-1)
        for c in range(len(logp)):
            one = loop(net, [net(x[None])[0].log_softmax(-1)[c]])
            for name, value in one.items():
                expected[name] = expected.get(name, 0) + logp[c].exp().detach() * value / 16
    close(found.diagonal, expected)


class ConvNet(PlainNet):
    """A convolution, a batch norm, a group norm, a dropout and a grouped convolution over (B, 4) inputs as images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)),
            nn.Conv2d(1, 4, 2, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Conv2d(4, 4, 2, groups=2),
            nn.Dropout(0.5),
            nn.GroupNorm(2, 4),
            nn.Flatten(),
            nn.Linear(16, 3),
        )


def test_convolutions_and_norms_are_a_loop_and_nothing_is_disturbed(tmp_path):
    """Traps 1 and 4: eval mode inside, and modes, statistics, gradients and generators as they were."""
    net = ConvNet()
    seen = {}

    class Before(pl.Callback):
        def on_train_end(self, trainer, module):
            module.double()
            module.net[2].eval()  # a mode that is nobody's default
            seen["modes"] = [m.training for m in module.modules()]
            seen["stats"] = module.net[2].running_mean.clone()
            seen["grads"] = {n: p.grad.clone() for n, p in module.named_parameters()}
            seen["rng"] = torch.get_rng_state()

    found = measured(tmp_path, net, "empirical", before=[Before()])
    assert [m.training for m in net.modules()] == seen["modes"]
    assert torch.equal(net.net[2].running_mean, seen["stats"])
    assert all(torch.equal(p.grad, seen["grads"][n]) for n, p in net.named_parameters())
    close(found.diagonal, by_loop(net, "empirical"))
    assert not found.slow


def test_it_leaves_the_generators_alone(tmp_path):
    states = []

    class Look(pl.Callback):
        def on_train_end(self, trainer, module):
            states.append(torch.get_rng_state())

    data = DataLoader(TensorDataset(*rows()), 4)
    shuffled = DataLoader(TensorDataset(*rows()), 4, shuffle=True)
    run = trainer(tmp_path, Look(), AtTheEnd("sample", shuffled, double=False), Look(), max_steps=1)
    run.fit(PlainNet(), data, data)
    assert torch.equal(*states)


class Tied(PlainNet):
    """One table that is looked up, called as a layer of its own, and read by a function."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.words = nn.Embedding(7, 5)
        self.first, self.second = nn.Linear(5, 7, bias=False), nn.Linear(7, 3)
        self.first.weight = self.words.weight

    def forward(self, x):
        words = (x.double() * 2).round().clamp(-3, 3).long() + 3
        hidden = self.words(words).mean(1)
        logits = self.first(hidden) if self.how == "layers" else F.linear(hidden, self.words.weight)
        return self.second(torch.tanh(logits))


@pytest.mark.parametrize("how", ["layers", "function"])
def test_tied_weights_are_added_before_they_are_squared(how, tmp_path):
    """By the layers where each use is a call; where a function reads the table, that is found out."""
    net = Tied(how)
    del net.net
    found = measured(tmp_path, net)
    assert found.slow == (frozenset({"words.weight"}) if how == "function" else frozenset())
    close(found.diagonal, by_loop(net))


class Odd(PlainNet):
    """Attention that reads a layer's weight without calling it, a layer that mixes rows, and a scale of the module's own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.across = nn.Linear(4, 4)

    def forward(self, x):
        y = (x * self.scale)[:, None] * torch.tensor([[1.0], [-0.5]], dtype=x.dtype)  # (B, 2, 4)
        y = self.attention(y, y, y)[0]
        flipped = self.across(y.flip(0)).flip(0)  # entry b of this call is not row b
        return self.net((y + flipped).mean(1))


def test_what_cannot_be_read_off_layers_gets_a_backward_pass_for_each_example(tmp_path):
    net = Odd()
    found = measured(tmp_path, net)
    assert {"attention.in_proj_weight", "attention.out_proj.weight", "across.weight"} <= found.slow
    assert "net.0.weight" not in found.slow
    close(found.diagonal, by_loop(net))


def test_a_call_whose_output_nobody_uses_does_not_matter(tmp_path):
    """As that of a pooler which a packed encoder's own forward asks of the row's first token."""

    class Net(PlainNet):
        def forward(self, x):
            self.net[0](x[:1])  # no layout is like that
            return self.net(x)

    net = Net()
    found = measured(tmp_path, net)
    assert not found.slow
    close(found.diagonal, by_loop(net))


def test_a_call_of_no_known_layout_gets_a_backward_pass_for_each_example(tmp_path):
    class Net(PlainNet):
        def forward(self, x):
            return self.net(x) + self.net[0](x[:1]).sum()

    net = Net()
    found = measured(tmp_path, net)
    assert {"net.0.weight", "net.0.bias"} <= found.slow
    net.eval()
    x, y = rows()

    def logits(i):  # of row i, which the first one of its batch has a say in
        first = i - i % 4
        return net(x[first : first + 4].double())[i - first][None]

    close(found.diagonal, loop(net, (nll(logits(i), y[i : i + 1], "sample", i) for i in range(len(x)))))


class Leaning(nn.Linear):
    """A layer that cannot run by itself: it needs what another call has left."""

    entry = None

    def forward(self, x):
        if self.entry is None:
            raise RuntimeError("called out of turn")
        entry, self.entry = self.entry, None
        return self.scale * (super().forward(x) + entry)


def test_a_layer_that_cannot_run_by_itself_gets_a_backward_pass_for_each_example(tmp_path):
    class Net(PlainNet):
        def __init__(self):
            super().__init__()
            self.leaning = Leaning(3, 3).requires_grad_(False)
            self.leaning.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            logits = self.net(x)
            self.leaning.entry = logits
            return self.leaning(logits)

    net = Net()
    found = measured(tmp_path, net)
    assert found.slow == frozenset({"leaning.scale"})
    close(found.diagonal, by_loop(net))


@pytest.mark.parametrize("kind", ["sample", "all", "empirical"])
def test_numbers_have_normal_errors(kind, tmp_path):
    class Values(PlainNet):
        def training_step(self, batch, batch_idx):
            return 0.5 * (self(batch[0]) - batch[1]).square().mean()

    x = rows()[0].double()
    y = torch.randn(16, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    batches = DataLoader(TensorDataset(x, y), 4)
    net = Values()
    found = measured(tmp_path, net, kind, batches)
    net.eval()
    exact = loop(net, (net(one[None])[0, c] for one in x for c in range(3)))
    if kind == "all":
        close(found.diagonal, {n: 3 * v for n, v in exact.items()})
    elif kind == "empirical":
        losses = (-0.5 * (net(one[None]) - t).square().sum() for one, t in zip(x, y, strict=True))
        close(found.diagonal, loop(net, losses))
    else:  # one draw an example: near the expectation, and another thing than the data's own errors
        assert found.trace == pytest.approx(3 * sum(float(v.sum()) for v in exact.values()), rel=0.8)
    if kind == "sample":
        with pytest.raises(Refusal, match="'predicted' has no meaning for numbers"):
            measured(tmp_path, Values(), "predicted", batches)


def test_the_norm_of_the_outputs_is_that_of_mas(tmp_path):
    net = PlainNet()
    found = measured(tmp_path, net, None)
    net.eval()
    close(found.diagonal, loop(net, (net(x[None]).square().sum() for x in rows()[0].double()), power=1))


def test_drawn_labels_follow_the_model(tmp_path):
    """Averaged over many draws, the sampled information is the exact one; the empirical one is not."""
    net = PlainNet()
    x, y = rows()
    many = TensorDataset(x.double().repeat(200, 1), y.repeat(200))
    sampled = measured(tmp_path, net, "sample", DataLoader(many, 800))
    exact = measured(tmp_path, PlainNet(), "all")
    empirical = measured(tmp_path, PlainNet(), "empirical")
    assert sampled.trace == pytest.approx(exact.trace, rel=0.05)
    assert empirical.trace != pytest.approx(exact.trace, rel=0.2)


def test_the_size_of_a_batch_changes_nothing(tmp_path):
    """Traps 1 and 3: also where the last batch is short."""
    one = measured(tmp_path, PlainNet(), batch_size=16)
    for size in (1, 5, 7):
        close(measured(tmp_path, PlainNet(), batch_size=size).diagonal, one.diagonal)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_neither_the_number_of_rows_nor_the_reduction_of_the_loss_changes_anything(reduction, tmp_path):
    """Trap 2: a strength means the same for twice the rows, and whatever the module's own loss is divided by."""

    class Reduced(PlainNet):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1], reduction=reduction) * 1e-3

    x, y = rows()
    once = measured(tmp_path, Reduced(), "empirical")
    twice = measured(
        tmp_path, Reduced(), "empirical", DataLoader(TensorDataset(x.double().repeat(2, 1), y.repeat(2)), 4)
    )
    assert twice.examples == 2 * once.examples and twice.trace == pytest.approx(once.trace, rel=1e-9)
    close(twice.diagonal, once.diagonal)
    net = Reduced()
    measured(tmp_path, net, "empirical")
    close(once.diagonal, by_loop(net, "empirical"))


def test_the_information_of_labels_in_the_data_is_not_weighed_by_their_probability(tmp_path):
    """Trap 3: g^2 p(y | x) is neither the true information nor the empirical one."""
    net = PlainNet()
    found = measured(tmp_path, net, "empirical")
    net.eval()
    weighed = {}
    for x, y in zip(*rows(), strict=True):
        logp = net(x[None].double())[0].log_softmax(-1)[y]
        for name, value in loop(net, [logp]).items():
            weighed[name] = weighed.get(name, 0) + logp.exp().detach() * value / 16
    assert found.trace > 1.5 * sum(float(v.sum()) for v in weighed.values())


def test_a_module_that_cannot_answer_is_refused(tmp_path):
    class Odd(PlainNet):
        def forward(self, x):
            return {"logits": self.net(x)}

        def training_step(self, batch, batch_idx):
            return self(batch[0])["logits"].square().mean()

    with pytest.raises(
        Refusal, match=r"Odd does not say how likely its labels are: give it a method likelihood\(batch, ask\)"
    ):
        measured(tmp_path, Odd())


# -- language models: an example is a sequence --------------------------------------------------------------------------


def language_losses(job, kind):
    """The log-probability of each row's labels by transformers' own forward, alone in its batch."""
    module, data = job["module"], job["data"]
    module.eval()
    data.packing = False
    data.batch_size = 1
    for batch in data.in_order()["train"]:
        logits = module.model(input_ids=batch.ids).logits[0]
        row = int(batch.rows)
        chosen = logits[batch.scored]
        yield chosen.square().sum() if kind is None else nll(chosen, batch.labels, kind, row)


@pytest.mark.parametrize(
    ("adapter", "kind", "packing"),
    [
        ("full", "sample", True),
        ("full", "sample", False),
        ("lora", "sample", True),
        ("lora", "empirical", False),
        ("everywhere", "sample", True),
        ("dora", "sample", True),
        ("dora", "predicted", False),
        ("lora", None, True),
        ("full", None, False),
    ],
)
def test_language_models_are_a_loop_over_sequences(adapter, kind, packing, chat, tmp_path):
    job = chat_fisher(str(chat), str(tmp_path), adapter, kind, packing=packing, batch_size=6)
    assert job["examples"] == 16 and not job["slow"]
    expected = loop(job["module"], language_losses(job, kind), power=1 if kind is None else 2)
    close(job["diagonal"], expected)


def test_all_labels_of_a_sequence_are_refused(chat, tmp_path):
    with pytest.raises(Refusal, match="goes through every label of an example.*take 'sample'"):
        chat_fisher(str(chat), str(tmp_path), labels="all")


@pytest.mark.parametrize(("adapter", "packing"), [("adapter", True), ("adapter", False), ("prefix", True)])
def test_adapters_and_prefixes_are_a_loop_over_sequences(adapter, packing, chat, tmp_path):
    job = chat_fisher(str(chat), str(tmp_path), adapter, packing=packing, batch_size=6)
    close(job["diagonal"], loop(job["module"], language_losses(job, "sample")))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("adapter", ["lora", "full", "adapter", "prefix"])
def test_two_ranks_find_the_same(strategy, adapter, chat, tmp_path, two_ranks):
    job = {"chat": str(chat), "folder": str(tmp_path), "adapter": adapter, "double": False}
    both = two_ranks.run("tests.engine.importances:chat_fisher", **job, strategy=strategy, batch_size=3)
    alone = chat_fisher(**job, batch_size=6)
    for rank in both:
        assert rank["examples"] == 16 and rank["slow"] == alone["slow"]
        assert bool(rank["slow"]) == (adapter in ("adapter", "prefix"))
        assert rank["kinds"] == {"DTensor" if strategy == "fsdp2" else "Tensor"}
        assert rank["trace"] == pytest.approx(alone["trace"], rel=1e-4)
        close(rank["diagonal"], alone["diagonal"], torch.float32)


def test_a_table_of_biases_that_fits_the_rows_of_one_rank_alone_keeps_no_rank_waiting(tmp_path, two_ranks):
    base = write_base("t5", tmp_path / "base")
    alone = seq2seq_fisher(str(base), str(tmp_path))
    job = {"base": str(base), "folder": str(tmp_path), "sharded": True}
    ranks = two_ranks.run("tests.engine.importances:seq2seq_fisher", timeout=60, **job)
    assert [rank["shapes"] for rank in ranks] == [[(4, 4)], [(4, 7)]]
    for rank in ranks:
        assert {name for name in rank["slow"] if "relative_attention_bias" in name} == {
            f"model.{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            for side in ("encoder", "decoder")
        }
        close(rank["diagonal"], alone["diagonal"], torch.float32)
