"""The training scripts under FSDP2: accelerate's own preparation on two CPU processes, its configs, and what is said where it does not shard."""

from __future__ import annotations

import importlib.util
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers as tf

import kanformer
from kanformer.errors import ConfigError
from kanformer.training.distribution import check_distribution, ready_to_wrap
from kanformer.training.finetune_task import SummedLoss
from kanformer.training.settings import LoopArguments
from model_cases import BY_NAME, blocks
from sharding_cases import free_port, fsdp_config, two
from training_cases import ROOT, checkpoint, curve, python, run_distill, run_finetune, same_weights, weights, write_text

FINETUNE = {
    "max_grad_norm": 0.5,
    "save_steps": 3,
    "save_total_limit": None,
    "eval_steps": 2,
    "eval_on_start": True,
    "load_best_model_at_end": True,
    "greater_is_better": True,  # the loss is: the best model is an early one
    "kan": {"init": "exact", "basis": "rational", "groups": 8},
}
DISTILL = {"max_grad_norm": 0.5, "eval_on_start": True, "save_steps": 5}
CHILD = """
import sys
from pathlib import Path
from sharding_cases import leave, shard_on_cpu
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
shard_on_cpu(rank, sys.argv[3])
import torch
from torch.distributed.tensor import DTensor
from kanformer.errors import DataError
from kanformer.training import finetune, loop
from test_training_sharding import DISTILL, FINETUNE
from training_cases import run_distill, run_finetune

init, optimize, units = loop.Trainer.__init__, loop.Trainer._optimize, {}

def watched(self, *words):
    init(self, *words)
    assert all(isinstance(parameter, DTensor) for parameter in self.module.parameters())
    assert all(isinstance(parameter, DTensor) for group in self.optimizer.param_groups for parameter in group["params"])
    units[self.output_dir.name] = self.module._no_split_modules

loop.Trainer.__init__ = watched
text = str(folder / "text.txt")
halves = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
run_finetune(str(folder / "llama"), text, folder / "straight", **halves, **FINETUNE)

def broken(self):
    if self.step == 5:
        raise InterruptedError
    return optimize(self)

loop.Trainer._optimize = broken
try:
    run_finetune(str(folder / "llama"), text, folder / "broken", **halves, **FINETUNE)
except InterruptedError:
    torch.rand(17)
loop.Trainer._optimize = optimize
run_finetune(str(folder / "llama"), text, folder / "broken", **halves, **FINETUNE, resume=True)
run_distill(str(folder / "bert"), text, folder / "local", per_device_train_batch_size=2, **DISTILL)
run_distill(str(folder / "bert"), text, folder / "hidden", per_device_train_batch_size=2, hidden_weight=1.0, train_rest="norms", **DISTILL)

def apart(*words, **settings):
    model = patch(*words, **settings)
    if rank:
        next(module for module in model.modules() if hasattr(module, "kan_grid")).kan_grid += 1e-6
    return model

patch, finetune.patch_model = finetune.patch_model, apart
try:
    run_finetune(str(folder / "llama"), text, folder / "apart", **halves)
except DataError as error:
    leave(f"{units} | {error}")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder in which two processes, sharded, trained "straight", "broken", "local" and "hidden", and what they said."""
    folder = tmp_path_factory.mktemp("runs")
    checkpoint(folder / "llama", "llama")
    checkpoint(folder / "bert")
    write_text(folder / "text.txt")
    return folder, two(CHILD, str(free_port()), folder=folder)


def gap(left, right) -> float:
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_units_are_the_layers_and_blocks_that_are_run_by_themselves(runs):
    expected = {"straight": ["LlamaDecoderLayer"], "broken": ["LlamaDecoderLayer"], "local": ["KANFeedForward"], "hidden": ["BertLayer", "KANFeedForward"]}
    assert all(said.splitlines()[-1].startswith(f"{expected} | ") for said in runs[1])
    assert [said.count("fine-tuned:") + said.count("distilled:") for said in runs[1]] == [4, 0]


def test_grids_that_differ_between_processes_are_an_error_in_both(runs):
    assert all("got other grids or functions in process 1 than in process 0" in said.splitlines()[-1] for said in runs[1])
    assert not (runs[0] / "apart" / "model").exists()


def test_a_sharded_run_is_the_run_of_one_process(runs, tmp_path):
    folder = runs[0]
    run_finetune(str(folder / "llama"), str(folder / "text.txt"), tmp_path / "one", per_device_train_batch_size=4, **FINETUNE)
    assert gap(folder / "straight", tmp_path / "one") < 1e-5
    for mine, theirs in zip(curve(tmp_path / "one"), curve(folder / "straight"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    results = json.loads((folder / "straight" / "all_results.json").read_text(encoding="utf-8"))
    assert results["best_step"] == 2 and results["steps"] == 8
    model = tf.AutoModelForCausalLM.from_pretrained(folder / "straight" / "model").eval()
    best = tf.AutoModelForCausalLM.from_pretrained(folder / "straight" / "checkpoint-2").eval()
    ids = torch.randint(3, 30, (2, 9))
    assert len(blocks(model)) == 2 and torch.equal(model(input_ids=ids).logits, best(input_ids=ids).logits)


def test_a_sharded_run_that_was_interrupted_ends_with_the_same_bits(runs):
    folder = runs[0]
    assert same_weights(folder / "broken", folder / "straight") and curve(folder / "broken") == curve(folder / "straight")


def test_a_checkpoint_of_two_sharded_processes_goes_on_in_one(runs, tmp_path):
    folder = runs[0]
    shutil.copytree(folder / "straight", tmp_path / "moved", ignore=shutil.ignore_patterns("checkpoint-[4-9]", "model", "all_results.json"))
    results = run_finetune(str(folder / "llama"), str(folder / "text.txt"), tmp_path / "moved", per_device_train_batch_size=4, resume=True, **FINETUNE)
    assert results["steps_this_run"] == 5 and gap(folder / "straight", tmp_path / "moved") < 1e-5
    for mine, theirs in zip(curve(tmp_path / "moved"), curve(folder / "straight"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("name", "settings"), [("local", {}), ("hidden", {"hidden_weight": 1.0, "train_rest": "norms"})])
def test_a_sharded_distillation_is_that_of_one_process(runs, tmp_path, name, settings):
    folder = runs[0]
    # Hidden states are weighed by their variance in the micro-batch, so these are the same there too.
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run_distill(str(folder / "bert"), str(folder / "text.txt"), tmp_path / "one", **halves, **settings, **DISTILL)
    assert gap(folder / name, tmp_path / "one") < 1e-5
    for mine, theirs in zip(curve(tmp_path / "one"), curve(folder / name), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_launched_on_a_cpu_the_fsdp_config_says_that_nothing_is_sharded(tmp_path):
    model, text = checkpoint(tmp_path / "llama", "llama"), write_text(tmp_path / "text.txt")
    words = ["--model_name_or_path", model, "--train_file", text, "--kan.init", "exact", "--max_steps", "1", "--max_length", "16", "--disable_tqdm"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/fsdp2.yaml"), "--mixed_precision", "no"]
    launch += ["--num_processes", "2", "--main_process_port", str(free_port()), str(ROOT / "scripts/finetune.py")]
    done = python(*launch, *words, "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        assert done.stderr.count("asked for FSDP, got MULTI_CPU") == 1 and "each with all weights" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_every_accelerate_config_is_read_by_accelerate(path, monkeypatch):
    from accelerate import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    found = load_config_from_file(str(path))
    expected = {"cpu": DistributedType.NO, "ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP, "zero3": DistributedType.DEEPSPEED}
    assert isinstance(found, ClusterConfig) and found.distributed_type == expected[path.stem]
    flags = {action.dest for action in launch_command_parser()._actions}
    assert set(found.fsdp_config) | set(found.deepspeed_config) <= flags, "accelerate launch knows every key"
    if path.stem == "fsdp2":
        for name, value in fsdp_config().items():
            monkeypatch.setenv(f"FSDP_{name.upper()}", str(value))
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and not plugin.cpu_ram_efficient_loading
    if path.stem == "zero3":
        values = {name: value for name, value in found.deepspeed_config.items() if not name.startswith("offload")}
        config = DeepSpeedPlugin(**values).deepspeed_config
        assert config["zero_optimization"]["stage"] == 3 and config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
        assert not values["zero3_init_flag"] and config["gradient_accumulation_steps"] == 1
        assert config["gradient_clipping"] == LoopArguments().max_grad_norm


def plugin(**values) -> SimpleNamespace:
    return SimpleNamespace(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False, "transformer_cls_names_to_wrap": None, **values})


def accelerator(kind: str, **plugins) -> SimpleNamespace:
    return SimpleNamespace(distributed_type=SimpleNamespace(value=kind), num_processes=2, is_main_process=True, state=SimpleNamespace(**plugins))


@pytest.mark.parametrize(
    ("kind", "settings", "arguments", "message"),
    [
        ("FSDP", {"fsdp_plugin": plugin(fsdp_version=1)}, {}, "fsdp_version.: got 1, expected 2"),
        ("FSDP", {"fsdp_plugin": plugin(cpu_ram_efficient_loading=True)}, {}, "cpu_ram_efficient_loading.*each of them patches"),
        ("FSDP", {"fsdp_plugin": plugin()}, {"kan_l1": 1e-6}, "kan_l1.*under FSDP.*ddp.yaml"),
        ("DEEPSPEED", {"deepspeed_plugin": SimpleNamespace(zero3_init_flag=True)}, {}, "zero3_init_flag.*before the model is patched"),
        ("DEEPSPEED", {"deepspeed_plugin": SimpleNamespace(zero3_init_flag=False)}, {"save_steps": 5}, "save_steps.*under DeepSpeed.*fsdp2.yaml"),
        ("DEEPSPEED", {"deepspeed_plugin": SimpleNamespace(zero3_init_flag=False)}, {"kan_entropy": 1.0}, "kan_entropy.*under DEEPSPEED"),
    ],
)
def test_ways_of_sharding_that_cannot_work_are_refused_before_anything_is_loaded(kind, settings, arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_distribution(accelerator(kind, **settings), LoopArguments(**arguments))


def test_units_must_hold_the_blocks_that_run_alone_and_deepspeed_gets_its_batch_size():
    model = kanformer.patch_model(BY_NAME["llama"].build())
    task, settings = SummedLoss(model, SimpleNamespace(loss=None)), {"train_micro_batch_size_per_gpu": "auto"}
    alone = torch.nn.ModuleList(blocks(model).values())
    with pytest.raises(ConfigError, match="fsdp_transformer_layer_cls_to_wrap.*got LlamaDecoderLayer, expected KANFeedForward among them"):
        ready_to_wrap(accelerator("FSDP", fsdp_plugin=plugin(transformer_cls_names_to_wrap=["LlamaDecoderLayer"])), alone, model, LoopArguments())
    with pytest.raises(ConfigError, match="no layers that FSDP could make units of"):
        ready_to_wrap(accelerator("FSDP", fsdp_plugin=plugin()), torch.nn.Linear(2, 2), model, LoopArguments())
    deepspeed = accelerator("DEEPSPEED", deepspeed_plugin=SimpleNamespace(deepspeed_config=settings))
    with pytest.raises(ConfigError, match="blocks that are trained outside of their model"):
        ready_to_wrap(deepspeed, alone, model, LoopArguments())
    ready_to_wrap(deepspeed, task, model, LoopArguments(per_device_train_batch_size=3))
    assert settings == {"train_micro_batch_size_per_gpu": 3}


@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_on_gpus_a_launched_run_is_the_run_of_one_process(tmp_path, config):
    """What only GPUs can show: NCCL, accelerate's own choice of FSDP2, DeepSpeed."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, this machine has {torch.cuda.device_count()}")
    if config == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: pip install deepspeed")
    model, text = checkpoint(tmp_path / "llama", "llama"), write_text(tmp_path / "text.txt")
    words = ["--model_name_or_path", model, "--train_file", text, "--kan.init", "exact", "--max_steps", "4", "--max_length", "16", "--disable_tqdm"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"configs/accelerate/{config}.yaml"), "--mixed_precision", "no"]
    launch += ["--num_processes", "2", "--main_process_port", str(free_port()), str(ROOT / "scripts/finetune.py"), *words]
    done = python(*launch, "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "two"), timeout=600)
    assert done.returncode == 0, done.stderr
    run_finetune(model, text, tmp_path / "one", max_steps=4, warmup_steps=0.05, logging_steps=10)
    assert gap(tmp_path / "one", tmp_path / "two") < 1e-3
