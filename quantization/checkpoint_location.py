"""Locate a checkpoint as SGLang does: a folder, the Hugging Face cache, ModelScope. No torch."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from hopper_moe.quantization.checkpoint_files import missing_files
from hopper_moe.quantization.errors import Refusal

_EXAMPLE = "deepseek-ai/DeepSeek-V4-Flash"


@dataclass(frozen=True)
class ModelSource:
    """A model as a launch names it.

    `model`: a folder, or ORG/NAME. `revision`: branch, tag or commit, None: the main one. `download_dir`: where weights are
    cached instead of the usual place.
    """

    model: str
    revision: str | None = None
    download_dir: str | None = None

    @property
    def is_folder(self) -> bool:
        return Path(self.model).expanduser().is_dir()


def find_config(source: ModelSource) -> Path:
    """Folder of the config.json that SGLang reads, which is fetched if it is not on this machine.

    Raises Refusal: there is nothing of that name, or config.json cannot be fetched.
    """
    folder, name = Path(source.model).expanduser(), source.model
    if not name.strip():
        raise Refusal(f"MODEL is empty: give a checkpoint folder or a Hugging Face id like {_EXAMPLE}.")
    if source.is_folder:
        return folder
    if folder.exists():
        raise Refusal(f"{name} is a file, not a checkpoint: give the folder that holds config.json and the safetensors files.")
    if name.startswith("-"):
        raise Refusal(
            f"{name} stands where MODEL is expected: give the checkpoint folder or Hugging Face id first, then options."
        )
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise Refusal(f"{name} does not exist: give a checkpoint folder or a Hugging Face id like {_EXAMPLE}.")
    return _modelscope(source) if _uses_modelscope() else _hugging_face(source)


def find_weights(source: ModelSource, config_folder: Path) -> Path | None:
    """Folder of the weights that SGLang will load as they are; None: it will fetch some first.

    Offline, and of a user's own folder, nothing is fetched: what is missing there is missing.
    """
    if source.is_folder:
        return config_folder
    snapshots = [config_folder] if _uses_modelscope() else [*_snapshots(source), config_folder]
    for folder in snapshots:
        if any(folder.glob("*.safetensors")) and not missing_files(folder):
            return folder
    return snapshots[0] if _is_on(os.environ.get("HF_HUB_OFFLINE")) else None


def _uses_modelscope() -> bool:
    return _is_on(os.environ.get("SGLANG_USE_MODELSCOPE"))


def _is_on(value: str | None) -> bool:
    """Parse a switch as SGLang does."""
    return (value or "").strip().lower() in ("1", "true", "yes", "y", "on", "t")


def _hugging_face(source: ModelSource) -> Path:
    """Snapshot of the revision in the usual cache, whole or not; online the revision is looked up first. SGLang reads config.json
    from there even if --download-dir names another cache."""
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise Refusal(
            f"{source.model} looks like a Hugging Face id, but huggingface_hub is not installed: give a local folder."
        ) from None
    try:
        return Path(hf_hub_download(source.model, "config.json", revision=source.revision)).parent
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        for folder in _snapshots(source):
            if (folder / "config.json").exists():
                raise Refusal(
                    f"{source.model} is in {source.download_dir}, but SGLang takes only weights from --download-dir and finds no "
                    f"config.json in {constants.HF_HUB_CACHE}: set HF_HUB_CACHE={source.download_dir}, or give {folder} as MODEL."
                ) from None
        which = f" at revision {source.revision}" if source.revision else ""
        raise Refusal(
            f"{source.model}{which}: its config.json cannot be fetched ({_first_line(error)}): give a local folder or a revision "
            "that is in the cache, or mend the connection."
        ) from None


def _snapshots(source: ModelSource) -> list[Path]:
    """The snapshot of the revision in --download-dir, if there is one. Fetches nothing."""
    if source.download_dir is None:
        return []
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError, OSError):
        found = snapshot_download(source.model, revision=source.revision, cache_dir=source.download_dir, local_files_only=True)
        return [Path(found)]
    return []


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _modelscope(source: ModelSource) -> Path:
    """ModelScope's cache, then the download folder, then its hub: the order in which SGLang resolves --model-path."""
    try:
        from modelscope.hub.file_download import model_file_download
        from modelscope.utils.file_utils import get_model_cache_root
    except ImportError:
        raise Refusal(
            f"{source.model}: SGLANG_USE_MODELSCOPE is set, but modelscope is not installed: pip install modelscope, unset the "
            "variable, or give a local folder."
        ) from None
    for root in filter(None, (get_model_cache_root(), source.download_dir)):
        if (found := Path(root) / source.model).is_dir():
            return found
    try:
        fetched = model_file_download(source.model, "config.json", revision=source.revision, cache_dir=source.download_dir)
        return Path(fetched).parent
    except Exception as error:  # modelscope raises errors of several libraries
        raise Refusal(
            f"{source.model}: its config.json cannot be fetched from ModelScope ({_first_line(error)}): give a local folder or "
            "mend the connection."
        ) from None
