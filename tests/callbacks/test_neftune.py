"""NEFTune: the contract, and what only it does."""

import zlib

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from lightning_ft import Attachment, LoRA, Refusal
from lightning_ft.callbacks.neftune import NEFTune, _layout
from lightning_ft.engine.batch import Batch
from tests.contract import Case, checks_for
from tests.contract.subjects import PlainNet, WordNet, chat_job, fit, rows, state, trainer

CASE = Case(NEFTune, small={"alpha": 5.0}, idle={"alpha": 0.0})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


class Watch(pl.Callback):
    """What reaches the first block beside the embeddings themselves: (batch, what was added), for each forward."""

    def __init__(self):
        self.seen = {"train": [], "validation": [], "reference": []}
        self.now = "validation"
        self.batch = None

    def setup(self, trainer, pl_module, stage):
        self.module = pl_module

    def on_fit_start(self, trainer, pl_module):
        model = pl_module.model.model

        def watch(layer, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            clean = model.embed_tokens.weight[self.batch.ids]
            self.seen[self.now].append((self.batch, (hidden - clean).detach()))

        model.layers[0].register_forward_pre_hook(watch, with_kwargs=True)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now, self.batch = "train", batch

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.now, self.batch = "validation", batch


class WithReference:
    """Mixed into SFT: looks at the reference inside the step."""

    def training_step(self, batch, batch_idx):
        watch = next(c for c in self.trainer.callbacks if isinstance(c, Watch))
        watch.now = "reference"
        with self.reference("base"):
            self.view.hidden(batch.ids, batch.positions, bounds=batch.bounds, mask=batch.mask)
        watch.now = "train"
        return super().training_step(batch, batch_idx)


def by_the_formula(row, length, dim, alpha, seed=0, step=0, name="neftune"):
    key = [number % 2**32 for number in (seed, step, zlib.crc32(name.encode()), row, 0)]
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
    uniform = torch.rand(length, dim, generator=generator).double() * 2 - 1
    return (uniform * alpha / (length * dim) ** 0.5).float()


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_each_segment_gets_noise_of_its_own_length_in_training_alone(packing, chat, tmp_path):
    module, data = chat_job(chat, tmp_path, data={"packing": packing})
    module.__class__ = type("WithReferenceSFT", (WithReference, type(module)), {})
    watch = Watch()
    trainer(tmp_path, NEFTune(3.0), LoRA(2), watch, max_steps=2).fit(module, data)
    assert [len(watch.seen[when]) for when in ("train", "reference", "validation")] == [2, 2, 1]
    for when in ("reference", "validation"):
        assert all(not added.any() for _, added in watch.seen[when]), f"noise in a {when}"
    for step, (batch, added) in enumerate(watch.seen["train"]):
        dim = added.shape[-1]
        assert (batch.bounds is not None) == packing
        if packing:
            spans = list(zip(batch.bounds, batch.bounds[1:], strict=False))
            pieces = [added[0, start:end] for start, end in spans]
        else:
            lengths = batch.mask.sum(1).tolist()
            pieces = [added[i, :n] for i, n in enumerate(lengths)]
            assert not added[~batch.mask].any(), "padding got noise"
        assert len({len(piece) for piece in pieces}) > 1, "rows of one length would prove nothing"
        for row, piece in zip(batch.rows.tolist(), pieces, strict=True):
            expected = by_the_formula(row, len(piece), dim, 3.0, step=step)
            torch.testing.assert_close(piece, expected, rtol=0, atol=1e-6)


def test_a_tiny_alpha_is_the_same_training_and_a_large_one_is_not(chat, tmp_path):
    outcomes = []
    for techniques in ([], [NEFTune(1e-7)], [NEFTune(50.0)]):
        module, data = chat_job(chat, tmp_path)
        run = trainer(tmp_path, *techniques, max_steps=2)
        run.fit(module, data)
        outcomes.append(float(run.callback_metrics["train/loss"]))
    without, tiny, large = outcomes
    assert tiny == pytest.approx(without, rel=1e-5) and abs(large - without) > 1e-3


def test_a_resumed_run_draws_the_same(chat, tmp_path):
    whole, data = chat_job(chat, tmp_path)
    trainer(tmp_path, NEFTune(), max_steps=4, max_epochs=4).fit(whole, data)
    first, data = chat_job(chat, tmp_path)
    run = trainer(tmp_path, NEFTune(), max_steps=3, max_epochs=4)
    run.fit(first, data)
    run.save_checkpoint(tmp_path / "three.ckpt")
    second, data = chat_job(chat, tmp_path)
    trainer(tmp_path, NEFTune(), max_steps=4, max_epochs=4).fit(second, data, ckpt_path=tmp_path / "three.ckpt")
    assert all(torch.equal(value, state(second)[name]) for name, value in state(whole).items())


def test_weights_are_read_and_generation_is_untouched(chat, tmp_path):
    module, data = chat_job(chat, tmp_path)
    trainer(tmp_path, NEFTune(20.0), LoRA(2), max_steps=1).fit(module, data)
    before = module.generate(["ask 1:"], max_new_tokens=4)
    plain, data = chat_job(chat, tmp_path)
    Attachment.of(plain).rebuild([LoRA(2)], seed=0)
    plain.load_state_dict(module.state_dict())
    assert plain.generate(["ask 1:"], max_new_tokens=4) == before
    assert not module.model.get_input_embeddings()._forward_hooks


class Both(WordNet):
    """Two embeddings."""

    def __init__(self):
        super().__init__()
        self.more = nn.Embedding(2, 3)


def test_a_user_s_module_gets_the_padded_formula(tmp_path):
    """Four tokens of width four: uniform within alpha / sqrt(16), from the batch's seed."""
    seen = []

    class Seeing(WordNet):
        def training_step(self, batch, batch_idx):
            embedded = self.words(torch.zeros(5, 4, dtype=torch.long))
            seen.append((embedded - self.words.weight[0]).detach())
            return super().training_step(batch, batch_idx)

    fit(tmp_path, Seeing(), NEFTune(2.0), max_steps=2)
    assert all(0.3 < float(noise.abs().max()) <= 0.5 + 1e-6 for noise in seen) and not torch.equal(*seen)


def test_where_there_is_no_embedding_or_several_it_asks(tmp_path):
    with pytest.raises(Refusal, match="NEFTune found no input embedding in PlainNet; name the module"):
        fit(tmp_path, PlainNet(), NEFTune())
    with pytest.raises(Refusal, match=r"NEFTune found 2 embeddings in Both \(more, words\); say which one by target"):
        fit(tmp_path, Both(), NEFTune())
    with pytest.raises(Refusal, match="NEFTune.target names 'wrods', which the model does not have"):
        fit(tmp_path, Both(), NEFTune(target="wrods"))
    before, after = PlainNet(), PlainNet()
    fit(tmp_path, before)
    fit(tmp_path, after, NEFTune(target="net.0"))  # any module will do
    assert not torch.equal(before(rows()[0]), after(rows()[0]))


def test_a_beginning_that_another_row_holds_counts():
    """The second answer to a prompt gets the noise of the whole row, of which it holds the end."""
    one = torch.zeros(0, dtype=torch.long)
    ids = torch.arange(9)[None]
    batch = Batch(ids, ids, (0, 7, 9), None, one, one, one, torch.tensor([4, 4]), {}, shared=(None, (0, 5)))
    assert _layout(batch, ids) == [((4, 0), 7, 7, 0), ((4, 0), 7, 7, 5)]
    technique = NEFTune(alpha=5.0)
    technique._key = (1, 2)
    whole, rest = (technique._row_noise(*row, torch.zeros(1, 9, 8)) for row in _layout(batch, ids))
    assert whole.shape == (7, 8) and torch.equal(rest, whole[5:])
