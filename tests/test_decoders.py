"""Decoders on encoders of every family, and a memory that must never change a number."""
from functools import partial

import pytest
import torch
from open_clip.transformer import VisionTransformer as ClipTower
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from wsol_nb.core import SettingsError
from wsol_nb.decoders import (LocalizationHead, Remembered, TokenDecoder, UNet, class_tokens, encode, halving_widths, stage_channels,
                              stage_outputs)
from wsol_nb.models import as_backbone, attention_maps, backbone
from wsol_nb.proposals import AttentionMaps


def vit(**settings):
    torch.manual_seed(0)
    fixed = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, dynamic_img_size=True)
    return as_backbone(VisionTransformer(**fixed | settings))


def eva():
    torch.manual_seed(0)
    return as_backbone(Eva(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, use_rot_pos_emb=True,
                           swiglu_mlp=True, num_reg_tokens=2, dynamic_img_size=True))


def clip():
    torch.manual_seed(0)
    return as_backbone(ClipTower(32, 8, width=48, layers=3, heads=4, mlp_ratio=4., output_dim=16))


@pytest.mark.parametrize("make", (vit, partial(vit, reg_tokens=4), eva, clip), ids=("vit", "registers", "eva", "clip"))
def test_class_tokens_of_every_family(make):
    """The last one is the network's own class token; earlier ones are what a shorter network would give."""
    network, images = make().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), class_tokens(network, 3) as seen:
        tokens = network.tokens(images)
    assert len(seen) == 3
    assert torch.allclose(seen[-1], tokens.prefix[:, 0], atol=1e-5)
    blocks = network.body.blocks if hasattr(network.body, "blocks") else network.body.transformer.resblocks
    del blocks[-1]
    with torch.no_grad():
        assert torch.allclose(seen[1], network.tokens(images).prefix[:, 0], atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_class_tokens_need_a_class_token():
    with pytest.raises(SettingsError, match="class tokens of 2"), class_tokens(vit(class_token=False, global_pool="avg"), 2):
        pass


def test_encoding_trains_nothing_and_leaves_modes_alone():
    network = vit().train()
    maps = AttentionMaps(network, attention_maps)
    found = encode(network, maps.read, torch.randn(2, 3, 32, 32), blocks=2)
    assert not any(part is not None and part.requires_grad for part in found)
    assert network.training and all(m.training for m in network.modules())


@pytest.mark.parametrize("channels, stride, cells", [(48, 8, 4), (64, 16, 3), (40, 14, 2), (16, 4, 7)])
def test_the_default_head_reaches_the_picture(channels, stride, cells):
    side = cells * 2 ** len(halving_widths(channels, stride))
    out = LocalizationHead(channels, halving_widths(channels, stride))(torch.randn(2, channels, cells, cells))
    assert out.shape == (2, 2, side, side) and side >= cells * stride


def test_every_parameter_of_the_head_learns():
    head = LocalizationHead(16, (8, 2))
    head(torch.randn(4, 16, 5, 5))[:, 1].mean().backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("size", (32, 33, 96))
def test_unet_on_any_size(size):
    torch.manual_seed(0)
    net = UNet(backbone("mini_cnn", pretrained=False)).eval()
    assert net(torch.randn(1, 3, size, size)).shape == (1, 2, size, size)


def test_unet_stages_of_a_small_resnet():
    with torch.device("meta"):
        encoder = backbone("resnet18", pretrained=False)
        net = UNet(encoder)
    images = torch.zeros(1, 3, 64, 64, device="meta")
    assert [f.shape[1] for f in stage_outputs(encoder, images)] == stage_channels(encoder) == [64, 64, 128, 256, 512]
    assert net(images).shape == (1, 2, 64, 64)
    assert not any(m._forward_hooks for m in net.modules())


def test_token_decoder_learns_everywhere():
    decoder = TokenDecoder(16, 8, trunk=1, widths=(8,))
    out = decoder(torch.randn(2, 16, 3, 3))
    (out.embeddings.square().mean() + out.scores.sigmoid().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def remembered(limit=2e9):
    network = vit().eval()
    return Remembered(partial(encode, network, AttentionMaps(network, attention_maps, more=("token_cut",)).read, blocks=2), limit)


def test_memory_gives_the_same_numbers_whatever_it_knew_before():
    images = torch.randn(6, 3, 32, 32)
    cold, warm, full = remembered(), remembered(), remembered(limit=12_000)
    warm(images[:2]), warm(images[3:])
    for i in range(0, 6, 2):
        parts = [memory(images[i:i + 2]) for memory in (cold, warm, full)]
        assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(parts[0], parts[1]))
    repeated = [memory(images) for memory in (cold, cold, full, full)]
    assert all(torch.equal(a, b) for a, b in zip(repeated[0], repeated[1]))
    assert all(torch.equal(a, b) for a, b in zip(repeated[2], repeated[3]))
    assert 0 < full.bytes <= 12_000 and len(full.kept) < 6


def test_memory_of_a_picture_that_occurs_twice_in_a_batch():
    images = torch.randn(1, 3, 32, 32).expand(3, -1, -1, -1)
    memory = remembered()
    found = memory(images)
    assert torch.equal(found.patches[0], found.patches[2]) and len(memory.kept) == 1


def test_kept_rows_do_not_hold_whole_batches():
    memory = remembered()
    memory(torch.randn(8, 3, 32, 32))
    parts = [part for row in memory.kept.values() for part in row if part is not None]
    assert sum(part.untyped_storage().nbytes() for part in parts) == memory.bytes


def test_a_module_without_stages_is_a_clear_error():
    class Odd(nn.Module):
        body = nn.Identity()
    with pytest.raises(SettingsError, match="encoder of a U-Net"):
        UNet(Odd())
