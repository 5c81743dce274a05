"""Inputs for a model's forward, made from its signature and config: several guesses, the likeliest first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, TOKENS = 1, 16, 60
_TOKEN_NAMES = ("input_ids", "decoder_input_ids", "seq_ids", "input", "task_inputs", "codes", "qformer_input_ids")
_PICTURES = ("pixel_values", "image", "images")
_MELS = ("num_mel_bins", "n_mels", "input_feat_per_channel", "feature_size", "input_size", "input_dim", "num_mel")


@dataclass
class Guesser:
    """Makes tensors for one model; every call of `inputs` starts from the same seed."""

    model: nn.Module
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.config = self.model.config
        self.parameters = inspect.signature(self.model.forward).parameters
        self.main = getattr(self.model, "main_input_name", "input_ids")

    def size(self, *names: str, default: int) -> int:
        """The first of the config's (or its parts') integers with one of these names."""
        parts = [getattr(self.config, name, None) for name in (getattr(type(self.config), "sub_configs", None) or {})]
        for config in [self.config, *parts]:
            for name in names:
                try:
                    value = getattr(config, name, None)
                except Exception:
                    continue
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return default

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def tokens(self, length: int = LENGTH) -> Tensor:
        text = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        size = getattr(text, "vocab_size", None)
        size = size if isinstance(size, int) and size > 4 else self.size("vocab_size", "src_vocab_size", default=TOKENS)
        return torch.randint(3, max(4, min(size, TOKENS)), (BATCH, length), generator=self.generator)

    def picture(self, *frames: int) -> Tensor:
        size = getattr(self.config, "image_size", None) or getattr(getattr(self.config, "vision_config", None), "image_size", None) or 64
        height, width = (size[0], size[-1]) if isinstance(size, list | tuple) else (size, size)
        return self.normal(BATCH, *frames, self.size("num_channels", "in_channels", "in_chans", default=3), height, width)

    def width(self, *names: str) -> int:
        return self.size(*names, "hidden_size", "d_model", "embed_dim", default=64)

    def inputs(self, guess: str) -> dict[str, Any]:
        """The inputs of one guess, an entry of `GUESSES`."""
        self.generator.manual_seed(0)
        return GUESSES[guess](self)

    def required(self, name: str) -> bool:
        return name in self.parameters and self.parameters[name].default is inspect.Parameter.empty


def _by_name(guess: Guesser, *, pictures: bool = False, video: bool = False, extras: bool = False) -> dict[str, Any]:
    """A tensor for each argument whose name says what it is."""
    made: dict[str, Any] = {}
    text = "input_ids" in guess.parameters
    for name in guess.parameters:
        if name in _TOKEN_NAMES:
            if name != "input_ids" or guess.main == "input_ids" or guess.required(name) or pictures:
                made[name] = guess.tokens()
        elif name in _PICTURES:
            if guess.main == name or not text or pictures:
                made[name] = guess.picture(guess.size("num_frames", default=4)) if video else guess.picture()
        elif name == "pixel_values_videos":
            if guess.main == name or not text:
                made[name] = guess.picture(guess.size("num_frames", "frames_per_clip", default=4))
        elif name in _SPECIAL and (_SPECIAL[name].always or guess.required(name) or (_SPECIAL[name].without_text and not text) or guess.main == name):
            made[name] = _SPECIAL[name].make(guess)
    if extras:
        made |= _extras(guess, made)
    return made


def _extras(guess: Guesser, made: dict[str, Any]) -> dict[str, Any]:
    """Optional arguments that some models cannot do without."""
    extra: dict[str, Any] = {}
    if "encoder_hidden_states" in guess.parameters:
        extra["encoder_hidden_states"] = guess.normal(BATCH, 8, guess.width("cross_attention_hidden_size", "encoder_hidden_size"))
    if "attention_mask" in guess.parameters and "input_ids" in made:
        extra["attention_mask"] = torch.ones_like(made["input_ids"])
    if "input_features_mask" in guess.parameters and "input_features" in made:
        extra["input_features_mask"] = torch.ones(BATCH, max(made["input_features"].shape[1:]), dtype=torch.long)
    if "use_cache" in guess.parameters:
        extra["use_cache"] = False
    return extra


def _patches(guess: Guesser) -> dict[str, Any]:
    """Flattened patches and their grid, as Qwen2-VL's vision towers take them."""
    patch, frames = guess.size("patch_size", default=14), guess.size("temporal_patch_size", default=1)
    made: dict[str, Any] = {
        next(iter(guess.parameters)): guess.normal(16, guess.size("num_channels", "in_channels", "in_chans", default=3) * frames * patch**2)
    }
    for name in ("grid_thw", "image_grid_thw"):
        if name in guess.parameters:
            made[name] = torch.tensor([[1, 4, 4]])
    if "merge_sizes" in guess.parameters:
        made["merge_sizes"] = torch.tensor([1])
    return made


def _rows(guess: Guesser) -> dict[str, Any]:
    """Rows of patches with their mask, as SigLIP 2 takes them."""
    width = guess.size("num_channels", default=3) * guess.size("patch_size", default=16) ** 2
    made = {
        "pixel_values": guess.normal(BATCH, 16, width),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }
    return made | ({"input_ids": guess.tokens()} if "input_ids" in guess.parameters else {})


def _codebooks(guess: Guesser) -> dict[str, Any]:
    """A row of tokens per codebook, as MusicGen takes them."""
    rows = torch.cat([guess.tokens() for _ in range(guess.size("num_codebooks", default=4))])
    return {"input_ids": guess.tokens(), "decoder_input_ids": rows} if "decoder_input_ids" in guess.parameters else {"input_ids": rows}


def _series(guess: Guesser) -> dict[str, Any]:
    """A past and a future, for models of time series."""
    config = guess.config
    past, future, features = config.context_length + max(config.lags_sequence), config.prediction_length, config.num_time_features
    return {
        "past_values": guess.normal(2, past),
        "past_time_features": guess.normal(2, past, features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": guess.normal(2, future),
        "future_time_features": guess.normal(2, future, features),
    }


def _sound(guess: Guesser, layout: str) -> dict[str, Any]:
    """Spectrograms in the layouts that are in use, and waves with a channel axis."""
    made = _by_name(guess, extras=True)
    mel = guess.size(*_MELS, default=80)
    shapes = {"frames": (BATCH, 64, mel), "bands": (BATCH, mel, 2 * guess.size("max_source_positions", default=32)), "image": (BATCH, 1, 64, mel)}
    if "input_features" in guess.parameters:
        made["input_features"] = guess.normal(*shapes[layout])
        if "input_features_mask" in guess.parameters:
            made["input_features_mask"] = torch.ones(BATCH, shapes[layout][-1 if layout == "bands" else -2], dtype=torch.long)
    if "input_values" in guess.parameters:
        made["input_values"] = guess.normal(BATCH, 1, 4000) if layout == "bands" else guess.normal(BATCH, guess.size("max_length", default=128), mel)
    return made


@dataclass(frozen=True)
class _Special:
    """How to make an argument, and when: always, or only where it is required (or there is no text)."""

    make: Callable[[Guesser], Tensor]
    always: bool = False
    without_text: bool = False


_SPECIAL = {
    "input_values": _Special(lambda guess: guess.normal(BATCH, 4000), without_text=True),
    "input_features": _Special(
        lambda guess: guess.normal(BATCH, guess.size(*_MELS, default=80), 2 * guess.size("max_source_positions", default=32)), without_text=True
    ),
    "bbox": _Special(lambda guess: torch.zeros(BATCH, LENGTH, 4, dtype=torch.long), always=True),
    "flattened_patches": _Special(
        lambda guess: torch.rand(BATCH, 16, guess.size("patch_embed_hidden_size", default=768) + 2, generator=guess.generator), always=True
    ),
    "past_values": _Special(
        lambda guess: guess.normal(BATCH, guess.size("context_length", default=32), guess.size("num_input_channels", default=1)), always=True
    ),
    "inputs_embeds": _Special(lambda guess: guess.normal(BATCH, LENGTH, guess.width())),
    "hidden_states": _Special(lambda guess: guess.normal(BATCH, LENGTH, guess.width())),
    "encoder_hidden_states": _Special(lambda guess: guess.normal(BATCH, 8, guess.width("encoder_hidden_size"))),
    "grid_thw": _Special(lambda guess: torch.tensor([[1, 4, 4]])),
    "image_grid_thw": _Special(lambda guess: torch.tensor([[1, 4, 4]])),
    "visual_feats": _Special(lambda guess: guess.normal(BATCH, 4, guess.size("visual_feat_dim", default=2048)), always=True),
    "visual_pos": _Special(lambda guess: guess.normal(BATCH, 4, 4), always=True),
    "states": _Special(lambda guess: guess.normal(BATCH, 4, guess.config.state_dim), always=True),
    "actions": _Special(lambda guess: guess.normal(BATCH, 4, guess.config.act_dim), always=True),
    "rewards": _Special(lambda guess: guess.normal(BATCH, 4, 1), always=True),
    "returns_to_go": _Special(lambda guess: guess.normal(BATCH, 4, 1), always=True),
    "timesteps": _Special(lambda guess: torch.arange(4)[None], always=True),
    "input_features_mask": _Special(lambda guess: torch.ones(BATCH, 2 * guess.size("max_source_positions", default=32), dtype=torch.long)),
    "audio_mel_mask": _Special(lambda guess: torch.zeros(BATCH, 64, dtype=torch.bool)),
    "audio_mel": _Special(lambda guess: guess.normal(BATCH, 64, guess.size(*_MELS, default=80))),
    "attention_mask": _Special(lambda guess: torch.ones(BATCH, LENGTH, dtype=torch.long)),
    "aspect_ratio_ids": _Special(lambda guess: torch.ones(BATCH, 1, dtype=torch.long)),
    "aspect_ratio_mask": _Special(lambda guess: torch.ones(BATCH, 1, 1, dtype=torch.long)),
    "query_embeds": _Special(lambda guess: guess.normal(BATCH, guess.size("num_query_tokens", default=8), guess.size("hidden_size", default=64)), always=True),
    "spectrogram": _Special(lambda guess: guess.normal(BATCH, 40, guess.size("model_in_dim", "num_mel_bins", default=80)), always=True),
    "noise_sequence": _Special(lambda guess: guess.normal(BATCH, 40, 64)),
}

GUESSES: dict[str, Callable[[Guesser], dict[str, Any]]] = {
    "by name": _by_name,
    "with extras": lambda guess: _by_name(guess, extras=True),
    "text and picture": lambda guess: _by_name(guess, pictures=True),
    "video": lambda guess: _by_name(guess, pictures=True, video=True),
    "two pictures": lambda guess: {"pixel_values": guess.picture(2)},
    "spectrogram, frames first": lambda guess: _sound(guess, "frames"),
    "spectrogram, bands first": lambda guess: _sound(guess, "bands"),
    "spectrogram as a picture": lambda guess: _sound(guess, "image"),
    "time series": _series,
    "patches": _patches,
    "rows of patches": _rows,
    "codebooks": _codebooks,
    "tokens": lambda guess: {"input_ids": guess.tokens()},
    "the model's own": lambda guess: dict(guess.model.dummy_inputs),
}


def guesses(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, inputs) of every guess that can be made for this model."""
    guesser = Guesser(model)
    for name in GUESSES:
        try:
            made = guesser.inputs(name)
        except Exception:
            continue
        if made:
            yield name, made
