"""GenerationMetrics: the contract, what is asked and expected, and the scores."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from lightning_ft import LoRA, Refusal
from lightning_ft.callbacks.generation_metrics import GenerationMetrics
from lightning_ft.data.collate import Segment, collate
from lightning_ft.engine.batch import Source
from lightning_ft.engine.generation import fits, generate, prompts_and_references
from tests.contract import Case, checks_for
from tests.contract.subjects import PlainNet, SpeakingNet, chat_job, fit, loader, trainer
from tests.modules.preference import dpo, kto, write_job

SMALL = {"rows": 6, "max_new_tokens": 3, "batch_size": 4}
CASE = Case(GenerationMetrics, small=SMALL, idle=SMALL)


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


# What is asked and expected


def segment(row, length, *spans):
    import numpy as np

    return Segment(np.arange(10 * row, 10 * row + length), np.array(spans, dtype=np.int64).reshape(-1, 2), row)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_the_last_answer_is_expected_and_all_before_it_continued(packed):
    segments = [
        segment(1, 8, (3, 5), (6, 8)),  # two turns
        segment(2, 4, (2, 4)),
        segment(3, 5, (0, 2), (4, 5)),  # the first token of a row is never scored
        segment(4, 5),  # nothing scored
        segment(-1, 2),
    ]
    assert prompts_and_references(collate(segments, packed=packed)) == [
        ([10, 11, 12, 13, 14, 15], [16, 17]),
        ([20, 21], [22, 23]),
        ([30, 31, 32, 33], [34]),
    ]


def test_with_an_encoder_what_it_reads_is_continued():
    batch = collate([segment(1, 4, (1, 4)), segment(2, 3, (1, 3))], packed=False)
    batch.source = Source(torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool())
    assert prompts_and_references(batch) == [([5, 6], [11, 12, 13]), ([7, 8, 9], [21, 22])]


# The scores


def bleu_4(pairs):
    """Papineni et al., 2002, over a corpus, of texts whose words are apart already."""
    matches, totals, answer_length, reference_length = [0] * 4, [0] * 4, 0, 0
    for answer, reference in pairs:
        a, r = answer.split(), reference.split()
        answer_length, reference_length = answer_length + len(a), reference_length + len(r)
        for n in range(1, 5):
            grams = [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (a, r)]
            matches[n - 1] += sum((grams[0] & grams[1]).values())
            totals[n - 1] += sum(grams[0].values())
    if not all(matches):
        return 0.0
    brevity = min(0.0, 1 - reference_length / answer_length)
    return math.exp(brevity + sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / 4)


def rouge_l(answer, reference):
    """Lin, 2004: F of the longest common subsequence of words, with equal weights."""
    a, r = answer.split(), reference.split()
    table = [[0] * (len(r) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(r):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 2 * common / (len(a) + len(r)) if common else 0.0


PAIRS = [
    ("the cat sat on the mat", "the cat sat on the mat"),
    ("a dog ran over there today", "the dog ran over there"),
    ("nothing in common here at all", "some other words"),
    ("the bird in the big tree sings", "the small bird in the big tree sings well"),
]


class Answering(SpeakingNet):
    """Gives the answers above, with some white space around."""

    def prompts_and_references(self, batch):
        first = len(self.asked)
        self.asked += batch[1].tolist()
        return [(str(n), PAIRS[n % 4][1]) for n in range(first, len(self.asked))]

    def on_validation_epoch_start(self):
        self.asked = []
        self.batches = []

    def generate(self, prompts, *, max_new_tokens, temperature):
        self.batches.append(len(prompts))
        assert (max_new_tokens, temperature) == (9, 0.0)
        return [f" {PAIRS[int(prompt) % 4][0]}\n" for prompt in prompts]


def test_scores_are_those_of_the_papers(tmp_path):
    net = Answering()
    technique = GenerationMetrics(10, max_new_tokens=9, batch_size=4)
    run = trainer(tmp_path, technique, GenerationMetrics(2, max_new_tokens=9, name="two"), limit_val_batches=4)
    (metrics,) = run.validate(net, loader(), verbose=False)
    pairs = [PAIRS[n % 4] for n in range(10)]
    assert metrics["val/exact_match"] == pytest.approx(3 / 10)
    assert metrics["val/bleu"] == pytest.approx(bleu_4(pairs), rel=1e-5) and 0.2 < bleu_4(pairs) < 0.9
    assert metrics["val/rougeL"] == pytest.approx(sum(rouge_l(*pair) for pair in pairs) / 10, rel=1e-5)
    assert net.batches == [4, 4, 2, 2]
    assert metrics["val/two/exact_match"] == 0.5
    (metrics,) = trainer(tmp_path, technique, limit_test_batches=4).test(Measured(), loader(), verbose=False)
    assert metrics["test/exact_match"] == pytest.approx(3 / 10)


class Measured(Answering):
    def test_step(self, batch, batch_idx):
        pass

    def on_test_epoch_start(self):
        self.on_validation_epoch_start()


def test_a_model_that_has_learned_its_rows_answers_them(chat, tmp_path):
    """Sixteen rows by heart: all answers right, which no wrong prompt or cut-off reference could give."""
    module, data = chat_job(chat, tmp_path, model={"optimizer": None, "lr": 3e-3})
    run = trainer(
        tmp_path, GenerationMetrics(16, max_new_tokens=12), max_steps=80, max_epochs=80, check_val_every_n_epoch=40,
        limit_val_batches=2,
    )  # fmt: skip
    run.fit(module, data)
    assert float(run.callback_metrics["val/exact_match"]) == 1.0
    rows = [json.loads(line) for line in (chat / "rows.jsonl").read_text().splitlines()]
    assert module.generate([rows[3]["prompt"]], max_new_tokens=12)[0].strip() == rows[3]["completion"].strip()


def two(chat, folder, rows):
    """A validation on two ranks, all rows together."""
    from pathlib import Path

    module, data = chat_job(Path(chat), Path(folder), data={"batch_size": 2})
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "limit_val_batches": 1.0}
    run = trainer(Path(folder), LoRA(2), GenerationMetrics(rows, max_new_tokens=3), max_steps=4, **options)
    run.fit(module, data)
    return {name: float(run.callback_metrics[f"val/{name}"]) for name in ("exact_match", "bleu", "rougeL")}


def test_two_ranks_share_the_rows(chat, tmp_path, two_ranks):
    ranks = two_ranks.run(
        "tests.callbacks.test_generation_metrics:two", chat=str(chat), folder=str(tmp_path / "two"), rows=16
    )
    assert ranks[0] == ranks[1]
    module, data = chat_job(chat, tmp_path, data={"batch_size": 4})
    run = trainer(tmp_path, LoRA(2), GenerationMetrics(16, max_new_tokens=3), max_steps=4, limit_val_batches=1.0)
    run.fit(module, data)
    assert ranks[0] == pytest.approx({n: float(run.callback_metrics[f"val/{n}"]) for n in ranks[0]}, abs=1e-6)


# Token ids as prompts


def test_ids_are_continued_as_they_are(chat, tmp_path):
    module, data = chat_job(chat, tmp_path)
    trainer(tmp_path, LoRA(2), max_steps=1).fit(module, data)
    texts = ["ask 1:", "a longer question: 22"]
    ids = [list(module.tokenizer(text)["input_ids"]) for text in texts]
    assert module.generate(ids, max_new_tokens=5) == module.generate(texts, max_new_tokens=5)


def test_an_encoder_s_prompt_stands_at_its_first_position():
    """BART counts positions from the first column: a shorter prompt must be answered in a batch as alone."""
    from transformers import BartConfig, BartForConditionalGeneration

    from tests.models.architectures import V

    torch.manual_seed(0)
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=V, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, init_std=0.4,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, pad_token_id=1,
            eos_token_id=2, bos_token_id=0, decoder_start_token_id=2, forced_eos_token_id=None,
        )
    ).eval()  # fmt: skip
    decode = SimpleNamespace(pad_token_id=1, decode=lambda row, skip_special_tokens: row.tolist())
    short, long = [5, 6, 7], [9, 8, 7, 6, 5, 4, 3]
    together = generate(model, decode, [short, long], max_new_tokens=6)
    alone = [generate(model, decode, [prompt], max_new_tokens=6)[0] for prompt in (short, long)]
    assert [text[: len(other)] for text, other in zip(together, alone, strict=True)] == alone
    assert alone[0] != alone[1]
    expected = model.generate(input_ids=torch.tensor([short]), max_new_tokens=6, do_sample=False)[0].tolist()
    assert alone[0] == str(expected)
    assert fits(model, 32, 8) and not fits(model, 33, 8) and not fits(model, 3, 32)


# What is refused


def test_modules_and_batches_without_answers_are_refused(tmp_path):
    with pytest.raises(Refusal, match="GenerationMetrics needs a module with generate.*PlainNet has none"):
        fit(tmp_path, PlainNet(), GenerationMetrics())

    class Silent(SpeakingNet):
        prompts_and_references = None

    with pytest.raises(Refusal, match="cannot tell prompts from answers in a list of this job; define prompts_and_ref"):
        fit(tmp_path, Silent(), GenerationMetrics(), max_steps=4)

    class Classes(SpeakingNet):
        task = "sequence_classification"
        writes = False

    with pytest.raises(Refusal, match="compares texts, and sequence_classification writes none"):
        fit(tmp_path, Classes(), GenerationMetrics())


@pytest.mark.parametrize("packing", [True, False])
def test_of_preferences_the_better_answers_are_compared_with(tmp_path, packing):
    """Shared prompts, rejected and mismatched answers and bad ones are left out."""
    job = write_job(tmp_path)
    for make, file, answer in ((dpo, "pairs.jsonl", "chosen"), (kto, "rated.jsonl", "completion")):
        rows = [json.loads(line) for line in (job / file).read_text().splitlines()]
        rows = [row for row in rows if row.get("label", True)]
        module, data = make(job, tmp_path, data={"packing": packing})
        metrics = Watched(rows=99, max_new_tokens=2)
        trainer(tmp_path, metrics, limit_val_batches=None).validate(module, data, verbose=False)
        told = {module.tokenizer.decode(prompt): reference for prompt, reference in metrics.told}
        assert told == {row["prompt"]: row[answer] for row in rows}


class Watched(GenerationMetrics):
    """Keeps what it has compared."""

    def _answers(self, module):
        self.told = list(self._pairs)
        return super()._answers(module)
