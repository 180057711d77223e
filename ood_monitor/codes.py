"""Codes of warnings: what each says, what usually causes it, and what to do.

A warning ends with its code, as "[OOD101]". `ood-monitor guide OOD101` prints what stands here, and
`docs/warnings.md` is written from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["AREAS", "CODES", "Meaning", "meaning_of"]


@dataclass(frozen=True)
class Meaning:
    """What a warning means.

    Attributes:
        title: What it says, in a few words.
        cause: What it says and where it usually comes from, in a sentence or two.
        do: What to do now.
    """

    title: str
    cause: str
    do: str


#: By the first digit of a code: where its warning comes from.
AREAS: Mapping[str, str] = {
    "1": "Fitting and calibrating a detector",
    "2": "A detector and its model",
    "3": "A monitor and its stream",
    "4": "Alerts on their way to the sinks",
    "5": "Training: Lightning, the Hugging Face Trainer",
    "6": "Serving: diffusers",
    "7": "MLflow",
}

#: By code, in order.
CODES: Mapping[str, Meaning] = {
    "OOD101": Meaning(
        "Neighbouring calibration scores are correlated",
        "Held-out samples next to each other resemble each other, such as frames of one video or "
        "rows of one user. P-values and drift alarms assume exchangeable samples, so they may be "
        "wrong more often than promised.",
        "Shuffle the held-out data. If whole units repeat (videos, users), keep one sample of "
        "each, or calibrate on units.",
    ),
    "OOD102": Meaning(
        "Held-out samples are copies of others",
        "The same sample is in the held-out data more than once, so that the calibration looks "
        "larger than it is. Normal samples are then flagged more often than at `fpr`.",
        "Keep one of each. If samples of your stream repeat by nature, leave the copies and ignore "
        "the warning.",
    ),
    "OOD103": Meaning(
        "Held-out samples are left out: not finite",
        "The model gives NaN or an infinite value for these samples, or their input has one. The "
        "detector is fitted on the others.",
        "Look at the samples whose indices are named. If there are many, check the model's "
        "precision and how you scale its input.",
    ),
    "OOD104": Meaning(
        "Features are left out: not finite",
        "These features are NaN or infinite in more than one held-out sample of twenty, usually "
        "since the model computes in half precision. The detector does not watch them.",
        "Fit in float32 or bfloat16. If a whole layer overflows, look at its input.",
    ),
    "OOD105": Meaning(
        "Samples have no finite score",
        "The detector cannot score some of the samples that it is to be calibrated on. The "
        "calibration goes without them.",
        "Look for NaN, infinite values or values of another range in the data. If most samples are "
        "concerned, fit the detector again.",
    ),
    "OOD106": Meaning(
        "Parameters have no gradient",
        "The gradient of these parameters is zero for every held-out sample, so they are not "
        "watched. The likelihood does not use them, something multiplies them by zero, or the "
        "model keeps between calls what it has computed from them.",
        "Nothing, if the parameters are not part of the likelihood (such as a VAE's spare head). "
        "Else look for a cache, a `detach()` or a `torch.no_grad()` in the model.",
    ),
    "OOD107": Meaning(
        "Groups are too small to be calibrated alone",
        "A group needs a number of calibration samples that is named. Smaller ones are calibrated "
        "together, so that the rate of false flags is kept on their average, not in each.",
        "Give more held-out samples of these groups, or group more coarsely.",
    ),
    "OOD108": Meaning(
        "Groups can flag nothing at this rate",
        "With n calibration samples the smallest p-value is 1 / (n + 1). Where that is larger than "
        "`fpr`, no sample of the group is ever flagged.",
        "Give more calibration samples of these groups, or a larger `fpr=`.",
    ),
    "OOD109": Meaning(
        "The detector goes without one of its parts",
        "One part of the method could not be fitted, for the reason that is named. The others are "
        "used, and detection is usually weaker.",
        "Read the reason. With too few held-out samples, give more (docs/choosing.md says how "
        "many). With one value a sample, from a plain `log_prob`, give an adapter of the model "
        "itself, such as `LogLikelihood(flow)`, which tells its terms apart.",
    ),
    "OOD110": Meaning(
        "The detector cannot explain by layer",
        "At the fit the usual gradient norms by layer could not be kept, for the reason that is "
        "named. Scores, p-values and alerts are as good as ever.",
        "Nothing, if you do not use `explain(layers=True)`. Else mend the reason and fit again.",
    ),
    "OOD111": Meaning(
        "Images have values outside the range that they are shown in",
        "One feature is the size of a sample as a PNG file, for which the values have to be turned "
        "into colours. The adapter's `value_range` does not cover your data.",
        "Give the adapter the range of your images, such as `value_range=(-1, 1)`.",
    ),
    "OOD112": Meaning(
        "Expected norms leave out layers",
        "The inputs of these layers have no row for each position of a sequence. Padding could not "
        "be told from text in them, so they are not watched.",
        'Nothing, unless all layers are left out. Then use `method="gradient_norms"`.',
    ),
    "OOD113": Meaning(
        "Gradient norms are watched instead of a denoiser's output",
        "The default method looks at a denoiser's samples without noise. This denoiser cannot be "
        "run so, for the reason that is named. The detector takes gradient norms, which cost more.",
        'Nothing, if the cost is fine. Pass `method="gradient_norms"` to choose it yourself.',
    ),
    "OOD114": Meaning(
        "The fast path for gradients disagrees with the loop",
        "At the first batch the fast gradient norms are compared with a loop over samples. For "
        "these parameters they differ, usually since the model mixes samples or works on them in a "
        "way that hooks do not see. The loop is used: exact, but slower.",
        "Nothing, if it is fast enough. A small script with that module is welcome as an issue.",
    ),
    "OOD115": Meaning(
        "It is not known whether the padding token ends a text",
        "The model's configuration names no end token. Where texts end by the padding token, their "
        "end is taken for padding and is not scored.",
        "Pass `padding_is_end=True` if your texts end by this token, else `padding_is_end=False`.",
    ),
    "OOD201": Meaning(
        "Stale calibration: the model has other weights",
        "The detector was fitted on other weights, in another precision, or with other settings of "
        "the model. Its p-values and alarms promise nothing now.",
        "Fit the detector again on held-out data, or load the weights that it was fitted on.",
    ),
    "OOD202": Meaning(
        "The adapter has other arguments than at the fit",
        "An argument of the adapter, such as `bins=` or a noise level, changes the scores. The "
        "detector was fitted with another value.",
        "Build the adapter with the arguments that the warning names as those of the fit.",
    ),
    "OOD301": Meaning(
        "Samples could not be scored",
        "The model raised an error on them, or gave values that are not finite. They count as "
        "invalid, and no drift test counts them.",
        "Read the first error, which is named. Usual causes are another shape, another value range "
        "or NaN from a step before.",
    ),
    "OOD302": Meaning(
        "Samples of the stream resemble their neighbours",
        "Consecutive scores are correlated, as with frames of one video or requests of one user. "
        "Drift alarms then come more often than `ert` promises.",
        "Pass `thin=` to the monitor, or give it one sample of each independent unit.",
    ),
    "OOD303": Meaning(
        "A fork waited for another thread",
        "The process was forked while another thread was changing a monitor's state, and that did "
        "not end in time. In the child process this state may be incomplete.",
        "Start processes before you make a monitor, or use the start method `spawn`.",
    ),
    "OOD401": Meaning(
        "Alerts will not be delivered",
        "The monitor was closed, or its queue was full, before every sink had its alerts.",
        "Give the monitor a spool (`spool=`), which keeps alerts over a crash. Without one, "
        "`Dispatcher.undelivered` has the latest.",
    ),
    "OOD402": Meaning(
        "The spool is full",
        "A sink has been down for so long that the spool holds as many alerts to it as it may. "
        "Further alerts to this sink are counted and dropped.",
        "Mend the sink. The spool then delivers what it has, the oldest first.",
    ),
    "OOD403": Meaning(
        "The spool could not be written",
        "The disk is full, the folder is read-only, or a network file system is away. Alerts are "
        "still delivered, but a crash now would lose those under way.",
        "Free space or mend the folder. A line with the same code says when it works again.",
    ),
    "OOD404": Meaning(
        "The spool's file or folder was removed or replaced",
        "Something other than the monitor touched the spool while it was in use, such as a "
        "clean-up job or another machine.",
        "Nothing now: what is owed was written anew. Keep other programs out of the folder.",
    ),
    "OOD405": Meaning(
        "The spool owes alerts to a sink that is not there",
        "A sink of an earlier run has another name now, or was removed. Its alerts are kept for a "
        "while, then given up.",
        "Give the sink its old name (`name=`), or delete the spool's folder if nobody waits.",
    ),
    "OOD406": Meaning(
        "Lines of the spool could not be read",
        "The file was cut off by a crash, or damaged. The lines that can be read are used.",
        "Nothing, after a crash. The lines are kept beside the file if you want to look at them.",
    ),
    "OOD407": Meaning(
        "A sink failed",
        "The sink raised an error, or its thread was ended. The alert is tried again with growing "
        "pauses, and the monitor goes on. Further failures are counted, not logged.",
        "Read the error: a wrong address, a server that is down, credentials that ran out.",
    ),
    "OOD408": Meaning(
        "A sink refused an alert for good",
        "The receiver said that it will never take this alert, such as HTTP 400 or 401. It is not "
        "tried again.",
        "Check the address, the credentials and the format that the receiver expects.",
    ),
    "OOD409": Meaning(
        "A file is left out of the status page",
        "A file in the page's folder cannot be read, is too large or is not one of a stream.",
        "Delete it if it is none of yours; it is written again by its monitor if it is.",
    ),
    "OOD501": Meaning(
        "A batch could not be scored",
        "The model or its adapter raised an error on this batch, or gave values that are not "
        "finite. The training goes on, and the samples count as invalid.",
        "Read the error, which stands in the warning. `failures` of the callback counts them.",
    ),
    "OOD502": Meaning(
        "The callback is not calibrated and does not watch",
        "There is no detector for these weights: there are too few held-out samples, they could "
        "not be scored, or no fit came before.",
        "Give more validation data or `held_out=`, call `calibrate` of the callback, or pass a "
        "fitted `detector=`.",
    ),
    "OOD503": Meaning(
        "A stage that you asked for is not watched",
        "Detectors come with checkpoints, so that during a fit there is none that did not learn "
        "from the same evaluation data.",
        "Do what the warning names: give `held_out=` and how often to calibrate, or a fitted "
        "`detector=`, or run the stage after the fit.",
    ),
    "OOD504": Meaning(
        "Checkpoints have no detector",
        "By default the best checkpoint gets a detector, or the last one where no value is "
        "monitored. Others have none.",
        'Pass `calibrate="every checkpoint"`, or call `calibrate` for a model that you load.',
    ),
    "OOD505": Meaning(
        "The detector in a checkpoint could not be read or written",
        "The checkpoint is of another version, was cut off or could not be written, or a value "
        "cannot be stored without pickle. The training's own checkpoint is not touched.",
        "Read the error. A detector can be made again by `calibrate` of the callback.",
    ),
    "OOD506": Meaning(
        "A logger could not be reached",
        "A figure, an image or an alert did not reach a logger or MLflow. The others have it.",
        "Check the logger's address and credentials. Alerts also stand in `callback.alerts`.",
    ),
    "OOD507": Meaning(
        "Calibration data are not held out",
        "The same samples train the model, or calibrate and are scored. P-values then say nothing "
        "of new data.",
        "Give data that the model never saw as `held_out=`.",
    ),
    "OOD508": Meaning(
        "Samples cannot be numbered as in the dataset",
        "The loader draws or reorders samples in a way that does not tell their index.",
        "Nothing, if you do not need `dataset_index`. Else use a loader with a plain sampler.",
    ),
    "OOD509": Meaning(
        "The results of a stage could not be written",
        "An error came when scores were put beside predictions or a stage was finished. The "
        "predictions themselves are as they would be without the callback.",
        "Read the error; a full disk is the most frequent one.",
    ),
    "OOD510": Meaning(
        "The training stream could not be resumed",
        "What the checkpoint holds of the training's gradients cannot be read, so watching the "
        "training begins anew.",
        "Nothing; a new baseline is learned from the next steps.",
    ),
    "OOD511": Meaning(
        "Another callback waits for a metric that is not logged",
        "A checkpoint, an early stopping or a scheduler monitors a metric of this callback that no "
        "stage will write.",
        "Read what is missing in the warning: usually a stage in `watch=` or a held-out set.",
    ),
    "OOD512": Meaning(
        "The gradient of a training batch is unusual",
        "The norms of this batch's gradient are far from those of the batches before. It is a "
        "heuristic, without a promised rate.",
        "Look at the batch, whose number is named: damaged samples, wrong labels, a new shard.",
    ),
    "OOD513": Meaning(
        "The detector was fitted in another process",
        "A strategy that launches processes has fitted it there. The next stage watches with it, "
        "and checkpoints hold it, but here it is only a state.",
        "Nothing, for watching. To have the object call `Detector.from_state_dict(...)` as the "
        "warning shows.",
    ),
    "OOD514": Meaning(
        "The variable for watching without a change of code names no detector",
        "The folder that the environment variable names has no `config.json`. Nothing is watched.",
        "Set it to the folder of `detector.save(...)`, as an absolute path.",
    ),
    "OOD515": Meaning(
        "Samples without a trained token are left out",
        "Every label after their first token is -100, so that the model's loss says nothing of "
        "them.",
        "Nothing, if you mask them on purpose. Else check the collator and the longest length.",
    ),
    "OOD601": Meaning(
        "A call is unlike those of the fit",
        "The call's settings, such as the number of steps or the guidance, change what the "
        "pipeline generates. The detector was fitted on others.",
        "Call the pipeline as at the fit, or fit with `call=` as you call it now.",
    ),
    "OOD602": Meaning(
        "A size or an adapter that the detector was not fitted on",
        "Samples of another size, or made with other LoRA weights, are counted but not scored.",
        "Fit with enough samples of it.",
    ),
    "OOD603": Meaning(
        "A call is shorter than the budget was planned for",
        "With fewer steps, scoring takes a larger share of the call's time than `max_overhead`.",
        "Fit with a `call=` that has as few steps, or lower `sample_rate=`.",
    ),
    "OOD604": Meaning(
        "A call was not scored",
        "Scoring raised an error. The call's images are returned as they are.",
        "Read the error. `pipe.ood_monitor.failures` counts each kind.",
    ),
    "OOD605": Meaning(
        "The budget takes something from the detector",
        "To stay within `max_overhead=` fewer levels or fewer samples are scored, or later.",
        "Nothing, if what is given up is fine. Else raise `max_overhead=`.",
    ),
    "OOD606": Meaning(
        "A task in the background failed",
        "An error came in the thread that scores in the background. The thread goes on.",
        "Read the error that is logged with it; please report it, since tasks should tell their "
        "own.",
    ),
    "OOD701": Meaning(
        "The note of an MLflow run has no room",
        "The run's description is as long as MLflow allows, so the alert is not added to it. Its "
        "tags and files are written as ever.",
        "Shorten the description of the run.",
    ),
    "OOD702": Meaning(
        "A scored call was not traced",
        "MLflow's tracing raised an error. The call and its scores are not touched.",
        "Check the tracking address, or turn tracing off.",
    ),
}


def meaning_of(code: str) -> Meaning:
    """What a code stands for.

    Raises:
        ValueError: There is no such code.
    """
    if code not in CODES:
        raise ValueError(
            f"Expected code to be one at the end of a warning, such as 'OOD101', got {code!r}: "
            "docs/warnings.md lists all."
        )
    return CODES[code]
