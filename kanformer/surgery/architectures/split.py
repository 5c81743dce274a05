"""BERT and its kin: the layer holds `intermediate` (dense, activation) and `output` (dense, dropout, LayerNorm with the residual)."""

from kanformer.surgery.finding.spec import FFNSpec

SPECS = (
    FFNSpec(
        name="bert",
        owner=r"(Bert|Roberta|XLMRoberta|XLMRobertaXL|Camembert|Electra|Ernie|Data2VecText|BertGeneration|MegatronBert|LayoutLM|Splinter)Layer",
        up="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        down="output.dense",
        slot="intermediate",
        identities=("output.dense",),
    ),
)
