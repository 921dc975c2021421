"""What README.md and docs/ tell a reader to type works: shell lines, YAML, Python, links and generated tables.

Everything runs in a folder that holds what the pages speak of: ``my.jsonl``, ``reviews.csv``, ``intents.csv``, ``pairs.jsonl``,
``rated.jsonl``, ``prompts.jsonl``, ``my/model`` (a tiny random model), ``configs/`` and a finished run ``runs/sft_lora``. ``fit``
lines are parsed, the others run.
"""

import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.random_model import write_model
from tests.cli.conftest import Outcome, call

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PARSED = ("fit", "validate", "predict")
# What a snippet runs with instead: nothing else of it is changed.
SUBSTITUTIONS = {
    '"starter:smollm2-135m"': '"my/model"',
    '"starter:minilm-l6"': '"my/model"',
    "max_epochs=1": 'max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, '
    "enable_model_summary=False, num_sanity_val_steps=0",
    # Of a stream all tasks are trained, two batches each.
    "max_epochs=-1": 'max_epochs=-1, limit_train_batches=2, accelerator="cpu", logger=False, enable_progress_bar=False, '
    "enable_model_summary=False, num_sanity_val_steps=0",
}
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def lines(page: Path) -> list[str]:
    """Every shell line of a page that calls the program, and those inside its tables and sentences that have flags."""
    return [line for body in blocks(page, "bash") for line in body.splitlines() if line.strip()]


def named(pages: list[Path]) -> list[object]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like that of somebody who follows the pages, after a first run."""
    folder = tmp_path_factory.mktemp("newcomer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LIGHTNING_FT_CACHE", str(folder / "cache"))
        (folder / "configs").symlink_to(ROOT / "configs")
        write_model(folder / "my/model", max_position_embeddings=512)
        chats = [
            [{"role": "user", "content": f"{n}+1?"}, {"role": "assistant", "content": f"{n + 1}"}] for n in range(24)
        ]
        (folder / "my.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        labelled = [f"answer {n} {'good' if n % 2 else 'bad'},{'up' if n % 2 else 'down'}" for n in range(24)]
        (folder / "reviews.csv").write_text("\n".join(["text,label", *labelled]) + "\n")
        intents = [f"{word} {'please ' * k}{n},intent {k}" for k in range(8) for n, word in enumerate(["ask"] * 6)]
        (folder / "intents.csv").write_text("\n".join(["text,label", *intents]) + "\n")
        answers = [{"prompt": f"{n}+1=", "chosen": f" {n + 1}.", "rejected": " no."} for n in range(24)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
        rated = [{"prompt": f"{n}+1=", "completion": f" {n + n % 2}.", "label": n % 2 == 1} for n in range(24)]
        (folder / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
        sums = [{"prompt": f"{n}+1=", "answer": str(n + 1), "metadata": {}} for n in range(24)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
        from lightning_ft.cli.training import run

        words = ["--config", "configs/sft_lora.yaml", "--data.path", "my.jsonl", "--model.base", "my/model"]
        run("fit", [*words, "--trainer.max_steps=2", "--trainer.log_every_n_steps=1", *QUIET])
        yield folder


@pytest.fixture
def run(newcomer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    monkeypatch.chdir(newcomer)
    return lambda *words: call(capsys, *words)


@pytest.mark.parametrize("page", named([page for page in PAGES if lines(page)]))
def test_shell_lines(page: Path, run: Callable[..., Outcome], newcomer: Path) -> None:
    for line in lines(page):
        program, command, *words = shlex.split(line)
        assert program == "lightning-ft", line
        if command in PARSED:
            outcome = run(command, *words, "--print_config")
            assert outcome.code == 0 and "trainer:" in outcome.out, f"{line}: {outcome.err}"
        else:
            extra = QUIET if command == "test" else ()
            outcome = run(command, *words, *extra)
            assert outcome.code == 0, f"{line}: {outcome.err}"
        for written in ("adapter", "merged"):
            shutil.rmtree(newcomer / written, ignore_errors=True)


@pytest.mark.parametrize("page", named([page for page in PAGES if blocks(page, "yaml")]))
def test_yaml(page: Path, run: Callable[..., Outcome], newcomer: Path) -> None:
    for body in blocks(page, "yaml"):
        (newcomer / "snippet.yaml").write_text(body)
        job = "protonet_text" if "EpisodeData" in body else "sft_full"
        outcome = run("fit", "--config", f"configs/{job}.yaml", "--config", "snippet.yaml", "--print_config")
        assert outcome.code == 0, f"{body}\n{outcome.err}"


@pytest.mark.parametrize("page", named([page for page in PAGES if blocks(page, "python")]))
def test_python(page: Path, run: Callable[..., Outcome], newcomer: Path) -> None:
    names: dict[str, object] = {"__name__": "snippet"}
    for body in blocks(page, "python"):
        for written, tiny in SUBSTITUTIONS.items():
            body = body.replace(written, tiny)
        exec(compile(body, f"{page.name}", "exec"), names)


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", named(PAGES))
def test_generated_tables_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert renderer().render(text) == text, "run: python docs/render_tables.py"


def test_every_technique_has_a_page_and_a_line_in_the_index() -> None:
    from lightning_ft.cli.slots import techniques

    index = (ROOT / "docs/index.md").read_text()
    for slot, cls in techniques().items():
        page = ROOT / f"docs/techniques/{slot}.md"
        assert page.is_file() and f"techniques/{slot}.md" in index, slot
        assert f"<!-- generated: arguments {cls.__name__} -->" in page.read_text()


def test_the_readme_lists_every_command() -> None:
    from lightning_ft.cli.main import OTHERS, TRAINING

    text = (ROOT / "README.md").read_text()
    assert not [name for name in (*TRAINING, *OTHERS) if f"| `lightning-ft {name}` |" not in text]


def renderer() -> ModuleType:
    """docs/render_tables.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("render_tables", ROOT / "docs/render_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
