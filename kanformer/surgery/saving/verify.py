"""Whether a checkpoint's files, its config.json and a model class belong together, before a model is handed out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from kanformer.errors import CheckpointError
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.modules import get_path, join
from kanformer.surgery.sentinel import sentinel_names

ACTION = "load the KAN checkpoint"
WATCHED = "mark_tied_weights_as_initialized"
_INTEGERS = ("I", "U", "BOOL")  # how safetensors' names of such dtypes begin


def check_files(files: Sequence[str] | None) -> None:
    """Reads the headers of the weight files.

    Raises:
        CheckpointError: a file that is damaged, cut short or no safetensors file (pickles are never read), or a learned function that is no float.
    """
    from safetensors import SafetensorError, safe_open

    for path in map(Path, files or ()):
        if path.suffix != ".safetensors":
            raise CheckpointError(
                ACTION, subject=path, got="a pickle", expected="a safetensors file", hint="Pickles can run code; save the model again by save_pretrained."
            )
        try:
            with safe_open(path, framework="pt") as file:
                ours = [name for name in file.keys() if "kan_" in name and not name.endswith((".kan_index", ".kan_mask"))]  # noqa: SIM118
                strange = [name for name in ours if file.get_slice(name).get_dtype().startswith(_INTEGERS)]
        except (SafetensorError, OSError) as error:
            size = f"a file of {path.stat().st_size:,} bytes" if path.is_file() else "a file"
            raise CheckpointError(ACTION, subject=path, got=f"{size} that is damaged or cut short ({short(error)})", hint="Copy it again.") from error
        if strange:
            raise CheckpointError(ACTION, subject=path, got=f"{strange[0]} in integers", expected="floating point numbers", hint="The file is damaged.")


def check_site(site: Site) -> None:
    """Checks that a spec from a file names parts of the block, and nothing else that Python objects have.

    Raises:
        CheckpointError: a part that is missing, of another kind, or not the block's own.
    """
    spec = site.spec
    paths = [site.owner_path, spec.slot, spec.up, spec.down, spec.gate, spec.activation.removeprefix("="), *spec.identities]
    paths += [spec.hidden_dropout, spec.output_dropout, spec.input_norm, spec.hidden_norm, spec.expert_norm]
    strange = next((path for path in paths if path and not re.fullmatch(r"(?!__)\w+(\.(?!__)\w+)*", path)), None)
    problem = f"names {short(repr(strange))} as a part" if strange else site.problem() or _problem_of_parts(site)
    if problem is not None:
        raise CheckpointError(
            ACTION,
            subject=f"{type(site.model).__name__}, {site.owner_path}",
            got=f"a block that {problem}",
            expected=f"a block as described by the spec {short(repr(spec.name))}",
        )


def _problem_of_parts(site: Site) -> str | None:
    spec = site.spec
    if not isinstance(site.part(spec.slot), nn.Module):
        return f"has no module at {spec.slot}"
    norms = [path for path in (spec.input_norm, spec.hidden_norm, spec.expert_norm) if path]
    plain = [*spec.identities, *norms, *([] if spec.activation.startswith("=") else [spec.activation])]
    for path in plain:
        try:
            part = site.part(path)
        except AttributeError:
            return f"has no {path}"
        # A function can be a part; a class or a method that a path happens to name is none.
        if not isinstance(part, nn.Module) and (not callable(part) or isinstance(part, MethodType | type)):
            return f"has a {type(part).__name__} at {path}, not a module or function"
    for path in filter(None, (spec.hidden_dropout, spec.output_dropout)):
        part = site.part(path)
        if not isinstance(part, nn.Dropout) and not (type(part) in (int, float) and 0 <= part < 1 and path.rpartition(".")[2] in vars(_holder(site, path))):
            return f"has {short(repr(part))} at {path}, not a dropout"
    return None


def _holder(site: Site, path: str) -> Any:
    return get_path(site.owner, path.rpartition(".")[0])


def watch_loading(model: nn.Module, sites: Iterable[Site]) -> None:
    """Lets `from_pretrained` stop with a CheckpointError, before it makes up weights, if the files' tensors are not those of the KAN-FFNs.

    transformers itself only warns about missing and unknown tensors. It shows them to this method first of all.
    """
    original, paths = getattr(model, WATCHED), {id(module): path for path, module in model.named_modules()}
    parts, sentinels = set(), set()
    for site in sites:
        spec, owner = site.spec, paths[id(site.owner)]
        parts |= {join(owner, spec.slot), *(join(owner, path) for path in (spec.up, spec.down, spec.gate, *spec.identities) if path)}
        sentinels.update(join(owner, spec.slot, name) for name in sentinel_names(spec))

    def look(loading_info: Any) -> None:
        model.__dict__.pop(WATCHED, None)
        problem = _problem_of_tensors(model, tuple(f"{path}." for path in parts), sentinels, loading_info)
        if problem is not None:
            for found in (loading_info.missing_keys, loading_info.mismatched_keys, loading_info.unexpected_keys):
                found.clear()  # else transformers would report them, and raise an error of its own in place of this one
            raise CheckpointError(ACTION, subject=type(model).__name__, got=problem, hint="The weight files and config.json do not belong together.")
        original(loading_info)

    model.__dict__[WATCHED] = look


def _problem_of_tensors(model: nn.Module, parts: tuple[str, ...], sentinels: set[str], loading_info: Any) -> str | None:
    # A sentinel has the name of a native weight, which transformers may fuse with another or split when it saves and loads (gte).
    all_missing = loading_info.missing_keys - sentinels
    missing = {name for name in all_missing if name.startswith(parts)}
    foreign = {name for name in loading_info.unexpected_keys if any(word.startswith("kan_") for word in name.split("."))}
    wrong = {name: (tuple(got), tuple(expected)) for name, got, expected in loading_info.mismatched_keys if name.startswith(parts)}
    if wrong:
        name, (got, expected) = min(wrong.items())
        return f"{name} of shape {got} where config.json says {expected}"
    if foreign:
        return f"tensors that no block takes ({some(foreign)})"
    unknown = {name for name in loading_info.unexpected_keys if not name.startswith(parts)}
    if not missing and unknown and type(model).__name__ in (getattr(model.config, "architectures", None) or ()):
        # The class that was saved: a tensor that it lacks and one that it does not know were one, under its right name.
        tied, ignored = getattr(model, "all_tied_weights_keys", {}), getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        missing = {name for name in all_missing if name not in tied and not any(re.search(pattern, name) for pattern in ignored)}
    return f"no tensors for {some(missing)}" if missing else None


def some(names: Iterable[str]) -> str:
    """Three of the names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_unique(sites: Sequence[Site]) -> None:
    """Raises CheckpointError if a block is listed twice, or lies in another."""
    paths = sorted(f"{site.path}." for site in sites)
    for left, right in itertools.pairwise(paths):
        if right.startswith(left):
            raise CheckpointError(ACTION, got=f"{right[:-1]} as a block of its own beside {left[:-1]} in config.json", expected="each block once")


def short(value: object, length: int = 200) -> str:
    """A value on one line, cut where it is long."""
    text = " ".join(str(value).split())
    return text if len(text) <= length else text[: length - 3] + "..."
