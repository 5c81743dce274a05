"""transformers' pipelines and lm-eval on patched models: the answers of the plain model at the exact start, and of the same model after loading."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import kanformer
from model_cases import BY_NAME, disturb
from tool_cases import SIZES, loud, tokenizer

TEXTS = ["w1 w2 w3 w4", "w5 w6"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False, "pad_token_id": 0}
CLASSES = {**SIZES, "num_labels": 3}
TASKS = {
    "text-generation": (BY_NAME["llama"].build, TEXTS, GREEDY),
    "fill-mask": (BY_NAME["bert"].build, ["w1 [MASK] w3", "[MASK] w6"], {}),
    "feature-extraction": (lambda: tf.DistilBertModel(tf.DistilBertConfig(vocab_size=99, dim=32, n_layers=1, n_heads=4, hidden_dim=48)), TEXTS, {}),
    "text-classification": (lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**CLASSES, pad_token_id=0)), TEXTS, {"top_k": None}),
}


def answers(task: str, model, texts, options):
    """What the pipeline says; two texts in one batch where it can."""
    batch = {} if task == "feature-extraction" else {"batch_size": 2}
    return tf.pipeline(task, model=model, tokenizer=tokenizer(framed=task != "text-generation"), device="cpu", **batch)(texts, **options)


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_answers_as_with_the_plain_model_and_after_loading(task, tmp_path):
    build, texts, options = TASKS[task]

    def fresh():
        torch.manual_seed(0)
        return build().eval()

    want = answers(task, fresh(), texts, options)
    model = kanformer.patch_model(fresh())
    assert answers(task, model, texts, options) == want
    changed = answers(task, loud(disturb(model)), texts, options)
    assert changed != want
    model.save_pretrained(tmp_path)
    tokenizer(framed=task != "text-generation").save_pretrained(tmp_path)
    assert tf.pipeline(task, model=str(tmp_path), device="cpu")(texts, **options) == changed, "by the folder's name alone"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_lm_eval_scores_a_patched_instance(tmp_path):
    pytest.importorskip("lm_eval", reason="needs the package lm_eval, which no extra installs: pip install lm-eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [("w1 w2", "w3 w4"), ("w5", "w6 w7 w8"), ("", "w9 w10")]

    def scores(model):
        harness = HFLM(pretrained=model, tokenizer=tokenizer(framed=False), batch_size=2, max_length=32)
        requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number) for number, pair in enumerate(pairs)]
        rolling = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=("w1 w2 w3",), idx=0)]
        return harness.loglikelihood(requests, disable_tqdm=True), harness.loglikelihood_rolling(rolling, disable_tqdm=True)

    case = BY_NAME["llama"]
    want = scores(case.build())
    model = kanformer.patch_model(case.build())
    assert scores(model) == want
    changed = scores(loud(disturb(model)))
    assert changed != want
    model.save_pretrained(tmp_path)
    assert scores(tf.AutoModelForCausalLM.from_pretrained(tmp_path)) == changed
