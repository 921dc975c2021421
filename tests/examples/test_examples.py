"""Each script in examples/ runs, through its `main`, on tiny weights; one that is added without a test here fails."""

import importlib.util
import inspect
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.random_model import write_model

EXAMPLES = Path(__file__).parents[2] / "examples"
TESTED = {
    "continual_digits",
    "distil_your_module",
    "dpo_on_sft_adapter",
    "few_shot_images",
    "lora_on_a_cnn",
    "lora_on_your_module",
    "ppo_from_python",
    "several_tasks",
    "sft_from_python",
}


def example(name: str) -> ModuleType:
    """The script as a module; its ``main`` does not run on import."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of two layers."""
    return str(write_model(tmp_path_factory.mktemp("examples") / "model"))


def test_no_example_is_untested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED


@pytest.mark.parametrize("name", sorted(TESTED))
def test_the_first_lines_say_how_to_run_it(name: str) -> None:
    assert f"\npython examples/{name}.py" in inspect.cleandoc(example(name).__doc__ or "").replace("\n    ", "\n")


def test_lora_on_your_module(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = example("lora_on_your_module").main(model, max_steps=4, output=tmp_path / "out")
    assert result["last_loss"] < result["first_loss"]
    assert 0 < result["saved_share"] < 0.2


def test_lora_on_a_cnn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    result = example("lora_on_a_cnn").main(epochs=3)
    # Five of ten digits have never been seen before: at best half of the test digits are right.
    assert result["all ten, before"] < 0.6
    assert result["all ten, after"] > result["all ten, before"] + 0.15
    assert 0 < result["trained share"] < 0.2


def test_few_shot_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    result = example("few_shot_images").main(episodes=160, test_episodes=50)
    assert result["after"] > result["before"] + 0.05


def test_continual_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = example("continual_digits").main(epochs=3)
    average = {name: values["continual/average"] for name, values in found.items()}
    # Five tasks of two digits: who remembers the last alone has a fifth.
    assert average["naive"] < 0.4 < average["replay"] < average["joint"]
    assert found["replay"]["continual/forgetting_max"] < found["naive"]["continual/forgetting_max"] / 2


def test_distil_your_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    result = example("distil_your_module").main(epochs=3)
    assert result["teacher"] > 0.8 and result["with the teacher"] > result["alone"] + 0.05


def test_sft_from_python(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}+1=", "completion": f"{n + 1}"}) + "\n" for n in range(40)))
    answers = example("sft_from_python").main(model, str(rows), max_steps=2, batch_size=4, output=tmp_path / "out")
    assert len(answers) == 1
    assert {path.name for path in (tmp_path / "out/adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_dpo_on_sft_adapter(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f"{n}+1=", "completion": f"{n + 1}"}) + "\n" for n in range(40)))
    rows = [{"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": "none"} for n in range(40)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = example("dpo_on_sft_adapter").main(
        model, str(chats), str(pairs), max_steps=4, batch_size=4, output=tmp_path / "out"
    )
    assert found["first"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["val/rewards/margins"] > 0
    assert (tmp_path / "out/dpo/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_ppo_from_python(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+1="}) + "\n" for n in range(40)))
    rounds = example("ppo_from_python").main(
        model, "prompts.jsonl", method, rounds=2, max_new_tokens=4, lr=1e-2, output=tmp_path / "out"
    )
    assert rounds[0]["kl"] == 0 and rounds[1]["kl_k3"] > 0 and {"rewards/digits", "rewards/concise"} <= rounds[0].keys()
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()


def test_several_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.modules.tasks import write_base

    monkeypatch.chdir(tmp_path)
    found = example("several_tasks").main(str(write_base("bert", tmp_path / "bert")), rows=60, steps=4)
    assert {"val/tone/accuracy", "val/share/loss", "val/macro", "train/conflict_rate"} <= set(found)
