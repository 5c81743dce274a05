"""Teacher and student hold once what they have in common, and only that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kanformer.surgery.replacing.apply import patch_model
from kanformer.surgery.saving.loading import load_model
from kanformer.training.models import load_patched
from kanformer.training.settings import DistillArguments
from kanformer.training.sharing import copy_sharing, share, shared_bytes
from model_cases import same_state, snapshot
from training_cases import checkpoint, run_distill, same_weights, texts, weights, write_text

EXACT, PRUNE = {"init": "exact"}, {"init": "prune", "param_ratio": 0.5}


def pair(tmp_path, name="bert", kan=PRUNE, source=None, rest="none", **settings):
    """(student, teacher), shared as a distillation shares them."""
    folder = checkpoint(tmp_path / "teacher", name)
    arguments = DistillArguments(teacher_name_or_path=folder, kan=kan, max_length=16, **settings)
    student, teacher, _ = load_patched(source, folder, arguments, texts(40))
    share(student, teacher, rest)
    return student, teacher


def storages(model: nn.Module, trained: bool) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters() if parameter.requires_grad == trained}


@pytest.mark.parametrize("kan", [EXACT, PRUNE, {"init": "exact", "edges": "full"}, {"init": "exact", "edges": "mlp"}], ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_all_but_the_blocks_is_the_teachers(tmp_path, name, kan):
    student, teacher = pair(tmp_path, name, kan)
    assert storages(student, False) <= storages(teacher, False) and not storages(student, True) & storages(teacher, False)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    named = dict(student.named_parameters())
    assert [name for name in named if named[name].requires_grad] == [name for name in named if "kan_" in name]
    shared, whole = shared_bytes(student, teacher)
    assert shared == sum(4 * named[name].numel() for name in named if "kan_" not in name) and 0 < shared < whole


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(("rest", "moved"), [("norms", ("LayerNorm",)), ("all", ("LayerNorm", "attention"))])
def test_what_is_trained_is_a_copy(tmp_path, rest, moved, saved):
    source = checkpoint(tmp_path / "student", "bert", EXACT) if saved else None
    student, teacher = pair(tmp_path, rest=rest, source=source)
    own = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    expected = {name for name, _ in student.named_parameters() if "kan_" in name or (name.startswith("bert.") and any(part in name for part in moved))}
    assert own == expected and not storages(student, True) & storages(teacher, False) and storages(student, False) <= storages(teacher, False)


def test_tied_tensors_stay_tied(tmp_path):
    student, teacher = pair(tmp_path, "gpt2")
    assert student.lm_head.weight is student.transformer.wte.weight is teacher.transformer.wte.weight


def test_a_checkpoint_whose_rest_was_trained_keeps_its_own(tmp_path):
    model = load_model(checkpoint(tmp_path / "student", "bert", EXACT))
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight += 1e-3
    model.save_pretrained(tmp_path / "student")
    student, teacher = pair(tmp_path, source=str(tmp_path / "student"))
    mine, theirs = (found.bert.encoder.layer[0].attention.self for found in (student, teacher))
    assert mine.query.weight is not theirs.query.weight and mine.key.weight is theirs.key.weight
    assert torch.equal(mine.query.weight, model.bert.encoder.layer[0].attention.self.query.weight) and not mine.query.weight.requires_grad


def test_a_student_without_the_teachers_head_shares_the_rest(tmp_path):
    teacher = load_model(checkpoint(tmp_path / "teacher"))
    student = patch_model(load_model(str(tmp_path / "teacher"), "AutoModel"))
    share(student, teacher, "none")
    assert student.embeddings.word_embeddings.weight is teacher.bert.embeddings.word_embeddings.weight


def test_both_models_move_to_another_dtype_or_device_as_one(tmp_path):
    student, teacher = pair(tmp_path)
    student.to(torch.float64)
    assert storages(student, False) <= storages(teacher, False)
    student.to("cpu")
    teacher.to("cpu")
    assert storages(student, False) <= storages(teacher, False)


def test_training_the_student_leaves_the_teacher_alone(tmp_path):
    student, teacher = pair(tmp_path, kan=EXACT, rest="all")
    before = snapshot(teacher)
    optimizer = torch.optim.AdamW([parameter for parameter in student.parameters() if parameter.requires_grad], 0.1)
    student(input_ids=torch.tensor([[5, 6, 7]])).logits.square().sum().backward()
    optimizer.step()
    assert same_state(before, snapshot(teacher)) and same_state(before, snapshot(load_model(str(tmp_path / "teacher"))))


def test_a_copy_that_shares_is_patched_without_a_change_to_the_original(tmp_path):
    model = load_model(checkpoint(tmp_path / "teacher"))
    before = snapshot(model)
    student = patch_model(copy_sharing(model), init="exact", keep_original=False)
    assert same_state(before, snapshot(model)) and type(model.bert.encoder.layer[0].intermediate).__name__ == "BertIntermediate"
    assert student.bert.embeddings.word_embeddings.weight is model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("rest", ["none", "all"])
def test_a_run_gives_the_bits_of_one_with_two_whole_models(tmp_path, rest, monkeypatch):
    folder, text = checkpoint(tmp_path / "teacher"), write_text(tmp_path / "text.txt")
    settings = {"hidden_weight": 1.0, "train_rest": rest, "kan": PRUNE, "save_steps": 4}
    run_distill(folder, text, tmp_path / "shared", **settings)

    def apart(student, teacher, kind):
        for model in (student, teacher):
            tied: dict[int, nn.Parameter] = {}
            for module in model.modules():
                for name, value in module._parameters.items():
                    if value is not None:
                        module._parameters[name] = tied.setdefault(id(value), nn.Parameter(value.detach().clone(), requires_grad=False))
        share(student, nn.Module(), kind)

    monkeypatch.setattr("kanformer.training.distill.share", apart)
    run_distill(folder, text, tmp_path / "apart", **settings)
    assert same_weights(tmp_path / "shared", tmp_path / "apart")
    assert weights(tmp_path / "shared").keys() == weights(tmp_path / "apart").keys()
