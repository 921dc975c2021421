"""Invariant 3: a row in a packed batch gets the logits that it gets alone."""

import pytest
import torch

from lightning_ft.callbacks.lora import LoRA
from lightning_ft.engine.attachment import Attachment
from lightning_ft.functional.errors import Refusal
from tests.invariants import ground
from tests.tolerances import TOL


@pytest.fixture(scope="module")
def module(base):
    return ground.built(base, LoRA(r=4)).eval()


@pytest.fixture(scope="module")
def batches(base, rows, cache):
    packed, binned, padded = (
        list(ground.data(rows, cache, tokenizer=str(base), shuffle=False, **options).train_dataloader())
        for options in ({"batch_size": 7}, {"max_tokens": 160}, {"batch_size": 7, "packing": False})
    )
    return {"packed": packed, "bins": binned, "padded": padded}


def rows_of(batch):
    """(data-set row, its ids, its flat places) for each row of a packed or padded batch."""
    flat = batch.ids.reshape(-1)
    for number, row in enumerate(batch.rows.tolist()):
        if batch.bounds is not None:
            places = torch.arange(batch.bounds[number], batch.bounds[number + 1])
        else:
            width = batch.ids.shape[1]
            places = number * width + torch.arange(int(batch.mask[number].sum()))
        yield row, flat[places], places


@torch.no_grad()
def logits_of(module, batch):
    hidden = module.view.hidden(batch.ids, batch.positions, bounds=batch.bounds, mask=batch.mask)
    return module.view.logits(hidden).flatten(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["packed", "bins", "padded"])
def test_logits_equal_those_of_each_row_alone(module, batches, layout):
    seen = set()
    for batch in batches[layout]:
        assert layout == "padded" or len(batch.bounds) == len(batch.rows) + 1
        together = logits_of(module, batch)
        for row, ids, places in rows_of(batch):
            alone = module.model(ids[None]).logits[0]  # transformers' own forward; no argument of ours
            torch.testing.assert_close(together[places], alone, rtol=TOL[torch.float32], atol=TOL[torch.float32])
            seen.add(row)
    assert seen == set(range(ground.ROWS)) and max(len(b.rows) for b in batches[layout]) > 3


@torch.no_grad()
def test_the_comparison_sees_a_leak(module, batches):
    """Negative controls: rows that see one another, and positions that go on, give other logits."""
    batch = batches["packed"][0]
    truth = logits_of(module, batch)
    one_segment = module.view.hidden(batch.ids, batch.positions, bounds=(0, batch.ids.shape[1]))
    assert (module.view.logits(one_segment)[0] - truth).abs().max() > 1e-2
    # Rotary positions are relative, so within a segment an offset changes nothing; stretched ones do.
    stretched = module.view.hidden(batch.ids, batch.positions * 2, bounds=batch.bounds)
    assert (module.view.logits(stretched)[0] - truth).abs().max() > 1e-2


@torch.no_grad()
def test_changing_one_row_leaves_the_others_bit_for_bit(module, batches):
    batch = batches["packed"][0]
    before = logits_of(module, batch)
    ids = batch.ids.clone()
    first, second = batch.bounds[1], batch.bounds[2]
    ids[0, first:second] = 5
    after = logits_of(module, type(batch)(**{**vars(batch), "ids": ids}))
    changed = torch.zeros(len(before), dtype=torch.bool)
    changed[first:second] = True
    assert torch.equal(before[~changed], after[~changed]) and not torch.equal(before[changed], after[changed])


def test_predicted_log_probs_do_not_depend_on_packing(module, batches):
    found = {}
    for layout, some in batches.items():
        found[layout] = {}
        for batch in some:
            with torch.no_grad():
                answer = module.predict_step(batch, 0)
            found[layout] |= dict(zip(answer["rows"].tolist(), answer["logprob"].tolist(), strict=True))
    assert found["packed"] == pytest.approx(found["padded"], rel=1e-5)
    assert found["bins"] == pytest.approx(found["padded"], rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_that_does_not_know_segments_is_refused_for_packed_rows(base, rows, cache, tmp_path, attention):
    with pytest.raises(Refusal, match="packed rows.*set --data.packing false"):
        ground.trainer(tmp_path, LoRA()).fit(ground.sft(base, attention=attention), ground.data(rows, cache))
    module = ground.sft(base, attention=attention)
    Attachment.of(module).rebuild([], seed=0)
    with pytest.raises(Refusal, match="Packed rows need attention"):
        module.view.hidden(torch.zeros(1, 4, dtype=torch.long), bounds=(0, 2, 4))
