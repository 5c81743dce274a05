"""Plain blocks that are modules of their own: up, activation, down, at most a dropout at the end."""

from kanformer.surgery.finding.spec import FFNSpec

SPECS = (
    FFNSpec(
        name="bloom",
        owner=r"BloomMLP",
        up="dense_h_to_4h",
        activation="gelu_impl",
        down="dense_4h_to_h",
        output_dropout="hidden_dropout",
        residual="yes",
    ),
    FFNSpec(name="mpt", owner=r"MptMLP", up="up_proj", activation="act", down="down_proj", output_dropout="hidden_dropout", residual="yes"),
    FFNSpec(name="gpt2", owner=r"(GPT2|DecisionTransformerGPT2|ImageGPT|GPTBigCode)MLP", up="c_fc", activation="act", down="c_proj", output_dropout="dropout"),
    FFNSpec(name="gpt-neox", owner=r"GPTNeoXMLP", up="dense_h_to_4h", activation="act", down="dense_4h_to_h"),
    FFNSpec(name="fc1-fc2", owner=r"(ViT|ViTMAE|ViTMSN|Phi|CLIP|Siglip|Dinov2|DeiT)MLP", up="fc1", activation="activation_fn", down="fc2"),
)
