"""MultiTask beside penalties and teachers: Fisher information of all tasks' rows, and a teacher for each task."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lightning_ft import AGEM, EWC, Distillation, LoRA, Refusal, Replay, SampleGenerations, load
from lightning_ft.engine.likelihood import LogLikelihood, keys_of, likelihood
from lightning_ft.objectives.multitask_likelihood import examples_of
from tests.contract.subjects import Steps
from tests.modules.multitask_jobs import fit, job, on_ranks, pairs_job, taught
from tests.modules.tasks import write_base

TASKS = ["numbers", "liked", "policy", "texts"]


@pytest.mark.parametrize("packing", [True, False])
def test_the_fisher_information_is_that_of_a_loop_over_examples(tmp_path: Path, packing: bool) -> None:
    """EWC's own measurement at the end of a fit, beside autograd on each row or pair of each batch by itself."""
    module, data = pairs_job(tmp_path, batch_size=40, packing=packing)
    ewc = EWC(1.0, labels="empirical")
    fit(tmp_path, module, data, LoRA(2, name="shared"), ewc, max_steps=3, limit_val_batches=0)
    found = ewc._next.importance
    module.eval()
    squares = {n: torch.zeros_like(p) for n, p in module.named_parameters() if p.requires_grad}
    count = 0
    data.trainer = None
    for batch in data.in_order()["train"]:
        ask = LogLikelihood("empirical", 0)
        ask.keys = keys_of(batch, 0, 1)
        values = likelihood(module, batch, ask)
        count += len(values)
        for one in values:
            module.zero_grad()
            one.backward(retain_graph=True)
            for n, p in module.named_parameters():
                if p.grad is not None:
                    squares[n] += p.grad**2
    assert count == 7 + 9 + 9 + 9 and found
    assert set(found) == set(squares) and any("lora_" in name for name in found)
    for name, square in squares.items():
        torch.testing.assert_close(found[name], square / count, rtol=1e-3, atol=1e-8)


def test_likelihoods_are_those_by_hand(tmp_path: Path) -> None:
    """Of each example: normal errors of a number, which answer is better, all scored tokens of a text or a chosen answer."""
    module, data = pairs_job(tmp_path, batch_size=40)
    fit(tmp_path, module, data, max_steps=1, limit_val_batches=0)
    module.eval()
    data.trainer = None
    kinds = set()
    for batch in data.in_order()["train"]:
        ask = LogLikelihood("empirical", 0)
        ask.keys = keys_of(batch, 0, 1)
        with torch.no_grad():
            values = likelihood(module, batch, ask)
            outcomes = module._outcomes(batch, module._tasks())
        example, _ = examples_of(batch, module._tasks())
        (name,) = [n for n, one in outcomes.items() if one is not None]
        kinds.add(name)
        seen = outcomes[name]
        if name == "numbers":
            expected = -seen.losses
        elif name == "liked":
            expected = F.log_softmax(seen.logits, -1)[:, 0]
        elif name == "texts":
            expected = torch.zeros(len(batch.rows)).index_add(0, batch.segment_of_scored, -seen.losses)
        else:
            hidden = module._trunk(batch)[1]
            logp = module.view.score(hidden[batch.scored], batch.labels, outputs=("logprob",))["logprob"]
            chosen = batch.segment_of_scored % 2 == 0
            expected = torch.zeros(len(values)).index_add(
                0, example[batch.segment_of_scored[chosen]], logp[chosen].detach()
            )
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert kinds == set(TASKS)


def test_a_teacher_for_each_task(tmp_path: Path) -> None:
    """Each term is the divergence by hand, from what teacher and student say of the task's own rows."""
    teachers, module, data = taught(tmp_path, batch_size=30)
    found = {}

    class Watch(Steps):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            found.update(
                {n: float(v) for n, v in trainer.callback_metrics.items() if n.endswith(("soft_targets", "t2"))}
            )

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.expected = {}
            for name, teacher in teachers.items():
                said, mine = load(teacher), pl_module.task_names.index(name)
                with torch.no_grad():
                    own = pl_module._outcomes(batch, pl_module._tasks())[name]
                    rows = batch.columns[f"rows/{mine}"].tolist()
                    losses = []
                    for at, row in enumerate(rows):
                        begin, end = batch.bounds[row], batch.bounds[row + 1]
                        ids = batch.ids[:, begin:end]
                        model = said.eval().model
                        logits = model(input_ids=ids).logits[0]
                        if name == "numbers":
                            losses.append((logits[0] - own.logits[at, 0]) ** 2)
                        else:
                            p = F.log_softmax(logits / 2, -1)
                            q = F.log_softmax(own.logits[at] / 2, -1)
                            losses.append(4 * (p.exp() * (p - q)).sum())
                self.expected[name] = float(torch.stack(losses).mean())

    watch = Watch()
    callbacks = [Distillation(path, name=name, temperature=2.0, dtype="float32") for name, path in teachers.items()]
    fit(tmp_path, module, data, *callbacks, watch, max_steps=1, limit_val_batches=0)
    assert set(found) == {f"train/{name}/{kind}" for name in teachers for kind in ("soft_targets", "t2")}
    assert (found["train/classes/t2"], found["train/numbers/t2"]) == (4.0, 1.0)
    for name in teachers:
        assert found[f"train/{name}/soft_targets"] == pytest.approx(watch.expected[name], rel=1e-4)


def test_two_ranks_with_teachers_are_one_process(tmp_path: Path, two_ranks) -> None:
    taught(tmp_path)
    whole = on_ranks(str(tmp_path), 8, teachers=True)
    differs = on_ranks(str(tmp_path), 8)
    assert any(not torch.allclose(whole[n], differs[n]) for n in whole)
    for fsdp2 in (False, True):
        options = {"folder": str(tmp_path), "batch_size": 4, "devices": 2, "teachers": True, "fsdp2": fsdp2}
        for ranks in two_ranks.run("tests.modules.multitask_jobs:on_ranks", **options):
            for name, value in whole.items():
                torch.testing.assert_close(ranks[name], value, rtol=1e-4, atol=1e-5)


def test_a_run_of_one_task_leaves_teachers_of_others_out(tmp_path: Path) -> None:
    """As the single-task baselines need, which have the callbacks of the run of all."""
    teachers, module, data = taught(tmp_path, batch_size=30, only="numbers")
    of = [Distillation(path, name=name, dtype="float32") for name, path in teachers.items()]
    run = fit(tmp_path, module, data, *of, max_steps=2)
    told = [name for name in run.callback_metrics if "soft_targets" in name]
    assert told == ["train/numbers/soft_targets"]


def test_what_cannot_stand_beside_it(tmp_path: Path) -> None:
    module, data = job(tmp_path)
    with pytest.raises(Refusal, match="Replay cannot work with MultiTask, because a batch says of its rows together"):
        fit(tmp_path, module, data, Replay(4))
    module, data = job(tmp_path)
    with pytest.raises(Refusal, match="AGEM cannot work with MultiTask"):
        fit(tmp_path, module, data, AGEM(4))
    module, data = job(tmp_path)
    with pytest.raises(
        Refusal, match="teaches the task whose name it has, and 'distillation' is none of classes, words, numbers"
    ):
        fit(tmp_path, module, data, Distillation(str(tmp_path / "bert")))
    module, data = job(tmp_path)
    with pytest.raises(Refusal, match="gives one task the soft targets of a teacher that is named"):
        fit(tmp_path, module, data, Distillation("self", name="classes"))
    module, data = pairs_job(tmp_path)
    with pytest.raises(Refusal, match="'policy' is dpo, which compares answers and imitates none"):
        fit(tmp_path, module, data, Distillation(str(tmp_path / "llama"), name="policy"))
    module, data = job(tmp_path)
    with pytest.raises(Refusal, match="SampleGenerations shows texts, and MultiTask writes none"):
        fit(tmp_path, module, data, SampleGenerations(["hello"]))
    with pytest.raises(Refusal, match="The tasks of this model give classes or numbers and write no text; use predict"):
        module.generate(["hello"])


def test_a_teacher_of_other_tokens_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch) -> None:
    write_base("llama", tmp_path / "stranger")
    module, data = job(tmp_path)
    monkeypatch.setattr(
        "lightning_ft.engine.task_trunk.load_for_task", lambda *a, **k: pytest.fail("the student is loaded")
    )
    with pytest.raises(Refusal, match="different vocabularies"):
        fit(tmp_path, module, data, Distillation(str(tmp_path / "stranger"), name="classes"))


def test_answers_are_shown_where_a_task_writes_them(tmp_path: Path) -> None:
    module, data = job(tmp_path, "llama")
    fit(tmp_path, module, data, SampleGenerations(["hello"], max_new_tokens=2), max_steps=2)
    assert list(tmp_path.rglob("samples.jsonl"))
