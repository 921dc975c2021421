"""Distillation of language models: the task's loss and soft targets in one pass over the output layer, and where in two."""

import shutil

import pytest
import torch
import transformers as hf

from lightning_ft import Distillation, GradientSurgery, LoRA, LossBalancing, Replay
from lightning_ft.engine.step import Step
from lightning_ft.models.causal import LanguageHead
from tests.callbacks.test_distillation import bases, chat_run, larger, teach  # noqa: F401 (fixtures)
from tests.contract.subjects import state


@pytest.fixture
def passes(monkeypatch):
    """How many losses each pass over the student's output layer made."""
    made, original = [], LanguageHead.sum_scores

    def spy(self, hidden, labels, losses):
        made.append(len(losses))
        original(self, hidden, labels, losses)

    monkeypatch.setattr(LanguageHead, "sum_scores", spy)
    return made


@pytest.fixture
def apart(monkeypatch):
    """Called: from here on each loss has a pass of its own, the module's with its gradient in backward."""

    def split():
        monkeypatch.setattr(Step, "ask", lambda self, loss: None)
        monkeypatch.setattr(Step, "together", lambda self, trains_head: [])

    return split


@pytest.fixture(scope="module")
def untied(chat, tmp_path_factory):
    """The tiny chat model with an output layer of its own."""
    folder = tmp_path_factory.mktemp("untied")
    config = hf.AutoConfig.from_pretrained(chat / "model")
    config.tie_word_embeddings = False
    torch.manual_seed(4)
    hf.LlamaForCausalLM(config).save_pretrained(folder / "model")
    hf.AutoTokenizer.from_pretrained(chat / "model").save_pretrained(folder / "model")
    shutil.copy(chat / "rows.jsonl", folder)
    return folder


CASES = {
    "tied": ("chat", None, {}),
    "a head of its own": ("untied", None, {"divergence": "jensen_shannon", "task": 0.3, "soft_targets": 2.0}),
    "soft targets alone": ("chat", None, {"divergence": "reverse_kl", "task": 0.0}),
    "LoRA": ("chat", lambda: LoRA(2), {"divergence": "total_variation"}),
    "LoRA on the head": ("untied", lambda: LoRA(2, target=["q_proj", "lm_head"]), {"divergence": "skewed_kl"}),
    "layers beside": ("chat", None, {"recipe": "distilbert"}),
    "itself": ("untied", None, {"divergence": "skewed_reverse_kl"}),
    "padded rows": ("chat", None, {}),
}


def gradients(case, request, tmp_path, teacher):
    kind, part, arguments = CASES[case]
    technique = Distillation(
        "self" if case == "itself" else str(teacher), chunk_size=7, dtype="float32", **{"temperature": 2.0, **arguments}
    )
    data = {"batch_size": 4, **({"packing": False} if case == "padded rows" else {})}
    job = {"data": data, "max_steps": 2, "accumulate_grad_batches": 2}
    _, watch, steps = chat_run(request.getfixturevalue(kind), tmp_path, technique, *([part()] if part else []), **job)
    return watch.logged[-1], steps.gradients


@pytest.mark.parametrize("case", CASES)
def test_one_pass_learns_what_two_do(case, larger, passes, apart, request, tmp_path):  # noqa: F811
    """Two steps of accumulated windows: their logged terms and the gradients of all that is trained."""
    one = gradients(case, request, tmp_path, larger)
    assert passes == [2] * 4
    apart()
    two = gradients(case, request, tmp_path, larger)
    assert passes == [2] * 4 + [1] * 4
    assert one[0].keys() == two[0].keys()
    for name, value in one[0].items():
        assert value == pytest.approx(two[0][name], rel=1e-4, abs=1e-6), name
    for a, b in zip(one[1], two[1], strict=True):
        assert a.keys() == b.keys()
        for name, gradient in a.items():
            torch.testing.assert_close(gradient, b[name], rtol=1e-4, atol=1e-5, msg=name)


def test_an_encoder_decoder_too(bases, passes, apart, tmp_path):  # noqa: F811
    ends = []
    for _ in range(2):
        module, _ = teach(bases, tmp_path, "seq2seq_lm", temperature=2.0, soft_targets=0.7, steps=2)
        ends.append(state(module))
        apart()
    assert passes == [2, 2, 1, 1]
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-6)


def test_two_halves_are_one_batch(chat, larger, tmp_path):  # noqa: F811
    """Rows of uneven length, so that the halves have other counts of tokens."""
    found = []
    for size, accumulate in ((8, 1), (4, 2)):
        technique = Distillation(str(larger), temperature=2.0, dtype="float32")
        options = {"data": {"batch_size": size}, "accumulate_grad_batches": accumulate, "max_steps": 2}
        _, _, steps = chat_run(chat, tmp_path, technique, **options)
        found.append(steps)
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-5)
    for a, b in zip(found[0].gradients, found[1].gradients, strict=True):
        for name, gradient in a.items():
            torch.testing.assert_close(gradient, b[name], rtol=1e-4, atol=1e-5, msg=name)


def test_two_teachers_share_the_pass(chat, larger, passes, tmp_path):  # noqa: F811
    """Each logs what it logs alone."""
    first, second = (
        lambda: Distillation(str(larger), dtype="float32"),
        lambda: Distillation("self", divergence="reverse_kl", soft_targets=0.5, name="before"),
    )
    _, both, _ = chat_run(chat, tmp_path, first(), second(), max_steps=1)
    assert passes == [3]
    for make in (first, second):
        technique = make()
        name = f"train/{technique.name}/soft_targets"
        _, alone, _ = chat_run(chat, tmp_path, technique, max_steps=1)
        assert both.logged[0][name] == pytest.approx(alone.logged[0][name], rel=1e-5, abs=1e-6)


SAID = ["sft", "distillation/soft_targets"]


@pytest.mark.parametrize("beside", [lambda: GradientSurgery("pcgrad"), lambda: LossBalancing(terms=SAID)])
def test_terms_that_are_weighed_later_have_passes_of_their_own(beside, chat, larger, passes, tmp_path):  # noqa: F811
    _, watch, _ = chat_run(chat, tmp_path, Distillation(str(larger), dtype="float32"), beside(), max_steps=2)
    assert passes == [1, 1] and watch.logged[1]["train/distillation/soft_targets"] > 0


def test_rows_that_are_run_again_are_not_compared(chat, larger, passes, tmp_path):  # noqa: F811
    chat_run(chat, tmp_path, Distillation(str(larger), dtype="float32"), Replay(8, rows=2), max_steps=3)
    assert passes == [2, 2, 2]
