"""BART, OPT and their kin: `fc1`, `activation_fn`, `fc2` lie in the layer and its forward calls them one by one."""

from kanformer.surgery.finding.spec import FFNSpec

_LAYOUT = {"up": "fc1", "activation": "activation_fn", "down": "fc2", "slot": "fc1", "identities": ("activation_fn", "fc2")}

SPECS = (
    FFNSpec(name="opt", owner=r"OPTDecoderLayer", **_LAYOUT),
    FFNSpec(
        name="bart",
        owner=r"(Bart|MBart|Marian|Pegasus|Blenderbot|BlenderbotSmall|PLBart|M2M100|Whisper)(En|De)coderLayer",
        hidden_dropout="activation_dropout",
        **_LAYOUT,
    ),
)
