"""PEFT's ``adapter_config.json``: its fields, read, checked and written."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpeft.interop._format import PEFT_CONFIG
from jaxpeft.interop._modules import Module

CONFIG, TENSORS = PEFT_CONFIG, "adapter_model.safetensors"
PREFIX = "base_model.model."

# Defaults of the fields that matter, as PEFT 0.21 fills them in; by peft_type where
# types differ. A field may be left out of a file.
_COMMON = {
    "target_modules": None,
    "exclude_modules": None,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "fan_in_fan_out": False,
}
_LORA = {
    "bias": "none",
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {},
    "kasa_config": None,
    "ensure_weight_tying": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "LORA": _COMMON | _LORA,
    "ADALORA": _COMMON
    | _LORA
    | {
        "rank_pattern": None,
        "target_r": 8,
        "init_r": 12,
        "tinit": 0,
        "tfinal": 0,
        "deltaT": 1,
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.5,
        "total_step": None,
    },
    "VERA": _COMMON
    | {
        "bias": "none",
        "r": 256,
        "vera_dropout": 0.0,
        "d_initial": 0.1,
        "projection_prng_key": 0,
        "save_projection": True,
        "init_weights": True,
    },
    "IA3": _COMMON | {"feedforward_modules": None, "init_ia3_weights": True},
}

# Fields that a config of each type has besides these.
NOTES = ("peft_type", "peft_version", "task_type", "base_model_name_or_path")

# What is said even where it is the default: not every reader fills defaults in.
_RARE = ("kasa_config", "ensure_weight_tying")
PLAIN_FIELDS = {"LORA": {n: v for n, v in _LORA.items() if n not in _RARE}}

# Fields that change nothing of the function once the weights are trained.
_UNUSED = (
    *("auto_mapping", "revision", "inference_mode", "runtime_config"),
    *("megatron_core", "qalora_group_size", "eva_config", "lora_ga_config"),
    *("corda_config", "loftq_config"),
)

# PEFT adds these to modules_to_save for sequence and token classification.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}
TASKS = (
    *("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM", "QUESTION_ANS"),
    "FEATURE_EXTRACTION",
)


def read_config(folder: Path, ignore: Sequence[str]) -> dict[str, Any]:
    """Reads a config, fills in PEFT's defaults, refuses what cannot be honoured.

    Args:
        folder: an adapter folder.
        ignore: fields that the user wants to be overlooked.

    Raises:
        FileNotFoundError: there is no config.
        ValueError: it is damaged, of an unknown type, or has fields set that mean
            something this library does not do. All are named.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"`folder` {str(folder)!r} holds no {CONFIG}; give a folder that PEFT's "
            "save_pretrained wrote. (jaxpeft's own files: load_adapter.)"
        )
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        kind = given["peft_type"]
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{file} is damaged or no PEFT config: {e!r}") from e
    if kind not in DEFAULTS:
        raise ValueError(
            f"{file} is of peft_type {kind!r}; known are {', '.join(DEFAULTS)}. For "
            "another method, merge it in PEFT (merge_and_unload) and load the model."
        )
    known = DEFAULTS[kind]
    unset = (None, False, {}, [], "")
    strange = {
        name: value
        for name, value in given.items()
        if name not in known and name not in (*NOTES, *_UNUSED) and value not in unset
    }
    if strange := {n: v for n, v in strange.items() if n not in ignore}:
        raise ValueError(
            f"{file} sets what jaxpeft does not do: {strange}. Merge the adapter in "
            f"PEFT and load the model, or write ignore={sorted(strange)} if it does "
            "not matter."
        )
    kept = {n: v for n, v in given.items() if n not in ignore and v is not None}
    return known | {n: v for n, v in kept.items() if n in known or n in NOTES}


def target_names(sites: Sequence[Module], modules: Sequence[Module]) -> list[str]:
    """The shortest list for ``target_modules`` that means exactly these modules.

    A row of the table all of whose modules are sites is named by the shortest end
    that no other row shares; everything else by full paths. Ends that several rows
    share are never written, even where all of them are sites: the checkpoint's model
    may have a module more than our table (a pooler) that ends alike. So may it where
    the tree lacks the first layers or one between, as a part of a pipeline does, or
    is the text part of a model with vision.
    """
    chosen = {module.name for module in sites}
    rows: dict[str, list[Module]] = {}
    for module in modules:
        rows.setdefault(module.row.theirs, []).append(module)
    names: list[str] = []
    for theirs, each in rows.items():
        hits = [m.name for m in each if m.name in chosen]
        if not hits:
            continue
        parts = theirs.rpartition("{i}.")[2].split(".")
        ends = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        others = [t for t in rows if t != theirs]
        free = [
            e for e in ends if not any(t == e or t.endswith("." + e) for t in others)
        ]
        whole = [m.number for m in each] in ([None], [*range(len(each))])
        whole = whole and not each[0].row.saved
        if len(hits) == len(each) and free and whole:
            names.append(free[0])
        else:
            names += hits
    return names


def patterns_of(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """``(the most frequent value, {escaped path: value} of all others)``."""
    each = list(values.values())
    usual = max(dict.fromkeys(each), key=each.count)
    # PEFT sorts keys when it saves again: whole paths, so that none shadows another.
    rest = {re.escape(name): v for name, v in values.items() if v != usual}
    return usual, rest
