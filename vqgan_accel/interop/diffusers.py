"""Tokenizers of the `taming` architecture as diffusers' `VQModel`, whose networks they are."""

from __future__ import annotations

from pathlib import Path

from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor

from vqgan_accel.config import TamingConfig
from vqgan_accel.files import written_as_a_whole
from vqgan_accel.models.opening import open_tokenizer
from vqgan_accel.models.quantizers import CodebookQuantizer
from vqgan_accel.models.taming import network_options
from vqgan_accel.models.tokenizer import ImageTokenizer

CODEBOOK = "quantize.embedding.weight"  # VQModel's name of it
# VQModel's name of a layer or a network -> ours; the longer ones first
NAMES = {
    "decoder.conv_out.": "decoder.conv_out.",
    "decoder.": "decoder.body.",
    "encoder.": "encoder.body.",
    "post_quant_conv.": "decoder.post_quant_conv.",
    "quant_conv.": "encoder.quant_conv.",
}


def export_diffusers(model: str | Path, *, output: str | Path) -> list[str]:
    """Write a folder that `diffusers.VQModel.from_pretrained(output)` reads; the model gives our reconstructions.

    model: a run, a checkpoint, a saved tokenizer or a name on the hub. Returns a line that says what was done.
    ValueError where VQModel cannot be what the tokenizer is.
    """
    opened = open_tokenizer(model)
    vq_model = as_vq_model(opened.tokenizer, str(model))
    with written_as_a_whole(Path(output)) as partial:
        vq_model.save_pretrained(partial)
    return [f"{output}: {opened.folder} as diffusers' VQModel, {opened.tokenizer.quantizer.num_codes} codes"]


def as_vq_model(tokenizer: ImageTokenizer, source: str) -> VQModel:
    """VQModel looks for the nearest code; a codebook of unit vectors needs no normalised latents for that."""
    layout = tokenizer.settings.autoencoder_config
    if not isinstance(layout, TamingConfig):
        raise ValueError(
            f"{source} is of the {layout.type} architecture, and diffusers' VQModel is taming's; `export hub`, or the "
            "folder of ImageTokenizer.save_pretrained, carries any tokenizer"
        )
    if not (isinstance(tokenizer.quantizer, CodebookQuantizer) and tokenizer.quantizer.by_distance):
        kind = tokenizer.settings.quantizer_config.type
        raise ValueError(f"{source} has a {kind} quantizer; diffusers' VQModel knows nothing but the nearest code")
    encoder, decoder = network_options(layout)
    codebook = tokenizer.quantizer.codebook_vectors().detach()
    model = VQModel(
        **encoder | decoder,
        latent_channels=layout.latent_channels,
        sample_size=tokenizer.settings.image_size,
        num_vq_embeddings=len(codebook),
        vq_embed_dim=codebook.shape[1],
    )
    state = tokenizer.state_dict()
    own = {name: codebook if name == CODEBOOK else state[our_name(name)] for name in model.state_dict()}
    model.load_state_dict(own)
    return model.eval()


def our_name(name: str) -> str:
    """VQModel's name of a weight outside of the quantizer -> ours."""
    theirs = next(beginning for beginning in NAMES if name.startswith(beginning))
    return NAMES[theirs] + name.removeprefix(theirs)


def from_vq_model(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under VQModel's names, without the quantizer's -> the same under ours."""
    return {our_name(name): tensor for name, tensor in weights.items()}
