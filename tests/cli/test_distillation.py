"""distill-init and cache-teacher: a student's folder, a teacher's targets, and training by both."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.teacher_files import differing, prints_of, teacher_files
from lightning_ft.engine.teacher_targets import TeacherTargets, segment_keys
from tests.cli.conftest import Outcome
from tests.modules.tasks import WORDS, write_base

Run = Callable[..., Outcome]
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


@pytest.fixture
def config(tiny_model: Path, rows: Path, tmp_path: Path) -> Path:
    """A fit of the tiny model beside a deeper teacher with its vocabulary, padded."""
    settings = hf.AutoConfig.from_pretrained(tiny_model)
    settings.num_hidden_layers, settings.vocab_size = 3, settings.vocab_size + 2
    torch.manual_seed(1)
    model = hf.LlamaForCausalLM(settings)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    model.save_pretrained(tmp_path / "teacher")
    hf.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "teacher")
    path = tmp_path / "fit.yaml"
    parts = {
        "model": {"base": str(tiny_model), "lr": 0.01, "warmup_steps": 0, "base_dtype": "float32"},
        "data": {"path": str(rows), "cache_dir": str(tmp_path / "cache"), "val_fraction": 0.1},
        "distillation": {"teacher": str(tmp_path / "teacher"), "temperature": 2.0, "dtype": "float32"},
        "trainer": {"max_steps": 2, "log_every_n_steps": 1},
    }
    path.write_text(yaml.safe_dump(parts))
    return path


def logged(folder: Path, name: str) -> set[float]:
    with open(folder / "metrics.csv", newline="") as file:
        return {float(line[name]) for line in csv.DictReader(file) if line[name]}


def trained(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return state


def test_all_tokens_kept_train_as_the_teacher_itself(real: Run, config: Path, tmp_path: Path) -> None:
    """And few tokens cost less than it; packing and order are free, another temperature or row is refused."""
    live = real("fit", "--config", str(config), "--name=live", *QUIET)
    assert live.code == 0, live.err
    kept = real("cache-teacher", "--config", str(config), "--output", "targets", "--top_k", "100000")
    assert kept.code == 0, kept.err
    assert "train by it with --distillation.targets targets" in kept.out
    (tmp_path / "teacher").rename(tmp_path / "away")  # nobody asks for it
    given = ("--distillation.targets=targets",)
    other = real("fit", "--config", str(config), *given, "--distillation.teacher=nowhere", "--name=other", *QUIET)
    assert other.code == 2 and "and this run's teacher is nowhere" in other.err
    by_file = real("fit", "--config", str(config), *given, "--name=kept", *QUIET)
    assert by_file.code == 0, by_file.err
    assert logged(Path("runs/kept"), "train/distillation/t2") == {4.0}
    whole, other = trained(Path("runs/live")), trained(Path("runs/kept"))
    for name, value in whole.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)
    padded = real("fit", "--config", str(config), *given, "--data.packing=false", "--name=padded", *QUIET)
    assert padded.code == 0, padded.err
    cooler = real("fit", "--config", str(config), *given, "--distillation.temperature=1", "--name=cooler", *QUIET)
    assert cooler.code == 2 and "were kept at temperature 2, and this run's is 1" in cooler.err
    cut = real(
        "fit", "--config", str(config), *given, "--data.max_length=8", "--data.truncation=start", "--name=cut", *QUIET
    )
    assert cut.code == 2 and ("is not among the targets" in cut.err or "truncation" in cut.err), cut.err
    (tmp_path / "away").rename(tmp_path / "teacher")
    assert real("cache-teacher", "--config", str(config), "--output", "few", "--top_k", "2").code == 0
    both = [TeacherTargets(Path(name)) for name in ("targets", "few")]
    assert both[1].about.top_k == 2 and both[0].about.tokens == both[1].about.tokens
    n = both[1].about.tokens
    mass = torch.from_numpy(both[1]._logprobs.copy()).exp().sum(-1) + torch.from_numpy(both[1]._rest.copy()).exp()
    assert mass.shape == (n,) and (mass - 1).abs().max() < 1e-5
    (Path("few") / "rest.f32").write_bytes(b"")
    broken = real("fit", "--config", str(config), "--distillation.targets=few", "--name=broken", *QUIET)
    assert broken.code == 2 and "write the targets again" in broken.err


def test_resumed_by_targets_is_unbroken(real: Run, config: Path, tmp_path: Path) -> None:
    """Another teacher's targets do not go on with the run."""
    assert real("cache-teacher", "--config", str(config), "--output=targets", "--top_k=8").code == 0
    given = ("fit", "--config", str(config), "--distillation.targets=targets", "--data.batch_size=4", *QUIET)
    longer = ("--trainer.max_steps=4", "--trainer.max_epochs=9", "--model.schedule=constant")
    for name, more in (
        ("whole", ()),
        ("begun", ("--trainer.max_steps=3",)),
        ("ended", ("--ckpt_path=runs/begun/checkpoints/last.ckpt",)),
    ):
        outcome = real(*given, *longer, *more, f"--name={name}")
        assert outcome.code == 0, outcome.err
    whole, ended, begun = (trained(Path("runs", name)) for name in ("whole", "ended", "begun"))
    assert all(torch.equal(value, ended[name]) for name, value in whole.items())
    assert any(not torch.equal(value, begun[name]) for name, value in whole.items())
    other = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path / "teacher")
    assert real("cache-teacher", "--config", str(config), "--output=others", "--top_k=8").code == 0
    outcome = real(*given, *longer, "--distillation.targets=others", "--ckpt_path=runs/begun/checkpoints/last.ckpt")
    assert outcome.code == 2 and "The run was begun with another teacher" in outcome.err


def test_an_encoder_decoder_s_targets_train_as_its_teacher(real: Run, tmp_path: Path) -> None:
    """Answers are the same where sources are not, so that rows are told apart by what they answer."""
    base = write_base("t5", tmp_path / "t5")
    settings = hf.AutoConfig.from_pretrained(base)
    settings.num_layers, settings.num_decoder_layers = 3, 3
    torch.manual_seed(3)
    hf.T5ForConditionalGeneration(settings).save_pretrained(tmp_path / "larger")
    hf.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "larger")
    lines = [{"prompt": f"hello {WORDS[n]}", "completion": WORDS[n % 2]} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = {
        "model": {"base": str(base), "task": "seq2seq_lm", "lr": 0.01, "warmup_steps": 0, "base_dtype": "float32"},
        "data": {"class_path": "lightning_ft.Seq2SeqData", "init_args": {"path": "rows.jsonl", "cache_dir": "cache"}},
        "distillation": {"teacher": "larger", "dtype": "float32"},
        "trainer": {"max_steps": 2, "log_every_n_steps": 1},
    }
    Path("fit.yaml").write_text(yaml.safe_dump(parts))
    live = real("fit", "--config=fit.yaml", "--name=live", *QUIET)
    assert live.code == 0, live.err
    kept = real("cache-teacher", "--config=fit.yaml", "--output=targets", "--top_k=100000")
    assert kept.code == 0, kept.err
    by_file = real("fit", "--config=fit.yaml", "--distillation.targets=targets", "--name=kept", *QUIET)
    assert by_file.code == 0, by_file.err
    found = [logged(Path("runs", name), "train/distillation/soft_targets") for name in ("live", "kept")]
    assert sorted(found[1]) == pytest.approx(sorted(found[0]), rel=1e-3) and min(found[0]) > 1e-3
    whole, other = trained(Path("runs/live")), trained(Path("runs/kept"))
    for name, value in whole.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)
    parts["data"]["class_path"] = "lightning_ft.SFTData"
    Path("sft.yaml").write_text(yaml.safe_dump(parts))
    outcome = real("cache-teacher", "--config=sft.yaml", "--output=more")
    assert outcome.code == 2 and "take Seq2SeqData" in outcome.err


def test_targets_are_of_the_files_that_their_teacher_had(real: Run, config: Path, tmp_path: Path) -> None:
    """Its weights written anew under the same name are another teacher's; a copy of them is not."""
    kept = real("cache-teacher", "--config", str(config), "--output", "targets", "--top_k", "2")
    assert kept.code == 0, kept.err
    given = ("fit", "--config", str(config), "--distillation.targets=targets", *QUIET)
    for words, said in (
        (("--distillation.dtype=bfloat16",), "with dtype float32, and this run asks for bfloat16"),
        (("--distillation.quantize=nf4",), "with quantize null, and this run asks for nf4"),
    ):
        outcome = real(*given, *words, "--name=other")
        assert outcome.code == 2 and said in outcome.err
    weights = tmp_path / "teacher/model.safetensors"
    weights.write_bytes(content := weights.read_bytes())
    os.utime(weights, ns=(1, 1))  # as a copy of another time
    assert real(*given, "--distillation.dtype=auto", "--name=copied").code == 0
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    changed = real(*given, "--name=changed")
    assert changed.code == 2 and "before its file model.safetensors changed" in changed.err
    unnamed = real(*given, "--distillation.teacher=self", "--name=unnamed")
    assert unnamed.code == 0, unnamed.err


def test_an_adapter_is_known_by_its_base_s_files_too(tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    for folder, name, more in (
        (adapter, "adapter_config.json", {"base_model_name_or_path": str(base)}),
        (base, "config.json", {}),
    ):
        folder.mkdir()
        (folder / name).write_text(json.dumps(more))
        (folder / "weights.safetensors").write_bytes(b"12")
    files = teacher_files(str(adapter))
    assert set(files) == {"adapter_config.json", "weights.safetensors", "base/config.json", "base/weights.safetensors"}
    prints = prints_of(files)
    assert differing(files, prints) is None
    (base / "weights.safetensors").write_bytes(b"13")
    assert differing(files, prints) == "base/weights.safetensors"
    files.pop("base/config.json")
    assert differing(files, prints) == "base/config.json"
    assert teacher_files("starter:smollm2-135m") == {} == teacher_files(str(tmp_path / "nowhere"))


def test_drawn_tokens_train(real: Run, config: Path) -> None:
    """The same seed draws the same; shares of many draws are near what the teacher predicts."""
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        words = ("--output", name, "--draws", "30", f"--seed_everything={seed}", "--data.val_fraction=0")
        kept = real("cache-teacher", "--config", str(config), *words)
        assert kept.code == 0, kept.err
        assert "30 drawn tokens at each" in kept.out
    one, same, other = (Path(name, "tokens.i32").read_bytes() for name in ("one", "same", "other"))
    assert one == same != other
    targets = TeacherTargets(Path("one"))
    shares = torch.from_numpy(targets._logprobs.copy()).exp()
    assert targets.about.draws == 30 and (shares.sum(-1) - 1).abs().max() < 1e-5
    given = ("--distillation.targets=one", "--data.val_fraction=0", "--name=drawn")
    trained = real("fit", "--config", str(config), *given, *QUIET)
    assert trained.code == 0, trained.err


def test_a_teacher_is_needed(real: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("full").mkdir()
    Path("full/x").touch()
    monkeypatch.setattr("lightning_ft.engine.teacher.load_teacher", lambda *_, **__: pytest.fail("it is loaded"))
    outcome = real("cache-teacher", "--config", str(config), "--output=full")
    assert outcome.code == 2 and "full is not empty" in outcome.err
    outcome = real("cache-teacher", "--config", str(config), "--distillation.teacher=self", "--output=x")
    assert outcome.code == 2 and "There is no teacher to load" in outcome.err
    outcome = real("cache-teacher", "--config", str(config))
    assert outcome.code == 2 and "output is missing" in outcome.err


def test_keys_do_not_depend_on_the_layout() -> None:
    long = lambda *n: torch.tensor(n)  # noqa: E731
    packed = Batch(
        long(5, 6, 7, 8, 9)[None], long(0, 1, 2, 0, 1)[None], (0, 3, 5), None, long(0, 1, 3), long(6, 7, 9),
        long(0, 0, 1), long(0, 1), {},
    )  # fmt: skip
    mask = torch.tensor([[True, True, False], [True, True, True]])
    padded = Batch(
        torch.tensor([[8, 9, 0], [5, 6, 7]]), torch.tensor([[0, 1, 0], [0, 1, 2]]), None, mask, long(0, 3, 4),
        long(9, 6, 7), long(0, 1, 1), long(1, 0), {},
    )  # fmt: skip
    assert segment_keys(packed).tolist() == segment_keys(padded).tolist()[::-1]
    padded.scored = long(0, 4, 4)
    assert segment_keys(packed).tolist() != segment_keys(padded).tolist()[::-1]


@pytest.mark.parametrize("words", [("--keep", "2"), ("--layers", "[0, 2]")])
def test_a_student_has_its_teacher_s_blocks(words: tuple[str, str], real: Run, config: Path, tmp_path: Path) -> None:
    outcome = real("distill-init", "--base", str(tmp_path / "teacher"), *words, "--output", "student")
    assert outcome.code == 0, outcome.err
    assert "blocks 0, 2 of" in outcome.out
    teacher = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").eval()
    student = hf.AutoModelForCausalLM.from_pretrained("student").eval()
    teacher.model.layers = torch.nn.ModuleList([teacher.model.layers[0], teacher.model.layers[2]])
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(student(ids, use_cache=False).logits, teacher(ids, use_cache=False).logits)
    assert student.config.num_hidden_layers == 2
    taught = real("fit", "--config", str(config), "--model.base=student", "--name=taught", *QUIET)
    assert taught.code == 0, taught.err


def test_a_narrower_student_is_trained(real: Run, config: Path, tmp_path: Path) -> None:
    words = ("--keep", "2", "--neurons", "5")
    outcome = real("distill-init", "--base", str(tmp_path / "teacher"), *words, "--output", "student")
    assert outcome.code == 0, outcome.err
    assert "blocks 0, 2 and 5 neurons a block of" in outcome.out
    student = hf.AutoModelForCausalLM.from_pretrained("student")
    assert (student.config.intermediate_size, student.config.num_hidden_layers) == (5, 2)
    assert student.model.layers[1].mlp.down_proj.weight.shape[1] == 5
    taught = real("fit", "--config", str(config), "--model.base=student", "--name=taught", *QUIET)
    assert taught.code == 0, taught.err


def test_layers_that_are_not_there_are_refused(
    real: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        pytest.fail("weights are read")

    base = write_base("t5", tmp_path / "t5")
    with monkeypatch.context() as patch:
        patch.setattr("lightning_ft.models.load.read_weights", read)
        for where, layers, said in (
            (tmp_path / "teacher", "[1, 5]", "layers must be ascending numbers from 0 to 2"),
            (base, "[0]", "is an encoder-decoder (T5ForConditionalGeneration)"),
        ):
            outcome = real("distill-init", f"--base={where}", f"--layers={layers}", "--output=student")
            assert outcome.code == 2 and said in outcome.err
    narrower = real("distill-init", f"--base={base}", "--neurons=5", "--output=narrower")
    assert narrower.code == 0, narrower.err
    given = ("distill-init", "--base", str(tmp_path / "teacher"), "--output", "student")
    for words, said in (
        ((), "Give one of --keep"),
        (("--keep", "4"), "--keep must be from 1 to 3"),
        (("--layers", "[1, 0]"), "layers must be ascending"),
        (("--neurons", "0"), "--neurons must be from 1 to "),
    ):
        outcome = real(*given, *words)
        assert outcome.code == 2 and said in outcome.err
    Path("last.ckpt").write_bytes(b"")
    outcome = real("distill-init", "--base", "last.ckpt", "--keep", "2", "--output", "student")
    assert outcome.code == 2 and "lightning-ft merge --ckpt_path last.ckpt --output FOLDER" in outcome.err
    assert not Path("student").exists()
