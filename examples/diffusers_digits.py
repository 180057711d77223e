"""A diffusers pipeline watched in a loop: what it draws stops being digits, and an alert says so.

A small pipeline learns scikit-learn's handwritten digits (8x8, in the package); a detector is
fitted on what it draws when all is well, since a model's samples are not quite its training data.
Then it serves calls, until a deployment sets the number of steps to 2: images still come, and look
like nothing. Exits with 0 if the alarm came, and not before. About three minutes.

    python examples/diffusers_digits.py
"""

import sys

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from ood_monitor_integrations.diffusers import fit_pipeline, monitor_pipeline, plan_costs
from sklearn.datasets import load_digits
from torch import Tensor

import ood_monitor as om

#: The end of the network: it tells as much, for less.
END = ["up_blocks.*", "conv_norm_out.*", "conv_out.*"]

CALLS, BATCH = 6, 16


def main() -> int:
    torch.set_num_threads(1)  # images of 8x8: threads cost more than they bring
    torch.manual_seed(0)
    digits = torch.tensor(load_digits().images / 16, dtype=torch.float32).unsqueeze(1)
    pipe = trained(digits)
    for plan in plan_costs(pipe, call={"output_type": "np"}, layers=[None, END]):
        print(
            f"{plan.method} {plan.levels}, {'the end' if plan.layers else 'all layers'}: "
            f"{plan.milliseconds:.0f} ms a sample, {plan.forwards:.1f} forward passes"
        )
    usual = {"num_inference_steps": 50, "output_type": "np"}
    detector = fit_pipeline(pipe, call=usual, layers=END, samples=480)
    monitor = om.Monitor(detector, ert=1_000, fpr=0.01, sinks=[om.LoggingSink()], name="digits")
    with monitor_pipeline(pipe, monitor) as watched:
        before = serve(watched, steps=50)
        after = serve(watched, steps=2)
        print(watched.ood_monitor.counts)
    print(f"Alerts of 50 steps: {before}; of 2 steps: {after}.")
    return 0 if "drift" in after and "drift" not in before else 1


def trained(images: Tensor, steps: int = 800) -> DDPMPipeline:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    for _ in range(steps):
        x = 2 * images[torch.randint(len(images), (64,))] - 1
        noise, t = torch.randn_like(x), torch.randint(1000, (len(x),))
        loss = F.mse_loss(unet(scheduler.add_noise(x, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pipe = DDPMPipeline(unet.eval(), DDIMScheduler.from_config(scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def serve(pipe: DDPMPipeline, steps: int) -> list[str]:
    """The kinds of alerts that a number of calls raised."""
    known = len(pipe.ood_monitor.alerts)
    for seed in range(CALLS):
        generator = torch.Generator().manual_seed(seed)
        output = pipe(BATCH, generator=generator, num_inference_steps=steps)
        p_values = output.ood.p_value
        print(f"{steps} steps: median p-value {p_values.median():.3f}, least {p_values.min():.3f}")
    return [alert.kind for alert in list(pipe.ood_monitor.alerts)[known:]]


if __name__ == "__main__":
    sys.exit(main())
