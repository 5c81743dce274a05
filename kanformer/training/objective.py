"""What a distillation minimises: the weights of its losses, which its stage fills in where the settings name none."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

from kanformer.errors import ConfigError
from kanformer.training.models import head_of
from kanformer.training.settings import DistillArguments

_WEIGHTS = ("local_weight", "hidden_weight", "embedding_weight", "kl_weight", "ce_weight")
_NONE = dict.fromkeys(_WEIGHTS, 0.0)
_LOCAL = {**_NONE, "local_weight": 1.0, "train_rest": "none"}
_LANGUAGE = {**_NONE, "kl_weight": 1.0, "train_rest": "all"}
_ENCODER = {**_NONE, "hidden_weight": 1.0, "embedding_weight": 0.1, "train_rest": "all"}  # more of the embeddings, few and noisy in a batch, costs on MiniLM


@dataclass(frozen=True)
class Objective:
    """Weights of the losses, each a sum over tokens.

    - local: of the blocks' errors on the teacher's inputs, `hidden`: of the errors of the student's own hidden states, both in units of the teacher's
      variance and means over layers.
    - embedding: of 1 - cosine of a text's embedding (the mean of its last hidden states) to the teacher's, times its tokens.
    - kl, ce: see `logit_losses`, at `temperature`. head: "causal_lm" or "masked_lm", what the logits predict; None where there is no such head.
    """

    local: float = 1.0
    hidden: float = 0.0
    embedding: float = 0.0
    kl: float = 0.0
    ce: float = 0.0
    temperature: float = 1.0
    head: str | None = None

    @property
    def states(self) -> bool:
        """Whether hidden states are compared."""
        return bool(self.hidden or self.embedding)

    @property
    def logits(self) -> bool:
        """Whether logits are needed."""
        return bool(self.kl or self.ce)

    @property
    def free(self) -> bool:
        """Whether the student runs on its own, end to end."""
        return self.states or self.logits

    @property
    def masked(self) -> bool:
        """Whether tokens of the text are masked, for both models alike."""
        return self.logits and self.head == "masked_lm"


def learns_nothing(arguments: DistillArguments) -> bool:
    """Whether no model could learn anything: every weight is 0, given or by the stage."""
    stages = (_LOCAL,) if arguments.stage == "local" else (_LANGUAGE, _ENCODER)
    given = {name: getattr(arguments, name) for name in _WEIGHTS}
    return not any(known[name] if given[name] is None else given[name] for known in stages for name in _WEIGHTS)


def resolve(arguments: DistillArguments, teacher: nn.Module, student: nn.Module) -> tuple[DistillArguments, Objective]:
    """The settings with every weight and `train_rest` filled in, and the same as an `Objective`.

    Raises:
        ConfigError: nothing to learn, or something that this model or these settings cannot teach.
    """
    head = head_of(teacher)
    known = _LOCAL if arguments.stage == "local" else _LANGUAGE if head else _ENCODER
    arguments = dataclasses.replace(arguments, **{name: value for name, value in known.items() if getattr(arguments, name) is None})
    local, hidden, embedding, kl, ce = (float(getattr(arguments, name)) for name in _WEIGHTS)
    objective = Objective(local, hidden, embedding, kl, ce, arguments.temperature, head)
    headless = next((type(model).__name__ for model in (teacher, student) if head_of(model) is None), None)
    _check(arguments, objective, headless)
    return arguments, objective


def _check(arguments: DistillArguments, objective: Objective, headless: str | None) -> None:
    if not (objective.local or objective.free):
        raise ConfigError("distil", got=" and ".join(f"{name}=0" for name in _WEIGHTS), expected="at least one of them above 0")
    if arguments.train_rest != "none" and not objective.free:
        raise ConfigError(
            "distil",
            got=f"train_rest={arguments.train_rest} with local_weight alone",
            hint="Only a student that runs on its own teaches the rest: set hidden_weight, or stage to global.",
        )
    if objective.logits and headless:
        raise ConfigError(
            "distil",
            subject="kl_weight and ce_weight",
            got=f"{headless}, which has no language-modelling head",
            hint="Use hidden_weight and embedding_weight, or checkpoints that were saved with their head.",
        )
    if arguments.teacher_states and (objective.local or objective.logits):
        name = "local_weight" if objective.local else "kl_weight and ce_weight"
        raise ConfigError("distil", got=f"teacher_states with {name} above 0", hint=f"They hold hidden states only: set {name} to 0.")
