"""Single answers from files: TRL's preparation, labels, mismatched answers, pairs that become two rows, places."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from lightning_ft import UnpairedPreferenceData
from lightning_ft.data.loader import Placement
from lightning_ft.functional.errors import Refusal
from tests.data.preferences import LAYOUTS, assistant, pairs_of, scored, singles_of, uneven, user, written
from tests.data.test_collate_pairs import account
from tests.data.test_sft_data import KeepAll, Recorder, trainer_of
from tests.data.tiny_tokenizers import LLAMA3, tiny_tokenizer


def labelled(count: int = 13) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": n % 3 > 0}
        for n, row in enumerate(uneven(count))
    ]


CHATS = [
    {"prompt": [user("hello")], "completion": [assistant("yes " * (n + 1))], "label": n % 2 == 0} for n in range(4)
]


# TRL as an oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [labelled(6), CHATS, uneven(3)], ids=["texts", "chats", "pairs"])
def test_trl_prepares_the_same_tokens_and_the_same_mismatched_ones(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    from trl import KTOTrainer

    if (
        "chosen" in rows[0]
    ):  # of different prompts, as those of the other cases are, or it would not be their order alone
        rows = [{**row, "prompt": f"{n} {row['prompt']}"} for n, row in enumerate(rows)]
    tokenizer, size = tiny_tokenizer(LLAMA3, puts_bos=True), len(rows) * (2 if "chosen" in rows[0] else 1)
    args = SimpleNamespace(
        dataset_num_proc=None,
        max_length=None,
        per_device_train_batch_size=size,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )
    stub: Any = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
    theirs = list(KTOTrainer._prepare_dataset(stub, Dataset.from_list(rows), tokenizer, args, "train"))
    assert len(theirs) == size
    if "chosen" in rows[0]:  # TRL lays all chosen ones first, and its mismatched ones follow from that order
        order = [half * len(rows) + n for n in range(len(rows)) for half in range(2)]
        theirs = [theirs[n] for n in order]
        rotated = [*theirs[-2:], *theirs[:-2]]  # by a whole pair: TRL's lie apart, and ours are of other prompts, too
        theirs = [
            {**one, "KL_completion_ids": other["completion_ids"]} for one, other in zip(theirs, rotated, strict=True)
        ]

    def expected(one: dict[str, Any], answer: str) -> list[tuple[tuple[int, ...], int]]:
        prompt, ids = one["prompt_ids"], one[answer]
        return [((*prompt, *ids[:t]), ids[t]) for t in range(len(ids))]

    data = singles_of(written(tmp_path, rows), tmp_path, tokenizer, batch_size=size, shuffle=False, **LAYOUTS["shared"])
    data.setup("fit")
    (batch,) = data.train_dataloader()
    found = account(batch)
    assert found[:size] == [expected(one, "completion_ids") for one in theirs]
    assert found[size:] == [expected(one, "KL_completion_ids") for one in theirs]
    assert batch.targets is not None and batch.targets.tolist() == [float(one["label"]) for one in theirs]


# layouts, mismatched answers --------------------------------------------------------------------------------------------


def test_shared_separate_and_padded_rows_score_the_same(tmp_path: Path) -> None:
    path = written(tmp_path, labelled())
    found = [scored(singles_of(path, tmp_path, **options)) for options in LAYOUTS.values()]
    found += [scored(singles_of(path, tmp_path, mismatched=False, **options)) for options in LAYOUTS.values()]
    found.append(scored(singles_of(path, tmp_path, max_tokens=90, max_length=40, **LAYOUTS["shared"])))
    assert all(other == found[0] for other in found) and len(found[0]) == 13


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [labelled(), uneven(7)], ids=["labelled", "pairs"])
def test_each_prompt_also_comes_with_the_answer_of_another_row(
    rows: list[dict[str, Any]], layout: str, tmp_path: Path
) -> None:
    # 13 or 14 rows by 4: one batch has a row alone.
    rows = [{**row, "prompt": f"{n} {row['prompt']}"} for n, row in enumerate(rows)]
    options = {"batch_size": 4 if "label" in rows[0] else 13, "shuffle": False, **LAYOUTS[layout]}
    data = singles_of(written(tmp_path, rows), tmp_path, **options)
    data.setup("fit")
    own = {row: tokens for (row, _), tokens in scored(data).items()}
    sizes = []
    for batch in data.train_dataloader():
        assert batch.targets is not None
        size, found = len(batch.targets), account(batch)
        sizes.append(size)
        assert batch.rows.tolist()[size:] == [-1] * size and len(found) == 2 * size
        for i, row in enumerate(batch.rows.tolist()[:size]):
            prompt, answer = own[row][0][0], [token for _, token in found[size + i]]
            assert found[size + i][0][0] == prompt  # behind the row's own prompt
            if size > 1:
                other = batch.rows.tolist()[:size][i - shift_of(rows)]
                assert answer == [token for _, token in own[other]] and own[other][0][0] != prompt
            else:  # that of a row with another prompt, no longer than its own
                mine = [token for _, token in own[row]]
                others = [[t for _, t in tokens][: len(mine)] for tokens in own.values() if tokens[0][0] != prompt]
                assert answer in others
    assert 1 in sizes


def shift_of(rows: list[dict[str, Any]]) -> int:
    """By how many places answers move: over a whole pair, of which the halves stand beside each other."""
    return 1 if "label" in rows[0] else 2


def test_a_module_without_use_for_mismatched_answers_gets_none(tmp_path: Path) -> None:
    class Module(Recorder):
        admission, wants_mismatched = SimpleNamespace(packing=True), False

    path = written(tmp_path, labelled(5))
    data = singles_of(path, tmp_path, val_fraction=0.2)
    module = Module()
    trainer_of(tmp_path, max_epochs=1).fit(module, data)
    assert all(-1 not in rows for _, _, rows, _ in module.seen)
    with pytest.raises(Refusal, match="has one prompt, so no other row's answer"):
        singles_of(written(tmp_path, labelled(1), "one.jsonl"), tmp_path).setup("fit")
    with pytest.raises(Refusal, match="set batch_size and val_batch_size to 2 or more"):
        UnpairedPreferenceData(path, mismatched=True, batch_size=1)


def test_bins_count_mismatched_answers(tmp_path: Path) -> None:
    path = written(tmp_path, labelled(40))
    for layout in ("shared", "separate"):
        data = singles_of(path, tmp_path, max_tokens=60, max_length=25, **LAYOUTS[layout])
        data.setup("fit")
        batches = list(data.train_dataloader())
        assert max(batch.tokens for batch in batches) <= 60
        lengths = data._get("train").lengths
        for batch in batches:
            assert batch.targets is not None
            size = len(batch.targets)
            counted = int(lengths[batch.rows[:size].numpy()].sum())
            assert batch.tokens == counted if size > 1 else batch.tokens <= counted


# pairs as rows ----------------------------------------------------------------------------------------------------------


def test_pairs_become_two_rows_each(tmp_path: Path) -> None:
    rows = [*uneven(5), {**uneven(1)[0], "rejected": uneven(1)[0]["chosen"]}]
    path = written(tmp_path, rows)
    pairs = scored(pairs_of(path, tmp_path, bad_rows="drop", **LAYOUTS["shared"]))
    data = singles_of(path, tmp_path, bad_rows="drop", **LAYOUTS["shared"])
    assert scored(data) == {(2 * row + which, 0): tokens for (row, which), tokens in pairs.items()}
    assert data.label_counts() == {"desirable": 5, "undesirable": 5}
    report = data.reports()["train"]
    assert (report.rows, report.kept, report.dropped) == (12, 10, {"chosen and rejected are the same": 2})
    good, bad = data.preview(2)
    assert (good.where, bad.where) == (f"{path}, line 1 (chosen)", f"{path}, line 1 (rejected)")
    assert [piece.text for piece in bad.pieces] == ["hello world", "\n── undesirable: ", " no thank you</s>"]


def test_held_out_rows_keep_prompts_together_and_labels_apart(tmp_path: Path) -> None:
    data = singles_of(written(tmp_path, uneven(10)), tmp_path, val_fraction=0.3)
    train, val = scored(data), scored(data, "val")
    assert {row // 2 for row, _ in train} & {row // 2 for row, _ in val} == set() and len(val) == 6 and len(train) == 14
    data = singles_of(written(tmp_path, labelled(30)), tmp_path, val_fraction=0.2)
    data.setup("fit")
    assert data.label_counts() == {"desirable": 16, "undesirable": 8}
    with pytest.raises(Refusal, match="has one pair, so val_fraction cannot hold one out"):
        singles_of(written(tmp_path, uneven(1)), tmp_path, val_fraction=0.2, mismatched=False).setup("fit")


def test_mixtures_of_pairs_and_single_answers(tmp_path: Path) -> None:
    one, other = written(tmp_path, uneven(3), "a.jsonl"), written(tmp_path, labelled(4), "b.jsonl")
    data = singles_of([one, other], tmp_path, **LAYOUTS["shared"])  # type: ignore[arg-type]
    found = scored(data)
    assert {row for row, _ in found} == set(range(10))
    assert [row.where for row in data.preview(4)] == [
        f"{one}, line 1 (chosen)",
        f"{other}, line 1",
        f"{one}, line 1 (rejected)",
        f"{other}, line 2",
    ]


def test_labels_of_csv(tmp_path: Path) -> None:
    csv = tmp_path / "rated.csv"
    csv.write_text("prompt,completion,label\nhello, yes,true\nworld, no,0\nworld, yes,TRUE\n")
    data = singles_of(str(csv), tmp_path)
    data.setup("fit")
    assert data.label_counts() == {"desirable": 2, "undesirable": 1}


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_truncation(truncation: str, tmp_path: Path) -> None:
    path = written(tmp_path, labelled(12))
    whole = scored(singles_of(path, tmp_path, **LAYOUTS["separate"]))
    options = {"max_length": 9, "truncation": truncation, "bad_rows": "drop", **LAYOUTS["separate"]}
    data = singles_of(path, tmp_path, **options)
    cut = scored(data)
    changed = 0
    for key, tokens in whole.items():
        prompt, answer = tokens[0][0], [token for _, token in tokens]
        if truncation == "keep_start":
            answer = answer[: max(9 - len(prompt), 0)]
        else:
            prompt = prompt[len(prompt) - max(min(len(prompt), 9 - len(answer)), 0) :]
        usable = bool(answer and prompt)
        assert (key in cut) == usable
        if usable:
            assert cut[key] == [((*prompt, *answer[:t]), answer[t]) for t in range(len(answer))]
            changed += cut[key] != tokens
    assert changed and data.reports()["train"].truncated == changed


# placement --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_of_two_ranks_are_exact(layout: str, tmp_path: Path) -> None:
    data = singles_of(written(tmp_path, labelled(23)), tmp_path, **LAYOUTS[layout])
    data.setup("fit")
    loader = data.train_dataloader()
    ranks = []
    for rank in range(2):
        where = Placement(world_size=2, rank=rank, accumulate=2)
        loader.placement = lambda where=where: where
        ranks.append(list(loader))
        loader.placement = lambda where=where: replace(where, position=3)
        assert [b.ids.tolist() for b in loader] == [b.ids.tolist() for b in ranks[rank][3:]]
    for i in range(0, len(ranks[0]), 2):
        window = [batch for batches in ranks for batch in batches[i : i + 2]]
        for unit in ("row", "token"):
            held = sum(batch.counts[unit] for batch in window)
            assert all(batch.window is not None and batch.window[unit] == held for batch in window)
    rows = [row for batches in ranks for batch in batches for row in batch.rows.tolist() if row >= 0]
    assert sorted(rows) == list(range(23))


def test_a_resumed_fit_sees_what_an_unbroken_one_sees(tmp_path: Path) -> None:
    path, options = written(tmp_path, labelled(23)), {"val_fraction": 0.2, "packing": True, "share_prompts": True}
    keep, straight = KeepAll(tmp_path), Recorder()
    trainer_of(tmp_path, [keep], max_epochs=2).fit(straight, singles_of(path, tmp_path, **options))
    for file, where, done in keep.kept:
        resumed = Recorder()
        trainer_of(tmp_path, max_epochs=2).fit(
            resumed, singles_of(path, tmp_path, **options), ckpt_path=file, weights_only=False
        )
        assert resumed.seen == straight.seen[done:], (where, done)
