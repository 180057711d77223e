"""What `make test-floor` and `make test-floor-torch` leave out: what old releases do not have.

Nothing of ours is named here: where a test of our own code fails with an old release, the code is
mended or the lower bound is raised.
"""

import re
from collections.abc import Iterable

import pytest
import torch

#: Why a test is left out, by a pattern of its id.
LEFT_OUT = {
    r"tests/integrations/transformers/": "the Trainer's callback takes transformers 5",
    r"test_cases\.py.*\[(z-image|flux2|qwen-image-21|nucleus-moe|kandinsky5)": "diffusers has no "
    "such pipeline before 0.36",
    r"test_cases\.py.*\[qwen-image\]": "diffusers 0.35 itself fails with prompts of two lengths",
    r"test_deployment\.py.*\[.*(taylor seer|magnitudes)": "diffusers has no such cache before 0.36",
    r"test_a_block_watches_a_modular_pipeline": "modular pipelines are others before 0.36",
    r"group offloading|test_offloaded_models_are_watched_forward\[group": "diffusers offloads by "
    "groups on an accelerator alone before 0.36",
    r"test_padding\.py.*\[mpt\]": "transformers 4.57's MPT overflows with a mask in half precision",
    r"test_equal_to_gradients_of_single_samples\[gpt2": "transformers 4.57's attention is written "
    "otherwise, and takes the loop: exact, and slower",
    r"averaged[ -]weights|\[ema": "Lightning averages by EMAWeightAveraging since 2.6",
    r"\[RichProgressBar\]": "Lightning 2.5's bar fails with today's rich",
    r"test_an_old_file_store_is_explained": "MLflow takes file stores before 3.5",
    r"mlflow/test_traces\.py": "`mlflow.search_traces` takes no `locations` before 3.4",
    r"\[ICO\]": "Pillow 10 writes no such file",
}

#: The same of torch 2.6, which `make test-floor-torch` alone installs.
LEFT_OUT_OF_TORCH = {
    r"test_parameters_that_are_written_need_no_loop\[rows\]": "torch 2.6 itself fails at a mask of "
    "two dimensions beside a number",
}


def leave_out(items: Iterable[pytest.Item]) -> None:
    """Mark what is left out as skipped, with the reason."""
    is_old = torch.__version__.startswith("2.6.")
    left_out = LEFT_OUT | (LEFT_OUT_OF_TORCH if is_old else {})
    for item in items:
        for pattern, reason in left_out.items():
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.skip(reason=reason))
