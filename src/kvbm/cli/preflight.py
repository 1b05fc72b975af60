"""What a model's own files show to be wrong, in a moment, before an engine is started.

Neither vLLM nor transformers is imported: that takes longer than all of this."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kvbm.core.errors import Unsupported, UsageError

_ENCODERS: Final = r"(Bert|Roberta|XLMRoberta|DistilBert|Electra|Deberta|DebertaV2|ModernBert|Albert|NomicBert|Gte\w*)"
_ONE_PASS: Final = {
    rf"{_ENCODERS}(Model|ForMaskedLM|ForSequenceClassification|ForTokenClassification)": (
        "encoder models: their attention goes both ways, so vLLM reuses no prefixes of them"
    ),
    r".*(ForMaskedDiffusion|DiffusionLM|DreamModel|LLaDA\w*)": (
        "diffusion models, which write tokens again after their KV was kept"
    ),
}
"""Names of classes that vLLM has for models of which it reuses no prefixes. Others are refused when it knows them."""


def check(model: str, place: Path | None, max_model_len: str | None) -> None:
    """Raises UsageError for a model that is not there or has fewer positions than asked for, Unsupported for one that
    KVBM does not serve. `place` is its folder or file, if it is here; `max_model_len` None: not given."""
    if place is None:
        if model.startswith(("/", "./", "../", "~")):
            raise UsageError(f"there is no model {model}: neither a folder nor a file has that path")
        return
    if place.is_dir() and (configuration := _configuration(place)) is not None:
        if (wrong := _refused(configuration)) is not None:
            raise Unsupported(f"KVBM does not serve {wrong}. Start the engine without `kvbm serve`.")
        _check_length(configuration, max_model_len)


def _configuration(place: Path) -> dict[str, Any] | None:
    """A model's config.json; of a hub's cache, that of the only snapshot. None where others say what it is."""
    if (place / "snapshots").is_dir():
        snapshots = list((place / "snapshots").iterdir())
        if len(snapshots) != 1:
            return None
        (place,) = snapshots
    file = place / "config.json"
    if not file.is_file():
        others = ("params.json", "*.gguf", "config.yaml")
        if any(found for pattern in others for found in place.glob(pattern)) or place.parent.name == "snapshots":
            return None
        raise UsageError(f"there is no model in {place}: the folder has no config.json")
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} is not a model's configuration: it is no JSON object")
    return content


def _refused(configuration: dict[str, Any]) -> str | None:
    """What of a model KVBM does not serve, as far as its configuration says it."""
    if configuration.get("is_encoder_decoder") is True:
        return "encoder-decoder models"
    for name in _names(configuration.get("architectures")):
        for pattern, sentence in _ONE_PASS.items():
            if re.fullmatch(pattern, name) and configuration.get("is_decoder") is not True:
                return f"{sentence} ({name} in its config.json)"
    return None


def _names(value: object) -> Sequence[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _check_length(configuration: dict[str, Any], asked: str | None) -> None:
    """vLLM refuses more positions than a model has, half a minute later, unless its positions can be stretched."""
    text = configuration.get("text_config")
    text = text if isinstance(text, dict) else configuration
    own, rope = text.get("max_position_embeddings"), text.get("rope_parameters")
    plain = not text.get("rope_scaling") and not (isinstance(rope, dict) and rope.get("rope_type") != "default")
    if plain and isinstance(own, int) and asked is not None and asked.isdecimal() and int(asked) > own:
        raise UsageError(f"--max-model-len {asked}: the model has {own:,} positions (config.json)")
