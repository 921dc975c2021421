"""Invariant 11: imports patch nothing, nothing phones home, files run no code, nor does a repository unasked."""

import ast
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_ft
from benchmarks.random_model import write_model
from lightning_ft.callbacks.lora import LoRA
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.load import load_causal, load_config, load_tokenizer
from lightning_ft.modules.sft import SFT
from tests.invariants import ground

ROOT = Path(lightning_ft.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES}

# Everything that others own is looked at before and after all of lightning_ft was imported.
PROBE = """
import importlib, json, os, pkgutil, socket, sys
reached = []
def refuse(self, address, *more):
    reached.append(str(address))
    raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = refuse
import lightning.pytorch.cli, torch, transformers, datasets, jsonargparse, safetensors.torch, torchmetrics
import torch.distributed.fsdp, torch.distributed.checkpoint, torch.nn.attention.flex_attention
import transformers.masking_utils, transformers.modeling_utils, transformers.models.llama.modeling_llama
OWNERS = ("torch", "lightning", "transformers", "datasets", "jsonargparse", "safetensors", "torchmetrics", "builtins")
def look():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in OWNERS or module is None:
            continue
        for key, value in list(vars(module).items()):
            found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{key}.{k}": v for k, v in list(vars(value).items())}
    return found
def registries():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attention
    return [sorted(map(str, r.valid_keys())) for r in (masks, attention)]
names, tables, environment = look(), registries(), dict(os.environ)
import warnings
filters, hook = list(warnings.filters), sys.excepthook
import lightning_ft
every = ["lightning_ft"]
for found in pkgutil.walk_packages(lightning_ft.__path__, "lightning_ft."):
    # packed_linear is imported only where a base is packed: bitsandbytes compiles functions of torch when it is imported.
    if not found.name.endswith(("__main__", ".packed_linear")):
        importlib.import_module(found.name)
        every.append(found.name)
for name in lightning_ft.__all__:
    getattr(lightning_ft, name)
now = look()
IGNORED = ("__abstractmethods__", "_abc_impl", "__annotations__", "__annotations_cache__", "__doc__", "__path__")
changed = [k for k, v in names.items() if k in now and now[k] is not v and not k.endswith(IGNORED)]
plain = (bool, int, float, str, type(None))
changed = [k for k in changed if not (isinstance(names[k], plain) and names[k] == now[k])]
print(json.dumps({
    "changed": changed,
    "looked": len(names),
    "imported": len(every),
    "registries": tables == registries(),
    "environment": sorted(k for k in environment.keys() | os.environ.keys() if environment.get(k) != os.environ.get(k)),
    "filters": filters == list(warnings.filters),
    "hook": sys.excepthook is hook,
    "reached": reached,
    "threads": torch.get_num_threads(),
}))
"""


@pytest.fixture(scope="module")
def probe():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, cwd=ROOT.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_importing_patches_nothing(probe):
    assert probe["looked"] > 20_000 and probe["imported"] > 50
    assert probe["changed"] == []
    assert probe["registries"] and probe["filters"] and probe["hook"]


def test_importing_sets_no_environment_and_reaches_no_network(probe):
    assert probe["environment"] == [] and probe["reached"] == []


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: word.value for word in node.keywords}, node.lineno


def test_every_torch_load_is_weights_only():
    found = 0
    for file, tree in TREES.items():
        for name, words, line in calls(tree):
            if "allow_pickle" in words:
                assert ast.unparse(words["allow_pickle"]) == "False", (file.name, line)
            if name.endswith("torch.load") or name == "load" and "map_location" in words:
                found += 1
                value = words.get("weights_only")
                assert isinstance(value, ast.Constant) and value.value is True, f"{file.name}:{line}"
    assert found >= 4


def reads_named_classes_only(tree):
    """Whether all that a file does with pickle is a reader that looks each class up in a list of its own."""
    readers = [
        c for c in ast.walk(tree) if isinstance(c, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, c.bases)
    ]
    closed = readers and all(any(getattr(f, "name", "") == "find_class" for f in reader.body) for reader in readers)
    used = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pickle"}
    bases = sum(ast.unparse(n) == "pickle.Unpickler" for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    return closed and used <= {"pickle.Unpickler", "pickle.UnpicklingError"} and bases == len(readers)


def test_no_unpickler_is_imported_and_no_text_is_executed():
    banned = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "_pickle"}
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = banned & {name.split(".")[0] for name in names}
            assert not found or found == {"pickle"} and reads_named_classes_only(tree), (file.name, node.lineno)
        for name, _, line in calls(tree):
            assert name not in ("eval", "exec", "compile", "__import__", "yaml.load"), (file.name, line)


def imported(tree):
    """Names that a file's imports bind."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)


def test_no_module_assigns_into_another_when_it_is_imported():
    """Statements at the top of a file define and import; none sets an attribute or an entry of something imported."""
    for file, tree in TREES.items():
        others = set(imported(tree))
        for node in tree.body:
            for target in node.targets if isinstance(node, ast.Assign) else []:
                if isinstance(target, (ast.Attribute, ast.Subscript)):
                    text = ast.unparse(target)
                    own = text.startswith("sys.modules[__name__]") or text.split(".")[0].split("[")[0] not in others
                    assert own, (file.name, node.lineno, text)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                called = ast.unparse(node.value.func)
                assert not called.startswith(("setattr", "os.environ")), (file.name, node.lineno)


def test_no_word_of_telemetry():
    """Addresses and switches that would count users; the hub is reached by transformers, for models asked for by name."""
    words = ("telemetry", "analytics", "sentry_sdk", "posthog", "mixpanel", "segment.io", "urlopen", "requests.post")
    for file in SOURCES:
        text = file.read_text(encoding="utf-8").lower()
        assert not [word for word in words if word in text], file.name


class Bomb:
    """What a hostile file would do when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (self.target,))


def test_a_hostile_checkpoint_runs_nothing(base, rows, cache, tmp_path):
    mark = str(tmp_path / "ran")
    file = tmp_path / "hostile.ckpt"
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.4", "lightning_ft": Bomb(mark)}, file)
    with pytest.raises(Refusal, match="not a checkpoint that can be read"):
        lightning_ft.load(file)
    with pytest.raises(Refusal, match="is not a checkpoint that can be read"):
        ground.trainer(tmp_path, LoRA(init_from=str(file))).fit(ground.sft(base), ground.data(rows, cache))
    with pytest.raises((Refusal, pickle.UnpicklingError)):
        ground.trainer(tmp_path, LoRA()).fit(ground.sft(base), ground.data(rows, cache), ckpt_path=file)
    assert not os.path.exists(mark)
    torch.load(file, weights_only=False)  # the bomb works
    assert os.path.exists(mark)


def test_a_checkpoint_names_no_class_to_import_at_will(tmp_path):
    record = {
        "format": 1, "keys": [], "fingerprint": "", "seed": 0, "techniques": [], "references": {},
        "module": {"class_path": "subprocess.Popen", "init_args": {"args": f"mkdir {tmp_path / 'ran'}", "shell": True}},
    }  # fmt: skip
    torch.save({"state_dict": {}, "lightning_ft": record}, tmp_path / "hostile.ckpt")
    with pytest.raises(Refusal, match="subprocess.Popen, which is not part of lightning_ft"):
        lightning_ft.load(tmp_path / "hostile.ckpt")
    record["module"] = {"class_path": "lightning_ft.models.starter.fetch", "init_args": {}}
    torch.save({"state_dict": {}, "lightning_ft": record}, tmp_path / "hostile.ckpt")
    with pytest.raises(Refusal, match="is no LightningModule"):
        lightning_ft.load(tmp_path / "hostile.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("function", [SFT, load_causal, load_config, load_tokenizer])
def test_remote_code_is_off_unless_asked_for(function):
    assert inspect.signature(function).parameters["trust_remote_code"].default is False


def test_code_in_a_models_folder_does_not_run(rows, cache, tmp_path):
    base = write_model(tmp_path / "base")
    mark = tmp_path / "ran"
    (base / "modeling_own.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n")
    config = json.loads((base / "config.json").read_text())
    config["model_type"] = "own_kind"
    config["auto_map"] = {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match="trust_remote_code"):
        ground.trainer(tmp_path, LoRA()).fit(ground.sft(base), ground.data(rows, cache))
    assert not mark.exists()
