"""Folders for the hub: model card, code for trust_remote_code; what is written where, and what of a user's own stays."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from safetensors.torch import load_file, save_file

import kanformer
from kanformer.cli import main
from kanformer.errors import ConfigError, SurgeryError
from kanformer.surgery.saving.loading import load_model
from model_cases import BY_NAME, ONE_OF_EACH, blocks, disturb, same_state, snapshot
from training_cases import checkpoint, run_distill, run_finetune, tokenizer, write_text


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    tf.utils.logging.disable_progress_bar()
    yield
    tf.utils.logging.enable_progress_bar()


def patched(name: str = "bert", **settings):
    return disturb(kanformer.patch_model(BY_NAME[name].build(), **settings))


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


class TestCard:
    def test_it_states_base_model_settings_parameters_and_how_to_load(self, tmp_path):
        model = patched("gpt2", edges="full", grid_size=3)
        kanformer.save_pretrained(model, tmp_path, base_model="openai-community/gpt2", tokenizer=tokenizer())
        assert front_matter(tmp_path) == {"base_model": "openai-community/gpt2", "library_name": "transformers", "tags": ["kan", "kanformer"]}
        text = (tmp_path / "README.md").read_text()
        assert "[openai-community/gpt2](https://huggingface.co/openai-community/gpt2)" in text
        settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
        assert (settings["edges"], settings["grid_size"]) == ("full", 3)
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
        counts = kanformer.compare(model)
        assert rows[-1][0] == "all blocks" and rows[-1][4] == f"{counts.total('kan_parameters'):,}" and len(rows) == 3 + len(counts.blocks)
        assert rows[2][:5] == ["`transformer.h.0.mlp`", "128", "128", f"{counts.blocks[0].mlp_parameters:,}", f"{counts.blocks[0].kan_parameters:,}"]
        # The code of the card loads it, tokenizer and all.
        code = text.split("```python\n")[1].split("```")[0].replace("path/of/this/model", str(tmp_path))
        names: dict = {}
        exec(code, names)
        assert same_state(snapshot(names["model"]), snapshot(model)) and tf.AutoTokenizer.from_pretrained(tmp_path)

    def test_the_base_model_is_carried_on_from_folder_to_folder(self, tmp_path):
        kanformer.save_pretrained(patched(), tmp_path / "a", base_model="google-bert/bert-base-uncased")
        loaded = tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "a")
        kanformer.save_pretrained(loaded, tmp_path / "b")
        kanformer.save_pretrained(patched(), tmp_path / "c", base_model=str(tmp_path / "a"))
        assert front_matter(tmp_path / "b")["base_model"] == front_matter(tmp_path / "c")["base_model"] == "google-bert/bert-base-uncased"

    def test_a_base_model_that_is_a_folder_is_named_without_its_path(self, tmp_path):
        BY_NAME["bert"].build().save_pretrained(tmp_path / "mine")
        (tmp_path / "mine" / "README.md").write_text("---\nbase_model: google-bert/bert-base-uncased\ntags: [fill-mask]\n---\nTuned by me.\n")
        model = kanformer.patch_model(tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "mine"))
        kanformer.save_pretrained(model, tmp_path / "kan")
        assert "base_model" not in front_matter(tmp_path / "kan")
        text = (tmp_path / "kan" / "README.md").read_text()
        assert "Base model: `mine`" in text and str(tmp_path) not in text

    def test_a_card_of_ones_own_stays(self, tmp_path):
        card, model = tmp_path / "README.md", patched()
        card.write_text("# mine\n")
        with pytest.warns(UserWarning, match="was not written by kanformer"):
            kanformer.save_pretrained(model, tmp_path)
        assert card.read_text() == "# mine\n"
        card.unlink()
        kanformer.save_pretrained(model, tmp_path, base_model="a/b")
        first = card.read_text()
        kanformer.save_pretrained(model, tmp_path, base_model="a/c")  # its own card it writes anew
        assert front_matter(tmp_path)["base_model"] == "a/c" and card.read_text() != first
        for edited in (card.read_text() + "Trained on my texts.\n", card.read_text().replace("- kan\n", "- kan\n- german\n")):
            card.write_text(edited)
            with pytest.warns(UserWarning, match="edited since"):
                kanformer.save_pretrained(model, tmp_path, base_model="a/d")
            assert card.read_text() == edited

    def test_what_cannot_be_saved(self, tmp_path):
        with pytest.raises(SurgeryError, match="not patched"):
            kanformer.save_pretrained(BY_NAME["bert"].build(), tmp_path / "a")
        with pytest.raises(ConfigError, match="push_to_hub=True.*upload_folder"):
            kanformer.save_pretrained(patched(), tmp_path / "a", push_to_hub=True)
        wrapper = torch.nn.Sequential(patched())
        with pytest.raises(SurgeryError, match="knows nothing of the patch"):
            kanformer.save_pretrained(wrapper, tmp_path / "a")
        assert not (tmp_path / "a").exists()

    def test_a_model_of_parts_that_were_patched_by_themselves_loads_by_itself(self, tmp_path):
        values = BY_NAME["bert"].values
        encoder = kanformer.patch_model(tf.BertModel(tf.BertConfig(**values)), layers_to_transform=[0])
        decoder = tf.BertLMHeadModel(tf.BertConfig(**values, is_decoder=True, add_cross_attention=True))
        for place, model in (("one", decoder), ("both", kanformer.patch_model(copy.deepcopy(decoder), edges="full", grid_size=2))):
            whole = disturb(tf.EncoderDecoderModel(encoder=copy.deepcopy(encoder), decoder=model)).eval()
            kanformer.save_pretrained(whole, tmp_path / place)
            assert same_state(snapshot(tf.EncoderDecoderModel.from_pretrained(tmp_path / place)), snapshot(whole))
            settings = (tmp_path / place / "README.md").read_text().split("```yaml\n")[1:]
            assert [yaml.safe_load(text.split("```")[0])["edges"] for text in settings] == {"one": ["shared"], "both": ["shared", "full"]}[place]
            with pytest.raises(SurgeryError, match="a part was patched by itself"):
                kanformer.save_delta(whole, tmp_path / "delta")

    def test_options_of_save_pretrained_pass_through(self, tmp_path):
        kanformer.save_pretrained(patched(), tmp_path, max_shard_size="20KB", model_card=False)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1 and not (tmp_path / "README.md").exists()
        kanformer.save_pretrained(patched(), tmp_path / "other", is_main_process=False)
        assert not list((tmp_path / "other").iterdir())


_REMOTE = """
import json, sys, torch, transformers
from safetensors.torch import load_file
root, jobs = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
folder, auto = f"{root}/{jobs[0][0]}", getattr(transformers, jobs[0][1])

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "kanformer":
            raise ModuleNotFoundError("No module named 'kanformer'", name=name)

for what, options in (("neither flag nor import", {}), ("not installed", {"trust_remote_code": True})):
    sys.meta_path.insert(0, Hidden())
    try:
        auto.from_pretrained(folder, **options)
    except (RuntimeError, ImportError) as error:
        print(f"{what}: {type(error).__name__}: {error}")
    del sys.meta_path[0]
assert "kanformer" not in sys.modules

for number, (folder, name) in enumerate(jobs):
    expected = load_file(f"{root}/{folder}.{name}.safetensors")
    inputs = {key[3:]: tensor for key, tensor in expected.items() if key.startswith("in.")}
    model = getattr(transformers, name).from_pretrained(f"{root}/{folder}", trust_remote_code=True)
    model.save_pretrained(f"{root}/again{number}")
    again = getattr(transformers, name).from_pretrained(f"{root}/again{number}", trust_remote_code=True)
    for loaded in (model, again):
        assert any(type(module).__name__ == "KANFeedForward" for module in loaded.modules()), name
        with torch.no_grad():
            assert torch.equal(loaded(**inputs)[0], expected["output"]), name
    print("bit-equal:", folder, name)
"""


class TestRemoteCode:
    def test_a_process_that_never_imported_kanformer_loads_saves_and_loads_it(self, tmp_path):
        jobs = [(case.name, case.auto_class) for case in ONE_OF_EACH]
        jobs += [(case.name, "AutoModel") for case in ONE_OF_EACH if case.name not in ("bert", "vit")]  # whose pooler is new without the head
        for case in ONE_OF_EACH:
            kanformer.save_pretrained(patched(case.name), tmp_path / case.name, remote_code=True)
            assert "import kanformer" not in (tmp_path / case.name / "README.md").read_text()
        for name, auto_class in jobs:
            inputs = BY_NAME[name].inputs()
            with torch.no_grad():
                output = getattr(tf, auto_class).from_pretrained(tmp_path / name)(**inputs)[0]
            tensors = {f"in.{key}": value.contiguous() for key, value in inputs.items()} | {"output": output.contiguous()}
            save_file(tensors, tmp_path / f"{name}.{auto_class}.safetensors")
        arguments = [sys.executable, "-c", _REMOTE, str(tmp_path), json.dumps(jobs)]
        done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(tmp_path / "hf")})
        lines = done.stdout.splitlines()
        assert done.returncode == 0 and lines[2:] == [f"bit-equal: {name} {auto_class}" for name, auto_class in jobs], done.stderr[-2000:]
        assert lines[0].startswith("neither flag nor import: RuntimeError: You set `ignore_mismatched_sizes`")
        assert lines[1].startswith("not installed: ImportError: ") and lines[1].endswith("Run `pip install kanformer`")
        # Where kanformer is imported the same folders are loaded as any other, those that the other process saved too.
        for number, (name, _) in enumerate(jobs[:6]):
            loaded = load_model(str(tmp_path / f"again{number}"))
            assert same_state(snapshot(loaded), snapshot(patched(name))) and type(loaded).__module__.startswith("transformers.models.")

    def test_saved_again_with_and_without_it(self, tmp_path):
        model = patched()
        kanformer.save_pretrained(model, tmp_path, remote_code=True)
        kanformer.save_pretrained(tf.AutoModelForMaskedLM.from_pretrained(tmp_path), tmp_path, remote_code=True)
        assert "trust_remote_code=True" in (tmp_path / "README.md").read_text()
        model.save_pretrained(tmp_path)
        assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
        assert same_state(snapshot(tf.AutoModelForMaskedLM.from_pretrained(tmp_path)), snapshot(model))
        assert load_file(tmp_path / "model.safetensors") and len(blocks(model)) == 2


class TestCommands:
    def test_kanformer_patch_writes_the_card_and_the_code(self, tmp_path):
        source = checkpoint(tmp_path / "mine")
        main(["patch", source, "--out", str(tmp_path / "kan"), "--remote_code", "true"])
        assert "Base model: `mine`" in (tmp_path / "kan" / "README.md").read_text()
        assert (tmp_path / "kan" / "modeling_kanformer.py").is_file() and (tmp_path / "kan" / "tokenizer.json").is_file()

    def test_a_trained_model_has_a_card_with_the_model_that_was_patched(self, tmp_path):
        teacher, text = checkpoint(tmp_path / "teacher"), write_text(tmp_path / "text.txt")
        run_distill(teacher, text, tmp_path / "distilled", kan={"init": "exact"}, max_steps=2, save_steps=1)
        model = tmp_path / "distilled" / "model"
        assert "Base model: `teacher`" in (model / "README.md").read_text()
        assert not list((tmp_path / "distilled").glob("checkpoint-*/README.md"))
        card = model / "README.md"
        card.write_text(card.read_text().replace("library_name", "base_model: me/teacher\nlibrary_name"))
        with pytest.warns(UserWarning, match="edited since"):  # what somebody wrote into it outlives a second run
            run_distill(teacher, text, tmp_path / "distilled", kan={"init": "exact"}, max_steps=2, save_steps=1, resume=True)
        assert "me/teacher" in card.read_text()
        run_finetune(str(model), text, tmp_path / "tuned", task="masked_lm", max_steps=2)
        assert front_matter(tmp_path / "tuned" / "model")["base_model"] == "me/teacher"
