"""Distillation: the contract, and what only it does."""

import copy
import shutil

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers as hf

import lightning_ft
from lightning_ft import AGEM, DPO, GRPO, Distillation, LoRA, OnPolicyDistillation, Refusal, Replay
from lightning_ft.engine.own_student import logits_of
from lightning_ft.engine.rewards import Reward
from lightning_ft.engine.student import check_student
from lightning_ft.engine.teacher import fingerprint_of
from lightning_ft.functional import distillation as maths
from lightning_ft.nn.packed import packed_layers
from tests.callbacks.distillation_jobs import on_ranks, own_on_ranks
from tests.contract import Case, checks_for
from tests.contract.subjects import PlainNet, Steps, chat_job, fit, rows, state, trainer
from tests.modules.tasks import SIZE, job, write_base

CASE = Case(Distillation, small={"temperature": 2.0}, idle={"soft_targets": 0.0})


@pytest.mark.parametrize("check", checks_for(CASE))
def test_contract(check, place):
    check(CASE, place)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders: bert and t5 students, and trained-looking teachers of each task, wider and deeper ones among them."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("bert", "t5", "llama"):
        write_base(kind, folder / kind)
    torch.manual_seed(7)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    names = {0: "high", 1: "low", 2: "middle"}
    for name, labels, kind in (
        ("classes", names, hf.BertForSequenceClassification),
        ("words", {0: "B-X", 1: "I-X", 2: "O"}, hf.BertForTokenClassification),
        ("numbers", None, hf.BertForSequenceClassification),
        ("several", {0: "a", 1: "b", 2: "c"}, hf.BertForSequenceClassification),
    ):
        size = {**SIZE, "hidden_size": 48, "num_hidden_layers": 4}
        config = hf.BertConfig.from_pretrained(folder / "bert", **{**size, **quiet})
        if labels is None:
            config.num_labels, config.problem_type = 1, "regression"
        else:
            config.id2label, config.label2id = labels, {v: k for k, v in labels.items()}
        if name == "several":
            config.problem_type = "multi_label_classification"
        kind(config).save_pretrained(folder / name)
        hf.AutoTokenizer.from_pretrained(folder / "bert").save_pretrained(folder / name)
    for kind in ("t5", "llama"):
        config = hf.AutoConfig.from_pretrained(folder / kind)
        cls = hf.T5ForConditionalGeneration if kind == "t5" else hf.LlamaForCausalLM
        if kind == "t5":
            config.num_layers, config.num_decoder_layers = 3, 3
        else:
            config.num_hidden_layers, config.hidden_size, config.vocab_size = 4, 48, config.vocab_size + 5
        model = cls(config)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        model.save_pretrained(folder / f"{kind}-teacher")
        hf.AutoTokenizer.from_pretrained(folder / kind).save_pretrained(folder / f"{kind}-teacher")
    return folder


TEACHERS = {
    "sequence_classification": "classes",
    "token_classification": "words",
    "regression": "numbers",
    "multi_label": "several",
    "seq2seq_lm": "t5-teacher",
}


class Watch(pl.Callback):
    """Batches and what was logged."""

    def __init__(self):
        self.batches, self.logged = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def teach(bases, tmp_path, task, *, model=None, data=None, callbacks=(), steps=1, **arguments):
    """(module, watch) after a fit of few steps at rate zero point one, the teacher's numbers in float32."""
    base = "t5" if task == "seq2seq_lm" else "bert"
    options = {"optimizer": torch.optim.SGD, "lr": 0.1, **(model or {})}
    module, rows_ = job(bases / base, tmp_path, task, model=options, shuffle=False, **{"batch_size": 8, **(data or {})})
    watch = Watch()
    technique = Distillation(str(bases / TEACHERS[task]), dtype="float32", **arguments)
    run = trainer(tmp_path, technique, watch, *callbacks, max_steps=steps, limit_val_batches=0)
    run.fit(module, rows_)
    return module, watch


@torch.no_grad()
def by_hand(bases, task, batch, module, temperature):
    """The first step's soft targets in float64, by transformers' own forward of each row alone."""
    name = {"multi_label": "sequence_classification", "regression": "sequence_classification"}.get(task, task)
    auto = {
        "sequence_classification": hf.AutoModelForSequenceClassification,
        "token_classification": hf.AutoModelForTokenClassification,
        "seq2seq_lm": hf.AutoModelForSeq2SeqLM,
    }[name]
    teacher = auto.from_pretrained(bases / TEACHERS[task]).double().eval()
    student = copy.deepcopy(module.model).double().eval()
    total, count = 0.0, 0
    for number, row in enumerate(batch.rows.tolist()):
        if row < 0:
            continue
        if batch.bounds is not None:
            begin, end = batch.bounds[number], batch.bounds[number + 1]
            ids = batch.ids[:, begin:end]
        else:
            begin, ids = number * batch.ids.shape[1], batch.ids[number : number + 1, : int(batch.mask[number].sum())]
        given = {"input_ids": ids}
        if task == "seq2seq_lm":
            source = batch.source.ids[number : number + 1, : int(batch.source.mask[number].sum())]
            given = {"input_ids": source, "decoder_input_ids": ids}
        z = [m(**given).logits[0] for m in (student, teacher)]
        if task in ("token_classification", "seq2seq_lm"):
            at = batch.scored[batch.segment_of_scored == number] - begin
            z = [one[at] for one in z]
        pairs = [one.reshape(-1, one.shape[-1]) for one in z]
        for s, t in zip(*pairs, strict=True):
            if task == "regression":
                total += float((s - t) ** 2)
            elif task == "multi_label":
                p, q = torch.sigmoid(s / temperature), torch.sigmoid(t / temperature)
                each = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
                total += float(each.mean()) * temperature**2
            else:
                p, q = torch.softmax(s / temperature, -1), torch.softmax(t / temperature, -1)
                total += float((q * (q / p).log()).sum()) * temperature**2
            count += 1
    return total / count


@pytest.mark.parametrize("task", TEACHERS)
def test_every_task_learns_what_the_formula_says(task, bases, tmp_path):
    """The logged mean of the first step, at a rate of zero so that the student is still what it was."""
    model = {"optimizer": None, "lr": 1e-12}
    module, watch = teach(bases, tmp_path, task, model=model, soft_targets=0.7, temperature=2.0)
    expected = by_hand(bases, task, watch.batches[0], module, 2.0)
    logged = watch.logged[0]
    assert logged["train/distillation/soft_targets"] == pytest.approx(expected, rel=1e-4)
    assert logged["train/loss"] == pytest.approx(logged["train/sft"] + 0.7 * expected, rel=1e-4)
    assert logged["train/distillation/t2"] == (1.0 if task == "regression" else 4.0)  # T divides no number


@pytest.fixture(scope="module")
def larger(chat, tmp_path_factory):
    """A deeper, wider teacher of the tiny chat model, with a padded vocabulary."""
    folder = tmp_path_factory.mktemp("larger") / "model"
    config = hf.AutoConfig.from_pretrained(chat / "model")
    config.num_hidden_layers, config.vocab_size = 4, config.vocab_size + 3
    config.hidden_size = 2 * config.hidden_size
    torch.manual_seed(3)
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(chat / "model").save_pretrained(folder)
    return folder


def chat_run(chat, tmp_path, technique, *more, model=None, data=None, **options):
    module, rows_ = chat_job(chat, tmp_path, model=model or {}, data=data or {})
    watch, steps = Watch(), Steps()
    run = trainer(tmp_path, *([technique] if technique else []), *more, watch, steps, **{"max_steps": 2, **options})
    run.fit(module, rows_)
    return module, watch, steps


@torch.no_grad()
def dense(module, teacher, batch, divergence, temperature, beta):
    """Mean over the scored tokens from all logits of both models in float64, each row alone, padding of the vocabulary cut."""
    student = copy.deepcopy(module.model).double().eval()
    size, found = student.config.vocab_size, []
    for number in range(len(batch.rows)):
        begin, end = batch.bounds[number], batch.bounds[number + 1]
        at = batch.scored[batch.segment_of_scored == number] - begin
        ids = batch.ids[:, begin:end]
        logp, logq = (torch.log_softmax(m(ids).logits[0, at, :size] / temperature, -1) for m in (student, teacher))
        if divergence == "jensen_shannon":
            m = (beta * logq.exp() + (1 - beta) * logp.exp()).log()
            value = beta * (logq.exp() * (logq - m)).sum(-1) + (1 - beta) * (logp.exp() * (logp - m)).sum(-1)
            found.append(value / (beta * (1 - beta)))
        elif divergence == "total_variation":
            found.append((logp.exp() - logq.exp()).abs().sum(-1) / 2)
        elif divergence.startswith("skewed"):
            a, b = (logp, logq) if "reverse" in divergence else (logq, logp)
            found.append((a.exp() * (a - (beta * a.exp() + (1 - beta) * b.exp()).log())).sum(-1))
        else:
            a, b = (logq, logp) if divergence == "forward_kl" else (logp, logq)
            found.append((a.exp() * (a - b)).sum(-1))
    return float(torch.cat(found).mean()) * (temperature if divergence == "total_variation" else temperature**2)


@pytest.mark.parametrize("divergence", maths.DIVERGENCES)
def test_language_models_in_chunks_equal_all_logits_at_once(divergence, chat, larger, tmp_path):
    teacher = hf.AutoModelForCausalLM.from_pretrained(larger).double().eval()
    found = []
    for chunk in (3, 256):
        technique = Distillation(
            str(larger), divergence=divergence, temperature=1.5, beta=0.2, chunk_size=chunk, dtype="float32"
        )
        module, watch, steps = chat_run(chat, tmp_path, technique, model={"lr": 1e-12}, max_steps=1)
        found.append(steps.gradients[0])
    expected = dense(module, teacher, watch.batches[0], divergence, 1.5, 0.2)
    assert watch.logged[0]["train/distillation/soft_targets"] == pytest.approx(expected, rel=1e-4)
    assert watch.logged[0]["train/distillation/t2"] == (1.5 if divergence == "total_variation" else 2.25)
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)


def test_packed_is_padded(chat, larger, tmp_path):
    gradients = []
    for packing in (True, False):
        technique = Distillation(str(larger), hidden=1.0, layers="uniform", task=0.0, dtype="float32")
        _, watch, steps = chat_run(chat, tmp_path, technique, data={"packing": packing}, max_steps=1)
        assert (watch.batches[0].bounds is not None) == packing
        gradients.append(steps.gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)


def test_the_same_model_as_teacher_costs_and_pulls_nothing(chat, tmp_path):
    for teacher in ("self", str(chat / "model")):
        technique = Distillation(teacher, task=0.0, hidden=1.0, cosine=1.0, dtype="float32")
        _, watch, steps = chat_run(chat, tmp_path, technique, max_steps=1)
        for kind in ("soft_targets", "hidden", "cosine"):
            assert abs(watch.logged[0][f"train/distillation/{kind}"]) < 1e-5
        assert max(float(g.abs().max()) for g in steps.gradients[0].values()) < 1e-4


def test_self_is_the_model_before_the_fit_with_lora_and_without(chat, tmp_path):
    """The second step's divergence equals that from a copy of the start as an external teacher."""
    for more in ([], [LoRA(2)]):
        logged = []
        for teacher in ("self", str(chat / "model")):
            technique = Distillation(teacher, temperature=2.0, dtype="float32")
            _, watch, _ = chat_run(chat, tmp_path, technique, *copy.deepcopy(more), max_steps=3)
            logged.append([entry["train/distillation/soft_targets"] for entry in watch.logged])
        assert logged[0] == pytest.approx(logged[1], rel=1e-4, abs=1e-6) and logged[0][2] > 1e-4


def test_a_lora_student_trains_its_factors_alone_and_the_teacher_is_in_no_file(chat, larger, tmp_path, monkeypatch):
    technique = Distillation(str(larger), hidden=0.5, projection_rate=3.0, dtype="float32")
    module, rows_ = chat_job(chat, tmp_path, model={"optimizer": None, "lr": 1e-3, "weight_decay": 0.1})
    seen = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen["frozen"] = technique._lesson._teacher.observer.view.model
            seen["bytes"] = {n: p.clone() for n, p in seen["frozen"].state_dict().items()}
            seen["modes"] = {m.training for m in seen["frozen"].modules()}
            seen["groups"] = [(g["lr"], len(g["params"])) for g in trainer.optimizers[0].param_groups]
            held = {id(p) for p in seen["frozen"].parameters()}
            assert not held & {id(p) for p in pl_module.parameters()}
            assert not held & {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}

    run = trainer(tmp_path, LoRA(2), technique, Look(), max_steps=3)
    run.fit(module, rows_)
    assert seen["modes"] == {False} and not any(p.requires_grad for p in seen["frozen"].parameters())
    assert all(torch.equal(p, seen["bytes"][n]) for n, p in seen["frozen"].state_dict().items())
    trained = [n for n, p in module.named_parameters() if p.requires_grad]
    assert all("lora_" in n or n == "distillation_projections.layer_2.weight" for n in trained)
    assert any(count == 1 and lr == pytest.approx(3e-3) for lr, count in seen["groups"])
    file = tmp_path / "run.ckpt"
    run.save_checkpoint(file)
    saved = torch.load(file, weights_only=True)
    assert set(saved["state_dict"]) == set(trained)
    (recipe,) = [t for t in saved["lightning_ft"]["techniques"] if t["class_path"].endswith("Distillation")]
    assert recipe["init_args"]["teacher_width"] == seen["frozen"].config.hidden_size
    shutil.copytree(larger, tmp_path / "gone")
    again, rows_ = chat_job(chat, tmp_path)
    technique = Distillation(str(tmp_path / "gone"), hidden=0.5, quantize="nf4", dtype="float32")
    technique.quantize = None  # a checkpoint that asks for what this machine may lack
    run_again = trainer(tmp_path, LoRA(2), technique, max_steps=1)
    run_again.fit(again, rows_)
    technique.quantize = "nf4"
    run_again.save_checkpoint(tmp_path / "gone.ckpt")
    shutil.rmtree(tmp_path / "gone")
    monkeypatch.setattr("lightning_ft.engine.lesson.check_mode", lambda mode: pytest.fail("nobody packs"))
    lightning_ft.load(tmp_path / "gone.ckpt")
    run_again.validate(again, rows_, verbose=False)
    with pytest.raises(Refusal, match="There is no folder"):
        trainer(tmp_path, Distillation(str(tmp_path / "gone")), max_steps=1).fit(*chat_job(chat, tmp_path))
    loaded = lightning_ft.load(file)
    assert torch.equal(
        loaded.distillation_projections["layer_2"].weight, module.distillation_projections["layer_2"].weight
    )


def test_resumed_is_unbroken_and_another_teacher_is_refused(chat, larger, tmp_path):
    def make(teacher=larger):
        return Distillation(str(teacher), hidden=0.5, temperature=2.0, dtype="float32")

    whole, data = chat_job(chat, tmp_path)
    trainer(tmp_path, make(), max_steps=4, max_epochs=4).fit(whole, data)
    first, data = chat_job(chat, tmp_path)
    run = trainer(tmp_path, make(), max_steps=3, max_epochs=4)
    run.fit(first, data)
    run.save_checkpoint(tmp_path / "three.ckpt")
    second, data = chat_job(chat, tmp_path)
    trainer(tmp_path, make(), max_steps=4, max_epochs=4).fit(second, data, ckpt_path=tmp_path / "three.ckpt")
    assert all(torch.equal(value, state(second)[name]) for name, value in state(whole).items())
    other = hf.AutoModelForCausalLM.from_pretrained(larger)
    with torch.no_grad():
        other.lm_head.weight.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    hf.AutoTokenizer.from_pretrained(larger).save_pretrained(tmp_path / "other")
    third, data = chat_job(chat, tmp_path)
    with pytest.raises(Refusal, match="The run was begun with another teacher"):
        trainer(tmp_path, make(tmp_path / "other"), max_steps=4, max_epochs=4).fit(
            third, data, ckpt_path=tmp_path / "three.ckpt"
        )


def test_a_teacher_is_known_in_any_dtype_by_each_of_its_numbers(larger):
    model = hf.AutoModelForCausalLM.from_pretrained(larger)
    known = fingerprint_of(model)
    assert fingerprint_of(copy.deepcopy(model).to(torch.bfloat16)) == known
    with torch.no_grad():
        model.lm_head.weight[3, 5] *= 1.01
    assert fingerprint_of(model) != known


def test_a_teacher_in_four_bits(chat, larger, tmp_path):
    pytest.importorskip("bitsandbytes")
    logged, packed = [], []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            packed.append(set(packed_layers(technique._lesson._teacher.observer.view.model)))

    for quantize in (None, "nf4"):
        technique = Distillation(str(larger), quantize=quantize, dtype="float32")
        _, watch, _ = chat_run(chat, tmp_path, technique, LoRA(2), Look(), max_steps=1)
        logged.append(watch.logged[0]["train/distillation/soft_targets"])
    assert not packed[0] and len(packed[1]) == 4 * 7  # every linear layer of its four blocks
    assert logged[0] != logged[1] and logged[1] == pytest.approx(logged[0], rel=0.5)


def test_a_checkpoint_and_an_adapter_teach_as_the_model_they_are(chat, tmp_path):
    trained, data = chat_job(chat, tmp_path)
    run = trainer(tmp_path, LoRA(2), max_steps=3)
    run.fit(trained, data)
    run.save_checkpoint(tmp_path / "teacher.ckpt")
    from lightning_ft.formats.merged import export_merged
    from lightning_ft.formats.peft import export_peft

    export_peft(trained.model, tmp_path / "adapter", base_model_name=str(chat / "model"))
    export_merged(trained.model, trained.tokenizer, tmp_path / "merged")
    logged = []
    for teacher in ("teacher.ckpt", "adapter", "merged"):
        technique = Distillation(str(tmp_path / teacher), dtype="float32")
        _, watch, _ = chat_run(chat, tmp_path, technique, max_steps=1)
        logged.append(watch.logged[0]["train/distillation/soft_targets"])
    assert logged == pytest.approx([logged[0]] * 3, rel=1e-3) and logged[0] > 1e-3


def test_a_checkpoint_of_an_ordinary_fit_shows_its_maps(bases, tmp_path):
    """MiniLM's recipe with a teacher that was trained with another attention, as it teaches when it is written as a folder."""
    teacher, rows_ = job(bases / "bert", tmp_path, "sequence_classification", batch_size=8)
    run = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    run.fit(teacher, rows_)
    run.save_checkpoint(tmp_path / "teacher.ckpt")
    assert teacher.model.config._attn_implementation != "eager"
    teacher.model.save_pretrained(tmp_path / "folder")
    teacher.tokenizer.save_pretrained(tmp_path / "folder")
    logged = []
    for name in ("teacher.ckpt", "folder"):
        options = {"attention": "eager", "optimizer": torch.optim.SGD, "lr": 0.1}
        student, rows_ = job(
            bases / "bert", tmp_path, "sequence_classification", model=options, packing=False, batch_size=8
        )
        technique, watch = Distillation(str(tmp_path / name), recipe="minilm", dtype="float32"), Watch()
        trainer(tmp_path, technique, watch, max_steps=1, limit_val_batches=0).fit(student, rows_)
        logged.append([watch.logged[0][f"train/distillation/{kind}"] for kind in ("attention", "values")])
    assert logged[0] == pytest.approx(logged[1], rel=1e-3) and min(logged[0]) > 1e-7


def test_distilbert_is_its_weights_and_hidden_states_are_transformers_own(bases, tmp_path):
    model = {"optimizer": None, "lr": 1e-12}
    module, watch = teach(bases, tmp_path, "sequence_classification", model=model, recipe="distilbert")
    logged = watch.logged[0]
    terms = [logged[f"train/{name}"] for name in ("sft", "distillation/soft_targets", "distillation/cosine")]
    assert logged["train/loss"] == pytest.approx(2 * terms[0] + 5 * terms[1] + terms[2], rel=1e-5)
    assert logged["train/distillation/t2"] == 4.0
    batch, total = watch.batches[0], 0.0
    teacher = hf.AutoModel.from_pretrained(bases / "classes", add_pooling_layer=False).double().eval()
    student = copy.deepcopy(module.model).double().eval()
    matrix = module.distillation_projections["layer_2"].weight.detach().double()
    teacher.requires_grad_(False), student.requires_grad_(False)
    for number in range(len(batch.rows)):
        ids = batch.ids[:, batch.bounds[number] : batch.bounds[number + 1]]
        s = student.base_model(ids, output_hidden_states=True).hidden_states[2][0] @ matrix.T
        t = teacher(ids, output_hidden_states=True).hidden_states[4][0]
        total += float((1 - F.cosine_similarity(s, t, dim=-1)).mean())
    assert terms[2] == pytest.approx(total / len(batch.rows), rel=1e-4)


def test_minilm_compares_maps_and_relations_of_padded_rows(bases, tmp_path):
    model = {"attention": "eager", "optimizer": None, "lr": 1e-12}
    module, watch = teach(
        bases,
        tmp_path,
        "sequence_classification",
        model=model,
        data={"packing": False},
        recipe="minilm",
        layers="uniform",
    )
    batch, maps, values = watch.batches[0], 0.0, 0.0
    teacher = hf.AutoModel.from_pretrained(bases / "classes", attn_implementation="eager").double().eval()
    student = copy.deepcopy(module.model).double().eval().base_model
    caught = {}
    for who, net in (("s", student), ("t", teacher)):
        for index, layer in enumerate(net.encoder.layer, 1):
            layer.attention.self.value.register_forward_hook(
                lambda m, a, out, key=(who, index): caught.__setitem__(key, out[0])
            )
    teacher.requires_grad_(False), student.requires_grad_(False)
    for number in range(len(batch.rows)):
        ids = batch.ids[number : number + 1, : int(batch.mask[number].sum())]
        found = {w: n(ids, output_attentions=True).attentions for w, n in (("s", student), ("t", teacher))}
        for own, other in ((1, 2), (2, 4)):
            p, q = found["s"][own - 1][0], found["t"][other - 1][0]
            maps += float((q * (q / p).log()).sum(-1).mean()) / 2
            relations = []
            for key in (("s", own), ("t", other)):
                v = caught[key].view(len(ids[0]), 4, -1).transpose(0, 1)
                relations.append((v @ v.transpose(1, 2) / v.shape[-1] ** 0.5).log_softmax(-1))
            p, q = relations
            values += float((q.exp() * (q - p)).sum(-1).mean()) / 2
    logged, n = watch.logged[0], len(batch.rows)
    assert logged["train/distillation/attention"] == pytest.approx(maps / n, rel=1e-3)
    assert logged["train/distillation/values"] == pytest.approx(values / n, rel=1e-3)
    assert "train/distillation/soft_targets" not in logged


def test_embeddings_are_compared_beside_maps(bases, tmp_path):
    """TinyBERT's layers: embeddings and blocks for hidden states, the blocks alone for maps and values."""
    logged = []
    for asked in ({"hidden": 1.0, "attention": 1.0, "values": 1.0}, {"hidden": 1.0}, {"attention": 1.0, "values": 1.0}):
        _, watch = teach(
            bases,
            tmp_path,
            "sequence_classification",
            model={"attention": "eager", "optimizer": None, "lr": 1e-12},
            data={"packing": False},
            soft_targets=0.0,
            layers={0: 0, 1: 2} if "hidden" in asked else {1: 2},
            **asked,
        )
        logged.append(watch.logged[0])
    for kind, alone in (("hidden", 1), ("attention", 2), ("values", 2)):
        name = f"train/distillation/{kind}"
        assert logged[0][name] == pytest.approx(logged[alone][name], rel=1e-4)
    for layers, said in (({0: 0}, "pairs no two blocks"), ({}, "layers is empty")):
        with pytest.raises(Refusal, match=said):
            Distillation(attention=1.0, layers=layers)


def test_the_model_s_own_later_block_teaches_an_earlier_one(chat, tmp_path):
    """Value relations of two blocks of one model, as its copy teaches them."""
    logged = []
    for teacher in ("self", str(chat / "model")):
        technique = Distillation(
            teacher, values=1.0, relation_heads=2, soft_targets=0.0, layers={1: 2}, dtype="float32"
        )
        _, watch, _ = chat_run(chat, tmp_path, technique, data={"packing": False})
        logged.append([entry["train/distillation/values"] for entry in watch.logged])
    assert logged[0] == pytest.approx(logged[1], rel=1e-4) and min(logged[0]) > 1e-4
    with pytest.raises(Refusal, match="layers maps 1 to 3, but the student has 2 blocks"):
        chat_run(chat, tmp_path, Distillation(values=1.0, layers={1: 3}), data={"packing": False})


def an_epoch(folder, module, rows_, technique, watch, accumulate):
    """The trainer after one pass over the rows."""
    options = {"max_epochs": 1, "max_steps": -1, "accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    run = trainer(folder, technique, watch, **options)
    run.fit(module, rows_)
    return run


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification"])
def test_a_window_of_two_halves_is_one_batch(task, bases, tmp_path):
    """Rows of uneven length, the last window incomplete, all kinds of terms that packed rows allow."""
    ends = []
    for size, accumulate in ((8, 1), (4, 2)):
        base = bases / "bert"
        options = {"optimizer": torch.optim.SGD, "lr": 0.1}
        module, rows_ = job(base, tmp_path, task, model=options, n=28, shuffle=False, batch_size=size)
        technique = Distillation(str(bases / TEACHERS[task]), hidden=0.3, cosine=0.2, layers="uniform", dtype="float32")
        watch = Watch()
        run = an_epoch(tmp_path, module, rows_, technique, watch, accumulate)
        assert run.global_step == 4 and len(watch.batches[-1].rows) == 4  # 28 rows: half of the last window
        ends.append(state(module))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-5)


def test_windows_of_padded_rows_are_one_batch(bases, tmp_path):
    """Maps and value relations too, rows of uneven length, the last window of 14 rows incomplete."""
    ends, terms = [], {"hidden": 0.3, "attention": 1.0, "values": 1.0, "soft_targets": 0.5}
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        module, rows_ = job(
            bases / "bert",
            tmp_path,
            "sequence_classification",
            model={"optimizer": torch.optim.SGD, "lr": 0.1, "attention": "eager"},
            n=14,
            shuffle=False,
            packing=False,
            batch_size=size,
        )
        technique, watch = Distillation(str(bases / "classes"), layers="uniform", dtype="float32", **terms), Watch()
        run = an_epoch(tmp_path, module, rows_, technique, watch, accumulate)
        assert run.global_step == 4 and sum(len(batch.rows) for batch in watch.batches[-accumulate // 2 :]) == 2
        assert all(watch.logged[-1][f"train/distillation/{term}"] > 1e-6 for term in terms)
        ends.append(state(module))
    for end in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(end[name], value, rtol=1e-5, atol=1e-6)


def test_projections_are_a_group_of_their_own(chat, larger, tmp_path):
    """At the rate of all others, too."""
    technique = Distillation(str(larger), hidden=0.5, dtype="float32")
    module, rows_ = chat_job(chat, tmp_path, model={"optimizer": None, "weight_decay": 0.1})
    run = trainer(tmp_path, technique, max_steps=1)
    run.fit(module, rows_)
    matrix = module.distillation_projections["layer_2"].weight
    (group,) = [g for g in run.optimizers[0].param_groups if any(p is matrix for p in g["params"])]
    assert len(group["params"]) == 1 and group["weight_decay"] == 0.1


def test_padding_that_both_have_is_not_compared(chat, larger, tmp_path):
    """A student as wide as its teacher, both wider than their tokenizer; the rows beyond it get no gradient."""
    own = tmp_path / "padded"
    config = hf.AutoConfig.from_pretrained(chat / "model")
    config.vocab_size = hf.AutoConfig.from_pretrained(larger).vocab_size
    config.tie_word_embeddings = False
    torch.manual_seed(4)
    hf.LlamaForCausalLM(config).save_pretrained(own / "model")
    tokenizer = hf.AutoTokenizer.from_pretrained(larger)
    tokenizer.save_pretrained(own / "model")
    shutil.copy(chat / "rows.jsonl", own)
    used = len(tokenizer)
    assert config.vocab_size > used
    technique = Distillation(str(larger), task=0.0, dtype="float32")
    _, _, steps = chat_run(own, tmp_path, technique, max_steps=1)
    gradient = steps.gradients[0]["model.lm_head.weight"]
    assert gradient[used:].abs().max() == 0 < gradient[:used].abs().max()


# Everything that works packed, and what wants padded rows; "self" asks the reference.
RANKS = {
    "ddp, predictions and layers": ("ddp", False, True, {"hidden": 0.3, "cosine": 0.2, "layers": "uniform"}),
    "ddp, LoRA, value relations": ("ddp", True, False, {"values": 1.0, "relation_heads": 4}),
    "fsdp2, predictions and layers": ("fsdp2", False, True, {"hidden": 0.3, "cosine": 0.2, "layers": "uniform"}),
    "fsdp2, LoRA": ("fsdp2", True, True, {"divergence": "reverse_kl", "hidden": 0.3}),
    "fsdp2, itself": ("fsdp2", False, True, {"divergence": "jensen_shannon"}),
}


@pytest.mark.parametrize("case", RANKS)
def test_two_ranks_learn_what_one_does(case, chat, larger, tmp_path, two_ranks):
    """Uneven counts of tokens; under FSDP2 the student is split, and of the teacher each block."""
    strategy, lora, packing, arguments = RANKS[case]
    teacher = "self" if "itself" in case else str(larger)
    asked = {"chat": str(chat), "teacher": teacher, "folder": str(tmp_path), "lora": lora, "packing": packing}
    one = on_ranks(devices=1, strategy="auto", **asked, **arguments)
    assert all(abs(value) > 1e-5 for value in one["metrics"].values())
    for rank in two_ranks.run(
        "tests.callbacks.distillation_jobs:on_ranks", devices=2, strategy=strategy, **asked, **arguments
    ):
        assert rank["metrics"].keys() == one["metrics"].keys()
        for name, value in one["metrics"].items():
            assert rank["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        torch.testing.assert_close(rank["losses"], one["losses"], rtol=1e-4, atol=1e-5)
        for name, value in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-3, atol=1e-5, msg=name)
        for shares in rank["held"]:
            split = {name for name, share in shares.items() if share < 1}
            blocks = {name for name in shares if ".layers." in name and strategy == "fsdp2"}
            assert split == blocks and all(shares[name] == 0.5 for name in split)
            assert bool(split) == (strategy == "fsdp2" and teacher != "self")


# -- a user's own module ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_teach_your_own_module_what_one_does(strategy, tmp_path, two_ranks):
    """Each holds the whole teacher, under FSDP2 half of it."""
    one = own_on_ranks(str(tmp_path / "one"), 1)
    for rank in two_ranks.run(
        "tests.callbacks.distillation_jobs:own_on_ranks", folder=str(tmp_path / "two"), devices=2, strategy=strategy
    ):
        assert rank["divided"] == [strategy == "fsdp2"] * 3 and one["divided"] == [False] * 3
        for name, value in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-4, atol=1e-6, msg=name)


def wide():
    """A teacher of the plain net's inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3)
        )


def test_a_module_of_your_own_by_hand(tmp_path):
    """Three steps of SGD at rate 0.5 against a loop, the teacher without dropout, the student's part run once a step."""
    net, runs = PlainNet(), []
    net.net.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    fit(tmp_path, net, Distillation(teacher_module=wide, soft_targets=0.5, temperature=3.0, dtype="float32"))
    assert sum(runs) == 3
    hand, teacher = PlainNet(), wide().eval()
    optimizer = torch.optim.SGD(hand.parameters(), lr=0.5)
    x, y = rows()
    for step in range(3):
        at = slice(4 * step, 4 * step + 4)
        z, t = hand(x[at]), teacher(x[at]).detach()
        q, p = (t / 3).softmax(-1), (z / 3).log_softmax(-1)
        loss = F.cross_entropy(z, y[at]) + 0.5 * 9 * F.kl_div(p, q, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in state(hand).items():
        torch.testing.assert_close(state(net)[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("outputs", [None, "one", "several", "numbers"])
def test_what_columns_of_a_module_of_your_own_are(outputs, columns, tmp_path):
    """The first step's term against the definitions in float64."""

    class Columns(PlainNet):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0])[:, :1].sum() * 0.0

    def of(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.nn.Linear(4, columns)

    net, watch = Columns(), Watch()
    net.net = of(1)
    technique = Distillation(teacher_module=lambda: of(2), outputs=outputs, temperature=3.0, dtype="float32")
    if (outputs, columns) == ("one", 1):
        with pytest.raises(Refusal, match="outputs is one, and the part that is compared gives one column"):
            fit(tmp_path, net, technique)
        return
    fit(tmp_path, net, technique, watch, max_steps=1)
    x = rows()[0][:4].double()
    z, t = of(1).double()(x), of(2).double()(x)
    kind = outputs or ("numbers" if columns == 1 else "one")
    if kind == "numbers":
        expected = (z - t).square().sum(-1)
    elif kind == "several":
        p, q = (z / 3).sigmoid(), (t / 3).sigmoid()
        expected = 9 * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean(-1)
    else:
        p, q = (z / 3).softmax(-1), (t / 3).softmax(-1)
        expected = 9 * (q * (q / p).log()).sum(-1)
    found = watch.logged[0]
    assert found["train/distillation/soft_targets"] == pytest.approx(float(expected.mean().detach()), rel=1e-5)
    assert found["train/distillation/t2"] == (1.0 if kind == "numbers" else 9.0)


@pytest.mark.parametrize("technique", [lambda: Replay(8, rows=2), lambda: AGEM(8, rows=2)], ids=["replay", "agem"])
def test_rows_that_are_run_again_are_not_the_step(technique, tmp_path):
    """A later step finds one call of the part: its own."""
    net, watch = PlainNet(), Watch()
    fit(tmp_path, net, technique(), Distillation(teacher_module=wide), watch, max_steps=4)
    assert len(watch.logged) == 4 and watch.logged[3]["train/distillation/soft_targets"] > 0


class Read(torch.nn.Module):
    """Words of padded rows: (B, T) numbers and their mask -> (B, T, 3)."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.table = torch.nn.Embedding(5, 3)

    def forward(self, ids, attention_mask=None):
        return self.table(ids)


class Reader(pl.LightningModule):
    """A module of your own that gives its part the mask by place."""

    def __init__(self):
        super().__init__()
        self.net = Read()

    def training_step(self, batch, batch_idx):
        return self.net(batch["ids"], batch["mask"]).sum() * 0.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def read_rows():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    ids = torch.tensor([[1, 2, 0], [3, 0, 0]])
    return {
        "ids": ids,
        "mask": mask,
        "labels": torch.where(mask == 1, torch.tensor([[0, 1, 2]]), -100),
        "real": mask * 1.0,
    }


def read_fit(tmp_path, **arguments):
    def other():
        net = Read()
        with torch.no_grad():
            net.table.weight.neg_()
        return net

    module, watch, rows_ = Reader(), Watch(), read_rows()
    loader = torch.utils.data.DataLoader(
        [{name: value[n] for name, value in rows_.items()} for n in range(2)], batch_size=2
    )
    trainer(tmp_path, Distillation(teacher_module=other, **arguments), watch, max_steps=1).fit(module, loader)
    return module, watch.logged[0]["train/distillation/soft_targets"]


@pytest.mark.parametrize("mask", [None, "mask", "real"])
def test_padding_is_left_out_however_the_mask_is_given(mask, tmp_path):
    module, found = read_fit(tmp_path, mask=mask)
    z = module.net.table.weight.detach().double()[[1, 2, 3]]
    p, q = z.log_softmax(-1), (-z).log_softmax(-1)
    assert found == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-5)


def test_labels_are_no_mask(tmp_path):
    with pytest.raises(Refusal, match="names 'labels', which holds -100 and not only 0 and 1"):
        read_fit(tmp_path, mask="labels")


class Parts(PlainNet):
    """A body and a head, which under autocast is called with bfloat16."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.net(batch[0].to(self.dtype))).float(), batch[1] % 2)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_a_teacher_of_your_own_computes_in_its_own_dtype(precision, dtype, tmp_path):
    built = torch.nn.Linear(3, 2)
    watch, seen = Watch(), []
    built.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    technique = Distillation(teacher_module=lambda: built, student="head", dtype=dtype)
    fit(tmp_path, Parts(), technique, watch, max_steps=1, precision=precision)
    assert seen == [torch.bfloat16 if dtype == "bfloat16" else torch.float32]
    assert watch.logged[0]["train/distillation/soft_targets"] > 0


def test_arguments_that_would_say_nothing_are_refused(chat, larger, tmp_path):
    for given, said in (({"student": "model"}, "student"), ({"mask": "mask"}, "mask"), ({"outputs": "one"}, "outputs")):
        with pytest.raises(Refusal, match=f"Distillation.{said} is for modules of your own"):
            chat_run(chat, tmp_path, Distillation(str(larger), hidden=1.0, **given))
    with pytest.raises(Refusal, match="quantize packs a teacher that is loaded, and self is the model"):
        chat_run(chat, tmp_path, Distillation(quantize="nf4"))
    with pytest.raises(Refusal, match="targets keeps what a language model predicts"):
        fit(tmp_path, PlainNet(), Distillation(targets=str(tmp_path)))
    with pytest.raises(Refusal, match="quantize packs a teacher that is loaded by its name"):
        fit(tmp_path, PlainNet(), Distillation(teacher_module=wide, quantize="nf4"))


def test_classes_in_the_middle_are_refused():
    with pytest.raises(Refusal, match=r"gives \(2, 3, 4, 4\), of which nothing says where the classes are"):
        logits_of(torch.zeros(2, 3, 4, 4))
    assert logits_of({"logits": torch.zeros(2, 4, 3)}).shape == (2, 4, 3)


def test_what_cannot_be_compared_is_refused(chat, larger, bases, tmp_path):
    def run(technique, **settings):
        module, data = chat_job(chat, tmp_path, **settings)
        trainer(tmp_path, technique, max_steps=1).fit(module, data)

    with pytest.raises(Refusal, match="with beta 1 compares a distribution with itself"):
        Distillation(divergence="skewed_kl", beta=1.0)
    with pytest.raises(Refusal, match="different vocabularies"):
        run(Distillation(str(bases / "llama")))
    with pytest.raises(Refusal, match="set --model.attention eager"):
        run(Distillation(str(larger), attention=1.0))
    with pytest.raises(Refusal, match="set --data.packing false"):
        run(Distillation(str(larger), values=1.0))
    with pytest.raises(Refusal, match="layers maps 9 to 1, but the student has 2 blocks"):
        run(Distillation(str(larger), hidden=1.0, layers={9: 1}))
    with pytest.raises(Refusal, match="There is no folder"):
        run(Distillation(str(tmp_path / "nowhere" / "a b")))
    with pytest.raises(Refusal, match="teacher_module is for modules of your own"):
        run(Distillation(teacher_module=wide))
    with pytest.raises(Refusal, match="what calls it in a module of your own is not known"):
        fit(tmp_path, PlainNet(), Distillation(str(larger)))
    with pytest.raises(Refusal, match="Distillation.student names 'nets'"):
        fit(tmp_path, PlainNet(), Distillation(student="nets"))
    with pytest.raises(Refusal, match="of PlainNet only what its part gives"):
        fit(tmp_path, PlainNet(), Distillation(hidden=1.0))
    with pytest.raises(Refusal, match=r"teacher's classes .* are not the student's"):
        module, data = job(bases / "bert", tmp_path, "multi_label")
        trainer(tmp_path, Distillation(str(bases / "classes")), max_steps=1).fit(module, data)
    with pytest.raises(
        Refusal, match=r"^Distillation.teacher names the checkpoint .*last.ckpt, which is not there; train"
    ):
        run(Distillation(str(tmp_path / "runs/teacher/checkpoints/last.ckpt")))


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "regression"])
def test_a_teacher_without_a_head_is_refused_before_anything_is_loaded(task, bases, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lightning_ft.engine.module.load_for_task", lambda *a, **k: pytest.fail("the student is loaded")
    )
    for labels in (None, ["high", "low", "middle"]):
        module, data = job(bases / "bert", tmp_path, task, model={} if task == "regression" else {"labels": labels})
        with pytest.raises(Refusal, match=f"^The teacher .*bert has no trained head for {task}, .*; train it first"):
            trainer(tmp_path, Distillation(str(bases / "bert")), max_steps=1).fit(module, data)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"teacher": "llama"}, "different vocabularies"),
        ({"teacher": "larger", "hidden": 1.0, "layers": {9: 1}}, "layers maps 9 to 1, but the student has 2 blocks"),
        ({"teacher": "larger", "hidden": 1.0, "layers": {1: 9}}, "layers maps 1 to 9, .* and the teacher 4"),
        ({"teacher": "self", "hidden": 1.0, "layers": {1: 3}}, "layers maps 1 to 3"),
        ({"targets": "nowhere"}, "nowhere holds no teacher's targets"),
    ],
)
def test_what_files_alone_show_is_refused_before_anything_is_loaded(
    arguments, said, chat, larger, bases, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "lightning_ft.engine.module.load_for_task", lambda *a, **k: pytest.fail("the student is loaded")
    )
    places = {"llama": str(bases / "llama"), "larger": str(larger)}
    given = {**arguments, "teacher": places.get(arguments.get("teacher"), "self")}
    with pytest.raises(Refusal, match=said):
        chat_run(chat, tmp_path, Distillation(**given))


def test_layers_of_an_encoder_decoder_are_its_decoder_s(bases, tmp_path):
    module, data = job(bases / "t5", tmp_path, "seq2seq_lm")
    with pytest.raises(Refusal, match="layers maps 1 to 4, but the student has 2 blocks and the teacher 3"):
        technique = Distillation(str(bases / "t5-teacher"), hidden=1.0, layers={1: 4})
        trainer(tmp_path, technique, max_steps=1).fit(module, data)


def test_modules_that_imitate_nothing_say_what_they_do():
    for module, said in (
        (OnPolicyDistillation("base", teacher="other"), "has a teacher of its own"),
        (GRPO("base", rewards={"short": Reward(length=3)}), "learns from rewards of answers"),
        (DPO("base"), "compares answers with one another"),
    ):
        with pytest.raises(Refusal, match=f"and {type(module).__name__} {said}"):
            check_student(module, {})


def test_a_prefix_and_a_prompt_learn_predictions_and_no_layers(chat, larger, tmp_path):
    """The student reads tokens of its own before each row, and the teacher the rows without them."""
    for injected in (lightning_ft.PrefixTuning(tokens=3), lightning_ft.PromptTuning(tokens=3)):
        technique = Distillation(str(larger), dtype="float32")
        _, watch, _ = chat_run(chat, tmp_path, technique, injected, max_steps=2)
        assert all(0 < entry["train/distillation/soft_targets"] < 20 for entry in watch.logged)
        with pytest.raises(Refusal, match="puts tokens before rows that the teacher lacks"):
            chat_run(chat, tmp_path, Distillation(str(larger), hidden=1.0), copy.copy(injected), max_steps=1)
