"""What an installed copy promises: every module imports, the package itself costs nothing to import, names resolve."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import time
from importlib.metadata import entry_points, metadata
from pathlib import Path

import pytest

import lightning_ft

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lightning_ft.__path__, "lightning_ft.")
    if not module.name.endswith("__main__")
)


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    importlib.import_module(name)


@pytest.mark.parametrize("name", lightning_ft.__all__)
def test_every_public_name_resolves_and_is_what_its_file_calls_it(name):
    if name != "__version__":
        # Importing the file first binds its name in the package, which must not hide the function `load`.
        importlib.import_module(f"lightning_ft.{lightning_ft._HOMES[name]}")
        value = getattr(lightning_ft, name)
        assert value.__name__ == name and value.__module__.startswith("lightning_ft.")


def test_lazy_names_type_checked_names_and_all_agree():
    source = Path(lightning_ft.__file__).read_text(encoding="utf-8")
    checked = dict(re.findall(r"^    from lightning_ft\.(\S+) import (\w+)$", source, re.MULTILINE))
    assert {name: home for home, name in checked.items()} == lightning_ft._HOMES
    assert sorted([*lightning_ft._HOMES, "__version__"]) == sorted(lightning_ft.__all__) == dir(lightning_ft)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lightning_ft' has no attribute 'Lora'"):
        lightning_ft.Lora  # noqa: B018


def test_import_loads_neither_torch_nor_lightning():
    loaded = python(
        "import sys, lightning_ft; print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_import_takes_at_most_a_fifth_longer_than_lightnings():
    # In turn and the fastest of each, because another test may run beside this one.
    code = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    ours, theirs = [], []
    for _ in range(2):
        theirs.append(float(python(code.format("lightning"))))
        ours.append(float(python(code.format("lightning_ft"))))
    assert min(ours) <= 1.2 * min(theirs)


def test_importing_everything_patches_nothing():
    """No module of ours changes an attribute of a class or module of Lightning, torch or transformers."""
    code = """
import importlib, types
import lightning.pytorch as pl, torch, transformers
from transformers import masking_utils as masks, modeling_utils as attentions

watched = [pl.Trainer, pl.LightningModule, pl.Callback, pl.LightningDataModule, torch.nn.Module, torch.nn.Linear,
           torch.optim.Optimizer, torch.Tensor, torch.nn.functional, torch.utils.data.DataLoader,
           transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, transformers.GenerationMixin]
def shot():
    return {(str(owner), name): id(value) for owner in watched for name, value in vars(owner).items()
            if isinstance(value, (types.FunctionType, property, classmethod, staticmethod))}
def registered():
    return [set(attentions.ALL_ATTENTION_FUNCTIONS.valid_keys()), set(masks.ALL_MASK_ATTENTION_FUNCTIONS.valid_keys())]
before, names = shot(), registered()
for module in %r:
    importlib.import_module(module)
after = shot()
print([key for key in before if after.get(key) != before[key]], names == registered())
"""
    assert python(code % (MODULES,)).strip() == "[] True"


def test_the_distribution_says_what_it_is():
    about = metadata("lightning-ft")
    assert about["Version"] == lightning_ft.__version__
    assert about["License-Expression"] == "Apache-2.0" and about["Requires-Python"] == ">=3.10"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert (ROOT / "lightning_ft" / "py.typed").exists()
    (command,) = entry_points(group="console_scripts", name="lightning-ft")
    assert command.value == "lightning_ft.cli.main:main"


def test_constraints_pin_every_direct_dependency():
    pinned = {
        re.split(r"[=; ]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    }
    wanted = set()
    for requirement in metadata("lightning-ft").get_all("Requires-Dist") or []:
        if not re.search(r"extra == ['\"](docs|all)['\"]", requirement):
            wanted.add(re.split(r"[\[<>=;! ]", requirement)[0].lower().replace("_", "-"))
    assert wanted and wanted <= pinned
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.skipif(os.name == "nt", reason="make")
class TestMakefile:
    def test_an_old_python_is_refused_in_one_sentence(self, tmp_path):
        old = tmp_path / "oldpython"
        # Only the version differs, so that the Makefile's own check is what runs.
        code = "import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])"
        old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$2"\n')
        old.chmod(0o755)
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
        run = subprocess.run(
            ["make", "install", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert run.returncode != 0
        assert run.stderr.startswith(f"lightning_ft needs Python 3.10 or newer and {old} is 3.9")
        assert not (tmp_path / ".venv").exists()

    def test_a_second_install_does_nothing(self, tmp_path):
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
        (tmp_path / ".venv").mkdir()
        time.sleep(0.01)
        (tmp_path / ".venv" / ".installed").touch()

        def planned() -> str:
            return subprocess.run(
                ["make", "--dry-run", "install"], cwd=tmp_path, capture_output=True, text=True, check=True
            ).stdout

        assert "pip install" not in planned()
        later = time.time() + 60
        os.utime(tmp_path / "constraints.txt", (later, later))
        assert "pip install" in planned()
