import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raekit.errors import UserError
from raekit.models.decoder import Decoder, DecoderConfig


def tiny(**changes) -> Decoder:
    values = {"token_dim": 12, "grid": (3, 3), "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "hidden": 24}
    return Decoder(DecoderConfig(**(values | changes))).eval()


@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_output_covers_the_image(grid: tuple[int, int]):
    out = tiny(grid=grid)(torch.randn(2, 12, *grid))
    assert out.shape == (2, 3, 4 * grid[0], 4 * grid[1])


def test_every_norm_has_the_epsilon_of_the_config():
    for model, expected in ((tiny(), 1e-12), (tiny(norm_eps=0.5), 0.5)):
        assert [m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)] == [expected] * 5


def test_published_size_of_vit_xl():
    with torch.device("meta"):
        model = Decoder(DecoderConfig(token_dim=768, grid=(16, 16), width=1152, depth=28, heads=16, hidden=4096))
    count = sum(p.numel() for p in model.parameters())
    assert round((count + 257 * 1152) / 1e6, 2) == 415.35  # the release counts its position table
    # The release splits q, k and v, in weight and bias, and stores the position table: 456 tensors.
    assert len(model.state_dict()) == 456 - 28 * 4 - 1


def test_another_grid_is_resampled_after_the_embedding():
    model = tiny()
    latents = torch.randn(2, 12, 5, 5)
    embedded = F.conv2d(latents, model.embed.weight[:, :, None, None], model.embed.bias)
    resampled = F.interpolate(embedded, (3, 3), mode="bilinear", align_corners=False)
    expected_model = tiny(token_dim=16)
    state = model.state_dict() | {"embed.weight": torch.eye(16), "embed.bias": torch.zeros(16)}
    expected_model.load_state_dict(state)
    assert torch.allclose(model(latents), expected_model(resampled), atol=1e-5)


def test_patches_stand_at_the_place_of_their_tokens():
    # Without attention between tokens, a change of one token changes its own patch of pixels alone.
    model = tiny()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()  # pyright: ignore
    latents = torch.randn(1, 12, 3, 3)
    changed = latents.clone()
    changed[:, :, 1, 2] += 1
    different = (model(latents) != model(changed)).any(1)[0]
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[4:8, 8:12] = True
    assert torch.equal(different, expected)


def test_equal_tokens_at_different_places_decode_differently():
    out = tiny()(torch.ones(1, 12, 3, 3))
    assert not torch.allclose(out[..., :4, :4], out[..., :4, 4:8], atol=1e-4)
    assert not torch.allclose(out[..., :4, :4], out[..., 4:8, :4], atol=1e-4)


def test_class_token_takes_part():
    model = tiny()
    latents = torch.randn(1, 12, 3, 3)
    before = model(latents)
    with torch.no_grad():
        model.cls_token.add_(torch.randn(16))
    assert not torch.allclose(model(latents), before, atol=1e-4)


@pytest.mark.parametrize(("width", "heads"), [(30, 4), (18, 3)])
def test_impossible_width_is_named(width: int, heads: int):
    with pytest.raises(
        UserError, match=f"decoder.width: {width} must be a multiple of 4 and of decoder.heads = {heads}"
    ):
        tiny(width=width, heads=heads)
