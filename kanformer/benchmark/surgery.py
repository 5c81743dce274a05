"""What patching and loading cost: an 8-billion-parameter architecture without weights, memory with weights, and loading against the stock checkpoint."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}
SMALL: dict[str, Any] = {**LLAMA_8B, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16, "vocab_size": 32_000}


def measure_surgery(rounds: int) -> list[str]:
    """Three lines of figures; everything runs in fresh processes, one after the other."""
    meta, kept, dropped = (_child(*arguments) for arguments in (("meta",), ("memory", "keep"), ("memory", "drop")))
    with tempfile.TemporaryDirectory() as folder:
        _child("save", folder)
        times: dict[str, list[float]] = {name: [] for name in ("stock", "kan")}
        for _ in range(rounds + 1):
            for name, values in times.items():
                values.append(_child("load", str(Path(folder) / name))["seconds"])
    stock, kan = (statistics.median(values[1:]) for values in times.values())
    return [
        f"Llama-3-8B on meta: plan {meta['plan']:.2f} s, plan and patch {meta['patch']:.2f} s, {meta['megabytes']:.0f} MB",
        f"patching {dropped['ffn']:.0f} MB of FFN weights in {dropped['blocks']:.0f} blocks takes {kept['peak']:.0f} MB more, "
        f"with keep_original=False {dropped['peak']:.0f} MB (one block: {dropped['ffn'] / dropped['blocks']:.0f})",
        f"from_pretrained: {stock:.2f} s stock, {kan:.2f} s patched, ratio {kan / stock:.2f}",
    ]


def _child(*arguments: str) -> dict[str, float]:
    result = subprocess.run([sys.executable, "-m", __name__, *arguments], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def _meta() -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import kanformer

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_8B))
    with _Peak() as peak:
        start = time.perf_counter()
        kanformer.plan_surgery(model)
        planned = time.perf_counter()
        kanformer.patch_model(model)
        return {"plan": planned - start, "patch": time.perf_counter() - planned, "megabytes": peak()}


def _memory(keep: str) -> dict[str, float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    import kanformer

    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    kanformer.plan_surgery(model)  # imports and checks are not what is measured here
    with _Peak() as peak:
        kanformer.patch_model(model, keep_original=keep == "keep")
        highest = peak()
    blocks = kanformer.compare(model).blocks
    return {"peak": highest, "ffn": sum(block.mlp_bytes for block in blocks) / 1e6, "blocks": len(blocks)}


def _save(folder: str) -> dict[str, float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    import kanformer

    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.save_pretrained(Path(folder) / "stock")
    kanformer.patch_model(model).save_pretrained(Path(folder) / "kan")
    return {}


def _load(folder: str) -> dict[str, float]:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    import kanformer  # noqa: F401

    assert LlamaForCausalLM
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = sum(float(parameter.detach().sum()) for parameter in model.parameters())  # so that mapped files are read
    assert total == total
    return {"seconds": time.perf_counter() - start}


class _Peak:
    """Resident memory of this process at its highest, looked at every millisecond, in MB over what it was at the start."""

    def __enter__(self):
        import psutil

        self.process, self.running = psutil.Process(), True
        self.start = self.highest = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return lambda: (max(self.highest, self.process.memory_info().rss) - self.start) / 1e6

    def __exit__(self, *error) -> None:
        self.running = False
        self.thread.join()

    def _watch(self) -> None:
        while self.running:
            self.highest = max(self.highest, self.process.memory_info().rss)
            time.sleep(0.001)


if __name__ == "__main__":
    print(json.dumps({"meta": _meta, "memory": _memory, "save": _save, "load": _load}[sys.argv[1]](*sys.argv[2:])))
