"""The intermediate picture of a cascade: a small picture instead of a latent, and the network that makes it large."""

from __future__ import annotations

from types import SimpleNamespace

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from sd_mini.autoencoder.super_resolution import DiffusionEnlarger
from sd_mini.config import check_choice
from sd_mini.draws import Draws
from sd_mini.errors import UserError


class SmallPicture(ModelMixin, ConfigMixin):
    """Pictures => the same pictures `factor` times smaller, by area; and back by super-resolution.

    Encoding learns nothing: a noise predictor over it makes small pictures, as the first stage of Imagen does (Saharia
    et al. 2022, section 2.4). `enlarger` "residual" is a network at the small size that ends in a sub-pixel convolution
    (Shi et al. 2016, ESPCN) and adds to the enlarged picture; noise on the small pictures while it is trained (`loss.
    latent_noise`) is Imagen's noise conditioning augmentation without the condition. "diffusion" draws the large
    picture from noise in `steps` evaluations, and is told the noise on the small one (`augmentation` when pictures are
    made); see `DiffusionEnlarger`.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        factor: int = 4,
        width: int = 64,
        num_blocks: int = 4,
        enlarger: str = "residual",
        steps: int = 8,
        augmentation: float = 0.0,
    ):
        super().__init__()
        if in_channels != out_channels:
            raise UserError(f"in_channels {in_channels} and out_channels {out_channels}: expected the same")
        if factor < 1:
            raise UserError(f"factor {factor}: expected at least 1")
        self.encoder = nn.AvgPool2d(factor)
        check_choice("enlarger", enlarger, ("residual", "diffusion"))
        if steps < 1 or not 0 <= augmentation <= 1:
            raise UserError(f"steps {steps}, augmentation {augmentation:g}: expected at least 1, and 0 to 1")
        if enlarger == "diffusion":
            self.decoder: nn.Module = DiffusionEnlarger(in_channels, factor, width, num_blocks, steps, augmentation)
        else:
            self.decoder = Enlarger(in_channels, factor, width, num_blocks)

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        """pixels (B, C, H, W) => `.latents` (B, C, H / factor, W / factor), in the range of the pixels."""
        return SimpleNamespace(latents=self.encoder(pixels))

    def decode(self, small: Tensor, draws: Draws | None = None) -> SimpleNamespace:
        """=> `.sample` (B, C, H, W); `draws`: each picture's generator, of which only a diffusion has a use."""
        is_drawn = isinstance(self.decoder, DiffusionEnlarger)
        return SimpleNamespace(sample=self.decoder(small, draws) if is_drawn else self.decoder(small))


class Enlarger(nn.Module):
    """(B, C, h, w) => (B, C, factor h, factor w)."""

    def __init__(self, channels: int, factor: int, width: int, num_blocks: int):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(AutoencoderTinyBlock(width, width, "relu") for _ in range(num_blocks))
        self.conv_out = nn.Conv2d(width, channels * factor**2, 3, padding=1)
        self.enlarge = nn.Upsample(scale_factor=factor, mode="bilinear")
        self.shuffle = nn.PixelShuffle(factor)

    def forward(self, small: Tensor) -> Tensor:
        x = self.conv_in(small)
        for block in self.blocks:
            x = block(x)
        return self.enlarge(small) + self.shuffle(self.conv_out(x))
