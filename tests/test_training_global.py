"""Stage 2 of the distillation, end to end: what is minimised, measured, trained and refused, for causal and masked language models and encoders."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from evaluation_cases import mixture
from kanformer.errors import ConfigError, SurgeryError
from kanformer.evaluation.corpus import CorpusResult, measure_corpus
from kanformer.evaluation.settings import EvaluateArguments
from kanformer.evaluation.subjects import load_subjects
from kanformer.evaluation.texts import Reader
from kanformer.layers import KANExperts
from kanformer.surgery.replacing.apply import patch_model
from kanformer.surgery.saving.loading import load_model
from kanformer.training.data import read_lines
from kanformer.training.distiller import Distiller
from kanformer.training.objective import Objective, resolve
from kanformer.training.settings import DistillArguments
from kanformer.training.sharing import share
from training_cases import SPECIAL, checkpoint, curve, metrics, run_distill, same_weights, tokenizer, weights, write_text

LIVELY = {"initializer_range": 0.3}  # blocks that are no linear maps
GLOBAL = {"stage": "global", "kan": {"init": "prune", "param_ratio": 0.6}}
LEARN = {"kan": {"init": "random"}, "max_steps": 40, "per_device_train_batch_size": 8, "new_module_learning_rate": 1e-2}


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt", 200)


@pytest.fixture
def any_precision():
    """accelerate keeps one precision per process: forgets it before and after."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda: AcceleratorState._reset_state(reset_partial_state=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def encoder(folder, **changes) -> str:
    return checkpoint(folder, auto_class="AutoModel", **{**LIVELY, **changes})


@pytest.mark.parametrize(
    ("name", "auto_class", "settings", "wanted", "rest"),
    [
        ("llama", None, {}, Objective(local=1.0, head="causal_lm"), "none"),
        ("llama", None, {"stage": "global"}, Objective(local=0.0, kl=1.0, head="causal_lm"), "all"),
        ("bert", None, {"stage": "global"}, Objective(local=0.0, kl=1.0, head="masked_lm"), "all"),
        ("bert", "AutoModel", {"stage": "global"}, Objective(local=0.0, hidden=1.0, embedding=0.1), "all"),
        ("bert", "AutoModel", {"stage": "global", "embedding_weight": 0.0, "local_weight": 0.5}, Objective(local=0.5, hidden=1.0), "all"),
        ("llama", None, {"stage": "global", "kl_weight": 0.9, "ce_weight": 0.1, "temperature": 2.0, "train_rest": "norms"},
         Objective(local=0.0, kl=0.9, ce=0.1, temperature=2.0, head="causal_lm"), "norms"),
        ("bert", None, {"local_weight": 0.0, "hidden_weight": 2.0}, Objective(local=0.0, hidden=2.0, head="masked_lm"), "none"),
    ],
)  # fmt: skip
def test_the_stage_fills_in_what_is_not_given(tmp_path, name, auto_class, settings, wanted, rest):
    model = load_model(checkpoint(tmp_path / "teacher", name, auto_class=auto_class))
    arguments, objective = resolve(DistillArguments(**settings), model, model)
    assert objective == wanted and arguments.train_rest == rest
    assert all(getattr(arguments, f"{name}_weight") == getattr(wanted, name) for name in ("local", "hidden", "embedding", "kl", "ce"))
    assert resolve(arguments, model, model)[0] == arguments


def test_the_resolved_settings_are_written(tmp_path, text):
    run_distill(encoder(tmp_path / "teacher"), text, tmp_path / "run", max_steps=1, **GLOBAL)
    written = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert all(line in written for line in ("stage: global", "local_weight: 0.0", "hidden_weight: 1.0", "embedding_weight: 0.1", "train_rest: all"))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_language_model_comes_closer_to_its_teachers_predictions(tmp_path, text, name):
    teacher = checkpoint(tmp_path / "teacher", name, **LIVELY)
    results = run_distill(teacher, text, tmp_path / "run", **{**GLOBAL, **LEARN})
    assert 0 < results["eval_kl"] < 0.7 * results["start_kl"] and results["eval_top1_agreement"] > results["start_top1_agreement"]
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_ce"])) and "eval_fvu" in results and "eval_hidden" not in results
    assert all(set(line) >= {"kl", "loss"} and "hidden" not in line and line["loss"] == pytest.approx(line["kl"]) for line in metrics(tmp_path / "run")[:-1])


def test_an_encoder_comes_closer_to_its_teachers_embeddings(tmp_path, text):
    results = run_distill(encoder(tmp_path / "teacher"), text, tmp_path / "run", **{**GLOBAL, **LEARN})
    assert 1 - results["eval_embedding_cosine"] < 0.5 * (1 - results["start_embedding_cosine"])
    assert 0 < results["eval_hidden"] < 0.7 * results["start_hidden"]
    line = metrics(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(line["hidden"] + 0.1 * line["embedding"]) and "eval_kl" not in results


def plain_losses(teacher, student, ids, mask, labels, temperature):
    """(kl, ce, hidden, embedding), means over tokens, text by text without padding; hidden in units of one."""
    sums = torch.zeros(4, dtype=torch.float64)
    for row in range(len(ids)):
        count = int(mask[row].sum())
        with torch.no_grad():
            ours, theirs = (model(input_ids=ids[row : row + 1, :count], output_hidden_states=True) for model in (student, teacher))
        p, q = ((found.logits[0] / temperature).softmax(-1) for found in (theirs, ours))
        sums[0] += temperature**2 * (p * (p / q).log()).sum()
        sums[1] += count * F.cross_entropy(ours.logits[0], labels[row, :count], ignore_index=-100)
        for mine, wanted, scale in zip(ours.hidden_states[1:], theirs.hidden_states[1:], (2.0, 0.5), strict=True):
            sums[2] += (mine - wanted).square().mean(-1).sum() / scale / 2
        means = [found.hidden_states[-1][0].mean(0) for found in (ours, theirs)]
        sums[3] += count * (1 - F.cosine_similarity(*means, dim=0))
    return (sums / mask.sum()).tolist()


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_losses_are_the_plain_formulas(tmp_path, name):
    teacher = load_model(checkpoint(tmp_path / "teacher", name, **LIVELY))
    student = load_model(checkpoint(tmp_path / "student", name, {"init": "random"}, **LIVELY))
    torch.manual_seed(1)
    ids, mask = torch.randint(4, 40, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:], mask[2, 2:] = 0, 0
    labels = ids.roll(-1, 1)
    for row, count in enumerate(mask.sum(1).tolist()):
        labels[row, count - 1 :] = -100
    batch = {"input_ids": ids, "attention_mask": mask}
    if name == "bert":  # the labels of what was masked travel in the batch
        labels = torch.where(torch.rand(3, 9) < 0.6, ids, -100).masked_fill(mask == 0, -100)
        labels[:, 0] = ids[:, 0]
        batch["labels"] = labels
    objective = Objective(local=0.0, hidden=3.0, embedding=5.0, kl=0.7, ce=0.3, temperature=2.0, head="causal_lm" if name == "gpt2" else "masked_lm")
    distiller = Distiller(teacher, student, [], [], objective)
    distiller.hidden_scale = torch.tensor([2.0, 0.5])
    total, parts = distiller(batch)
    count = float(mask.sum())
    kl, ce, hidden, embedding = plain_losses(teacher, student, ids, mask, labels, 2.0)
    assert {part: value.item() / count for part, value in parts.items()} == pytest.approx(
        {"kl": kl, "ce": ce, "hidden": hidden, "embedding": embedding}, rel=2e-4
    )
    assert total.item() / count == pytest.approx(0.7 * kl + 0.3 * ce + 3 * hidden + 5 * embedding, rel=2e-4)


def test_evaluation_measures_what_the_evaluate_command_measures(tmp_path, text):
    teacher = checkpoint(tmp_path / "teacher", "llama", **LIVELY)
    held = write_text(tmp_path / "held.txt", 20, seed=5)
    results = run_distill(teacher, text, tmp_path / "run", validation_file=held, max_steps=2, **GLOBAL)
    found = load_subjects(EvaluateArguments(model_name_or_path=str(tmp_path / "run" / "model"), teacher_name_or_path=teacher, max_length=16, device="cpu"))
    reader = Reader(found.tokenizer, "causal_lm", 16, 8, 0, 0.3)
    row = measure_corpus(found, reader, read_lines(held), CorpusResult("corpus", "lines")).rows["patched"]
    for name in ("kl", "ce", "perplexity", "top1_agreement"):
        assert results[f"eval_{name}"] == pytest.approx(row[name], rel=1e-4), name


def test_a_mixture_of_experts_is_distilled_end_to_end_only(tmp_path, text):
    teacher = mixture(tmp_path / "teacher")
    with pytest.raises(SurgeryError, match="experts of a mixture.*--stage global"):
        run_distill(teacher, text, tmp_path / "local", kan=GLOBAL["kan"])
    assert not (tmp_path / "local").exists()
    results = run_distill(teacher, text, tmp_path / "run", **{**GLOBAL, **LEARN})
    assert 0 < results["eval_kl"] < 0.8 * results["start_kl"] and results["layers"] == [] and "eval_fvu" not in results
    model = load_model(str(tmp_path / "run" / "model"))
    assert sum(isinstance(module, KANExperts) for module in model.modules()) == 2


def test_an_expert_without_tokens_gets_zeros_and_dropout_stays_off(tmp_path):
    teacher = load_model(mixture(tmp_path / "teacher"))
    student = patch_model(load_model(str(tmp_path / "teacher")), init="random")
    share(student, teacher, "all")
    distiller = Distiller(teacher, student, [], [], Objective(local=0.0, kl=1.0, head="causal_lm")).train()
    ids = torch.tensor([[5, 6]])
    distiller({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0].backward()
    trained = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None for gradient in trained.values())  # DDP waits for each
    assert any("kan_experts" in name and not gradient.any() for name, gradient in trained.items()) and any("gate.weight" in name for name in trained)
    assert [module for module in student.modules() if module.training] == [module for module in student.modules() if isinstance(module, KANExperts)]


UNEVEN = "\n".join(["bad kuf", "bad kuf milo nomur rep sast bad kuf milo nomur", "milo rep bad"] * 10) + "\n"
ALL_LOSSES = {**GLOBAL, "kan": {"init": "random"}, "max_steps": 3, "max_grad_norm": 0.5, "local_weight": 0.5, "hidden_weight": 1.0, "embedding_weight": 3.0}


@pytest.mark.parametrize("name", ["bert-encoder", "gpt2"])
def test_micro_batches_add_up_to_the_step_of_the_large_batch(tmp_path, name):
    teacher = encoder(tmp_path / "teacher") if name == "bert-encoder" else checkpoint(tmp_path / "teacher", name, **LIVELY)
    (tmp_path / "uneven.txt").write_text(UNEVEN, encoding="utf-8")
    settings = {**ALL_LOSSES, "learning_rate": 1e-3, **({"ce_weight": 0.5} if name == "gpt2" else {})}
    for run, batch in (("one", 4), ("many", 1)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        run_distill(teacher, str(tmp_path / "uneven.txt"), tmp_path / run, **sizes, **settings)
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    # Attention does not depend on the keys' biases: their gradient is rounding, which Adam makes large.
    moved = [name for name in one if "key.bias" not in name and "c_attn.bias" not in name]
    assert max(float((one[name] - many[name]).abs().max()) for name in moved) < 5e-6
    for mine, theirs in zip(curve(tmp_path / "one"), curve(tmp_path / "many"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_mixed_precision_takes_nearly_the_same_steps(tmp_path, text, name, any_precision):
    teacher = checkpoint(tmp_path / "teacher", name, **LIVELY)
    for run, bf16 in (("bf16", True), ("fp32", False)):
        any_precision()
        run_distill(teacher, text, tmp_path / run, bf16=bf16, max_steps=3, hidden_weight=1.0, ce_weight=0.1, **GLOBAL)
    for low, high in zip(metrics(tmp_path / "bf16"), metrics(tmp_path / "fp32"), strict=True):
        for key in ("loss", "kl", "hidden", "ce", "eval_kl"):
            assert (key in low) == (key in high) and (key not in low or low[key] == pytest.approx(high[key], rel=0.1))
    assert metrics(tmp_path / "bf16")[0]["loss"] != metrics(tmp_path / "fp32")[0]["loss"]
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "bf16").values() if tensor.is_floating_point())


@pytest.mark.parametrize(
    ("name", "auto_class", "metric", "greater"),
    [("llama", None, "kl", False), ("bert", "AutoModel", "embedding_cosine", True), ("llama", None, "top1_agreement", True)],
)
def test_the_best_weights_are_those_of_the_best_evaluation(tmp_path, text, name, auto_class, metric, greater):
    teacher = checkpoint(tmp_path / "teacher", name, auto_class=auto_class, **LIVELY)
    chosen = {} if metric in ("kl", "embedding_cosine") else {"metric_for_best_model": metric}
    settings = {**GLOBAL, **chosen, "max_steps": 6, "eval_steps": 1, "lr_scheduler_type": "constant", "new_module_learning_rate": 0.3, "learning_rate": 0.1}
    results = run_distill(teacher, text, tmp_path / "run", load_best_model_at_end=True, **settings)
    values = {line["step"]: line[f"eval_{metric}"] for line in metrics(tmp_path / "run") if f"eval_{metric}" in line}
    best = (max if greater else min)(values.values())
    assert len(values) == 6 and results[f"best_{metric}"] == best == values[results["best_step"]] and results[f"eval_{metric}"] == pytest.approx(best, rel=1e-6)


def test_texts_of_stored_states_teach_an_encoder_end_to_end(tmp_path, text):
    teacher = encoder(tmp_path / "teacher")
    for run, stored in (("beside", {}), ("stored", {"teacher_states": str(tmp_path / "states.bin")})):
        run_distill(teacher, text, tmp_path / run, **GLOBAL, **stored)
    for one, other in zip(metrics(tmp_path / "beside"), metrics(tmp_path / "stored"), strict=True):
        for key in ("hidden", "embedding", "eval_embedding_cosine"):
            assert (key in one) == (key in other) and (key not in one or one[key] == pytest.approx(other[key], rel=0.02))


def test_the_same_seed_masks_the_same_tokens(tmp_path, text):
    teacher = checkpoint(tmp_path / "teacher", **LIVELY)
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_distill(teacher, text, tmp_path / run, seed=seed, max_steps=3, ce_weight=1.0, **GLOBAL)
    assert same_weights(tmp_path / "a", tmp_path / "b") and curve(tmp_path / "a") == curve(tmp_path / "b")
    assert not same_weights(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"kl_weight": 1.0}, ConfigError, "kl_weight and ce_weight.*BertModel, which has no language-modelling head.*hidden_weight and embedding_weight"),
        ({"ce_weight": 1.0}, ConfigError, "no language-modelling head"),
        ({"hidden_weight": 0.0, "embedding_weight": 0.0}, ConfigError, "local_weight=0 and hidden_weight=0 .* and ce_weight=0"),
        ({"teacher_name_or_path": "masked", "teacher_states": "s.bin"}, ConfigError, "teacher_states with kl_weight and ce_weight above 0"),
        ({"teacher_name_or_path": "masked", "model_name_or_path": "encoder-kan"}, ConfigError, "BertModel, which has no language-modelling head"),
        ({"teacher_name_or_path": "masked", "model_name_or_path": "small-kan"}, SurgeryError, "got 51 and 99 tokens in their vocabularies"),
        ({"teacher_name_or_path": "masked", "tokenizer_name": "no-mask"}, ConfigError, "task=masked_lm.*without a mask token"),
        ({"stage": "local", "train_rest": "all"}, ConfigError, "train_rest=all with local_weight alone.*stage to global"),
        ({"metric_for_best_model": "kl"}, ConfigError, "metric_for_best_model.*got 'kl'.*Known: embedding_cosine, fvu, fvu_worst, hidden"),
    ],
)
def test_what_cannot_be_learned_is_refused_and_leaves_nothing(tmp_path, text, settings, error, message):
    folders = {
        "teacher": encoder(tmp_path / "teacher"),
        "masked": checkpoint(tmp_path / "masked"),
        "encoder-kan": checkpoint(tmp_path / "encoder-kan", patch={}, auto_class="AutoModel"),
        "small-kan": checkpoint(tmp_path / "small-kan", patch={}, vocab_size=51),
    }
    without = tokenizer()
    without.mask_token = None
    folders["no-mask"] = checkpoint(tmp_path / "no-mask")
    without.save_pretrained(tmp_path / "no-mask")
    settings = {key: folders.get(value, value) if isinstance(value, str) else value for key, value in {**GLOBAL, **settings}.items()}
    with pytest.raises(error, match=message):
        run_distill(settings.pop("teacher_name_or_path", folders["teacher"]), text, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists() and SPECIAL["mask_token"] == "[MASK]"
