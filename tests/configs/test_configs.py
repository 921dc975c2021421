"""Every file in configs/ is found by existing: parsed, commented, run for two steps, and its keys checked for typos."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.random_model import write_model
from lightning_ft import DPO, KTO, RewardModel
from lightning_ft.engine.sharded_files import read_whole
from lightning_ft.models.load_task import load_for_task
from tests.cli.conftest import Outcome, call
from tests.modules.tasks import WORDS, rows_of, write_base

CONFIGS = Path(__file__).parents[2] / "configs"
JOBS = sorted(CONFIGS.glob("*.yaml"))
PARTS = sorted((CONFIGS / "parts").glob("*.yaml"))
ORDER = ["name", "model", "data", None, "trainer"]  # None: techniques
FILES = [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in (*JOBS, *PARTS)]
COMMAND = re.compile(r" {5}(lightning-ft fit --config \S+.*)$")
ANSWERED = {
    "EpisodeData": "episodes",
    "PreferenceData": "pairs",
    "PromptData": "prompts",
    "UnpairedPreferenceData": "rated",
}
HEAD = ("model.classifier.", "model.bert.pooler.", "model.score.")
Run = Callable[..., Outcome]
Flags = Callable[[Path], tuple[str, ...]]


QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
SHORT = ("--trainer.max_steps=2", "--trainer.log_every_n_steps=1", *QUIET)
HELD_OUT = "--data.val_fraction=0.05"


def task_of(path: Path) -> str:
    """The task of a job, or the rows of a preference module; fragments are run on a language model."""
    given = yaml.safe_load(path.read_text()) if path in JOBS else {}
    data = str(given.get("data", {}).get("class_path")).rpartition(".")[2]
    return ANSWERED.get(data) or given.get("model", {}).get("task", "causal_lm")


def write_episodes(path: Path) -> None:
    """Forty classes of twenty different texts each: what reptile_text takes in training."""
    lines = [
        f"{WORDS[k % 8]} {'yes ' * (k // 8)}{WORDS[n % 8]} {'no ' * (n // 8)},class {k}"
        for k in range(40)
        for n in range(20)
    ]
    path.write_text("\n".join(["text,label", *lines]) + "\n")


def given_data(path: Path) -> dict[str, Any]:
    """What a job says of its data."""
    found: dict[str, Any] = yaml.safe_load(path.read_text()).get("data") or {} if path in JOBS else {}
    return found


def has_teacher(path: Path) -> bool:
    """Whether a file names a teacher other than the model itself."""
    return yaml.safe_load(path.read_text()).get("distillation", {}).get("teacher", "self") != "self"


def teacher_of(base: Path, task: str) -> Path:
    """A teacher with a trained head: of language models the base itself, of classes a random one with the rows' labels."""
    if task == "causal_lm":
        return base
    folder = base.with_name(f"teacher-{task}")
    if not folder.exists():
        model, tokenizer, _ = load_for_task(task, str(base), labels=["high", "low", "middle"])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[str, ...]]:
    """A file's flags that put tiny weights and rows in the place of the real ones, for two steps."""
    folder = tmp_path_factory.mktemp("tiny")
    question = {"role": "user", "content": "Good?"}
    chats = [{"prompt": [question], "completion": [{"role": "assistant", "content": f"no {n}"}]} for n in range(80)]
    pairs = [{"prompt": f"{n}?", "chosen": f" yes {n}", "rejected": " no"} for n in range(80)]
    rated = [{"prompt": f"{n}?", "completion": f" yes {n}", "label": n % 2 == 0} for n in range(80)]
    sums = [{"question": f"{n} + 1 =", "answer": str(n + 1), "metadata": {"num_terms": 2}} for n in range(80)]
    prompts = [{"prompt": row["question"], **row} for row in sums]
    texts = {"causal_lm": chats, "pairs": pairs, "prompts": prompts, "rated": rated}

    def several(path: Path) -> tuple[str, ...]:
        """Of a job of several tasks: the same file with tiny rows, and their model."""
        speaks = "SFTData" in path.read_text()
        base, rows = folder / f"model-several-{speaks}", folder / "several.jsonl"
        if not base.exists():
            write_model(base, max_position_embeddings=256) if speaks else write_base("bert", base)
            chat = [[*one["prompt"], *one["completion"]] for one in chats]
            told = [
                {"messages": m, "text": f"hello {n}", "label": "ab"[n % 2], "rating": n / 80}
                for n, m in enumerate(chat)
            ]
            rows.write_text("".join(json.dumps(row) + "\n" for row in told))
            answered = "".join(json.dumps(row) + "\n" for row in pairs)
            (folder / "pairs-several.jsonl").write_text(answered)
        tiny = folder / path.name
        text = (
            path.read_text()
            .replace("starter:vader/train", str(rows))
            .replace("val_fraction: 0.1 ", "val_fraction: 0.05 ")
            .replace("path: pairs.jsonl", f"path: {folder / 'pairs-several.jsonl'}")
        )
        tiny.write_text(re.sub(r"starter:\S+", str(base), text).replace("val_fraction: 0.02", "val_fraction: 0.05"))
        return ("--config", str(tiny), "--trainer.max_steps=2", "--trainer.log_every_n_steps=1", *QUIET)

    def flags(path: Path) -> tuple[str, ...]:
        if path.stem == "lwf":
            return flags(CONFIGS / "continual_naive.yaml")
        if path.stem == "task_sampling":
            return several(CONFIGS / "multitask_classification.yaml")
        if path in JOBS and "MultiTask" in path.read_text():
            return several(path)
        task = task_of(path)
        if path.stem == "maml_sinusoid":
            return ("--data.val_episodes=4", *SHORT)
        if path.stem == "maml_lora_reasoning":
            base = folder / "model-reasoning"
            if not base.exists():
                write_model(base, max_position_embeddings=256)
            return (f"--model.base={base}", "--data.val_episodes=2", "--data.batch_size=1", *SHORT)
        if task == "episodes":
            base, data = folder / "model-episodes", folder / "episodes.csv"
            if not base.exists():
                write_base("bert", base)
                write_episodes(data)
            cache = f"--data.cache_dir={folder / 'cache'}"
            return (f"--model.base={base}", f"--data.path={data}", cache, "--data.val_episodes=4", *SHORT)
        base, data = folder / f"model-{task}", folder / f"{task}.jsonl"
        if not base.exists():
            rows: list[dict[str, Any]] = texts.get(task) or rows_of(task, 80)
            if task in texts:
                write_model(base)
            else:
                write_base("t5" if task == "seq2seq_lm" else "bert", base)
            lines = [{**row, "rating": row.get("label"), "domain": "ab"[n % 2]} for n, row in enumerate(rows)]
            data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows_at = "data.source" if "source" in given_data(path).get("init_args", {}) else "data"
        taught = (f"--distillation.teacher={teacher_of(base, task)}",) if has_teacher(path) else ()
        if path.stem == "gkd":
            if not (teacher := base.with_name("teacher-prompts")).exists():
                write_model(teacher, initializer_range=0.1)
            taught = (f"--model.teacher={teacher}",)
        return (
            f"--model.base={base}",
            f"--{rows_at}.path={data}",
            f"--{rows_at}.cache_dir={folder / 'cache'}",
            HELD_OUT.replace("data", rows_at),
            *taught,
            *SHORT,
        )

    return flags


@pytest.fixture(autouse=True)
def left_alone() -> Iterator[None]:
    """A config with a distributed strategy makes a process group of one, which must not outlive its test."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in an empty folder, with the library's own classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    return lambda *words: call(capsys, *words)


def stacked(path: Path) -> list[str]:
    """A job by itself; a fragment on full training, which has nothing that a technique would clash with, or on what it needs."""
    base = {"task_sampling": "multitask_classification", "lwf": "continual_naive"}.get(path.stem, "sft_full")
    files = [path] if path in JOBS else [CONFIGS / f"{base}.yaml", path]
    return [word for file in files for word in ("--config", str(file))]


def leaves(path: Path) -> list[tuple[str, int]]:
    """Dotted keys with a value of their own, and the line of each."""

    def walk(node: yaml.Node, prefix: str) -> list[tuple[str, int]]:
        if not isinstance(node, yaml.MappingNode):
            return []
        found = []
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            inner = walk(value, f"{name}.")
            found += inner or [(name, key.start_mark.line)]
        return found

    return walk(yaml.compose(path.read_text(), Loader=yaml.SafeLoader), "")


def test_the_folder_is_what_the_readme_says() -> None:
    assert {path.stem for path in JOBS} >= {"quickstart", "sft_lora", "sft_dora", "sft_freeze", "sft_full"}
    assert {path.stem for path in PARTS} >= {"lora", "freeze", "samples"}
    assert not [path for path in CONFIGS.rglob("*.yml")], "the tests above look for .yaml"


@pytest.mark.parametrize("path", FILES)
def test_header_names_the_job_and_its_command(path: Path) -> None:
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ") and second.startswith(("# ", "#")) or not second
    command = COMMAND.search(first)
    assert command, f"{path.name}: the first line ends with the command that runs the file"
    named = [word for word in command[1].split() if word.startswith("configs/")]
    assert named[-1] == str(path.relative_to(CONFIGS.parent)), f"{path.name}: its command names another file"
    assert all((CONFIGS.parent / name).is_file() for name in named)


@pytest.mark.parametrize("path", FILES)
def test_every_key_says_why(path: Path) -> None:
    lines = path.read_text().splitlines()
    bare = [name for name, line in leaves(path) if not re.search(r"\S +# \S.{10,}", lines[line])]
    assert not bare, f"{path.name}: no comment beside {', '.join(bare)}"
    assert max(map(len, lines)) <= 140, f"{path.name}: a line is too long to read beside its neighbours"


@pytest.mark.parametrize("path", FILES)
def test_order_is_model_data_techniques_trainer(path: Path) -> None:
    keys = list(yaml.safe_load(path.read_text()))
    places = [ORDER.index(key if key in ORDER else None) for key in keys]
    assert places == sorted(places), f"{path.name}: {keys}"


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log.*sync_dist")  # our modules have summed already
@pytest.mark.parametrize("path", FILES)
def test_two_steps_change_what_is_trained(path: Path, run: Run, tiny: Flags, tmp_path: Path) -> None:
    outcome = run("fit", *stacked(path), *tiny(path), "--name=two")
    assert outcome.code == 0, outcome.err
    last = tmp_path / "runs/two/checkpoints/last.ckpt"
    checkpoint = read_whole(last) if last.is_dir() else torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 2
    moments = [state["exp_avg"] for state in checkpoint["optimizer_states"][0]["state"].values()]
    if path.stem != "reptile_text":  # whose plain outer steps keep no state
        assert moments and all(moment.isfinite().all() for moment in moments)
        assert any(moment.abs().sum() > 0 for moment in moments)
    # Only what a technique of this file trains is stored.
    keys = [key for key in checkpoint["state_dict"] if key.startswith("model.")]
    given = {**yaml.safe_load((CONFIGS / "sft_full.yaml").read_text()), **yaml.safe_load(path.read_text())}
    if "lora" in given or "orthogonal_lora" in given:
        assert all(".lora_" in key or task_of(path) != "causal_lm" and key.startswith(HEAD) for key in keys)
    elif "ia3" in given:
        assert all(key.endswith(".ia3_scale") for key in keys)
    elif "adapter" in given:
        assert all(re.search(r"\.(down|up)_(weight|bias)$", key) for key in keys)
    elif "prefix" in given:
        assert all(".prefix_" in key for key in keys)
    elif path.stem == "maml_sinusoid":
        assert len(keys) == 6
    elif path.stem == "sft_bitfit":
        assert all(key.endswith(".bias") or key.startswith(HEAD) for key in keys)
    elif "freeze" in given:
        assert all(".layers." in key for key in keys)
    else:
        assert any("embed" in key or "shared" in key for key in keys)


PAIRED = [path for path in JOBS if task_of(path) in ("pairs", "rated")]


@pytest.mark.parametrize("path", PAIRED, ids=lambda path: path.stem)
def test_answers_share_their_prompts(path: Path, run: Run, tiny: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the shipped files say: no prompt stands in a batch twice."""
    seen = []
    for module in (DPO, KTO, RewardModel):
        own = module.training_step

        def watched(self: Any, batch: Any, batch_idx: int, own: Any = own) -> Any:
            seen.append(batch)
            return own(self, batch, batch_idx)

        monkeypatch.setattr(module, "training_step", watched)
    assert run("fit", "--config", str(path), *tiny(path), "--name=shared").code == 0
    assert seen and all(batch.shared is not None and any(batch.shared) for batch in seen)


@pytest.mark.parametrize("path", FILES)
def test_a_misspelt_key_is_refused_with_its_line(path: Path, run: Run, tiny: Flags, tmp_path: Path) -> None:
    name, line = leaves(path)[-1]
    key = name.rpartition(".")[2]
    lines = path.read_text().splitlines()
    lines[line] = lines[line].replace(key, f"{key}x", 1)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("\n".join(lines) + "\n")
    base = [] if path in JOBS or path.stem == "task_sampling" else ["--config", str(CONFIGS / "sft_full.yaml")]
    outcome = run("fit", *base, "--config", str(wrong), *tiny(path))
    assert outcome.code == 2
    assert f"{key}x" in outcome.err and "Traceback" not in outcome.err
    assert f"wrong.yaml, line {line + 1}" in outcome.err
    assert not (tmp_path / "runs").exists()


def test_own_data_and_model_are_two_flags(run: Run, tiny: Flags, tmp_path: Path) -> None:
    """Nothing in sft_lora.yaml but these two values points at the starter assets, at any stage."""
    config = yaml.safe_load((CONFIGS / "sft_lora.yaml").read_text())
    starters = {f"{part}.{key}" for part in config for key, value in config[part].items() if "starter:" in str(value)}
    assert starters == {"model.base", "data.path"}


def test_fragments_stack_on_each_other(run: Run, tiny: Flags, tmp_path: Path) -> None:
    words = [
        word for name in ("lora", "freeze", "samples") for word in ("--config", str(CONFIGS / f"parts/{name}.yaml"))
    ]
    short = ["--samples.max_new_tokens=2", "--freeze.layers=[-1]"]
    outcome = run(
        "fit",
        "--config",
        str(CONFIGS / "sft_full.yaml"),
        *words,
        *tiny(CONFIGS / "sft_full.yaml"),
        *short,
        "--name=all",
    )
    assert outcome.code == 0, outcome.err
    keys = torch.load(tmp_path / "runs/all/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert any(".lora_" in key for key in keys) and any("layers.1.mlp.down_proj" in key for key in keys)
    assert len((tmp_path / "runs/all/samples.jsonl").read_text().splitlines()) >= 6
