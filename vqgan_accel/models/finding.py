"""Which saved tokenizer is meant by a run, a checkpoint, a folder or a name on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from vqgan_accel.files import followed
from vqgan_accel.run_folder import (
    BEST,
    CONFIG,
    LATEST,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_EMA,
    WEIGHTS_PATTERN,
    checkpoints,
    checkpoints_folder,
)


def find_tokenizer(path: Path) -> tuple[Path, Path | None]:
    """(folder of a saved tokenizer, its run's config or None) for a run, a checkpoint, a saved tokenizer, or a name on
    the Hugging Face hub, whose files are downloaded once.

    A run means its latest checkpoint; of a checkpoint the averaged weights are taken where it has them.
    FileNotFoundError where there is none.
    """
    if path.name in (LATEST, BEST):
        path = followed(path)
    if not path.is_dir():
        path = downloaded(path)
    checkpoint = path
    if checkpoints_folder(path).is_dir():
        found = checkpoints(path)
        if not found:
            raise FileNotFoundError(f"{path} is a run without a complete checkpoint: train it first")
        checkpoint = found[-1]
    config = next(
        (parent / CONFIG for parent in (path, *path.resolve().parents[:3]) if (parent / CONFIG).is_file()), None
    )
    for tokenizer in (checkpoint / TOKENIZER_EMA, checkpoint / TOKENIZER, checkpoint):
        if (tokenizer / TOKENIZER_CONFIG).is_file():
            return tokenizer, config
    raise FileNotFoundError(
        f"{path} holds no tokenizer: give a run folder, a checkpoint or a folder of save_pretrained"
    )


def downloaded(name: Path) -> Path:
    """The folder in which the hub's files of that name are kept."""
    missing = f"there is no run, checkpoint or saved tokenizer at {name}"
    # Names on the hub are USER/NAME; below a folder that is here something was mistyped.
    if name.is_absolute() or len(name.parts) != 2:
        raise FileNotFoundError(missing)
    if name.parent.exists():
        raise FileNotFoundError(f"{missing} (and as the folder {name.parent} is here, the hub was not asked for it)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(name), allow_patterns=[TOKENIZER_CONFIG, CONFIG, WEIGHTS_PATTERN]))
    except (OSError, HFValidationError) as error:  # its errors of the network and of the server are OSErrors
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(f"{missing}, nor can that name be had from the Hugging Face hub ({reason})") from None
