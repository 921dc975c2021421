"""Pairs from files: the same tokens as TRL's preparation, in every layout, on every rank, after a resume."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from lightning_ft import SFT, PreferenceData
from lightning_ft.data.collate_pairs import collate_pairs
from lightning_ft.data.loader import Placement
from lightning_ft.functional.errors import Refusal
from tests.data.preferences import LAYOUTS, TOKENIZER, assistant, pairs_of, scored, uneven, user, written
from tests.data.test_sft_data import KeepAll, Recorder, trainer_of
from tests.data.tiny_tokenizers import CHATML, LLAMA3, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Total length of `list`", "ignore:.*does not have many workers")


class Preferring(Recorder):
    """One that was proven to see prompts that are laid out once."""

    admission = SimpleNamespace(packing=True)
    sharing_reason = ""


TALK = [user("hello"), assistant("yes"), user("is this positive?")]
CHATS = [
    {"prompt": TALK[:1], "chosen": [assistant("yes thank you")], "rejected": [assistant("no")]},
    {"prompt": TALK, "chosen": [assistant("positive")], "rejected": [assistant("negative or positive")]},
]
KINDS: dict[str, list[dict[str, Any]]] = {
    "chats": CHATS,
    "whole conversations": [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in CHATS
    ],
    "texts": uneven(3),
    "whole texts": [
        {"chosen": "user: hello assistant: yes thank you", "rejected": "user: hello assistant: no thank you"},
        {"chosen": "is this positive?\nyes", "rejected": "is this positive?\nno yes"},
    ],
}


# TRL as an oracle -------------------------------------------------------------------------------------------------------


def prepared_by_trl(rows: list[dict[str, Any]], tokenizer: Any) -> Any:
    from trl import DPOTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    stub: Any = SimpleNamespace(_tokenizer=tokenizer)
    return list(DPOTrainer._prepare_dataset(stub, Dataset.from_list(rows), tokenizer, args, "train"))


def batched_by_trl(examples: Any, **options: Any) -> list[list[tuple[tuple[int, ...], int]]]:
    """(context, token) of each token that TRL's batch scores: of all chosen rows, then of all rejected ones."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    batch = DataCollatorForPreference(pad_token_id=0, **options)(examples)
    found = []
    for ids, mask in zip(batch["input_ids"].tolist(), batch["completion_mask"].tolist(), strict=True):
        found.append([(tuple(ids[:t]), ids[t]) for t in range(len(ids)) if mask[t]])
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", [LLAMA3, CHATML], ids=["llama3", "chatml"])
@pytest.mark.parametrize("kind", KINDS)
def test_trl_prepares_the_same_tokens(kind: str, template: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(template, puts_bos=template == LLAMA3)
    rows = KINDS[kind]
    theirs = batched_by_trl(prepared_by_trl(rows, tokenizer))
    if "chat" in kind or "conversations" in kind:
        # TRL also scores the line break that ChatML writes after an end of turn.
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        theirs = [[(seen, token) for seen, token in row if not seen or seen[-1] != end] for row in theirs]
    ours = scored(pairs_of(written(tmp_path, rows), tmp_path, tokenizer, **LAYOUTS["shared"]))
    assert [ours[n, 0] for n in range(len(rows))] == theirs[: len(rows)]
    assert [ours[n, 1] for n in range(len(rows))] == theirs[len(rows) :]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("most", [7, 9, 12])
def test_trl_keeps_the_same_starts(most: int, tmp_path: Path) -> None:
    rows = uneven(12)
    examples = prepared_by_trl(rows, TOKENIZER)
    options = {"max_length": most, "truncation": "keep_start", "bad_rows": "drop", **LAYOUTS["shared"]}
    data = pairs_of(written(tmp_path, rows), tmp_path, **options)
    ours = scored(data)
    report = data.reports()["train"]
    theirs = batched_by_trl(examples, max_length=most)
    alike = 0
    for n in range(12):
        pair = theirs[n], theirs[12 + n]
        usable = all(pair) and [token for _, token in pair[0]] != [token for _, token in pair[1]]
        assert ((n, 0) in ours) == usable
        alike += usable
        if usable:
            assert (ours[n, 0], ours[n, 1]) == pair
    assert report.kept == alike and sum(report.dropped.values()) == 12 - alike
    assert report.truncated == sum(
        len(e["prompt_ids"]) + max(len(e["chosen_ids"]), len(e["rejected_ids"])) > most and (n, 0) in ours
        for n, e in enumerate(examples)
    )


# truncation -------------------------------------------------------------------------------------------------------------


def test_keeping_the_end_cuts_one_prompt_for_both_answers(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(None, puts_bos=True)
    rows = uneven(12)
    path = written(tmp_path, rows)
    whole = scored(pairs_of(path, tmp_path, tokenizer, **LAYOUTS["shared"]))
    most = 8
    data = pairs_of(
        path, tmp_path, tokenizer, max_length=most, truncation="keep_end", bad_rows="drop", **LAYOUTS["shared"]
    )
    cut = scored(data)
    lost = 0
    for n in range(12):
        prompt = whole[n, 0][0][0]
        longer = max(len(whole[n, 0]), len(whole[n, 1]))
        room = min(len(prompt), most - longer)
        assert ((n, 0) in cut) == (room > 0)
        lost += room < 1
        if room < 1:
            continue
        kept = (
            prompt
            if room == len(prompt)
            else prompt[-1:]
            if room == 1
            else prompt[:1] + prompt[len(prompt) - room + 1 :]
        )
        for which in range(2):
            answer = [token for _, token in whole[n, which]]
            assert cut[n, which] == [((*kept, *answer[:t]), answer[t]) for t in range(len(answer))]
    assert 0 < lost < 12
    assert data.reports()["train"].dropped == {"an answer without room for its prompt": lost}


@pytest.mark.parametrize(
    "options, match",
    [
        (
            {},
            r"line 2 has 14 tokens in its prompt and longer answer, more than max_length 8, as have 1 of 2 rows: raise",
        ),
        (
            {"truncation": "keep_start"},
            "line 2: truncation to max_length 8 .keep_start. makes chosen and rejected the same",
        ),
        ({"truncation": "keep_end"}, "line 2: an answer alone has 13 tokens, which leaves its prompt no room"),
    ],
)
def test_long_pairs_are_refused_by_line(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    long = {"prompt": "hello", "chosen": " yes" * 12, "rejected": " yes" * 11}
    path = written(tmp_path, [uneven(1)[0], long])
    with pytest.raises(Refusal, match=match):
        pairs_of(path, tmp_path, max_length=8, **options).setup("fit")
    if options:
        kept = pairs_of(path, tmp_path, max_length=8, bad_rows="drop", **options)
    else:
        kept = pairs_of(path, tmp_path, max_length=8, truncation="drop")
    assert kept.reports()["train"].kept == 1 and sum(kept.reports()["train"].dropped.values()) == 1


def test_a_prompt_as_long_as_a_row_may_be(tmp_path: Path) -> None:
    path = written(tmp_path, [{"prompt": "hello" + " world" * 9, "chosen": " yes", "rejected": " no"}])
    with pytest.raises(
        Refusal, match="line 1: truncation to max_length 8 .keep_start. leaves an answer no token to learn"
    ):
        pairs_of(path, tmp_path, max_length=8, truncation="keep_start").setup("fit")


# layouts, sharing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [uneven(), KINDS["chats"] * 3], ids=["texts", "chats"])
def test_shared_separate_and_padded_rows_score_the_same(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = written(tmp_path, rows)
    found = [scored(pairs_of(path, tmp_path, **options)) for options in LAYOUTS.values()]
    found.append(scored(pairs_of(path, tmp_path, max_tokens=90, max_length=40, **LAYOUTS["shared"])))
    assert all(other == found[0] for other in found) and len(found[0]) == 2 * len(rows)


def test_prompts_are_shared_where_the_module_proves_it(tmp_path: Path) -> None:
    path = written(tmp_path, uneven(6))

    def shares(reason: str | None, packs: bool = True, **options: Any) -> bool:
        module = Preferring()
        module.sharing_reason, module.admission = reason, SimpleNamespace(packing=packs)  # type: ignore[assignment]
        data = pairs_of(path, tmp_path, **options)
        trainer_of(tmp_path, max_epochs=1, limit_train_batches=1, accumulate_grad_batches=1).fit(module, data)
        return data.shares_prompts

    assert shares("")
    assert not shares("its layers look both ways")
    assert not shares(None) and not shares("", packs=False)
    assert not shares("", packing=False) and not shares("", share_prompts=False)
    assert shares(None, packing=True, share_prompts=True)
    with pytest.raises(
        Refusal, match="the model cannot take prompts that are laid out once: its layers look both ways"
    ):
        shares("its layers look both ways", packing=True, share_prompts=True)


def test_bins_count_a_shared_prompt_once(tmp_path: Path) -> None:
    path = written(tmp_path, [{"prompt": "hello" * 20, "chosen": " yes", "rejected": " no"}] * 8)
    sizes = {}
    for name in ("shared", "separate"):
        data = pairs_of(path, tmp_path, max_tokens=100, max_length=50, **LAYOUTS[name])
        data.setup("fit")
        batches = list(data.train_dataloader())
        assert max(batch.tokens for batch in batches) <= 100
        assert sum(batch.tokens for batch in batches) == data._get("train").lengths.sum()
        sizes[name] = len(batches)
    assert sizes == {"shared": 2, "separate": 4}


def test_a_pair_that_no_bin_takes_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, [{"prompt": "hello" * 20, "chosen": " yes", "rejected": " no"}])
    with pytest.raises(
        Refusal, match="takes 44 tokens, its prompt for each answer, which do not fit into max_tokens 30"
    ):
        list(pairs_of(path, tmp_path, max_tokens=30, max_length=30, **LAYOUTS["separate"]).train_dataloader())
    assert list(pairs_of(path, tmp_path, max_tokens=30, max_length=30, **LAYOUTS["shared"]).train_dataloader())


def test_the_report_says_why_prompts_are_not_shared(tmp_path: Path) -> None:
    path = written(tmp_path, uneven(6))
    said = "where the model is proven to see them, which saves"
    assert said in pairs_of(path, tmp_path).reports()["train"].facts["prompts laid out once"]
    module = Preferring()
    module.sharing_reason = "its layers look both ways"
    data = pairs_of(path, tmp_path)
    trainer_of(tmp_path, max_epochs=1).fit(module, data)
    assert data.reports()["train"].facts["prompts laid out for each answer"].endswith(", but its layers look both ways")


def test_the_report_says_what_sharing_saves_and_how_full_batches_are(tmp_path: Path) -> None:
    path = written(tmp_path, uneven(8))
    texts = {
        name: pairs_of(path, tmp_path, batch_size=4, **options).reports()["train"] for name, options in LAYOUTS.items()
    }
    prompts = sum(len(TOKENIZER(row["prompt"])["input_ids"]) for row in uneven(8))
    whole = texts["separate"].tokens
    assert texts["shared"].tokens == whole - prompts and texts["padded"].tokens == whole
    share = f"{prompts} of {whole} tokens ({prompts / whole:.0%})"
    assert texts["shared"].facts == {"prompts laid out once": f"saves {share}"}
    assert texts["separate"].facts == {"prompts laid out for each answer": f"sharing them would save {share}"}
    assert texts["shared"].packing_efficiency == texts["separate"].packing_efficiency == 1.0
    data = pairs_of(path, tmp_path, batch_size=4, **LAYOUTS["padded"])
    data.setup("fit")
    batches = list(data.train_dataloader())
    positions = sum(batch.ids.numel() for batch in batches)
    assert texts["padded"].packing_efficiency == pytest.approx(sum(batch.tokens for batch in batches) / positions)


# margins ------------------------------------------------------------------------------------------------------------------


def test_margins_reach_their_pairs(tmp_path: Path) -> None:
    path = written(tmp_path, [{**row, "margin": n / 4} for n, row in enumerate(uneven(7))])
    data = pairs_of(path, tmp_path, **LAYOUTS["shared"])
    data.setup("fit")
    for batch in data.train_dataloader():
        assert batch.columns["margin"].tolist() == (batch.rows[::2] / 4).tolist()
        assert batch.columns["margin"].dtype == torch.float32
    csv = tmp_path / "pairs.csv"
    csv.write_text("prompt,chosen,rejected,margin\nhello, yes, no,0.5\n")
    data = pairs_of(str(csv), tmp_path)
    data.setup("fit")
    assert next(iter(data.train_dataloader())).columns["margin"].tolist() == [0.5]


def test_files_with_and_without_margins_do_not_mix(tmp_path: Path) -> None:
    one = written(tmp_path, [{**row, "margin": 1} for row in uneven(2)], "a.jsonl")
    other = written(tmp_path, uneven(2), "b.jsonl")
    with pytest.raises(Refusal, match="a.jsonl has margins and .*b.jsonl has none"):
        pairs_of([one, other], tmp_path).check_files("fit")  # type: ignore[arg-type]
    # Rows of a validation meet in a batch, too, and a training file of another kind is no matter.
    held = pairs_of(one, tmp_path, val_path=[other, one])
    for ask in (lambda: held.check_files("validate"), lambda: held.setup("validate"), lambda: held.setup("fit")):
        with pytest.raises(Refusal, match="a.jsonl has margins and .*b.jsonl has none"):
            ask()
    apart = pairs_of(one, tmp_path, val_path=other)
    apart.setup("fit")
    assert "margin" not in next(iter(apart.val_dataloader())).columns
    rows = apart._get("val").segments([0]) + apart._get("train").segments([0])
    with pytest.raises(ValueError, match="Of 2 pairs 1 have a margin"):
        collate_pairs(rows, packed=True, shared=True)


def test_a_first_row_without_a_margin_does_not_take_it_from_the_others(tmp_path: Path) -> None:
    rows = [{**row, "margin": None if n == 0 else n / 2} for n, row in enumerate(uneven(4))]
    path = written(tmp_path, rows)
    with pytest.raises(Refusal, match="line 1: the row has no margin, as others of the file have"):
        pairs_of(path, tmp_path).check_files("fit")
    data = pairs_of(path, tmp_path, bad_rows="drop", batch_size=4)
    data.setup("fit")
    assert sorted(next(iter(data.train_dataloader())).columns["margin"].tolist()) == [0.5, 1.0, 1.5]
    empty = pairs_of(written(tmp_path, [{**row, "margin": None} for row in uneven(3)], "none.jsonl"), tmp_path)
    empty.setup("fit")
    assert "margin" not in next(iter(empty.train_dataloader())).columns


# placement ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_tokens": 60, "max_length": 40}], ids=["rows", "bins"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_of_two_ranks_are_exact(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    if options and layout == "padded":
        pytest.skip("bins are packed")
    data = pairs_of(written(tmp_path, uneven()), tmp_path, **LAYOUTS[layout], **options)
    data.setup("fit")
    loader = data.train_dataloader()
    ranks = []
    for rank in range(2):
        where = Placement(world_size=2, rank=rank, accumulate=2)
        loader.placement = lambda where=where: where
        ranks.append(list(loader))
        loader.placement = lambda where=where: replace(where, position=3)  # a run that is resumed
        assert [b.ids.tolist() for b in loader] == [b.ids.tolist() for b in ranks[rank][3:]]
    assert len(ranks[0]) == len(ranks[1]) > 3
    for i in range(0, len(ranks[0]), 2):
        window = [batch for batches in ranks for batch in batches[i : i + 2]]
        for unit in ("pair", "row", "token", "chosen_token"):
            held = sum(batch.counts[unit] for batch in window)
            assert all(batch.window is not None and batch.window[unit] == held for batch in window)
    rows = [row for batches in ranks for batch in batches for row in batch.rows.tolist() if row >= 0]
    assert sorted(rows) == sorted([*range(23)] * 2)


@pytest.mark.filterwarnings("error:.*not resumable.*")
@pytest.mark.parametrize("options", [{}, {"max_tokens": 60, "max_length": 40, "packing": True}], ids=["rows", "bins"])
def test_a_resumed_fit_sees_what_an_unbroken_one_sees(options: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, uneven())
    keep = KeepAll(tmp_path)
    straight = Preferring()
    options = {"val_fraction": 0.2, **options}
    trainer_of(tmp_path, [keep], max_epochs=2).fit(straight, pairs_of(path, tmp_path, **options))
    assert len(keep.kept) > 6
    for file, where, done in keep.kept:
        resumed = Preferring()
        trainer_of(tmp_path, max_epochs=2).fit(
            resumed, pairs_of(path, tmp_path, **options), ckpt_path=file, weights_only=False
        )
        assert resumed.seen == straight.seen[done:], (where, done)
        assert torch.equal(resumed.table.weight, straight.table.weight), (where, done)
    if options.get("max_tokens"):
        with pytest.raises(Refusal, match="share_prompts True .now False"):
            trainer_of(tmp_path, max_epochs=2).fit(
                Preferring(),
                pairs_of(path, tmp_path, **options, share_prompts=False),
                ckpt_path=keep.kept[0][0],
                weights_only=False,
            )


def test_splits_and_mixtures(tmp_path: Path) -> None:
    one, other = written(tmp_path, uneven(10), "a.jsonl"), written(tmp_path, KINDS["chats"] * 5, "b.jsonl")
    data = pairs_of([one, other], tmp_path, val_fraction=0.2, **LAYOUTS["shared"])  # type: ignore[arg-type]
    train, val = scored(data), scored(data, "val")
    assert len(train) == 32 and len(val) == 8 and not set(train) & set(val)
    assert {row for row, _ in (*train, *val)} == set(range(20))
    drawn = pairs_of({one: 3, other: 1}, tmp_path, epoch_rows=8, **LAYOUTS["separate"])  # type: ignore[arg-type]
    assert sorted(row >= 10 for row, _ in scored(drawn)) == [False] * 12 + [True] * 4
    assert [part.name for part in data.reports()["train"].parts] == [one, other]


# for people ---------------------------------------------------------------------------------------------------------------


def test_preview_shows_the_prompt_and_both_answers(tmp_path: Path) -> None:
    path = written(tmp_path, [{**KINDS["whole conversations"][0], "margin": 2}])
    (row,) = pairs_of(path, tmp_path).preview(1)
    assert [(piece.text, piece.scored) for piece in row.pieces] == [
        ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", False),
        ("\n── chosen: ", False),
        ("yes thank you<|im_end|>", True),
        ("\n", False),
        ("\n── rejected: ", False),
        ("no<|im_end|>", True),
        ("\n", False),
        ("\n── margin: 2", False),
    ]
    assert row.where == f"{path}, line 1" and row.scored == row.pieces[2].tokens + row.pieces[5].tokens


def test_a_module_that_learns_every_answer_is_refused(tmp_path: Path) -> None:
    module = Preferring()
    module.imitates = SFT.imitates
    with pytest.raises(
        Refusal, match="learns every answer that it is given, and PreferenceData has answers that are not"
    ):
        trainer_of(tmp_path).fit(module, pairs_of(written(tmp_path, uneven(4)), tmp_path))


@pytest.mark.parametrize(
    "options, match",
    [
        (
            {"packing": False, "share_prompts": True},
            "PreferenceData.share_prompts lays a prompt out once among packed rows",
        ),
        ({"max_tokens": 64}, "PreferenceData.max_tokens fills packed rows: set packing true"),
        ({"bad_rows": "skip"}, "PreferenceData.bad_rows must be one of"),
        ({"max_length": 1}, "PreferenceData.max_length must be at least 2"),
    ],
)
def test_bad_arguments_are_refused_in_the_constructor(options: dict[str, Any], match: str) -> None:
    with pytest.raises(Refusal, match=match):
        PreferenceData("pairs.jsonl", **options)
