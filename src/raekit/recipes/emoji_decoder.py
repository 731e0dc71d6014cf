"""Stage 1 on the built-in emoji: a small decoder for builtin:vit-tiny, L1 only.

Reproduces:     src/raekit/assets/emoji/autoencoder (4.8 M parameters, seed 0), with LPIPS and a continuation as below
Command:        raekit train emoji_decoder --train.compile
                for the built-in decoder, add --perceptual.weights FILE --perceptual.weight 0.3
                --perceptual.start 1500, continue as below, then python tools/make_builtin.py autoencoder RUN
Size:           4.8 M parameters
Memory:         0.2 GiB
Cost:           about 75 minutes on one CPU core
Last verified:  2026-11-27. Held-out images at step 1,759: PSNR 29.1 dB, SSIM 0.94, and a Frechet distance to real
                images in VGG16 of 54.6. After the continuation on one core: 27.6 dB, 0.91, 48.5. After that on the
                H200: 30.9 dB, 0.95, 29.2. The earlier built-in decoder of 4 x 4 tokens had 22.3 dB and 0.78.

The 75 minutes are of one core of a busy machine (25 images/s, with LPIPS 5). The continuations took 2.5 hours on one
core, and 6.5 minutes on an H200 that four other processes used (2,300 images/s).

The built-in decoder continues from step 1,759 with LPIPS of weight 1 in every step. On one core it was continued three
times with --init-from, batches of 32 and a cosine schedule: 1,300 steps with noise 0.5, then about 200 steps (of a
schedule of 850) and 1,000 steps with noise 0.4. The learning rates start at 6e-4, 5e-4 and 5e-4. A discriminator on
builtin:vit-tiny was trained next to the 200 steps, but never learned to tell reconstructions from images, so it was
left out of the loss. On the H200 it was continued for 4,858 steps in bf16:

    raekit train emoji_decoder --init-from RUN --perceptual.weights FILE --train.batch-size 128 --data.flip \
        --train.steps 4858 --optim.decay-end 4858 --optim.warmup-steps 300 --ema 0.999 --train.compile

FILE has the weights of VGG16. LPIPS starts late, because at this size its VGG16 takes more time than all other parts
together. The latents are the mean of the encoder's first and last block. A linear map predicts the pixels of a patch
from such a token with 25.4 dB, and from a token of the last block with 24.2 dB. The class accuracy is nearly the same.
"""

from raekit.data.loader import DataConfig
from raekit.models.registry import LayersConfig
from raekit.stages.reconstruction import DecoderSize, ReconstructionConfig
from raekit.stages.watch import HeldoutConfig, PicturesConfig
from raekit.training.optim import OptimConfig
from raekit.training.trainer import TrainConfig

STEPS = 2000


def config() -> ReconstructionConfig:
    return ReconstructionConfig(
        data=DataConfig(source="emoji", image_size=64),
        encoder="builtin:vit-tiny",
        layers=LayersConfig(blocks=(0, 5)),
        decoder=DecoderSize(width=256, depth=6, heads=4, hidden=1024, patch_size=8),
        # Less than the published 0.8, because a token has only 192 channels.
        noise=0.2,
        train=TrainConfig(steps=STEPS, batch_size=32, checkpoint_every=100, ema_warmup=True),
        optim=OptimConfig(
            lr=1e-3,
            final_lr=2e-5,
            warmup_steps=100,
            warmup_from_zero=True,
            decay="cosine",
            decay_end=STEPS,
        ),
        ema=(0.99,),
        samples=PicturesConfig(every=500),
        heldout=HeldoutConfig(every=500),
    )
