"""Gated blocks that are modules of their own: down(act(gate(x)) * up(x))."""

from kanformer.surgery.finding.spec import FFNSpec

SPECS = (
    FFNSpec(
        name="llama",
        owner=r"(Llama|Qwen2|Qwen3|Mistral|Gemma|Gemma2|Gemma3|Granite|Olmo|Olmo2|StableLm|SmolLM3|Cohere|Helium|SeedOss)M(LP|lp)",
        gate="gate_proj",
        up="up_proj",
        activation="act_fn",
        down="down_proj",
    ),
)
