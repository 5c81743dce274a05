"""Run in a fresh process: load a saved model by stock transformers and compare it bit for bit with what was saved."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file

import kanformer  # noqa: F401  (registers the checkpoints)
from kanformer.demo.measure import last_hidden_state
from kanformer.surgery.saving.loading import load_model, quiet_transformers


def main() -> None:
    """`python -m kanformer.demo.verify MODEL REFERENCE [ATTENTION]`: prints the maximum difference, exits with 1 if it is not 0."""
    folder, reference_file, *attention = sys.argv[1:]
    reference = load_file(reference_file)
    torch.set_num_threads(int(reference["threads"]))
    quiet_transformers()
    model = load_model(folder, attn_implementation=attention[0] if attention else None)
    state = model.state_dict()
    different = [name for name, tensor in reference.items() if name.startswith("state.") and not torch.equal(tensor, state[name[6:]])]
    with torch.no_grad():
        hidden = last_hidden_state(model, {name: reference[name] for name in ("input_ids", "attention_mask")})
    difference = float((hidden - reference["hidden"]).abs().max())
    tensors = sum(name.startswith("state.") for name in reference)
    print(f"{tensors - len(different)} of {tensors} tensors bit-equal, outputs differ by at most {difference}")
    raise SystemExit(0 if difference == 0 and not different else 1)


if __name__ == "__main__":
    main()
