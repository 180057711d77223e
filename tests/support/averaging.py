"""Lightning's averaging of weights, which releases before 2.6 do not have."""

from typing import Any

from pytorch_lightning import callbacks

EMAWeightAveraging: Any = getattr(callbacks, "EMAWeightAveraging", None)
