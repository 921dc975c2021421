"""Names that become parts of files."""

import pytest

from lightning_ft.callbacks.bottleneck_adapter import BottleneckAdapter
from lightning_ft.callbacks.export_adapter import ExportAdapter
from lightning_ft.callbacks.ia3 import IA3
from lightning_ft.callbacks.lora import LoRA
from lightning_ft.callbacks.prefix_tuning import PrefixTuning
from lightning_ft.callbacks.prompt_tuning import PromptTuning
from lightning_ft.callbacks.samples import SampleGenerations
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.names import check_name

BAD = ["a/b", "../a", "a.b", "a b", "a\\b", "", "-a", "ä", "a\n"]
TECHNIQUES = [LoRA, BottleneckAdapter, IA3, PrefixTuning, PromptTuning, ExportAdapter]


@pytest.mark.parametrize("name", BAD)
def test_no_technique_takes_a_name_that_is_no_word(name):
    with pytest.raises(Refusal, match="^This name must be a word without dots or slashes"):
        check_name(name, "This name")
    for cls in TECHNIQUES:
        with pytest.raises(Refusal, match=rf"^{cls.__name__}\.name must be a word without dots or slashes .*, got "):
            cls(name=name)
    with pytest.raises(Refusal, match=r"^SampleGenerations\.name must be a word"):
        SampleGenerations(["Hello?"], name=name)


@pytest.mark.parametrize("name", ["a", "default", "run-1", "_x", "2nd", "A_b-c"])
def test_words_are_taken(name):
    check_name(name, "This name")
    assert all(cls(name=name).instance_name == name for cls in TECHNIQUES)
