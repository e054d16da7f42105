"""Weights for others: adapters merged to the same logits, checkpoints that the Auto classes load, uploads through a
stub of the Hub."""

import inspect
import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppg_fast.cli import main
from ppg_fast.config import make_config
from ppg_fast.dialogues.chat_format import make_word_tokenizer
from ppg_fast.jobs import RunFolder
from ppg_fast.jobs.cards import write_model_card
from ppg_fast.models import export
from ppg_fast.models.adaptation import add_lora
from ppg_fast.models.causal_lm import load_model, make_model

WORDS = ["red", "blue", "green"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base/ is a model, adapter/ a LoRA of it whose weights are not zero, logits those of the two together on
    ``ids``."""
    root = tmp_path_factory.mktemp("export")
    tokenizer = make_word_tokenizer(WORDS)
    model = make_model(len(tokenizer), width=32, layers=2)
    for part in (model, tokenizer):
        part.save_pretrained(root / "base")
    adapted = add_lora(AutoModelForCausalLM.from_pretrained(root / "base"), 4, target_modules="q_proj,down_proj")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=generator)
    for part in (adapted, tokenizer):
        part.save_pretrained(root / "adapter")
    ids = torch.randint(len(tokenizer), (2, 9), generator=generator)
    with torch.no_grad():
        return root, adapted, tokenizer, ids, adapted(ids).logits


def logits_of(folder, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(ids).logits


def test_merged_weights_give_the_same_logits(folders, tmp_path, capsys):
    root, _, _, ids, expected = folders
    assert main(["merge", str(root / "adapter"), "-o", str(tmp_path / "whole")]) == 0
    assert "merged:" in capsys.readouterr().out
    torch.testing.assert_close(logits_of(tmp_path / "whole", ids), expected, rtol=1e-4, atol=1e-5)
    assert (logits_of(root / "base", ids) - expected).abs().max() > 0.05, "the adapter changes something"
    assert not (tmp_path / "whole" / export.ADAPTER_CONFIG).exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").get_vocab()["red"] > 0
    assert main(["merge", str(root / "adapter"), "-o", str(tmp_path / "again"), "--base", str(root / "base")]) == 0
    torch.testing.assert_close(logits_of(tmp_path / "again", ids), expected, rtol=1e-4, atol=1e-5)


def test_a_run_with_adapters_leaves_the_adapter(folders, tmp_path):
    """And training can go on: neither weights nor adapters of the model that is saved change."""
    _, adapted, tokenizer, ids, expected = folders
    run = RunFolder(make_config({"output_dir": str(tmp_path / "run")}))
    run.open()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    run.save_checkpoint(adapted, tokenizer)
    assert all(torch.equal(before[name], value) for name, value in adapted.state_dict().items())
    torch.testing.assert_close(logits_of(tmp_path / "run/checkpoint", ids), expected, rtol=1e-4, atol=1e-5)
    assert export.find_adapter(tmp_path / "run") == tmp_path / "run/checkpoint"
    assert main(["merge", str(tmp_path / "run"), "-o", str(tmp_path / "whole")]) == 0
    torch.testing.assert_close(logits_of(tmp_path / "whole", ids), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_merged_is_said(folders, tmp_path, capsys):
    root, _, tokenizer, *_ = folders
    run = RunFolder(make_config({"output_dir": str(tmp_path / "run")}))
    run.open()
    run.save_checkpoint(make_model(len(tokenizer), width=16, layers=1), tokenizer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    cases = [
        ([str(tmp_path / "run"), "-o", str(tmp_path / "x")], "is a whole model already"),
        ([str(tmp_path / "nowhere"), "-o", str(tmp_path / "x")], "merge wants the folder of a run or of an adapter"),
        ([str(root / "adapter"), "-o", str(tmp_path / "full")], "--output must be a new or empty folder"),
        ([str(root / "adapter"), "-o", str(tmp_path / "x"), "--base", "nowhere"], "(--base FOLDER), got 'nowhere'"),
        (
            [str(root / "adapter"), "-o", str(tmp_path / "x"), "--push-to-hub", "noslash"],
            "must be named user/name, got 'noslash'",
        ),
    ]
    for arguments, message in cases:
        assert main(["merge", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


class StubHub:
    """What of HfApi is used, without a network."""

    calls: ClassVar[list] = []
    error: ClassVar[Exception | None] = None

    def create_repo(self, repo_id, *, private, exist_ok):
        if StubHub.error:
            raise StubHub.error
        StubHub.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        StubHub.calls.append(("upload", repo_id, sorted(p.name for p in Path(folder_path).iterdir()), commit_message))
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})()


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    StubHub.calls, StubHub.error = [], None
    real = huggingface_hub.HfApi
    for name, used in (
        ("create_repo", {"repo_id", "private", "exist_ok"}),
        ("upload_folder", {"repo_id", "folder_path", "commit_message"}),
    ):
        assert used <= set(inspect.signature(getattr(real, name)).parameters), "the stub is what the Hub's client is"
    monkeypatch.setattr(huggingface_hub, "HfApi", StubHub)
    return StubHub


def test_push_uploads_the_checkpoint_with_its_card(hub, tmp_path, capsys):
    from test_cli import SHORT

    flags = ["--imitation-steps", "0", "--max-steps", "1", "--push-to-hub", "me/talker", "--hub-private"]
    assert main(["train", "--output-dir", str(tmp_path / "run"), *SHORT, *flags]) == 0
    assert hub.calls[0] == ("create", "me/talker", True, True)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.calls[1][2])
    assert "pushed: https://hub/me/talker/commit/1" in capsys.readouterr().out
    hub.calls.clear()
    assert main(["push", str(tmp_path / "run"), "me/other"]) == 0
    assert [call[:3] for call in hub.calls[:1]] == [("create", "me/other", False)]
    assert hub.calls[1][3] == "checkpoint of ppg_fast"


def test_a_refusal_of_the_hub_is_one_line(hub, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({}))
    hub.error = PermissionError("401 Client Error\nYou need a token")
    assert main(["push", str(tmp_path), "me/talker"]) == 1
    assert capsys.readouterr().err == f"ppg-fast: {tmp_path} could not be pushed to me/talker: 401 Client Error\n"
    assert main(["push", str(tmp_path / "none"), "me/talker"]) == 1
    assert "push wants a folder with a model" in capsys.readouterr().err
    assert main(["push", str(tmp_path), "me/ta lker"]) == 1
    assert "must be named user/name" in capsys.readouterr().err
    assert main(["train", "--push-to-hub", "talker", "--output-dir", str(tmp_path / "run")]) == 1
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_merged_into_the_base_it_was_trained_on_only(folders, tmp_path, capsys):
    """Another model of the same shapes fits, and its outputs would be nobody's."""
    _, adapted, tokenizer, *_ = folders
    run = RunFolder(make_config({"output_dir": str(tmp_path / "run")}))
    run.open()
    run.save_checkpoint(adapted, tokenizer)
    make_model(len(tokenizer), width=32, layers=2, seed=7).save_pretrained(tmp_path / "other")
    arguments = ["merge", str(tmp_path / "run"), "-o", str(tmp_path / "x")]
    assert main([*arguments, "--base", str(tmp_path / "other")]) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("ppg-fast")]
    assert "merge wants the base model that the adapter was trained on" in line
    assert f"got one of other weights: '{tmp_path / 'other'}'" in line
    assert not (tmp_path / "x").exists()


def test_the_card_of_an_adapter_names_its_base(tmp_path):
    (tmp_path / "SmolLM2-135M").mkdir()
    config = make_config({"model": str(tmp_path / "SmolLM2-135M"), "lora_rank": 4})
    numbers = {"steps": 1, "seconds": 1.0}
    write_model_card(tmp_path, config, "A run.", numbers)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card
    assert "LoRA adapters of rank 4 for the base model `SmolLM2-135M`" in card
    assert str(tmp_path) not in card
    write_model_card(tmp_path, make_config({}), "A run.", numbers)
    assert "adapters" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("damage", ["shape", "missing", "unexpected", "header", "config", "weights", "type"])
def test_a_model_is_loaded_whole_or_one_line_says_what_is_wrong(damage, tmp_path):
    make_model(16, width=32, layers=1).save_pretrained(tmp_path)
    settings, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config, state = json.loads(settings.read_text()), load_file(weights)
    name = "model.layers.0.mlp.up_proj.weight"
    if damage == "shape":
        state[name] = torch.zeros(3, 32)
    elif damage == "missing":
        del state[name]
    elif damage == "unexpected":
        state["v_head.weight"] = torch.zeros(1, 32)
    elif damage == "type":
        config["model_type"] = "nothing_known"
    save_file(state, weights, metadata={"format": "pt"})
    settings.write_text("{" if damage == "config" else json.dumps(config))
    if damage == "header":
        weights.write_bytes(b"abc")
    elif damage == "weights":
        weights.unlink()
    if damage == "unexpected":
        with pytest.warns(
            UserWarning, match=r"holds 1 weights that Qwen3ForCausalLM does not have, such as v_head\.weight"
        ):
            load_model(str(tmp_path), 16)
        return
    said = {
        "shape": rf"1 weights of other shapes .* {name} \(3, 32\) for \(64, 32\)",
        "missing": f"1 weights missing, such as {name}",
    }
    with pytest.raises(ValueError, match=said.get(damage, "cannot be loaded as a causal language model: ")) as error:
        load_model(str(tmp_path), 16)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
