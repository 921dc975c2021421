"""Episodes of texts laid end to end say, and teach, what padded ones do."""

import pytest
import torch

from lightning_ft import MAML, BottleneckAdapter, LinearProbe, LoRA, PrefixTuning, PromptTuning, ProtoNet
from lightning_ft.engine.batch import Batch, Source
from lightning_ft.engine.end_to_end import end_to_end
from lightning_ft.engine.episode_module import EpisodeModule
from tests.contract.subjects import trainer
from tests.modules.episodes import fit, words, write_words
from tests.modules.objective_episodes import BASES, data, learner
from tests.modules.tasks import write_base
from tests.tolerances import assert_gradient


def padded(**others):
    """Rows of two tokens, three and one; the first's last and the second's first two are scored."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    given = {
        "ids": torch.tensor([[5, 6, 0], [7, 8, 9], [4, 0, 0]]),
        "positions": torch.arange(3).expand(3, 3),
        "bounds": None,
        "mask": mask,
        "scored": torch.tensor([1, 3, 4]),
        "labels": torch.tensor([1, 2, 3]),
        "segment_of_scored": torch.tensor([0, 1, 1]),
        "rows": torch.arange(3),
        "counts": {"token": 3.0, "row": 3.0},
    }
    return Batch(**{**given, **others})


def test_what_stands_where():
    laid = end_to_end(padded(types=torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0]])))
    assert laid.mask is None and laid.bounds == (0, 2, 5, 6)
    assert laid.ids.tolist() == [[5, 6, 7, 8, 9, 4]] and laid.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert laid.types.tolist() == [[0, 1, 0, 0, 1, 0]]
    # The same tokens are scored.
    assert laid.ids.reshape(-1)[laid.scored].tolist() == padded().ids.reshape(-1)[padded().scored].tolist() == [6, 7, 8]


def test_what_stays():
    packed = end_to_end(padded())
    assert end_to_end(packed) is packed
    beside = padded(source=Source(torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 2, dtype=torch.bool)))
    assert end_to_end(beside) is beside


PARTS = {
    "lora": (lambda: [LoRA(r=2)], "adapter_and_head"),
    "prefix": (lambda: [PrefixTuning(tokens=2)], "adapter_and_head"),
    "prompt": (lambda: [PromptTuning(tokens=2)], "adapter_and_head"),
    "bottleneck": (lambda: [BottleneckAdapter(reduction_factor=8.0)], "adapter"),
    "everything": (lambda: [], "all"),
    "head": (lambda: [], "head"),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    bases = {kind: write_base(kind, folder / kind) for kind in ("bert", "llama")}
    return bases, write_words(folder), folder


def both_ways(monkeypatch, made, episode):
    """(loss, gradients) of a task laid end to end, and padded."""
    seen = []
    laid = EpisodeModule.laid

    def watched(module, batch):
        seen.append(laid(module, batch))
        return seen[-1]

    monkeypatch.setattr(EpisodeModule, "laid", watched)
    ours = made._with_gradients(episode)
    assert seen and all(batch.bounds is not None for batch in seen)
    monkeypatch.setattr(EpisodeModule, "laid", lambda module, batch: batch)
    return ours, made._with_gradients(episode)


def alike(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert any(float(g.abs().max()) > 1e-4 for g in theirs[1] if g is not None)
    for found, expected in zip(ours[1], theirs[1], strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert_gradient(found, expected, "a gradient")


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("part", PARTS)
def test_second_order_over_what_adapts(texts, tmp_path, monkeypatch, part, kind):
    bases, path, folder = texts
    callbacks, inner = PARTS[part]
    made = MAML(str(bases[kind]), inner=inner, inner_lr=0.1, steps=2, lr=0.1, optimizer=torch.optim.SGD)
    fit(tmp_path, made, words(path, folder), *callbacks(), max_steps=2, gradient_clip_val=1.0)
    episode = next(iter(words(path, folder, tokenizer=str(bases[kind])).train_dataloader())).episodes()[0]
    assert not episode.support.inputs.mask.all()  # there is padding to leave out
    alike(*both_ways(monkeypatch, made, episode))


@pytest.mark.parametrize("task", [task for task in BASES if task != "seq2seq_lm"])
def test_other_objectives(texts, tmp_path, monkeypatch, task):
    made = learner(write_base(BASES[task], tmp_path / "base"), task)
    fit(tmp_path, made, data(task), LoRA(r=2), max_steps=2)
    drawn, runner = data(task), trainer("unused")
    runner.strategy.connect(made)
    made.trainer = drawn.trainer = runner
    episode = next(iter(drawn.train_dataloader())).episodes()[0]
    alike(*both_ways(monkeypatch, made, made.referred(episode)))


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_embeddings(texts, tmp_path, monkeypatch, pooling, kind):
    bases, path, folder = texts
    for made in (ProtoNet(str(bases[kind]), pooling=pooling), LinearProbe(str(bases[kind]), pooling=pooling)):
        rows = words(path, folder)
        runner = trainer(tmp_path, limit_val_batches=None)
        runner.validate(made, rows, verbose=False)
        support = next(iter(rows.val_dataloader())).episodes()[0].support.inputs
        with torch.no_grad():
            ours = made.embed(support)
            with monkeypatch.context() as patched:
                patched.setattr(EpisodeModule, "laid", lambda module, batch: batch)
                theirs = made.embed(support)
        assert len(support.ids) == len(ours) and not support.mask.all()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_attention_that_knows_no_segments_stays_padded(texts, tmp_path):
    bases, path, folder = texts
    made = LinearProbe(str(bases["bert"]), attention="sdpa")
    trainer(tmp_path, limit_val_batches=1).validate(made, words(path, folder), verbose=False)
    assert made.laid(rows := padded()) is rows
