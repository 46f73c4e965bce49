"""timm: the smallest model of each family, at its own input size or a smaller one that it takes, random weights."""

from __future__ import annotations

from torch import nn

from benchmarks.suites.case import Case
from benchmarks.suites.zoo import images

# input size in pixels -> models
FAMILIES = {
    96: """
        gemma4_vit_167m
    """,
    126: """
        deepseek_vit_412m
    """,
    128: """
        caformer_s18 convformer_s18 convmixer_768_32 convnext_zepto_rms convnextv2_atto cpubone_nano
        cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny densenet121 dla46x_c dpn48b ecaresnet26t
        edgenext_xx_small efficientnet_lite0 efficientnetv2_rw_t efficientvim_m1 efficientvit_b0
        ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 focalnet_tiny_srf gcresnext26ts ghostnet_050
        ghostnetv3_050 hardcorenas_b hgnet_tiny hrnet_w18_small iformer_t inception_next_atto
        inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t lcnet_035 lcnetv2_small
        legacy_seresnet18 legacy_xception lowformer_b0 mambaout_femto mixnet_s mnasnet_small
        mobilenetv2_035 mobilenetv3_small_050 mobilenetv5_base mobileone_s1 mobilevit_xxs
        mobilevitv2_050 naflexvit_base_patch16_parfac_gap nasnetalarge nextvit_small nf_regnet_b0
        nfnet_l0 pnasnet5large poolformer_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnety_002
        regnetz_b16 repghostnet_050 repvgg_a0 repvit_m1 res2next50 resnest14d resnet10t resnetblur18
        resnetv2_18 resnext50_32x4d rexnet_100 selecsls42 seresnet18 shvit_s1 skresnet18
        starnet_s050 tiny_vit_5m_224 tinynet_e tresnet_m vgg11 xception41p
    """,
    224: """
        beit3_base_patch16_224 beit_base_patch16_224 cait_xxs24_224 coat_tiny coatnet_pico_rw_224
        convit_tiny deit_tiny_patch16_224 efficientformer_l1 efficientformerv2_s0 efficientvit_m0
        eva02_tiny_patch14_224 gcvit_xxtiny gmixer_12_224 gmlp_ti16_224 hiera_tiny_224 levit_128s
        mixer_s16_224 mvitv2_tiny nest_tiny pit_ti_224 resmlp_12_224 sam2_hiera_tiny
        samvit_base_patch16_224 sequencer2d_s swiftformer_xs swin_tiny_patch4_window7_224
        swinv2_cr_tiny_224 tnt_s_legacy_patch16_224 twins_svt_small visformer_tiny
        vit_srelpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224
        volo_d1_224 xcit_nano_12_p8_224
    """,
    240: """
        crossvit_tiny_240 flexivit_small
    """,
    256: """
        bat_resnext26ts botnet26t_256 halonet_h1 maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256
        swinv2_tiny_window8_256
    """,
}


def _case(name: str, size: int) -> Case:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return Case("timm", name, make, images(size))


CASES = [_case(name, size) for size, names in FAMILIES.items() for name in sorted(names.split())]
